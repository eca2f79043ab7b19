"""Searches of several prompts with threads: whatever the timing, the same files, and no question twice."""

import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import PIL.Image
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rflow_jax.errors import InputError
from rflow_jax.openai_client.usage import Usage
from rflow_jax.search import engine as module
from rflow_jax.search.config import NoiseStage, ReflectStage
from rflow_jax.search.engine import Engine, Models
from rflow_jax.search.progress import BusyClock, SearchProgress
from rflow_jax.testing.openai_server import score_of
from rflow_jax.utils.images import png_bytes
from rflow_jax.verifiers.base import Verdict
from tests.kit.asking import wait_until
from tests.kit.fake_pipeline import FakePipeline
from tests.kit.searching import (
    CONFIG,
    ENTRIES,
    HashVerifier,
    HashWriter,
    files,
    jitter,
    models,
    prompt_run,
    search,
    with_batch,
)

PATIENCE = 20.0
TOGETHER = 3 * 10  # images of all prompts
KINDS = {"reflect": CONFIG, "noise-prompt": replace(CONFIG, noise=NoiseStage(3, 2))}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return search(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module", params=list(KINDS))
def expected(request, tmp_path_factory):
    """(kind, files of its search one after another)."""
    out = tmp_path_factory.mktemp(request.param)
    alone = with_batch(replace(KINDS[request.param], prompts_in_flight=1), 1)
    search(out, alone, request.param, asked=models(request.param, concurrency=1))
    return request.param, files(out)


# A run takes a while, and what fails follows from timing: it is not made smaller.
@settings(max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    batch=st.integers(1, 5),
    in_flight=st.integers(1, 4),
    concurrency=st.integers(1, 5),
    asked_at_once=st.integers(1, 3),
    slow=st.tuples(*[st.sampled_from([0.0, 0.001, 0.004])] * 3),
    seed=st.integers(0, 999),
)
def test_timing_batches_and_neighbours_change_nothing(
    expected, batch, in_flight, concurrency, asked_at_once, slow, seed
):
    kind, content = expected
    pipe = FakePipeline(wait=jitter(seed, slow[0]))
    asked = models(kind, concurrency=concurrency, batch_size=asked_at_once, wait=jitter(seed, slow[1]))
    asked.verifier.wait = jitter(seed + 1, slow[2])
    config = with_batch(replace(KINDS[kind], prompts_in_flight=in_flight), batch)
    with TemporaryDirectory() as folder:
        done = search(Path(folder), config, kind, pipe=pipe, asked=asked)
        assert files(Path(folder)) == content
    assert done.most_open == min(in_flight, len(ENTRIES))
    assert set(asked.verifier.seen.values()) == {1}
    assert asked.verifier.most_at_once <= concurrency
    for sent in pipe.batches:
        # While the device works, a batch waits until it is full.
        assert len(sent.requests) == batch or sent.behind == 0
        assert sent.behind <= 1


def test_the_next_batch_is_sent_before_the_last_has_arrived(ran):
    assert {sent.behind for sent in ran.pipe.batches} == {0, 1}


def test_every_image_has_its_own_score_and_is_scored_once(ran):
    made = [record for index in ENTRIES for record in ran.records(index)]
    assert len(made) == TOGETHER == ran.live.images == ran.live.scored == sum(ran.models.verifier.seen.values())
    assert set(ran.models.verifier.seen.values()) == {1}
    for record in made:
        png = (ran.out / f"{record['index']:05d}" / record["file"]).read_bytes()
        assert record["verdict"]["score"] == score_of(png)
        assert record["verdict"]["raw"] == {"of": ENTRIES[record["index"]].get("tag")}


def test_prompts_with_the_same_text_have_images_of_their_own(ran):
    assert {record["prompt"] for record in ran.records(3) + ran.records(4)} == {"two owls"}
    images = [
        (ran.out / f"{index:05d}" / record["file"]).read_bytes() for index in (3, 4) for record in ran.records(index)
    ]
    assert len(set(images)) == 20


def test_noise_is_made_by_the_base_model_and_corrections_by_the_lora(ran):
    count = Counter(
        (sent.lora, request.condition is not None) for sent in ran.pipe.batches for request in sent.requests
    )
    assert count == {(False, False): 12, (True, True): 18}


def test_noise_and_reflect_share_their_noise_images(ran, tmp_path):
    search(tmp_path, kind="noise")
    for index in ENTRIES:
        for number in range(4):
            name = f"{index:05d}/samples/{number:05d}.png"
            assert (tmp_path / name).read_bytes() == (ran.out / name).read_bytes()


def test_models_are_closed_when_a_run_ends(ran):
    assert ran.models.verifier.closed
    assert ran.models.reflector.closed
    assert ran.models.refiner.closed


def test_images_are_made_while_others_are_scored(tmp_path):
    """No score is given before the last image of noise is on its way."""
    started = threading.Event()
    sent: list[object] = []

    def before(requests):
        sent.extend(requests)
        if len(sent) == 8:
            started.set()

    asked = models("noise", concurrency=8, wait=lambda: started.wait(PATIENCE) or pytest.fail("never"))
    done = search(tmp_path, with_batch(CONFIG, 2), "noise", pipe=FakePipeline(before=before), asked=asked)
    assert done.live.scored == 12


def test_calls_of_one_model_do_not_wait_for_those_of_another(tmp_path):
    """One prompt's verdict is held back until another prompt has been refined."""
    refined = threading.Event()
    held: set[str] = set()

    class Verifier(HashVerifier):
        def score(self, images, items):
            if items[0]["prompt"] == "a red drum":
                held.add("drum")
                assert refined.wait(PATIENCE)
            return super().score(images, items)

    class Writer(HashWriter):
        def write(self, cases):
            if cases[0].prompt == "two owls" and held:
                refined.set()
            return super().write(cases)

    asked = Models(Verifier(concurrency=6), HashWriter(), Writer(name="refine"))
    assert search(tmp_path, replace(CONFIG, prompts_in_flight=3), asked=asked).live.scored == TOGETHER


def test_while_a_service_is_away_the_images_of_the_prompts_in_flight_are_drawn_and_no_others(tmp_path, ran):
    back = threading.Event()
    asked = models(wait=lambda: back.wait(PATIENCE) or pytest.fail("never"))
    with ThreadPoolExecutor(1) as beside:
        pipe = beside.submit(FakePipeline).result()  # it is fed by the thread that made it
        running = beside.submit(search, tmp_path, asked=asked, pipe=pipe)
        wait_until(lambda: len(pipe.requests) == 8)  # two prompts of four images before the first verdict
        time.sleep(0.3)
        assert len(pipe.requests) == 8
        back.set()
        running.result(timeout=PATIENCE)
    assert files(tmp_path) == files(ran.out)


def test_images_that_a_slow_disk_has_not_taken_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "UNSAVED", 3)
    most = [0]
    submit, write = module.Engine._submit_image, module.PromptSearch.place

    def counting(self, task, image):
        submit(self, task, image)
        most[0] = max(most[0], self._saving)

    monkeypatch.setattr(module.Engine, "_submit_image", counting)
    monkeypatch.setattr(module.PromptSearch, "place", lambda self, work: time.sleep(0.005) or write(self, work))
    assert search(tmp_path, kind="noise").live.scored == 12
    assert 0 < most[0] <= 3


# ---- failures ----


def test_failed_texts_and_scores_are_counted_and_recorded(tmp_path):
    asked = models()
    asked.reflector.fails = asked.refiner.fails = lambda case: case.prompt == "a red drum"
    asked.verifier.fails = lambda png: png[-30] % 7 == 0
    done = search(tmp_path, asked=asked)
    unscored = [r for index in ENTRIES for r in done.records(index) if r["verdict"]["score"] is None]
    assert done.live.unscored == len(unscored) > 0
    assert all(asked.verifier.fails((tmp_path / f"{r['index']:05d}" / r["file"]).read_bytes()) for r in unscored)
    assert done.live.text_failures == 12
    failed = [record for index in ENTRIES for record in done.records(index) if record["text_errors"]]
    assert {record["index"] for record in failed} == {5}
    assert len(failed) == 6
    assert done.live.first_failure in ("score: gone", "reflection: no answer", "refined prompt: no answer")


def test_without_a_verifier_images_are_made_and_none_is_chosen(tmp_path):
    done = search(tmp_path, kind="noise", asked=Models())
    assert (done.live.images, done.live.scored) == (12, 0)
    assert sorted(child.name for child in (tmp_path / "00003").iterdir() if child.is_dir()) == ["midimg", "samples"]


@pytest.mark.parametrize("role", ["verifier", "reflector", "refiner"])
def test_an_exception_in_a_models_thread_ends_the_run_with_it_and_the_next_run_goes_on(tmp_path, ran, role):
    def broken():
        raise ZeroDivisionError(f"in the {role}")

    asked = models()
    getattr(asked, role).wait = broken
    with pytest.raises(ZeroDivisionError, match=f"in the {role}"):
        search(tmp_path, asked=asked)
    assert asked.verifier.closed
    search(tmp_path)
    assert files(tmp_path) == files(ran.out)


def test_a_disk_that_is_full_ends_the_run_and_the_next_one_goes_on(tmp_path, ran, monkeypatch):
    left = [5]
    write = module.PromptSearch.place

    def place(self, work):
        left[0] -= 1
        if left[0] < 0 and work.step == "draw":
            raise OSError(28, "No space left on device", "x.png")
        return write(self, work)

    monkeypatch.setattr(module.PromptSearch, "place", place)
    with pytest.raises(OSError, match="No space left"):
        search(tmp_path)
    monkeypatch.undo()
    search(tmp_path)
    assert files(tmp_path) == files(ran.out)


def test_settings_that_do_not_fit_the_model_end_the_run(tmp_path):
    def refuse(requests):
        raise InputError("height is 16: no")

    with pytest.raises(InputError, match="height is 16"):
        search(tmp_path, pipe=FakePipeline(before=refuse))


@pytest.mark.parametrize("after", [0, 1, 3, 7])
def test_an_interrupted_run_goes_on_and_ends_as_if_it_was_never_stopped(tmp_path, ran, after):
    left = [after]

    def before(requests):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, pipe=FakePipeline(before=before))
    stored = {str(file.relative_to(tmp_path)) for file in tmp_path.glob("*/midimg/*.png")}
    done = search(tmp_path)
    assert files(tmp_path) == files(ran.out)
    assert len(done.pipe.requests) == TOGETHER - len(stored)


def test_what_a_model_gives_up_when_the_run_is_interrupted_is_not_recorded(tmp_path, ran):
    """A verifier that is told to close answers that the image could not be scored."""
    closed = threading.Event()
    waiting = threading.Semaphore(0)

    class Verifier(HashVerifier):
        def score(self, images, items):
            waiting.release()
            assert closed.wait(PATIENCE)
            return [Verdict(None, error="the run is over") for _ in images]

        def close(self):
            closed.set()

    def before(requests):
        before.calls += 1
        if before.calls == 3:  # the first image has arrived
            assert waiting.acquire(timeout=PATIENCE)
            raise KeyboardInterrupt

    before.calls = 0
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, with_batch(CONFIG, 1), asked=models_with(Verifier()), pipe=FakePipeline(before=before))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("score-", "reflect-", "refine-"))]
    assert not any(b"the run is over" in content for content in files(tmp_path).values())
    search(tmp_path)
    assert files(tmp_path) == files(ran.out)


def models_with(verifier: HashVerifier) -> Models:
    return replace(models(), verifier=verifier)


# ---- enough ----


@pytest.mark.parametrize("questions", [1, 2, 9, 40])
def test_a_spent_budget_stops_cleanly_and_a_later_run_goes_on(tmp_path, ran, questions):
    asked, pipe = models(), FakePipeline()
    limit = [questions]

    def enough():
        limit[0] -= 1
        return "the budget is spent" if limit[0] < 0 else None

    done = search(tmp_path, asked=asked, pipe=pipe, enough=enough)
    assert done.engine.stopped == "the budget is spent"
    first = Counter(asked.verifier.seen)
    written = len(asked.reflector.cases) + len(asked.refiner.cases)
    assert sum(first.values()) + written <= questions
    # What was on its way is kept: no image is made again, and no question asked again.
    assert len(list(tmp_path.glob("*/midimg/*.png"))) == len(pipe.requests)
    again, pipe_again = models(), FakePipeline()
    end = search(tmp_path, asked=again, pipe=pipe_again)
    assert end.engine.stopped is None
    assert files(tmp_path) == files(ran.out)
    assert len(pipe.requests) + len(pipe_again.requests) == TOGETHER
    assert set((first + again.verifier.seen).values()) == {1}
    assert len(again.reflector.cases) + len(again.refiner.cases) == 2 * 18 - written


def test_once_it_is_enough_nothing_that_waits_is_asked(tmp_path):
    """All images wait for their verdicts when the budget is spent: only calls under way are answered."""
    asked, begun, submitted = models("noise", concurrency=2), [], []
    all_wait = threading.Event()

    def wait():
        assert all_wait.wait(PATIENCE)
        begun.append(1)

    def enough():
        submitted.append(1)
        if len(submitted) == 12:
            all_wait.set()
        return "enough" if len(begun) >= 3 else None

    asked.verifier.wait = wait
    done = search(tmp_path, replace(CONFIG, prompts_in_flight=3), "noise", asked=asked, enough=enough)
    assert done.engine.stopped == "enough"
    assert done.live.images == 12
    assert 3 <= done.live.scored <= 3 + 2


def test_a_budget_that_is_spent_by_the_last_question_stops_nothing(tmp_path):
    asked = models("noise")
    spent = lambda: "spent" if sum(asked.verifier.seen.values()) == 12 else None  # noqa: E731
    assert search(tmp_path, kind="noise", asked=asked, enough=spent).engine.stopped is None


def test_a_prompt_that_is_good_enough_is_not_searched_on(tmp_path):
    config = replace(CONFIG, stop_score=5.0, max_images=9)
    done = search(tmp_path, config)
    for index in ENTRIES:
        records = done.records(index)
        good = [r["round"] for r in records if r["verdict"]["score"] >= 5.0]
        assert len(records) <= 9
        assert records[-1]["round"] == (min(good) if good else 4)
    # The images that were spared are not awaited any more.
    assert done.live.images == sum(len(done.records(index)) for index in ENTRIES) == done.live._total


def test_given_images_are_corrected_and_are_no_images_of_this_run(tmp_path):
    given = {}
    for index in ENTRIES:
        given[index] = [tmp_path / f"{index}-{number}.png" for number in range(3)]
        for number, file in enumerate(given[index]):
            PIL.Image.new("RGB", (16, 16), (index, number, 0)).save(file)
    done = search(tmp_path / "run", given=given)
    for index, images in given.items():
        records = done.records(index)
        assert [record["stage"] for record in records] == ["given"] * 3 + ["reflect"] * 6
        for record, file in zip(records, images, strict=False):
            with PIL.Image.open(file) as image:
                assert (tmp_path / f"run/{index:05d}" / record["file"]).read_bytes() == png_bytes(image)
    assert (done.live.images, done.live.scored, len(done.pipe.requests)) == (18, 27, 18)


def test_a_given_image_that_cannot_be_read_ends_the_run(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(InputError, match=r"x\.png: cannot read this image"):
        search(tmp_path / "run", given={5: [tmp_path / "x.png"]}, entries={5: ENTRIES[5]})


def test_prompts_that_are_done_are_let_go(tmp_path):
    """Memory does not grow with the number of prompts."""
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    most = 0
    config = replace(CONFIG, noise=NoiseStage(1, 1), reflect=ReflectStage(1, 1))

    def prompts():
        nonlocal most
        for number in range(24):
            run = prompt_run(tmp_path / str(number), config=config)
            alive.add(run)
            yield run
            del run
            most = max(most, len(alive))

    live = SearchProgress(48, BusyClock(), Usage)
    Engine(FakePipeline(), models(concurrency=1), config.sampling, 2, live, BusyClock()).run(prompts())
    assert live.scored == 48
    # Those in flight, and one that each thread has had in hand last.
    assert most <= 2 + 3 + module.SAVERS + 2


def test_on_several_devices_a_batch_is_as_large_as_all_of_them_take(tmp_path, ran):
    pipe = FakePipeline(replicas=2)
    search(tmp_path, with_batch(CONFIG, 2), pipe=pipe)
    assert max(len(sent.requests) for sent in pipe.batches) == 4
    assert files(tmp_path) == files(ran.out)


def test_many_runs_leave_no_threads(tmp_path):
    before = {*threading.enumerate()}
    for number in range(3):
        search(tmp_path / str(number), entries={5: ENTRIES[5]})
    begun = {*threading.enumerate()} - before
    for thread in begun:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in begun)
