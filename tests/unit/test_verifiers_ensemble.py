"""An ensemble of verifiers: who is asked when, what is told, and searches that it decides."""

import json
import random
import threading
import time
import zlib

import pytest
import yaml

import infer
from rflow_jax import cli
from rflow_jax.chat import CLOSED, png_bytes
from rflow_jax.errors import InputError
from rflow_jax.report.runs import read_run
from rflow_jax.search.config import SearchConfig
from rflow_jax.search.journal import JOURNAL
from rflow_jax.search.nfe import FilterConfig, filter_nfe
from rflow_jax.search.run_folder import public_section
from rflow_jax.search.store import read_records
from rflow_jax.usage import Meter
from rflow_jax.verifiers import VerifierConfig, make_verifier
from rflow_jax.verifiers.base import EnsembleVerdict, MemberVerdict, Verdict, Verifier, read_verdict
from rflow_jax.verifiers.ensemble import EnsembleVerifier
from rflow_jax.verifiers.ranking import best_first, rated
from tests.kit.asking import items, pictures, wait_until
from tests.kit.fake_pipeline import instead_of_loading
from tests.kit.openai_server import Fault, OpenAIServer, decision_of, score_of
from tests.kit.searching import HashVerifier, drive, models, prompt_run

OWN = {"name": "tests.unit.test_verifiers_ensemble:make"}
MADE: dict[str, HashVerifier] = {}


class Backwards(HashVerifier):
    """Scores the other way round."""

    def _verdict(self, png, item):
        verdict = super()._verdict(png, item)
        return Verdict(None if verdict.score is None else -verdict.score, error=verdict.error)


def make(config, meter):
    """A verifier whose ``model`` says how it is: {"name", "concurrency", "batch_size", "fails", "backwards"}."""
    how = json.loads(config.model or "{}")
    kind = Backwards if how.pop("backwards", False) else HashVerifier
    bad = how.pop("fails", "")
    made = kind(meter, fails=lambda png: bool(bad) and str(score_of(png))[-1] in bad, **how)
    MADE[made.name] = made
    return made


def own(name, **how):
    return OWN | {"model": json.dumps({"name": name, "concurrency": 1, **how})}


def config(*members, **options):
    return VerifierConfig(name="ensemble", options={"members": list(members)} | options)


def test_it_is_a_verifier_and_counts_for_all():
    meter = Meter()
    verifier = make_verifier(config(own("a", batch_size=4), own("b", batch_size=3)), meter)
    assert isinstance(verifier, EnsembleVerifier)
    assert isinstance(verifier, Verifier)
    assert (verifier.name, verifier.concurrency, verifier.batch_size) == ("ensemble of a, b", 1, 4)
    verdicts = verifier.score(pictures(5), items(5))
    assert [[m.verdict.score for m in v.members] for v in verdicts] == [
        [score_of(png_bytes(i))] * 2 for i in pictures(5)
    ]
    assert all(v.explanation.startswith("a: Overall: ") and "\nb: Overall: " in v.explanation for v in verdicts)
    assert meter.snapshot().calls == 10
    assert verifier.score([], []) == []
    verifier.close()
    assert MADE["a"].closed
    assert MADE["b"].closed


@pytest.mark.parametrize(
    ("members", "limits"),
    [
        ([own("a", concurrency=16), own("b", concurrency=4)], (16, 1)),
        ([own("a", batch_size=8), own("b", batch_size=2)], (1, 8)),
        ([own("a", concurrency=16), own("b", batch_size=8)], (2, 8)),
    ],
)
def test_enough_images_at_once_for_the_one_that_takes_most(members, limits):
    verifier = EnsembleVerifier(config(*members))
    assert (verifier.concurrency, verifier.batch_size) == limits
    verifier.close()


def test_those_in_this_process_take_turns_and_the_others_work_meanwhile():
    verifier = EnsembleVerifier(config(own("a"), own("b"), own("c", concurrency=3)))
    lock, busy, met = threading.Lock(), set(), set()

    def at_work(name):
        def wait():
            with lock:
                busy.add(name)
                met.add(frozenset(busy))
            time.sleep(0.02)
            with lock:
                busy.discard(name)

        return wait

    for name in "abc":
        MADE[name].wait = at_work(name)
    verifier.score(pictures(6), items(6))
    verifier.close()
    assert not any({"a", "b"} <= together for together in met)
    assert {frozenset("ac"), frozenset("bc")} & met
    assert MADE["c"].most_at_once == 3


def test_calls_at_once_share_a_members_batches():
    """A batch is not left half empty since another thread asks for the rest."""
    verifier = EnsembleVerifier(config(own("a", batch_size=4), own("b", concurrency=8)))
    sizes, gate = [], threading.Event()
    member = MADE["a"]
    right = member.score
    member.score = lambda images, items: sizes.append(len(images)) or (gate.wait(20) and right(images, items))
    threads = [threading.Thread(target=verifier.score, args=(pictures(2, k), items(2))) for k in range(5)]
    for thread in threads:
        thread.start()
    wait_until(lambda: MADE["b"].seen.total() == 10)
    gate.set()
    for thread in threads:
        thread.join(20)
    verifier.close()
    assert sum(sizes) == 10
    assert sizes[1:3] == [4, 4]


def test_a_member_that_failed_is_said_and_the_others_count():
    verifier = EnsembleVerifier(config(own("a"), own("b", fails="02468")))
    images = pictures(12)
    verdicts = verifier.score(images, items(12))
    verifier.close()
    for image, verdict in zip(images, verdicts, strict=True):
        failed = str(score_of(png_bytes(image)))[-1] in "02468"
        assert verdict.scored
        assert verdict.error == ("b: gone" if failed else None)
        assert [member.verdict.scored for member in verdict.members] == [True, not failed]
        assert ("b: " in verdict.explanation) is not failed
    assert {verdict.error for verdict in verdicts} == {None, "b: gone"}


def test_an_image_that_nobody_scores_is_unscored_with_all_reasons():
    verifier = EnsembleVerifier(config(own("a", fails="0123456789"), own("b", fails="0123456789")))
    (verdict,) = verifier.score(pictures(1), items(1))
    verifier.close()
    assert not verdict.scored
    assert verdict.error == "a: gone; b: gone"
    assert verdict.evaluation() == "No evaluation of this image is available."


def test_closing_gives_up_what_waits_in_any_thread():
    verifier = EnsembleVerifier(config(own("a"), own("b", concurrency=2)))
    gate = threading.Event()
    MADE["a"].wait = lambda: gate.wait(20)
    found = []
    thread = threading.Thread(target=lambda: found.extend(verifier.score(pictures(4), items(4))))
    thread.start()
    wait_until(lambda: MADE["b"].seen.total() == 4 and MADE["a"].most_at_once == 1)
    verifier.close()
    thread.join(20)
    assert not thread.is_alive()
    gate.set()
    assert [verdict.error for verdict in found] == [f"a: {CLOSED}"] * 4
    assert all(verdict.members[1].verdict.scored for verdict in found)
    (after,) = verifier.score(pictures(1), items(1))
    assert after.error == f"a: {CLOSED}; b: {CLOSED}"


def test_a_bug_in_a_member_is_no_verdict():
    verifier = EnsembleVerifier(config(own("a"), own("b")))
    MADE["b"].score = lambda images, items: 1 / 0
    with pytest.raises(ZeroDivisionError):
        verifier.score(pictures(3), items(3))
    MADE["b"].score = lambda images, items: []
    with pytest.raises(ValueError, match="zip"):
        verifier.score(pictures(3), items(3))
    verifier.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give members"),
        ({"members": []}, "give members"),
        ({"memebers": []}, "unknown key memebers: did you mean members?"),
        ({"members": ["nvila"]}, "members is"),
        ({"members": [{"name": "clip", "modell": "x"}]}, r"members\[0\]: unknown key modell: did you mean model\?"),
        ({"members": [{"name": "clip"}, {"name": "nvla"}]}, "unknown verifier 'nvla': did you mean nvila"),
        ({"members": [{"name": "ensemble", "options": {"members": [OWN]}}]}, "a member cannot be ensemble"),
        ({"members": [{"name": "none"}]}, "a member cannot be none"),
        ({"members": [OWN], "weights": [1.0, 2.0]}, "a number above 0 for each of the 1 members"),
        ({"members": [OWN, OWN], "weights": [1.0, 0.0]}, "a number above 0"),
        ({"members": [OWN, OWN], "weights": ["much", 1.0]}, "weights is"),
    ],
)
def test_options_that_are_not_usable(options, message):
    with pytest.raises(InputError, match=message):
        VerifierConfig(name="ensemble", options=options)


def test_a_member_that_cannot_be_made_leaves_no_other_waiting():
    with pytest.raises(InputError, match="name the checkpoint"):
        make_verifier(config(own("first"), {"name": "reward"}))
    assert MADE["first"].closed


def test_what_is_published_holds_no_secret_of_a_member():
    member = {"name": "openai", "base_url": "http://me:secret@host/v1?key=hidden", "concurrency": 3}
    verifier = config(own("a"), member)
    section = public_section(verifier)
    assert section["options"]["members"][1]["base_url"] == "http://host/v1"
    assert section["options"]["members"][1]["model"] == "gpt-4o"
    assert "secret" not in repr(section) + repr(verifier)
    assert VerifierConfig(**section).members[0] == verifier.members[0]


def search_config(**more):
    return SearchConfig(model="m", lora="l", **more)


def test_an_ensemble_in_a_search_needs_prices_for_a_budget_and_no_score_to_stop_at():
    with pytest.raises(InputError, match="an ensemble ranks"):
        search_config(verifier=config(own("a")), stop_score=8.0).require_fit("noise", False)
    unpriced = search_config(verifier=config(own("a"), {"name": "openai"}), budget=1.0)
    with pytest.raises(InputError, match="the price of verifier is not known"):
        unpriced.require_fit("noise", False)
    priced = {"name": "openai", "price_input": 1.0, "price_output": 1.0}
    search_config(verifier=config(own("a"), priced), budget=1.0).require_fit("noise", False)


# ---- searches ----


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
    assert rated(verdicts) == verdicts
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
        "settings": {"height": 16, "width": 16, "condition_size": 16, "batch_size": 3},
        "verifier": {"name": "ensemble", "options": {"members": [own("a"), own("b", backwards=True, fails="123")],
                                                     "weights": [2.0, 1.0]}},
        "reflector": writes,
        "refiner": writes,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def call(given, out, *flags):
    argv = ["reflect", f"--config={given / 'config.yaml'}", f"--prompts={given / 'prompts.jsonl'}", f"--out={out}"]
    return cli.run(lambda: cli.dispatch(infer.COMMANDS, "", [*argv, *flags]))


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
    options = {"members": [own("a"), own("b")], "weights": [2.0, 1.0]}
    assert call(given, out, f"--verifier.options={json.dumps(options)}") == 2
    assert "verifier.options.members is" in capsys.readouterr().err


def test_score_ranks_the_images_of_each_prompt(given, tmp_path, capsys):
    out = tmp_path / "run"
    assert call(given, out) == 0
    capsys.readouterr()
    file = tmp_path / "o.jsonl"
    argv = ["score", str(out), "--samples=midimg", f"--config={given / 'config.yaml'}", f"--out={file}"]
    for _ in range(2):
        assert cli.run(lambda: cli.dispatch(infer.COMMANDS, "", argv)) == 0
        printed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line[2] for line in printed] == [line["image"] for line in lines]
        for prompt in range(2):
            want = {r["file"]: r["verdict"]["score"] for r in read_records(out / f"{prompt:05d}")}
            found = {line["image"]: line["verdict"]["score"] for line in lines if f"/{prompt:05d}/" in line["image"]}
            assert {name.partition(f"{prompt:05d}/")[2]: score for name, score in found.items()} == want
        assert [float(line[0]) for line in printed] == pytest.approx([x["verdict"]["score"] for x in lines], rel=1e-5)


def test_members_over_http_are_asked_at_the_same_time(monkeypatch):
    with OpenAIServer([Fault("status", status=401, when=lambda call: call.model == "bad")], delay=0.3) as server:
        member = {"base_url": server.base_url, "max_retries": 0}
        verifier = EnsembleVerifier(
            config(member | {"name": "openai", "model": "x"}, member | {"name": "yesno", "model": "y"},
                   member | {"name": "openai", "model": "bad"})
        )  # fmt: skip
        images = pictures(4)
        verdicts = verifier.score(images, items(4))
        assert server.most_at_once > 8
        verifier.close()
    assert verifier.concurrency == 8
    for image, verdict in zip(images, verdicts, strict=True):
        grade, word, failed = (member.verdict for member in verdict.members)
        png = png_bytes(image)
        assert grade.score == score_of(png)
        assert (word.label, word.score) == (decision_of(png)[0], pytest.approx(decision_of(png)[1]))
        assert not failed.scored
        assert verdict.error.startswith("openai bad: ")
