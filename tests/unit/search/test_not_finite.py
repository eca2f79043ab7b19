"""Images that cannot be made: recorded with their cause, not judged and not linked, and the search goes on."""

import random
from dataclasses import replace

import pytest

from rflow_jax.commands.main import main
from rflow_jax.openai_client.usage import Usage
from rflow_jax.search.config import NoiseStage
from rflow_jax.search.prompt_search import NotMade
from rflow_jax.search.summary import summary
from rflow_jax.utils.cli import run
from rflow_jax.verifiers.base import Verdict
from tests.kit.fake_pipeline import FakePipeline, instead_of_loading
from tests.kit.searching import CONFIG, ENTRIES, drive, files, models, prompt_run, search, with_batch

CAUSE = "its latents became NaN or infinite"
KINDS = {"reflect": CONFIG, "noise": CONFIG, "noise-prompt": replace(CONFIG, noise=NoiseStage(3, 2))}


def failing(share, corrections):
    """Fails for some seeds, always the same."""

    def fails(request):
        if (request.condition is not None) in corrections and random.Random(str(request.seed)).random() < share:
            return CAUSE
        return None

    return FakePipeline(fails=fails)


def check(done, kind):
    """Every image is either there and judged, or an error without a file, and no result is missing or too many."""
    failures = 0
    for index in ENTRIES:
        folder, records = done.out / f"{index:05d}", done.records(index)
        for record in records:
            verdict = record["verdict"]
            assert (folder / record["file"]).exists() == (record["error"] is None)
            assert (verdict["score"] is None) == (record["error"] is not None)
            assert verdict["error"] == record["error"]
            parent = None if record["parent"] is None else records[record["parent"]]
            if record["error"] is not None:
                failures += 1
                assert record["error"] in (
                    CAUSE,
                    f"{parent and parent['file']}, which it is made from, could not be made",
                )
            elif parent and record["stage"] in ("reflect", "prompt"):
                assert parent["error"] is None
        sound = [record for record in records if record["error"] is None]
        first = [record for record in sound if record["stage"] != "reflect"]
        assert len(list((folder / "samples").iterdir())) == len(first)
        best = list((folder / "samples_best").iterdir())
        assert len(best) == bool(sound)
        if sound:
            scores = {(folder / record["file"]).read_bytes(): record["verdict"]["score"] for record in sound}
            assert scores[best[0].read_bytes()] == max(scores.values())
        assert not (folder / "journal.jsonl").exists()
    assert done.live.without_image == failures
    assert done.live.unscored == 0
    return failures


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("corrections", [{True, False}, {True}], ids=["any", "corrections"])
def test_a_search_goes_on(kind, share, corrections, tmp_path):
    done = search(tmp_path / "a", KINDS[kind], kind, pipe=failing(share, corrections))
    failures = check(done, kind)
    assert bool(failures) == (share > 0 and (False in corrections or kind == "reflect"))
    if failures:
        assert done.live.first_failure == f"image: {CAUSE}"
    config = with_batch(replace(KINDS[kind], prompts_in_flight=1), 1)
    search(tmp_path / "b", config, kind, pipe=failing(share, corrections), asked=models(kind, concurrency=1))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_what_is_made_is_what_would_be_made_without_the_failures(tmp_path):
    whole, some = search(tmp_path / "a", kind="noise"), search(tmp_path / "b", kind="noise", pipe=failing(0.5, {False}))
    check(some, "noise")
    theirs, ours = files(whole.out), files(some.out)
    images = [name for name in ours if "midimg" in name]
    assert images
    assert len(images) < sum("midimg" in name for name in theirs)
    assert all(ours[name] == theirs[name] for name in images)


def test_a_killed_search_does_not_make_them_again(tmp_path):
    """The journal has the failure; whatever is left is done, with the same files."""
    whole = prompt_run(tmp_path / "a")
    todo = whole.begin()
    lost = todo[0].position
    assert whole.done(todo[0], NotMade(CAUSE)) == []
    again = prompt_run(tmp_path / "a")
    steps = drive(again, models(), random.Random(0))
    assert (lost, "draw") not in steps
    assert again.samples[lost].error == CAUSE
    assert again.samples[lost].verdict == Verdict(None, error=CAUSE)
    assert again.finished
    assert not any(sample.parent == lost for sample in again.samples)


def test_unverified_searches_have_them_too(tmp_path):
    run = prompt_run(tmp_path, kind="noise", verified=False)
    for task in run.begin()[:1]:
        run.done(task, NotMade(CAUSE))
    again = prompt_run(tmp_path, kind="noise", verified=False)
    drive(again, models("noise"), random.Random(0))
    assert again.samples[0].error == CAUSE
    assert again.samples[0].verdict is None


def test_the_summary_says_it(tmp_path):
    done = search(tmp_path, kind="noise", pipe=failing(0.4, {False}))

    words = summary(len(ENTRIES), [], done.live, Usage(), tmp_path, verified=True)
    assert f"{done.live.without_image} could not be made" in words


@pytest.mark.parametrize(("share", "status"), [(0.0, 0), (0.4, 1), (1.0, 1)])
def test_the_command_says_it_with_its_status(share, status, tmp_path, monkeypatch, capsys):
    fake = instead_of_loading(monkeypatch)
    fake.fails = failing(share, {False}).fails
    fake.without_lora().fails = fake.fails
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "two owls"}\n')
    words = ["noise", "--model=m", f"--prompts={tmp_path / 'prompts.jsonl'}", f"--out={tmp_path / 'out'}"]
    argv = [*words, "--verifier.name=none", "--noise.search_rounds=3", "--noise.search_branch=4"]
    assert run(lambda: main(argv)) == status
    said = capsys.readouterr()
    made = len(list((tmp_path / "out").glob("*/midimg/*.png")))
    assert f"2 prompts, {made} images" in said.out
    assert (f"{24 - made} could not be made" in said.out) == bool(share)
    assert (f"the first failure was: image: {CAUSE}" in said.err) == bool(share)
    # The folder is not complete either when the same command is given again.
    assert run(lambda: main(argv)) == status
    again = capsys.readouterr().out
    lacking = f", {24 - made} of their images could not be made (their records say why)" if share else ""
    assert again == f"{tmp_path / 'out'}: all 2 prompts are done{lacking}; nothing to do\n"
    (tmp_path / "out/00001/records.jsonl").unlink()
    assert run(lambda: main(argv)) == status
    assert (f"{24 - made} could not be made" in capsys.readouterr().out) == bool(share)
