"""GenEval's rules, on decisions that GenEval's own code made (tests/golden/geneval) and on edge cases."""

import json
import subprocess
import sys

import pytest

from rflow_jax.errors import InputError
from rflow_jax.verifiers.geneval import Detection, Rules, compare, decide, iou, objects_that_count, relations_of


@pytest.fixture
def recorded(golden):
    return golden / "geneval/decisions.json"


def test_every_recorded_decision_is_made_again(recorded):
    command = [sys.executable, "-m", "rflow_jax.verifiers.geneval", str(recorded)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "420 of 420 decisions agree\n"), done.stderr


@pytest.mark.parametrize("what", ["correct", "kept"])
def test_a_decision_that_differs_is_named(recorded, tmp_path, what):
    cases = json.loads(recorded.read_text())
    cases[7][what] = not cases[7][what] if what == "correct" else {}
    (tmp_path / "other.json").write_text(json.dumps(cases))
    with pytest.raises(InputError, match="case 7 of 420 is decided otherwise"):
        compare(tmp_path / "other.json")


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', '[{"metadata": {}}]', "[", '[{"detections": {"a": [[1]]}}]'])
def test_a_file_of_something_else_is_one_line(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(InputError, match=r"other\.json"):
        compare(tmp_path / "other.json")


def box(x: float, y: float, size: float = 10) -> tuple[float, float, float, float]:
    return x, y, x + size, y + size


def test_overlapping_objects_count_once_where_the_rules_say_so():
    found = {"dog": [Detection(box(0, 0), 0.5), Detection(box(1, 0), 0.9), Detection(box(50, 0), 0.4)]}
    assert [d.score for d in objects_that_count(found, "counting", Rules(counting_threshold=0.3))["dog"]] == [
        0.9,
        0.5,
        0.4,
    ]
    assert [d.score for d in objects_that_count(found, "two_object", Rules(max_overlap=0.5))["dog"]] == [0.9, 0.4]
    assert iou(box(0, 0), box(0, 0)) == 1
    assert iou(box(0, 0), box(50, 0)) == 0


def test_relations_are_each_others_opposite():
    assert relations_of(box(0, 0), box(50, 0)) == {"left of"}
    assert relations_of(box(50, 0), box(0, 0)) == {"right of"}
    assert relations_of(box(0, 50), box(40, 0)) == {"left of", "below"}
    assert relations_of(box(0, 0), box(1, 1)) == set()


def test_what_failed_is_said():
    metadata = {
        "tag": "color_attr",
        "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 2}],
        "exclude": [{"class": "cow", "count": 1}],
    }
    found = {"cat": [Detection(box(0, 0), 0.9)], "dog": [Detection(box(0, 0), 0.9)], "cow": [Detection(box(0, 0), 0.9)]}
    decision = decide(metadata, found, lambda name, objects: ["blue"])
    assert not decision.correct
    assert [(failure.requirement, failure.entry) for failure in decision.failures] == [
        ("color", 0), ("count", 1), ("exclude", 0)
    ]  # fmt: skip
    assert decide({"tag": "x", "include": []}, {}, lambda name, objects: []).correct
    for wrong in ({}, {"tag": "x", "include": [{}]}, {"tag": "x", "include": 3}):
        with pytest.raises(InputError, match="not that of a GenEval prompt"):
            decide(wrong, {}, lambda name, objects: [])
