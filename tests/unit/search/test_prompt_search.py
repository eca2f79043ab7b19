"""The search of one prompt as a machine: told results in any order, killed at any moment."""

import json
import random
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rflow_jax.errors import InputError, RunError
from rflow_jax.generation.sampling import PerturbedSeed
from rflow_jax.search.config import NoiseStage, ReflectStage
from rflow_jax.search.prompt_folder import JOURNAL, read_records
from rflow_jax.testing.openai_server import score_of
from rflow_jax.utils.images import png_bytes
from rflow_jax.verifiers.base import Verdict
from tests.kit.searching import CONFIG, HashVerifier, HashWriter, answer, drive, files, models, prompt_run

SMALL = replace(CONFIG, noise=NoiseStage(2, 2), reflect=ReflectStage(2, 2, history=1))
SEARCHES = {
    "noise": SMALL,
    "zero_order": replace(SMALL, noise=NoiseStage(3, 2, method="zero_order")),
    "noise-prompt": replace(SMALL, noise=NoiseStage(3, 2)),
    "reflect": SMALL,
}
seeds = st.integers(0, 2**32)


def kind_of(name: str):
    return "noise" if name == "zero_order" else name


def unsure():
    """Models that fail at some images, always at the same ones."""
    asked = models()
    asked.verifier.fails = lambda png: png[-30] % 5 == 0
    asked.reflector.fails = lambda case: png_bytes(case.image)[-30] % 4 == 0
    asked.refiner.fails = lambda case: png_bytes(case.image)[-30] % 3 == 0
    return asked


def whole(out: Path, name: str, order: int = 0) -> dict[str, bytes]:
    drive(prompt_run(out, config=SEARCHES[name], kind=kind_of(name)), unsure(), random.Random(order))
    return files(out)


@pytest.fixture(scope="module", params=list(SEARCHES))
def uninterrupted(request, tmp_path_factory):
    return request.param, whole(tmp_path_factory.mktemp(request.param), request.param)


@settings(max_examples=8)
@given(seeds)
def test_the_order_of_results_changes_nothing(uninterrupted, order):
    name, expected = uninterrupted
    with TemporaryDirectory() as folder:
        assert whole(Path(folder), name, order) == expected


@settings(max_examples=15)
@given(seeds)
def test_a_killed_search_asks_only_for_what_is_missing_and_ends_the_same(uninterrupted, seed):
    """The journal is cut at any byte, and any of its images are missing, half written or left as temporary files."""
    name, expected = uninterrupted
    rng = random.Random(seed)
    with TemporaryDirectory() as folder:
        out = Path(folder)
        run = prompt_run(out, config=SEARCHES[name], kind=kind_of(name))
        drive(run, unsure(), rng, steps=rng.randrange(60))
        there = spoil(out / "00005", rng)
        lines = journal_of(out / "00005")
        done = drive(prompt_run(out, config=SEARCHES[name], kind=kind_of(name)), unsure(), rng)
        assert files(out) == expected
        assert len(set(done)) == len(done)
        records = read_records(out / "00005")
        drawn = {records[position]["file"] for position, step in done if step == "draw"}
        assert drawn.isdisjoint(there)
        assert drawn | there == {record["file"] for record in records}
        noted = {(position, what) for position, what in lines}
        called = {"reflect": "reflection", "refine": "refined_prompt", "score": "verdict"}
        assert noted.isdisjoint({(position, called[step]) for position, step in done if step in called})


def spoil(folder: Path, rng: random.Random) -> set[str]:
    """What a kill may leave; returns the images that are still whole."""
    journal = folder / JOURNAL
    if journal.exists():
        content = journal.read_bytes()
        journal.write_bytes(content[: rng.randint(0, len(content))])
    there = set()
    for image in folder.glob("midimg/*.png"):
        if (folder / "records.jsonl").exists() or rng.random() < 0.6:
            there.add(f"midimg/{image.name}")
        elif rng.random() < 0.5:
            image.unlink()
        else:
            image.write_bytes(image.read_bytes()[: rng.randint(0, 300)])
    (folder / "midimg").mkdir(exist_ok=True)
    (folder / "midimg/.half.png.1.tmp").write_bytes(b"half")
    return there


def journal_of(folder: Path) -> list[tuple[int, str]]:
    if not (folder / JOURNAL).exists():
        return []
    lines = (folder / JOURNAL).read_bytes().split(b"\n")[:-1]
    return [(entry["id"], next(key for key in entry if key != "id")) for entry in map(json.loads, lines)]


def test_a_finished_prompt_asks_for_nothing(tmp_path):
    expected = whole(tmp_path, "noise")
    # A kill between the records and the journal's end leaves both.
    run = prompt_run(tmp_path, config=SMALL, kind="noise")
    assert not run.finished
    asked = models("noise")
    for position in range(4):
        run.folder.journal.note(position, "verdict", read_records(tmp_path / "00005")[position]["verdict"])
    assert drive(prompt_run(tmp_path, config=SMALL, kind="noise"), asked, random.Random(0)) == []
    assert files(tmp_path) == expected
    assert not asked.verifier.seen


def test_steps_follow_each_other_for_each_image(tmp_path):
    run = prompt_run(tmp_path, config=SMALL)
    done = drive(run, models(), random.Random(4))
    assert run.finished
    assert run.drawn == len(run.samples) == 8
    for position in range(8):
        steps = [step for p, step in done if p == position]
        assert steps == (["draw", "score"] if position < 4 else ["reflect", "refine", "draw", "score"])


def test_a_correction_is_told_its_parent_its_texts_and_its_past(tmp_path):
    run = prompt_run(tmp_path, config=replace(SMALL, reflect=ReflectStage(3, 1, history=2)))
    asked = models()
    drive(run, asked, random.Random(0))
    records = read_records(tmp_path / "00005")
    first, second, third = records[4:]
    for child, reflected, refined in zip(
        (first, second, third), asked.reflector.cases, asked.refiner.cases, strict=True
    ):
        parent = records[child["parent"]]
        image = run.folder.read_image(parent["file"])
        for case in (reflected, refined):
            assert png_bytes(case.image) == png_bytes(image)
            assert (case.prompt, case.current_prompt) == ("a red drum", parent["refined_prompt"] or "a red drum")
            assert case.last_reflection == (parent["reflection"] or "")
            assert case.evaluation.startswith(f"Overall: {parent['verdict']['score']:g}")
        assert (reflected.reflection, refined.reflection) == ("", child["reflection"])
        assert refined.history == ()
        assert child["parent_file"] == parent["file"]
    pasts = [[past.reflection for past in case.history] for case in asked.reflector.cases]
    assert pasts == [[], [""], ["", first["reflection"]]]
    (oldest, newer) = asked.reflector.cases[2].history
    assert png_bytes(oldest.image) == png_bytes(run.folder.read_image(first["parent_file"]))
    assert newer.evaluation.startswith(f"Overall: {first['verdict']['score']:g}")


@pytest.mark.parametrize("history", [0, 1, 2, 9])
def test_the_history_is_as_long_as_it_is_set_to_be_and_the_newest_are_shown(tmp_path, history):
    asked = models()
    run = prompt_run(tmp_path, config=replace(SMALL, reflect=ReflectStage(4, 1, history=history)))
    drive(run, asked, random.Random(0))
    chain = [record["parent_file"] for record in read_records(tmp_path / "00005")[4:]]
    for number, case in enumerate(asked.reflector.cases):
        shown = [png_bytes(past.image) for past in case.history]
        earlier = [png_bytes(run.folder.read_image(name)) for name in chain[:number]]
        assert shown == earlier[max(0, number - history) :]


def test_what_an_image_is_made_from(tmp_path):
    run = prompt_run(tmp_path, config=SMALL)
    requests = []
    asked = models()
    todo = run.begin()
    while todo:
        work = todo.pop(0)
        if work.step == "draw":
            requests.append((run.samples[work.position], run.request(work), work.corrects))
        todo += run.done(work, answer(work, asked))
    for sample, request, corrects in requests:
        assert (request.prompt, request.seed) == ("a red drum", (9, 5, sample.round, sample.branch))
        assert (request.reflection, request.refined_prompt) == (sample.reflection, sample.refined_prompt)
        assert corrects == (sample.stage == "reflect")
        if corrects:
            parent = run.folder.read_image(run.samples[sample.parent].file)
            assert request.condition.tobytes() == parent.tobytes()
        else:
            assert request.condition is None


def test_a_neighbours_noise_is_near_its_pivots(tmp_path):
    config = replace(SMALL, noise=NoiseStage(4, 2, method="zero_order", noise_similarity=0.8))
    run = prompt_run(tmp_path, config=config, kind="noise")
    paths = {}
    todo = run.begin()
    while todo:
        work = todo.pop()
        if work.step == "draw":
            paths[work.position] = run.request(work).seed
        better = Verdict(float(work.position)) if work.step == "score" else answer(work, models("noise"))
        todo += run.done(work, better)
    assert [sample.parent for sample in run.samples] == [None, None, 1, 1, 3, 3, 5, 5]
    for position, sample in enumerate(run.samples):
        if sample.parent is None:
            assert paths[position] == sample.seed
        else:
            before = paths[sample.parent]
            before = before.path if isinstance(before, PerturbedSeed) else (before,)
            assert paths[position] == PerturbedSeed((*before, sample.seed), 0.8)
    assert [record["noise_path"] for record in read_records(tmp_path / "00005")][2][-1] == [9, 5, 1, 0]


def test_failed_texts_leave_the_prompt_as_it_was_and_are_recorded(tmp_path):
    asked = models()
    asked.reflector.fails = asked.refiner.fails = lambda case: case.last_reflection == ""
    asked.refiner.fails = lambda case: case.current_prompt != "a red drum"
    drive(prompt_run(tmp_path, config=replace(SMALL, reflect=ReflectStage(3, 1))), asked, random.Random(0))
    first, second, third = read_records(tmp_path / "00005")[4:]
    assert first["reflection"] == ""
    assert first["text_errors"] == ["reflection: no answer"]
    refined = first["refined_prompt"]
    assert refined.startswith("refine")
    # No refinement: the parent's prompt goes on.
    assert second["refined_prompt"] == third["refined_prompt"] == refined
    assert second["text_errors"] == ["reflection: no answer", "refined prompt: no answer"]


def test_an_image_that_cannot_be_scored_is_recorded_and_never_preferred(tmp_path):
    drive(prompt_run(tmp_path / "a", config=SMALL), models(), random.Random(0))
    first = read_records(tmp_path / "a/00005")
    best = max(first[:4], key=lambda record: record["verdict"]["score"])
    png = (tmp_path / "a/00005" / best["file"]).read_bytes()
    asked = models()
    asked.verifier.fails = lambda seen: seen == png
    drive(prompt_run(tmp_path / "b", config=SMALL), asked, random.Random(0))
    records = read_records(tmp_path / "b/00005")
    unscored = [record for record in records if record["verdict"]["score"] is None]
    assert [(record["file"], record["verdict"]["error"]) for record in unscored] == [(best["file"], "gone")]
    assert best["id"] not in {record["parent"] for record in records}


def test_without_a_verifier_nothing_is_judged(tmp_path):
    run = prompt_run(tmp_path, config=SMALL, kind="noise", verified=False)
    done = drive(run, models("noise"), random.Random(0))
    assert {step for _, step in done} == {"draw"}
    assert {record["verdict"] for record in read_records(tmp_path / "00005")} == {None}
    assert sorted(child.name for child in (tmp_path / "00005").iterdir()) == [
        "metadata.jsonl", "midimg", "records.jsonl", "samples"
    ]  # fmt: skip


def test_given_images_are_taken_over_and_judged_and_the_best_corrected(tmp_path):
    given_files = []
    for number in range(5):
        given_files.append(tmp_path / f"{number}.{'jpg' if number % 2 else 'png'}")
        PIL.Image.new("RGB", (8, 8), (number * 40, 9, 9)).save(given_files[-1])
    run = prompt_run(tmp_path / "run", config=SMALL, given=given_files)
    asked = models()
    done = drive(run, asked, random.Random(0))
    assert [step for position, step in done if position < 5].count("take") == 5
    assert run.drawn == 4
    records = read_records(tmp_path / "run/00005")
    assert [record["stage"] for record in records] == ["given"] * 5 + ["reflect"] * 4
    for record, file in zip(records, given_files, strict=False):
        with PIL.Image.open(file) as image:
            png = (tmp_path / "run/00005" / record["file"]).read_bytes()
            assert png == png_bytes(image.convert("RGB"))
            assert record["verdict"]["score"] == score_of(png)
    ranked = sorted(records[:5], key=lambda record: record["verdict"]["score"], reverse=True)
    assert {record["parent"] for record in records[5:7]} == {record["id"] for record in ranked[:2]}
    assert len(list((tmp_path / "run/00005/samples").iterdir())) == 5


def test_an_image_that_was_written_and_is_not_there_is_not_asked_for_for_ever(tmp_path):
    run = prompt_run(tmp_path)
    work = run.begin()[0]
    with pytest.raises(RunError, match=r"0_round@9-5-0-0\.png: disappeared after it was written"):
        run.done(work, None)


def test_a_given_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    run = prompt_run(tmp_path / "run", given=[tmp_path / "x.png"])
    (work,) = run.begin()
    with pytest.raises(InputError, match=r"x\.png: cannot read this image"):
        answer(work, models())


def test_the_kit_would_notice_another_score_or_text(tmp_path):
    """The replays above compare files: a verdict or text that depended on the order of questions would show."""
    expected = whole(tmp_path / "a", "reflect")

    class Counting(HashWriter):
        def text(self, case):
            return f"number {len(self.cases)}"

    asked = replace(unsure(), refiner=Counting(), verifier=HashVerifier())
    drive(prompt_run(tmp_path / "b", config=SMALL), asked, random.Random(3))
    assert files(tmp_path / "b") != expected
