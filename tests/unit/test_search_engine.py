"""A search with a pipeline that draws at random and models that answer at once."""

import json
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import pytest

from rflow_jax.chat import png_bytes
from rflow_jax.language.base import Case, Written
from rflow_jax.search import engine
from rflow_jax.search.config import SearchConfig, Stage
from rflow_jax.search.engine import Correction, Search
from rflow_jax.search.store import claim_folder, write_config
from rflow_jax.settings import Settings
from rflow_jax.verifiers.base import Verdict
from tests.kit.fake_pipeline import FakePipeline
from tests.kit.openai_server import score_of

ENTRIES = {3: {"tag": "counting", "prompt": "two owls"}, 4: {"prompt": "two owls"}, 5: {"prompt": "a red drum"}}
CONFIG = SearchConfig(
    model="m",
    lora="l",
    seed=9,
    prompts_in_flight=2,
    noise=Stage(2, 2),
    reflect=Stage(3, 2),
    settings=Settings(height=16, width=16, condition_size=16, batch_size=3),
)


@dataclass
class HashVerifier:
    """Scores by the image's bytes; remembers what it saw."""

    fails_on: set[str] = field(default_factory=set)
    seen: list[str] = field(default_factory=list)
    concurrency: int = 4

    def score(self, images, items):
        digests = [sha256(png_bytes(image)).hexdigest() for image in images]
        self.seen += digests
        return [
            Verdict(None, error="gone") if digest in self.fails_on else Verdict(score_of(png_bytes(image)))
            for digest, image in zip(digests, images, strict=True)
        ]

    def close(self):
        pass


@dataclass
class HashWriter:
    """Writes its name and what it was told; fails where the prompt says so."""

    name: str
    fails_on: str = "never"
    cases: list[Case] = field(default_factory=list)

    def write(self, cases):
        self.cases += cases
        return [
            Written(None, "no answer")
            if case.prompt == self.fails_on
            else Written(f"{self.name} after <{case.last_reflection}> of <{case.current_prompt}>")
            for case in cases
        ]

    def close(self):
        pass


def search(out: Path, config=CONFIG, verifier=None, reflector=None, refiner=None, entries=ENTRIES):
    verifier = verifier or HashVerifier()
    correction = Correction(reflector or HashWriter("reflect"), refiner or HashWriter("refine"))
    pipe = FakePipeline()
    counters = Search(config, pipe, verifier, correction, out).run(entries)
    records = {
        index: [json.loads(line) for line in (out / f"{index:05d}/records.jsonl").read_text().splitlines()]
        for index in entries
    }
    return records, counters, pipe, verifier


def score_in(out: Path, record) -> float:
    return score_of((out / f"{record['index']:05d}" / record["file"]).read_bytes())


def test_every_image_has_its_own_score_and_is_scored_once(tmp_path):
    records, counters, _, verifier = search(tmp_path)
    made = [record for prompt in records.values() for record in prompt]
    assert len(made) == counters.images == counters.scored == 3 * (4 + 6)
    assert all(record["verdict"]["score"] == score_in(tmp_path, record) for record in made)
    assert sorted(verifier.seen) == sorted(set(verifier.seen))
    assert len(verifier.seen) == len(made)


def test_the_noise_stage_uses_the_base_model_and_corrections_the_lora(tmp_path):
    records, _, pipe, _ = search(tmp_path)
    # Two groups of prompts; in each, one call for the noise and one a round over all prompts of the group.
    assert [call["lora"] for call in pipe.calls] == [False, True, True, True] * 2
    assert [len(call["prompts"]) for call in pipe.calls] == [8, 4, 4, 4, 4, 2, 2, 2]
    assert {record["lora"] for record in records[3][:4]} == {None}
    assert {record["lora"] for record in records[3][4:]} == {"l"}


def test_conditions_are_the_parents_and_the_texts_follow_the_chain(tmp_path):
    records, _, pipe, _ = search(tmp_path, entries={5: ENTRIES[5]})
    corrected = [record for record in records[5] if record["parent"] is not None]
    conditions = [image for call in pipe.calls for image in call["conditions"]]
    for record, condition in zip(corrected, conditions, strict=True):
        parent = records[5][record["parent"]]
        assert png_bytes(condition) == (tmp_path / "00005" / parent["file"]).read_bytes()
        current, last = parent["refined_prompt"] or "a red drum", parent["reflection"] or ""
        assert record["refined_prompt"] == f"refine after <{last}> of <{current}>"
        assert record["reflection"] == f"reflect after <{last}> of <{current}>"
        assert record["parent_file"] == parent["file"]


def test_seeds_name_prompt_round_and_branch_and_stand_in_the_file_name(tmp_path):
    records, *_ = search(tmp_path)
    for index, prompt in records.items():
        for record in prompt:
            seed = [9, index, record["round"], record["branch"]]
            assert record["seed"] == seed
            assert record["file"] == f"midimg/{record['round']}_round@{'-'.join(map(str, seed))}.png"
    assert len({record["file"] for record in records[3]}) == 10


@pytest.mark.parametrize("change", [{"prompts_in_flight": 1}, {"settings": replace(CONFIG.settings, batch_size=1)}])
def test_results_do_not_depend_on_neighbours(tmp_path, change):
    first, *_ = search(tmp_path / "a")
    second, *_ = search(tmp_path / "b", replace(CONFIG, **change), entries={5: ENTRIES[5], 3: ENTRIES[3]})
    for index in (3, 5):
        kept = [{k: v for k, v in record.items() if k != "settings"} for record in first[index]]
        assert kept == [{k: v for k, v in record.items() if k != "settings"} for record in second[index]]


def test_folders_hold_what_their_names_say(tmp_path):
    records, *_ = search(tmp_path)
    for index, prompt in records.items():
        folder = tmp_path / f"{index:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == ENTRIES[index]
        content = {name: [f.read_bytes() for f in sorted((folder / name).iterdir())] for name in folders(folder)}
        images = [(folder / record["file"]).read_bytes() for record in prompt]
        assert content["midimg"]
        assert set(content["midimg"]) == set(images)
        assert content["samples"] == images[:4]
        assert content["samples_lastround"] == images[-2:]
        assert content["samples_best"] == [max(images, key=score_of)]
        for branch, best in enumerate(content["samples_path_bestround"]):
            tips = [r["id"] for r in prompt if r["round"] == prompt[-1]["round"] and r["branch"] == branch]
            chain = [tips[0]]
            while prompt[chain[-1]]["parent"] is not None:
                chain.append(prompt[chain[-1]]["parent"])
            assert best == max((images[i] for i in chain), key=score_of)
    assert not list(tmp_path.rglob("*.tmp"))


def folders(path: Path) -> list[str]:
    return [child.name for child in path.iterdir() if child.is_dir()]


def test_records_hold_every_setting_with_the_models_own_numbers(tmp_path):
    records, *_ = search(tmp_path)
    settings = records[3][0]["settings"]
    assert settings["num_inference_steps"] == 30
    assert settings["max_sequence_length"] == 512
    assert set(settings) == set(Settings.__dataclass_fields__)


def test_an_image_that_cannot_be_scored_is_recorded_and_never_preferred(tmp_path):
    first, *_ = search(tmp_path / "a")
    best = max(first[5][:4], key=lambda record: record["verdict"]["score"])
    digest = sha256((tmp_path / "a/00005" / best["file"]).read_bytes()).hexdigest()
    records, counters, *_ = search(tmp_path / "b", verifier=HashVerifier(fails_on={digest}))
    unscored = [record for prompt in records.values() for record in prompt if record["verdict"]["score"] is None]
    assert [(record["index"], record["file"]) for record in unscored] == [(5, best["file"])]
    assert unscored[0]["verdict"]["error"] == "gone"
    assert counters.unscored == 1
    assert best["id"] not in {record["parent"] for record in records[5]}


def test_a_failed_text_leaves_the_current_prompt_and_is_recorded(tmp_path):
    records, counters, *_ = search(
        tmp_path, reflector=HashWriter("reflect", fails_on="a red drum"), refiner=HashWriter("refine", "a red drum")
    )
    assert counters.text_failures == 2 * 6
    for record in records[5][4:]:
        assert record["reflection"] == ""
        assert record["refined_prompt"] is None
        assert record["text_errors"] == ["reflection: no answer", "refined prompt: no answer"]
    assert not any(record["text_errors"] for record in records[3] + records[4])


def test_noise_alone_without_a_verifier(tmp_path):
    Search(CONFIG, FakePipeline(), None, None, tmp_path).run({3: ENTRIES[3]})
    assert sorted(folders(tmp_path / "00003")) == ["midimg", "samples"]
    assert len(list((tmp_path / "00003/samples").iterdir())) == 4


def test_noise_and_reflect_share_their_noise_images(tmp_path):
    search(tmp_path / "reflect", entries={3: ENTRIES[3]})
    Search(CONFIG, FakePipeline(), HashVerifier(), None, tmp_path / "noise").run({3: ENTRIES[3]})
    for file in (tmp_path / "noise/00003/samples").iterdir():
        assert file.read_bytes() == (tmp_path / "reflect/00003/samples" / file.name).read_bytes()


def test_images_are_scored_while_others_are_made(tmp_path):
    """The first batch's score is only given once the second batch is under way."""
    second = threading.Event()

    class Waiting(HashVerifier):
        def score(self, images, items):
            assert len(self.seen) or second.wait(10)
            return super().score(images, items)

    class Pipe(FakePipeline):
        def without_lora(self):
            return self

        def generate(self, prompts, *, on_images, **more):
            def heard(first, images):
                on_images(first, images)
                if first:
                    second.set()

            return super().generate(prompts, on_images=heard, **more)

    config = replace(CONFIG, settings=replace(CONFIG.settings, batch_size=2))
    counters = Search(config, Pipe(), Waiting(), None, tmp_path).run({3: ENTRIES[3]})
    assert counters.scored == 4


def test_an_interrupted_stage_keeps_the_records_of_what_was_scored(tmp_path, monkeypatch):
    class AtOnce:
        def __init__(self, workers):
            pass

        def submit(self, function, *args):
            done = Future()
            done.set_result(function(*args))
            return done

        def shutdown(self, **more):
            pass

    class Pipe(FakePipeline):
        def without_lora(self):
            return self

        def generate(self, prompts, *, on_images, **more):
            def heard(first, images):
                if first == 6:
                    raise KeyboardInterrupt
                on_images(first, images)

            return super().generate(prompts, on_images=heard, **more)

    monkeypatch.setattr(engine, "ThreadPoolExecutor", AtOnce)
    with pytest.raises(KeyboardInterrupt):
        Search(CONFIG, Pipe(), HashVerifier(), None, tmp_path).run({3: ENTRIES[3], 4: ENTRIES[4]})
    for index, count in {3: 4, 4: 2}.items():
        records = [json.loads(line) for line in (tmp_path / f"{index:05d}/records.jsonl").read_text().splitlines()]
        assert [record["id"] for record in records] == list(range(count))
        assert all(record["verdict"]["score"] == score_in(tmp_path, record) for record in records)


def test_a_folder_with_files_is_refused(tmp_path):
    claim_folder(tmp_path / "new/run")
    (tmp_path / "new/run/kept.txt").write_text("x")
    with pytest.raises(ValueError, match="holds files of another run"):
        claim_folder(tmp_path / "new/run")
    assert (tmp_path / "new/run/kept.txt").read_text() == "x"


def test_only_one_of_two_runs_that_found_a_folder_empty_gets_it(tmp_path):
    for _ in range(2):
        claim_folder(tmp_path / "run")
    write_config(tmp_path / "run", {"seed": 1})
    with pytest.raises(ValueError, match="holds files of another run"):
        write_config(tmp_path / "run", {"seed": 2})
    assert (tmp_path / "run/config.yaml").read_text() == "seed: 1\n"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def refused(dir):
        raise PermissionError(13, "Permission denied")

    # Not by permissions: they do not hold for root.
    monkeypatch.setattr("rflow_jax.search.store.tempfile.TemporaryFile", refused)
    with pytest.raises(ValueError, match=r"cannot use this folder \(Permission denied\)"):
        claim_folder(tmp_path)
