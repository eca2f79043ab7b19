"""Reading grades strictly, whatever a model wrote around them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.openai_client import Answer, UnusableAnswer
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.verifiers.config import OpenAIVerifierConfig
from rflow_jax.verifiers.openai import OpenAIVerifier
from tests.kit.asking import pictures, prompt_folder

MARK = {"reason": "so", "score": 7.5}
GRADES = {"sharpness": MARK, "overall": {"reason": "on the whole", "score": 4}}


@pytest.fixture(scope="module")
def parse(tmp_path_factory):
    """What the verifier makes of an answer's text."""
    folder = prompt_folder(tmp_path_factory.mktemp("prompts"))
    meter = UsageTracker()
    verifier = OpenAIVerifier(OpenAIVerifierConfig(base_url="http://localhost", prompts=folder), meter)
    asked = verifier.question(pictures(1)[0], {"prompt": "x"})
    verifier.close()

    def parsed(text):
        return asked.parse(Answer(text))

    parsed.meter = meter
    return parsed


@pytest.mark.parametrize(
    "around", ["{}", "```json\n{}\n```", "Here:\n{}\nI hope this helps [1].", "  {}\n\n", "[{}]", "\ufeff{}"]
)
def test_prose_and_fences_around_the_object_are_put_up_with(parse, around):
    verdict = parse(around.replace("{}", json.dumps(GRADES)))
    assert verdict.score == 4
    assert verdict.explanation == "sharpness (7.5/10): so\noverall (4/10): on the whole"


def test_a_lone_surrogate_goes_no_further(parse):
    verdict = parse(json.dumps(GRADES).replace("whole", "\\ud800"))
    assert verdict.explanation.encode().endswith(b"on the ?")
    assert json.dumps(verdict.raw, ensure_ascii=False).encode()


def test_more_than_was_asked_for_is_put_up_with(parse):
    more = {"note": None, "overall": GRADES["overall"] | {"sure": True}}
    assert parse(json.dumps(GRADES | more)).raw == GRADES


@pytest.mark.parametrize(
    ("score", "number"),
    [
        ("7", 7),
        ("7/10", 7),
        (" 7.5 / 10 ", 7.5),
        ("10", 10),
        ("10.0/10.0", 10),
        ("7 out of 10", 7),
        ([7], 7),
        (["7"], 7),
    ],
)
def test_a_number_in_quotation_marks_is_a_number(parse, score, number):
    assert parse(json.dumps(GRADES | {"overall": {"reason": "x", "score": score}})).score == number


SHARP = {"sharpness": MARK}
CONVERTED = {
    "a number": {**SHARP, "overall": 7},
    "a text": {**SHARP, "overall": "7/10"},
    "no reason": {**SHARP, "overall": {"score": 7}},
    "null as reason": {**SHARP, "overall": {"reason": None, "score": 7}},
    "another case": {"Sharpness": {"Reason": "so", "SCORE": 7.5}, "OVERALL": {"Score": 7}},
    "lists of one": {"sharpness": [MARK], "overall": [{"reason": [""], "score": [7]}]},
    "a list of one": [{**SHARP, "overall": {"reason": "", "score": 7}}],
    "an object around it": {"grades": {**SHARP, "overall": {"reason": "", "score": 7.0}}},
}


@pytest.mark.parametrize("name", CONVERTED)
def test_what_can_only_mean_one_thing_is_converted_and_counted(parse, name):
    before = parse.meter.snapshot().converted
    verdict = parse(json.dumps(CONVERTED[name]))
    assert verdict.score == 7
    assert verdict.explanation == "sharpness (7.5/10): so\noverall (7/10)"
    came = CONVERTED[name]
    assert verdict.raw == (came[0] if isinstance(came, list) else came)
    assert parse.meter.snapshot().converted == before + 1


def test_what_was_asked_for_is_not_converted(parse):
    before = parse.meter.snapshot().converted
    parse(json.dumps(GRADES | {"overall": {"reason": "", "score": 7.0}}))
    assert parse.meter.snapshot().converted == before


REFUSED = {
    "nothing": "",
    "prose": "It is a 7.",
    "list": "[1, 2]",
    "cut": json.dumps(GRADES)[:-3],
    "cut, whole inside": '{"result": ' + json.dumps(GRADES),
    "two": json.dumps(GRADES) + "\n" + json.dumps(GRADES),
    "two in a list": json.dumps([GRADES, GRADES]),
    "a rest": json.dumps(GRADES) + "}",
    "braces before": "{x} " + json.dumps(GRADES),
    "lacks one": json.dumps({"overall": MARK}),
    "lacks the whole": json.dumps({"sharpness": MARK}),
    "a reason that is none": json.dumps(GRADES | {"sharpness": {"reason": 3, "score": 3}}),
    "a score for all": json.dumps({"score": 7}),
    "one name twice": json.dumps({"sharpness": MARK, "Overall": MARK, "OVERALL": MARK}),
    "two numbers": json.dumps(GRADES | {"overall": [7, 8]}),
    "two words": json.dumps(GRADES | {"overall": "seven or eight"}),
    "two numbers in words": json.dumps(GRADES | {"overall": "7 or 8"}),
    "of a smaller scale": json.dumps(GRADES | {"overall": "7/5"}),
    "a share": json.dumps(GRADES | {"overall": "70%"}),
    "no score": json.dumps(GRADES | {"overall": {"reason": "x"}}),
    "too much": json.dumps(GRADES | {"overall": {"reason": "x", "score": 10.001}}),
    "too little": json.dumps(GRADES | {"sharpness": {"reason": "x", "score": -1}}),
    "a word": json.dumps(GRADES | {"overall": {"reason": "x", "score": "seven"}}),
    "of another scale": json.dumps(GRADES | {"overall": {"reason": "x", "score": "7/100"}}),
    "too much in words": json.dumps(GRADES | {"overall": {"reason": "x", "score": "11"}}),
    "a bool": json.dumps(GRADES | {"overall": {"reason": "x", "score": True}}),
    "null": json.dumps(GRADES | {"overall": {"reason": "x", "score": None}}),
    "NaN": json.dumps(GRADES | {"overall": {"reason": "x", "score": float("nan")}}),
    "NaN elsewhere": json.dumps(GRADES | {"more": float("nan")}),
    "infinite": json.dumps(GRADES | {"overall": {"reason": "x", "score": float("inf")}}),
    "overflow": json.dumps(GRADES).replace("4", "1e999"),
    "long number": json.dumps(GRADES).replace("4", "4" * 5000),
    "twice": json.dumps(GRADES)[:-1] + ', "overall": ' + json.dumps(MARK) + "}",
    "twice inside": json.dumps(GRADES).replace('"score": 4', '"score": 4, "score": 9'),
    "deep": '{"a":' * 100000,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exactly_the_object_is_refused(parse, name):
    with pytest.raises(UnusableAnswer) as caught:
        parse(REFUSED[name])
    assert len(str(caught.value)) < 200


@given(
    st.text()
    | st.recursive(st.none() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)).map(
        json.dumps
    )
)
def test_any_answer_is_used_or_refused(parse, text):
    with pytest.raises(UnusableAnswer):
        parse(text)


@given(
    st.lists(st.floats(0, 10) | st.integers(0, 10), min_size=2, max_size=2),
    st.lists(st.text(), min_size=2, max_size=2),
    st.text(st.characters(exclude_characters="{}")),
    st.text(st.characters(exclude_characters="{}")),
)
def test_every_answer_of_the_form_is_read(parse, scores, reasons, before, after):
    names = ("sharpness", "overall")
    grades = {n: {"reason": r, "score": s} for n, r, s in zip(names, reasons, scores, strict=True)}
    verdict = parse(before + json.dumps(grades) + after)
    assert verdict.score == scores[1]
    assert verdict.raw == grades
