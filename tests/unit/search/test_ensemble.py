"""Searches whose images are compared by an ensemble of verifiers."""

import json
import random
import zlib

import pytest
import yaml

from rflow_jax.commands.filter import FilterConfig, filter_nfe
from rflow_jax.commands.main import main
from rflow_jax.report.runs import read_run
from rflow_jax.search.prompt_folder import JOURNAL, read_records
from rflow_jax.utils import cli
from rflow_jax.verifiers.base import EnsembleVerdict, MemberVerdict, Verdict, read_verdict
from rflow_jax.verifiers.ranking import best_first, with_ensemble_scores
from tests.kit.ensemble import MADE, own
from tests.kit.fake_pipeline import instead_of_loading
from tests.kit.searching import HashVerifier, drive, models, prompt_run


class Two(HashVerifier):
    """An ensemble at once: by the hash, and by the hash backwards, which fails for some."""

    def _verdict(self, png, item):
        first = super()._verdict(png, item)
        failed = str(first.score)[-1] in "13579"
        second = Verdict(None, error="gone") if failed else Verdict(float(zlib.crc32(png) % 7))
        members = (MemberVerdict("a", 2.0, first), MemberVerdict("b", 1.0, second))
        return EnsembleVerdict(None, error="b: gone" if failed else None, explanation="a: fine", members=members)


def test_every_choice_of_a_search_goes_by_the_ensemble(tmp_path):
    asked = models()
    asked.verifier.__class__ = Two
    run = prompt_run(tmp_path)
    drive(run, asked, random.Random(1))
    folder = tmp_path / "00005"
    records = read_records(folder)
    verdicts = [read_verdict(record["verdict"]) for record in records]
    assert all(isinstance(verdict, EnsembleVerdict) for verdict in verdicts)
    assert with_ensemble_scores(verdicts) == verdicts
    content = [(folder / record["file"]).read_bytes() for record in records]
    assert (folder / "samples_best/00000.png").read_bytes() == content[best_first(verdicts)[0]]
    # The parents of the first corrections: the two best of the four noise images.
    first = [record for record in records if record["round"] == 2]
    assert sorted(record["parent"] for record in first) == sorted(best_first(verdicts[:4])[:2])
    (tmp_path / "config.yaml").write_text("strategy: reflect\nverifier: {name: ensemble}\n")
    assert filter_nfe(FilterConfig(str(tmp_path), [1, 2, 4, 8])) == 0
    for k in (1, 2, 4, 8):
        assert (folder / f"nfe{k}/00000.png").read_bytes() == content[best_first(verdicts[:k])[0]]
    shown = read_run(tmp_path)
    assert [shown.prompts[0].best(k) for k in (1, 2, 4, 8)] == [best_first(verdicts[:k])[0] for k in (1, 2, 4, 8)]
    assert not shown.decides
    assert shown.unscored == 0
    assert [picture.verdict.score for picture in shown.prompts[0].pictures] == [verdict.score for verdict in verdicts]


@pytest.fixture
def given(tmp_path, monkeypatch):
    instead_of_loading(monkeypatch)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    writes = {"name": "tests.kit.searching:config_writer"}
    content = {
        "model": "m",
        "lora": "l",
        "noise": {"search_rounds": 2, "search_branch": 2},
        "reflect": {"search_rounds": 2, "search_branch": 2},
        "sampling": {"height": 16, "width": 16, "condition_size": 16, "batch_size": 3},
        "verifier": {"name": "ensemble", "weights": [2, 1],
                     "members": [own("a"), own("b", backwards=True, fails="123")]},
        "reflector": writes,
        "refiner": writes,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def call(given, out, *flags):
    argv = ["reflect", f"--config={given / 'config.yaml'}", f"--prompts={given / 'prompts.jsonl'}", f"--out={out}"]
    return cli.run(lambda: main([*argv, *flags]))


def results(out):
    return {
        str(file.relative_to(out)): file.read_bytes()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.parent != out
    }


def test_a_search_goes_on_from_its_journal_and_its_own_configuration(given, tmp_path, capsys):
    out = tmp_path / "run"
    assert call(given, out) == 0
    before = results(out)
    errors = [record["verdict"]["error"] for n in range(2) for record in read_records(out / f"0000{n}")]
    assert set(errors) == {None, "b: gone"}
    said = capsys.readouterr()
    assert f"16 scored, 0 without a score, {errors.count('b: gone')} of them not by all members" in said.out
    assert "the first failure was: score: b: gone" in said.err
    records = read_records(out / "00000")
    notes = [{"id": record["id"], "verdict": record["verdict"] | {"score": None}} for record in records]
    texts = [
        {"id": r["id"], "reflection": {"text": r["reflection"]}, "refined_prompt": {"text": r["refined_prompt"]}}
        for r in records
        if r["stage"] == "reflect"
    ]
    (out / "00000" / JOURNAL).write_text("".join(json.dumps(note) + "\n" for note in [*notes, *texts]))
    (out / "00000/records.jsonl").unlink()
    for name in "ab":
        MADE.pop(name)
    assert call(given, out, f"--config={out / 'config.yaml'}") == 0
    assert results(out) == before
    assert not MADE["a"].seen
    capsys.readouterr()
    assert call(given, out, f"--verifier.members={json.dumps([own('a'), own('b')])}") == 2
    assert "verifier.members is" in capsys.readouterr().err


def test_score_ranks_the_images_of_each_prompt(given, tmp_path, capsys):
    out = tmp_path / "run"
    assert call(given, out) == 0
    capsys.readouterr()
    file = tmp_path / "o.jsonl"
    argv = ["score", str(out), "--samples=midimg", f"--config={given / 'config.yaml'}", f"--out={file}"]
    for _ in range(2):
        assert cli.run(lambda: main(argv)) == 0
        printed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line[2] for line in printed] == [line["image"] for line in lines]
        for prompt in range(2):
            want = {r["file"]: r["verdict"]["score"] for r in read_records(out / f"{prompt:05d}")}
            found = {line["image"]: line["verdict"]["score"] for line in lines if f"/{prompt:05d}/" in line["image"]}
            assert {name.partition(f"{prompt:05d}/")[2]: score for name, score in found.items()} == want
        assert [float(line[0]) for line in printed] == pytest.approx([x["verdict"]["score"] for x in lines], rel=1e-5)
