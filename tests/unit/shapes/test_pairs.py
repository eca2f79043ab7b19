"""GenRef's pairs of the shapes world, and questions about its pictures."""

import io
import json
from collections import Counter
from random import Random

import numpy as np
import pytest
from PIL import Image

from rflow_jax.data.records import SUBSETS
from rflow_jax.data.sources.tar import open_tars
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.errors import InputError
from rflow_jax.shapes import drawn
from rflow_jax.shapes.drawn import DrawnPictures
from rflow_jax.shapes.edits import spoil
from rflow_jax.shapes.grammar import is_held_out, parse, sample_prompt
from rflow_jax.shapes.judge import judge, read
from rflow_jax.shapes.pairs import DrawJob, PairsOfShapesConfig, make_pairs, write_pairs
from rflow_jax.shapes.questions import QuestionsConfig, ask, content, write_questions
from rflow_jax.shapes.render import render
from rflow_jax.shapes.requirements import CONTENT, requirements
from rflow_jax.shapes.scenes import judge_scene, make_scene
from rflow_jax.verifiers.findings import KEEP


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


def pictures_of(seed, right, count, first=0):
    """Pictures as a model might have drawn them, a share of them right."""
    rng = Random(seed)
    prompts = [sample_prompt(rng) for _ in range(count)]
    scenes = [make_scene(prompt, rng) for prompt in prompts]
    scenes = [
        scene if rng.random() < right else spoil(scene, prompt, rng)
        for scene, prompt in zip(scenes, prompts, strict=True)
    ]
    return DrawnPictures(seed, first, prompts, np.stack([np.asarray(render(scene)) for scene in scenes]))


@pytest.fixture
def model(monkeypatch):
    """Stands for a model that draws half of its pictures right; tells how many were drawn."""
    drew = []

    def draw(config, limit):
        for first in range(0, limit, 32):
            drew.append(32)
            yield pictures_of(first, 0.5, 32, first)

    for module in ("pairs", "questions"):
        monkeypatch.setattr(f"rflow_jax.shapes.{module}.draw_pictures", draw)
    return drew


def test_pairs_are_genrefs(model, tmp_path):
    config = PairsOfShapesConfig(str(tmp_path / "out"), records=60, shard=25, workers=0)
    counts = write_pairs(config)
    assert counts == {"general": 9, "length": 9, "rule": 24, "editing": 18} == config.counts
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000.tar", "001.tar", "002.tar"]
    source = open_tars(str(tmp_path / "out"), cache=tmp_path / "cache", retry=RetryPolicy())
    assert source.counts == counts
    for subset in SUBSETS:
        for index in range(counts[subset]):
            record = source.read(subset, index)
            prompt, good, bad = parse(record.prompt), pixels(record.good_image), pixels(record.bad_image)
            assert not is_held_out(prompt)
            assert judge(prompt, good).correct
            assert judge(prompt, bad).correct == (subset == "general") == (record.reflection == KEEP)
            if subset == "general":
                np.testing.assert_array_equal(good, bad)
            if subset in ("general", "rule"):
                assert record.reflection.count(".") <= 2


def test_a_pair_depends_on_its_number_alone():
    jobs = [DrawJob(3, "editing", numbers) for numbers in (range(4), range(2, 4))]
    whole, half = map(make_pairs, jobs)
    assert whole[2:] == half
    assert make_pairs(DrawJob(4, "editing", range(4))) != whole


def test_what_is_not_edited_stays():
    """An edit of one thing leaves most of a picture as it is."""
    records = make_pairs(DrawJob(0, "editing", range(20)))
    changed = [np.any(pixels(r.good_image) != pixels(r.bad_image), axis=-1).mean() for r in records]
    assert min(changed) > 0
    assert max(changed) < 0.35


def test_a_model_that_is_always_right_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("rflow_jax.shapes.pairs.draw_pictures", lambda config, limit: [pictures_of(0, 1.0, 8)])
    config = PairsOfShapesConfig(str(tmp_path / "out"), records=20, workers=0)
    with pytest.raises(InputError, match="its pictures gave only 0 of 8 rule pairs; is it trained"):
        write_pairs(config)
    assert not (tmp_path / "out").exists()


def test_folders_that_contain_something_are_kept(model, tmp_path):
    (tmp_path / "file").write_text("x")
    for write, config in ((write_pairs, PairsOfShapesConfig), (write_questions, QuestionsConfig)):
        with pytest.raises(InputError, match="contains something; name a new folder"):
            write(config(str(tmp_path), workers=0))
    assert not model


def test_questions_have_true_answers(model, tmp_path):
    config = QuestionsConfig(str(tmp_path / "out"), pictures=64, drawn=16, questions=3, held_out=10, workers=0)
    counts = write_questions(config)
    assert counts[0] == 54
    assert sum(model) == 32
    texts = [(tmp_path / "out" / name).read_text() for name in ("chats.jsonl", "held_out.jsonl")]
    training, tests = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert counts == (len(training), len(tests))
    images = [{line["images"][0] for line in part} for part in (training, tests)]
    assert not images[0] & images[1]
    assert len(images[0] | images[1]) == 64
    assert {len(line["messages"]) for line in tests} == {2}
    answers: Counter[str] = Counter()
    for line in [*training[:30], *tests]:
        scene = read(pixels((tmp_path / "out" / line["images"][0]).read_bytes()))
        said = [message["content"].removeprefix("<image>") for message in line["messages"]]
        turns = dict(zip(said[::2], said[1::2], strict=True))
        assert len(turns) == len(said) / 2  # no question twice
        if len(turns) > 1:
            assert turns.pop(CONTENT) == content(scene)
        answers.update(turns.values())
        for question, answer in turns.items():
            (part,) = [part for prompt in about(question) for part in requirements(prompt) if part.question == question]
            assert judge_scene(part.metadata, scene).correct == (answer == "yes")
    assert set(answers) == {"yes", "no"}
    assert 0.35 < answers["yes"] / answers.total() < 0.65


def about(question):
    """A prompt that the question is about."""
    words = question.rstrip("?").split()
    if words[0] == "Are":
        return [parse(" ".join(words[4:]))]
    if words[1] == "there":
        return [parse(f"{words[2]} {words[3]}")]
    if len(words) == 4:
        return [parse(f"a {words[3]} {words[2]}".replace("a orange", "an orange"))]
    relation = " ".join(words[3:-2])
    return [parse(f"a {words[2]} {relation} a {words[-1]}")]


def test_questions_make_sense():
    """None is about the color or the place of what is not there."""
    rng = Random(0)
    for _ in range(200):
        prompt = sample_prompt(rng)
        scene = spoil(make_scene(prompt, rng), prompt, rng)
        question, _ = ask(prompt, scene, rng)
        shapes = {item.shape for item in scene.items}
        words = question.rstrip("?").split()
        if words[:2] == ["Is", "the"]:
            assert words[2] in shapes
            assert len(words) == 4 or words[-1] in shapes


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"seed": -1}, {"records": 0}, {"dtype": "float"}])
def test_settings_that_are_not_usable(options, tmp_path):
    with pytest.raises(InputError, match=next(iter(options))):
        PairsOfShapesConfig(str(tmp_path), **options)


def test_pictures_come_in_batches(monkeypatch):
    """Each prompt and picture as the numbers say, whatever the batch."""

    class Pipe:
        def generate(self, prompts, seeds, settings):
            assert settings.batch_size == len(prompts) == 3
            return [np.full((96, 96, 3), seed[1], np.uint8) for seed in seeds]

    monkeypatch.setattr("rflow_jax.generation.pipeline.load_pipeline", lambda model, dtype: Pipe())
    batches = list(drawn.draw_pictures(PairsOfShapesConfig("out", batch_size=3), 7))
    assert [batch.first for batch in batches] == [0, 3, 6]
    cases = [case for batch in batches for case in batch.cases()]
    assert [int(picture[0, 0, 0]) for _, picture, _ in cases] == list(range(9))
    assert not any(is_held_out(prompt) for prompt, *_ in cases)
    assert len({rng.random() for *_, rng in cases}) == 9
