"""The verifier that asks about each part of a prompt, and the writer that reads what it found."""

from dataclasses import replace
from pathlib import Path
from random import Random

import jax
import numpy as np
import pytest
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.shapes.grammar import parse, sample_prompt
from rflow_jax.shapes.vision_language import write_start
from rflow_jax.verifiers import VERIFIERS, make_verifier
from rflow_jax.verifiers.base import Verifier
from rflow_jax.verifiers.checklist import ChecklistVerifier
from rflow_jax.verifiers.findings import Finding, Question, in_words, remedies_in
from rflow_jax.vlm.config import QwenChatConfig
from rflow_jax.vlm.qwen_chat import ChatQuery, QwenChat
from rflow_jax.writers import REFLECTION_PROMPT, WRITERS, make_text_generator
from rflow_jax.writers.base import WriterInput

TWO = (Question("Is there a star?", "Add a star."), Question("Is the star red?", "Make the star red.", (0,)))
PICTURES = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (56, 56, 3), np.uint8), "RGB") for k in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that knows the words, and nothing else."""
    path = tmp_path_factory.mktemp("checklist") / "model"
    write_start(path)
    return path


def config(path, **options):
    return VERIFIERS.parse({"name": "checklist", "model": str(path), "dtype": "float32", "batch_size": 4} | options)


@pytest.fixture(scope="module")
def verifier(model):
    with jax.default_matmul_precision("highest"):
        yield make_verifier(config(model))


def test_first_tokens_are_those_that_an_answer_begins_with(golden):
    base = str(golden / "qwen" / "base")
    chat = QwenChat(QwenChatConfig(base, dtype="float32", batch_size=2, max_new_tokens=1))
    vocabulary = chat.prepare.tokenizer.vocabulary
    questions = [ChatQuery(None, (picture, f"What is it, {k}?")) for k, picture in enumerate(PICTURES)]
    questions.insert(1, ChatQuery(None, ("<|im_end|>",)))
    found = chat.first_tokens(questions, list(vocabulary.values()))
    assert isinstance(found.pop(1), InputError)
    answers = chat.answer(questions)
    answers.pop(1)
    by_id = {number: k for k, number in enumerate(vocabulary.values())}
    for likely, answer in zip(found, answers, strict=True):
        assert 0.9 < np.exp(likely).sum() < 1  # the network has a few more tokens than the tokenizer
        best = list(vocabulary.values())[int(likely.argmax())]
        assert chat.prepare.tokenizer.decode(np.asarray([best])) == answer
        assert by_id[best] == likely.argmax()


def test_the_score_is_the_share_of_yes(verifier, monkeypatch):
    assert isinstance(verifier, Verifier)
    tokens = np.asarray(verifier._is_yes)
    answers = [0.9, 0.2, 0.8, 0.8, 0.9, 0.1, 0.7]

    def first_tokens(queries, ids):
        assert [query.parts[1] for query in queries][:3] == ["Is there a star?", "Is the star red?", "Is there a ring?"]
        assert len(queries) == len(answers)
        return [np.log(np.where(tokens, p / tokens.sum(), (1 - p) / (~tokens).sum())) for p in answers]

    monkeypatch.setattr(verifier._chat, "first_tokens", first_tokens)
    texts = ("a photo of a red star", "a photo of a ring", "a photo of a dog", "a red star left of a blue moon")
    answers = [0.9, 0.2, 0.8, 0.1, 0.8, 0.9, 0.7, 0.6]
    verdicts = verifier.score([PICTURES[0]] * 4, [{"prompt": text} for text in texts])
    assert [verdict.score for verdict in verdicts] == [0.5, 1.0, None, 0.4]
    assert "unknown words: dog" in verdicts[2].error
    assert verdicts[0].explanation == "yes: Is there a star?\nno: Is the star red? Make the star red."
    assert verdicts[0].raw == {"Is there a star?": 0.9, "Is the star red?": 0.2}
    # Nothing is said of the color of a star that is not there, nor of where it stands; neither is met.
    assert verdicts[3].explanation.splitlines() == [
        "no: Is there a star? Add a red star.",
        "yes: Is there a moon?",
        "yes: Is the star red?",
        "yes: Is the moon blue?",
        "yes: Is the star left of the moon?",
    ]


def test_a_verdict_depends_on_its_image_alone(verifier):
    rng = Random(0)
    items = [sample_prompt(rng).metadata for _ in PICTURES]
    together = verifier.score(PICTURES, items)
    assert all(verdict.scored for verdict in together)
    for verdict, picture, item in zip(together, PICTURES, items, strict=True):
        (alone,) = verifier.score([picture], [item])
        assert alone.score == verdict.score
        np.testing.assert_allclose(list(alone.raw.values()), list(verdict.raw.values()), atol=2e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": "colours"}, "questions is 'colours': give shapes, or package.module:function"),
        ({"questions": "json:nothing"}, "questions is 'json:nothing'"),
        ({"model": "nowhere/at-all"}, "nowhere/at-all"),
    ],
)
def test_what_cannot_be_used_is_told(model, options, message):
    with pytest.raises(InputError, match=message):
        ChecklistVerifier(config(model, **options))


def test_a_tokenizer_without_yes_and_no(golden):
    with pytest.raises(InputError, match="its tokenizer has no single tokens for yes and no"):
        ChecklistVerifier(config(golden / "qwen" / "base"))


def test_closed_verifiers_score_nothing(model):
    verifier = ChecklistVerifier(config(model))
    verifier.close()
    (verdict,) = verifier.score(PICTURES[:1], [parse("a star").metadata])
    assert verdict.score is None
    assert "closed" in verdict.error or "ended" in verdict.error


def findings(*met):
    return [Finding(question, yes, float(yes)) for question, yes in zip(TWO, met, strict=True)]


@pytest.mark.parametrize(
    ("met", "said"),
    [
        ((True, True), "Keep everything."),
        ((True, False), "Make the star red."),
        ((False, False), "Add a star."),
        ((False, True), "Add a star."),
    ],
)
def test_rules_put_findings_into_words(met, said):
    writer = make_text_generator(WRITERS.parse({"name": "rules"}), REFLECTION_PROMPT)
    text = in_words(findings(*met))
    for evaluation in (text, f"Overall: 0.5\n{text}", f"member checklist:\n  {text.replace(chr(10), chr(10) + '  ')}"):
        case = WriterInput(PICTURES[0], "a red star", "a red star", evaluation)
        assert [written.text for written in writer.write([case, case])] == [said, said]


def test_rules_say_at_most_so_many_sentences():
    evaluation = "".join(f"no: Is it {k}? Do {k}.\n" for k in range(3))
    for sentences, said in ((1, "Do 0."), (2, "Do 0. Do 1."), (5, "Do 0. Do 1. Do 2.")):
        writer = make_text_generator(WRITERS.parse({"name": "rules", "sentences": sentences}), Path("unused"))
        case = WriterInput(PICTURES[0], "p", "p", evaluation)
        assert writer.write([case])[0].text == said
    with pytest.raises(InputError, match="sentences is 0: give a whole number from 1"):
        WRITERS.parse({"name": "rules", "sentences": 0})


def test_rules_need_findings():
    writer = make_text_generator(WRITERS.parse({"name": "rules"}), REFLECTION_PROMPT)
    case = WriterInput(PICTURES[0], "p", "p", "Overall: yes, 0.5\nThe picture is nice. Is it? Yes: it is.")
    (written,) = writer.write([case])
    assert written.text is None
    assert "verifier: checklist" in written.error
    assert writer.write([replace(case, evaluation="yes: Is it?")])[0].text == "Keep everything."
    assert remedies_in("") is None
