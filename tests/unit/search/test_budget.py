"""What a run has used, over all its starts; and how busy its generator was."""

import json

import pytest

from rflow_jax.openai_client.usage import Usage
from rflow_jax.search import budget as module
from rflow_jax.search.budget import Budget
from rflow_jax.search.progress import BusyClock, SearchProgress

ROLES = ("verifier", "refiner")


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("rflow_jax.search.budget.time", clock)
    monkeypatch.setattr("rflow_jax.search.progress.time", clock)
    return clock


def read(path):
    return json.loads(path.read_text())


def test_totals_go_on_where_an_earlier_start_ended(tmp_path, clock):
    for start in range(1, 4):
        accounts = Budget(tmp_path, 0, ROLES, None)
        accounts.meters["verifier"].add(Usage(calls=2, attempts=3, prompt_tokens=10, in_flight=1, cost=0.25))
        accounts.meters["refiner"].add(Usage(calls=1, failures=1, cost=0.5))
        clock.now += 60
        accounts.write(4, 0.5)
        found = read(tmp_path / "usage.json")
        assert (found["seconds"], found["images"], found["cost"]) == (60.0 * start, 4 * start, 0.75 * start)
        assert found["generator_busy"] == 0.5
        assert found["roles"]["verifier"]["prompt_tokens"] == 10 * start
        assert "in_flight" not in found["roles"]["verifier"]
        assert found["roles"]["refiner"]["failures"] == start
        # Written again it counts nothing twice.
        accounts.write(4, None)
        assert read(tmp_path / "usage.json") == found | {"generator_busy": None}


def test_each_process_of_a_run_has_a_file_of_its_own(tmp_path):
    for place in (0, 1, 2):
        Budget(tmp_path, place, ROLES, None).write(place, None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["usage.json", "usage_1.json", "usage_2.json"]
    assert read(tmp_path / "usage_2.json")["images"] == 2


def test_it_is_written_now_and_then(tmp_path, clock):
    accounts = Budget(tmp_path, 0, ROLES, None)
    accounts.write(1, None, now=False)
    assert not (tmp_path / "usage.json").exists()
    clock.now += module.EVERY
    accounts.write(1, None, now=False)
    accounts.write(2, None, now=False)
    assert read(tmp_path / "usage.json")["images"] == 1
    accounts.write(2, None)
    assert read(tmp_path / "usage.json")["images"] == 2


def test_a_budget_counts_all_roles_and_all_starts(tmp_path):
    accounts = Budget(tmp_path, 0, ROLES, 1.0)
    assert accounts.over_budget() is None
    accounts.meters["verifier"].add(Usage(cost=0.6))
    assert accounts.over_budget() is None
    accounts.write(0, None)
    again = Budget(tmp_path, 0, ROLES, 1.0)
    again.meters["refiner"].add(Usage(cost=0.4))
    assert again.over_budget() == "the budget of $1 is spent ($1.00)"
    again.write(0, None)
    assert Budget(tmp_path, 0, ROLES, 2.0).over_budget() is None
    assert Budget(tmp_path, 0, ROLES, None).over_budget() is None


def test_a_file_that_cannot_be_read_is_a_new_beginning(tmp_path):
    for content in ("", "{half", "[1]", '{"roles": {"verifier": {"calls": 1, "of_the_future": 2}}}'):
        (tmp_path / "usage.json").write_text(content)
        assert Budget(tmp_path, 0, ROLES, None).total().calls == content.count("future")


def test_an_unknown_price_is_no_price(tmp_path):
    accounts = Budget(tmp_path, 0, ROLES, 1.0)
    accounts.meters["verifier"].add(Usage(calls=1, cost=None))
    accounts.write(0, None)
    assert read(tmp_path / "usage.json")["cost"] is None
    assert accounts.over_budget() is None


def test_busy_time_is_counted_since_the_programs_are_compiled(clock):
    busy = BusyClock()
    assert busy.fraction is None
    busy.sent(compiles=True)
    clock.now += 50  # compiles
    busy.arrived()
    clock.now += 1  # idle
    busy.sent(compiles=False)
    clock.now += 2
    busy.sent(compiles=False)  # behind the other
    clock.now += 1
    assert busy.fraction == pytest.approx(3 / 4)
    busy.arrived()
    clock.now += 3
    busy.arrived()
    clock.now += 1
    assert busy.fraction == pytest.approx(6 / 8)
    busy.sent(compiles=True)
    clock.now += 90
    busy.arrived()
    clock.now += 1
    busy.sent(compiles=False)
    clock.now += 1
    assert busy.fraction == pytest.approx(1 / 2)


def test_the_live_view_says_what_happens(clock):
    usage = Usage(calls=3, in_flight=2, cost=0.255)
    live = SearchProgress(10, BusyClock(), lambda: usage)
    live.made(3)
    live.spared(2)
    live.judged(None)
    live.judged("gone")
    live.text_failed("reflection", "no answer")
    clock.now += 2
    assert live.note() == "1.50 images/s, 2 calls, 2 failures, $0.26"
    assert (live.images, live.scored, live.unscored, live.text_failures) == (3, 1, 1, 1)
    assert live.first_failure == "score: gone"


def test_without_a_terminal_it_prints_lines(monkeypatch, capsys):
    monkeypatch.setattr("rflow_jax.search.progress.LINE_EVERY", 0.01)
    live = SearchProgress(4, BusyClock(), Usage)
    with live:
        live.made(1)
        live._ended.wait(0.1)
    assert "1 of 4 images, " in capsys.readouterr().err
