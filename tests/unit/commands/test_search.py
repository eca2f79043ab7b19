"""``rflow noise``, ``noise-prompt`` and ``reflect`` with a pipeline and models that answer at once."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import rflow_jax.generation.pipeline
import rflow_jax.search.run
from rflow_jax.commands.main import main
from rflow_jax.errors import InputError
from rflow_jax.search import prompt_folder
from rflow_jax.search.config import RunConfig, SearchConfig
from rflow_jax.search.prompt_folder import JOURNAL, read_records
from rflow_jax.utils import cli
from tests.kit.fake_pipeline import instead_of_loading
from tests.kit.searching import PRICE, files

SIZES = {"height": 16, "width": 16, "condition_size": 16, "batch_size": 3}
ASKED = {"name": "tests.kit.searching:config_verifier", "concurrency": 2}
WRITES = {"name": "tests.kit.searching:config_writer", "concurrency": 2}
CONFIG = {
    "model": "m",
    "lora": "l",
    "noise": {"search_rounds": 1, "search_branch": 2},
    "reflect": {"search_rounds": 2, "search_branch": 2},
    "sampling": SIZES,
    "verifier": ASKED,
    "reflector": WRITES,
    "refiner": WRITES,
}
PER_PROMPT = 2 + 4


@pytest.fixture
def pipe(monkeypatch):
    return instead_of_loading(monkeypatch)


@pytest.fixture
def given(tmp_path):
    """(configuration file, prompt file of five prompts)."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "picture {n}"}}\n' for n in range(5)))
    return tmp_path / "config.yaml", tmp_path / "prompts.jsonl"


def call(command: str, given: tuple[Path, Path], out: Path, *flags: str) -> int:
    argv = [command, f"--config={given[0]}", f"--prompts={given[1]}", f"--out={out}", *flags]
    return cli.run(lambda: main(argv))


def results(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(out).items() if not name.startswith(("usage", "config"))}


def test_a_finished_folder_needs_nothing_and_says_so(pipe, given, tmp_path, capsys):
    out = tmp_path / "run"
    assert call("reflect", given, out) == 0
    assert f"5 prompts, {5 * PER_PROMPT} images, {5 * PER_PROMPT} scored, 0 without" in capsys.readouterr().out
    before, times = files(out), {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    pipe.before = lambda requests: pytest.fail("nothing is to be made")
    assert call("reflect", given, out) == 0
    assert capsys.readouterr() == (f"{out}: all 5 prompts are done; nothing to do\n", "")
    assert files(out) == before
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == times


def test_further_prompts_are_added_to_a_folder(pipe, given, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert call("reflect", given, whole) == 0
    made = len(pipe.requests)
    assert call("reflect", given, out, "--start=1", "--end=3") == 0
    assert call("reflect", given, out, "--prompts_in_flight=1") == 0
    assert len(pipe.requests) == 2 * made
    assert results(out) == results(whole)


def test_a_prompt_whose_records_are_there_is_finished_once_more_if_its_journal_is(pipe, given, tmp_path):
    out = tmp_path / "run"
    assert call("noise", given, out, "--end=1") == 0
    before = results(out)
    notes = [{"id": record["id"], "verdict": record["verdict"]} for record in read_records(out / "00000")]
    (out / "00000" / JOURNAL).write_text("".join(json.dumps(note) + "\n" for note in notes))
    pipe.without_lora().before = lambda requests: pytest.fail("nothing is to be made")
    assert call("noise", given, out, "--end=1") == 0
    assert results(out) == before


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_shares_cover_every_prompt_once_and_together_they_are_the_whole(pipe, given, tmp_path, processes, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert call("noise", given, whole) == 0
    made = len(pipe.requests)
    found = []
    for number in reversed(range(processes)):
        before = {path.name for path in out.glob("0*")} if out.exists() else set()
        assert call("noise", given, out, f"--process_index={number}", f"--process_count={processes}") == 0
        mine = {path.name for path in out.glob("0*")} - before
        assert mine == {f"{index:05d}" for index in range(number, 5, processes)}
        found += mine
    assert sorted(found) == [f"{index:05d}" for index in range(5)]
    assert len(pipe.requests) == 2 * made
    assert results(out) == results(whole)
    if processes == 7:
        assert "all 0 prompts are done" in capsys.readouterr().out


@pytest.mark.parametrize(("index", "count"), [(1, 1), (2, 2), (-1, 2), (0, 0)])
def test_an_index_beyond_the_processes_is_refused(index, count):
    with pytest.raises(InputError, match=r"^process_(index|count) is -?\d: give "):
        RunConfig("p", "o", process_index=index, process_count=count)


def test_usage_is_kept_over_starts_and_a_budget_stops_and_goes_on(pipe, given, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert call("reflect", given, whole) == 0
    questions = 5 * (PER_PROMPT + 2 * 4)
    found = json.loads((whole / "usage.json").read_text())
    assert found["cost"] == pytest.approx(questions * PRICE)
    assert found["images"] == 5 * PER_PROMPT
    capsys.readouterr()
    assert call("reflect", given, out, "--budget=0.2") == 1
    stopped = capsys.readouterr()
    assert "stopped: the budget of $0.2 is spent ($0.2" in stopped.err
    assert "the same command with a larger budget continues" in stopped.err
    spent = json.loads((out / "usage.json").read_text())
    # Calls that were under way when it was spent are answered; each of the three models has two at once, and may have
    # taken up another two before the first of these told its cost.
    assert 0.2 <= spent["cost"] <= 0.2 + 3 * (2 + 2) * PRICE + 1e-9
    assert call("reflect", given, out, "--budget=100") == 0
    assert results(out) == results(whole)
    total = json.loads((out / "usage.json").read_text())
    assert total["cost"] == pytest.approx(questions * PRICE)
    assert total["images"] == 5 * PER_PROMPT
    assert {role: usage["calls"] for role, usage in total["roles"].items()} == {
        "verifier": 30, "reflector": 20, "refiner": 20
    }  # fmt: skip


def test_another_setting_is_named_before_a_model_is_loaded(pipe, given, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert call("noise", given, out, "--end=1") == 0
    before = files(out)
    capsys.readouterr()
    monkeypatch.setattr(rflow_jax.generation.pipeline, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    assert call("noise", given, out, "--seed=5") == 2
    assert "seed is 0 there and 5 now" in capsys.readouterr().err
    assert call("reflect", given, out) == 2
    assert "contains another search" in capsys.readouterr().err
    given[1].write_text('{"prompt": "other"}\n')
    assert call("noise", given, out) == 2
    assert "another prompt than number 0" in capsys.readouterr().err
    assert files(out) == before


def test_what_was_written_is_a_configuration_of_this_search_alone(pipe, given, tmp_path, capsys):
    assert call("noise", given, tmp_path / "run", "--end=1") == 0
    again = (tmp_path / "run/config.yaml", given[1])
    assert call("noise", again, tmp_path / "again") == 0
    assert read_records(tmp_path / "again/00000") == read_records(tmp_path / "run/00000")
    capsys.readouterr()
    assert call("noise-prompt", again, tmp_path / "other") == 2
    assert "strategy is noise: this configuration is of rflow noise" in capsys.readouterr().err


def test_reflect_begins_with_the_images_of_another_run(pipe, given, tmp_path):
    assert call("noise", given, tmp_path / "noise") == 0
    made = len(pipe.requests)
    assert call("reflect", given, tmp_path / "run", f"--images={tmp_path / 'noise'}", "--start=3") == 0
    assert len(pipe.requests) - made == 2 * 4
    records = read_records(tmp_path / "run/00004")
    assert [record["stage"] for record in records] == ["given"] * 2 + ["reflect"] * 4
    for number in range(2):
        name = f"00004/samples/{number:05d}.png"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "noise" / name).read_bytes()


def test_images_are_of_use_to_reflect_alone_and_every_prompt_needs_some(pipe, given, tmp_path, capsys):
    assert call("noise", given, tmp_path / "run", "--images=x") == 2
    assert "only reflect begins with the images of another run" in capsys.readouterr().err
    assert call("reflect", given, tmp_path / "run", f"--images={tmp_path}/none") == 2
    assert "no images to begin with; prompt 0" in capsys.readouterr().err


def test_noise_prompt_refines_each_branch(pipe, given, tmp_path):
    assert call("noise-prompt", given, tmp_path / "run", "--noise.search_rounds=3", "--end=1") == 0
    records = read_records(tmp_path / "run/00000")
    assert [record["parent"] for record in records] == [None, None, 0, 1, 2, 3]
    for record in records[2:]:
        assert record["refined_prompt"].startswith("refine")
        assert record["lora"] is None
    told = {request.refined_prompt for request in pipe.requests}
    assert told == {record["refined_prompt"] for record in records}
    assert not any(sent.lora for sent in pipe.batches)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("noise-prompt", {"verifier": "none"}, "verifier.name none serves random noise only"),
        ("noise", {"verifier": "none", "stop_score": 9.0}, "verifier.name none serves random noise only"),
        ("noise-prompt", {"method": "zero_order"}, "noise-prompt takes fresh noise"),
        ("reflect", {"lora": None}, "set lora"),
        ("reflect", {"branches": 3}, "search_branch is 3, but the noise stage makes only 2"),
        ("noise", {"budget": 1.0, "verifier": "openai"}, "the price of verifier is not known"),
        ("reflect", {"budget": 1.0, "writer": "http"}, "the price of reflector is not known"),
        ("noise-prompt", {"budget": 1.0, "writer": "http"}, "the price of refiner is not known"),
    ],
)
def test_what_does_not_fit_a_search_is_said(kind, changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes).require_fit(kind, given=False)


def config(verifier=ASKED["name"], writer=WRITES["name"], method="random", branches=2, lora: str | None = "l", **more):
    from rflow_jax.search.config import NoiseStage, ReflectStage
    from rflow_jax.verifiers.config import VERIFIERS
    from rflow_jax.writers.base import WRITERS

    return SearchConfig(
        "m",
        lora,
        noise=NoiseStage(1, 2, method=method),
        reflect=ReflectStage(1, branches),
        verifier=VERIFIERS.parse({"name": verifier}),
        reflector=WRITERS.parse({"name": writer}),
        refiner=WRITERS.parse({"name": writer}),
        **more,
    )


def test_what_fits_is_let_through():
    config(branches=3).require_fit("reflect", given=True)
    config(budget=1.0).require_fit("reflect", given=False)
    config(budget=1.0, verifier="none", writer="http").require_fit("noise", given=False)
    config(verifier="none").require_fit("noise", given=False)


def test_a_second_process_is_refused_before_models_and_leaves_no_mark(pipe, given, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    said = []

    def second(requests):
        with monkeypatch.context() as patched:
            patched.setattr(rflow_jax.search.run, "_make_models", lambda *_: pytest.fail("no model is to be made"))
            said.append(call("noise", given, out))

    pipe.without_lora().before = second
    assert call("noise", given, out, "--end=1") == 0
    assert set(said) == {2}
    assert capsys.readouterr().err.startswith(f"error: {out}: another process is using this folder")
    assert not list(out.glob(".*"))


def test_a_folder_that_is_deleted_during_a_search_is_not_made_again(pipe, given, tmp_path, capsys):
    out = tmp_path / "run"
    pipe.without_lora().before = lambda requests: shutil.rmtree(out, ignore_errors=True)
    assert call("noise", given, out) == 1
    assert capsys.readouterr().err.count(f"error: {out}: this folder is gone") == 1
    assert not out.exists()


def test_a_moved_folder_goes_on_under_its_new_name(pipe, given, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert call("noise", given, whole) == 0
    pipe.without_lora().before = lambda requests: out.exists() and out.rename(tmp_path / "moved")
    assert call("noise", given, out) == 1
    pipe.without_lora().before = lambda requests: None
    assert call("noise", given, tmp_path / "moved") == 0
    assert results(tmp_path / "moved") == results(whole)


def test_records_are_read_once_at_a_start(pipe, given, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert call("noise", given, out) == 0
    read = []
    monkeypatch.setattr(prompt_folder, "read_records", lambda folder: read.append(folder) or read_records(folder))
    assert call("noise", given, out) == 0
    assert len(read) == len(set(read)) == 5


@pytest.mark.parametrize("flag", ["--out=", "--model=", "--prompts=", "--lora=", "--images="])
def test_an_empty_path_is_refused(pipe, given, tmp_path, capsys, flag):
    assert call("reflect", given, tmp_path / "run", flag) == 2
    assert capsys.readouterr().err == f"error: {flag[:-1]} is empty: give a value, or leave it out\n"
