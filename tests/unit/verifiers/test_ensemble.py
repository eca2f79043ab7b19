"""An ensemble of verifiers: who is asked when, and what is told."""

import threading
import time

import pytest

from rflow_jax.errors import InputError, RunError, ServiceError
from rflow_jax.openai_client.messages import probe_picture
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.search.config import SearchConfig
from rflow_jax.search.run_folder import public_section
from rflow_jax.testing.openai_server import Fault, OpenAIServer, decision_of, score_of
from rflow_jax.utils.batching import CLOSED
from rflow_jax.utils.images import png_bytes
from rflow_jax.verifiers import VERIFIERS, make_verifier
from rflow_jax.verifiers.base import Verifier
from rflow_jax.verifiers.ensemble import EnsembleVerifier
from tests.kit.asking import items, pictures, wait_until
from tests.kit.ensemble import MADE, OWN, config, own


def test_it_is_a_verifier_and_counts_for_all():
    meter = UsageTracker()
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
    # The first is taken before the others ask; all but that and the last are full.
    assert set(sizes[1:-1]) == {4}


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
    closing = threading.Thread(target=verifier.close)
    closing.start()
    thread.join(20)
    assert not thread.is_alive()
    assert closing.is_alive()  # the call under way ends before anything of it is freed
    gate.set()
    closing.join(20)
    assert not closing.is_alive()
    assert MADE["a"].seen.total() == 1
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
    with pytest.raises(RunError, match=r"verifier b: score returned 0 results; expected a list of Verdict"):
        verifier.score(pictures(3), items(3))
    verifier.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "members: give some"),
        ({"members": []}, "members: give some"),
        ({"memebers": []}, r"unknown key verifier\.memebers: did you mean verifier\.members\?"),
        ({"members": ["nvila"]}, r"verifier\.members\[0\]: give a section"),
        (
            {"members": [{"name": "clip", "modell": "x"}]},
            r"members\[0\]\.modell: did you mean .*\[0\]\.model\?",
        ),
        (
            {"members": [{"name": "clip"}, {"name": "nvla"}]},
            r"members\[1\]\.name: unknown verifier 'nvla'",
        ),
        ({"members": [{"name": "ensemble", "members": [OWN]}]}, "a member cannot be ensemble"),
        ({"members": [{"name": "none"}]}, "a member cannot be none"),
        ({"members": [OWN], "weights": [1.0, 2.0]}, "a number above 0 for each of the 1 members"),
        ({"members": [OWN, OWN], "weights": [1.0, 0.0]}, "a number above 0"),
        ({"members": [OWN, OWN], "weights": ["much", 1.0]}, r"weights\[0\]: Input should be a valid number"),
    ],
)
def test_options_that_are_not_usable(options, message):
    with pytest.raises(InputError, match=message):
        VERIFIERS.parse({"name": "ensemble"} | options)


def test_a_member_that_cannot_be_made_leaves_no_other_waiting():
    with pytest.raises(InputError, match=r"members\[1\] of the ensemble: verifier package:Class: cannot import"):
        make_verifier(config(own("first"), {"name": "package:Class"}))
    assert MADE["first"].closed


def test_what_is_published_holds_no_secret_of_a_member():
    member = {"name": "openai", "base_url": "http://me:secret@host/v1?key=hidden", "concurrency": 3}
    verifier = config(own("a"), member)
    section = public_section(verifier)
    assert section["members"][1]["base_url"] == "http://host/v1"
    assert section["members"][1]["model"] == "gpt-4o"
    assert "secret" not in repr(section) + repr(verifier)
    assert VERIFIERS.parse(section).members[0] == verifier.members[0]


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


def test_members_over_http_are_asked_at_the_same_time(monkeypatch):
    first = png_bytes(probe_picture())
    fault = Fault("status", status=413, when=lambda call: call.model == "bad" and call.image != first)
    with OpenAIServer([fault], delay=0.3) as server:
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


def test_a_members_mistake_is_told_with_its_place_and_members_of_one_name_by_their_numbers():
    with pytest.raises(InputError, match=r"members\[1\]\.batch: did you mean .*\.batch_size"):
        make_verifier(config(own("a"), {"name": "nvila", "batch": 1}))
    verifier = EnsembleVerifier(config(own("a", fails="0123456789"), own("b"), own("a")))
    (verdict,) = verifier.score(pictures(1), items(1))
    verifier.close()
    assert verifier.name == "ensemble of a 1, b, a 2"
    assert verdict.error == "a 1: gone"


def test_services_are_asked_first_before_the_other_members_are_made():
    MADE.clear()
    away = {"name": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1", "max_retries": 0}
    with pytest.raises(ServiceError, match=r"^members\[1\]: m at http://127\.0\.0\.1:9/v1: no connection, or it broke"):
        make_verifier(config(own("a"), away), probe=True)
    assert not MADE
    verifier = make_verifier(config(own("a"), away), probe=False)
    assert [member.verifier.name for member in verifier._members] == ["a", "openai m"]
    verifier.close()
