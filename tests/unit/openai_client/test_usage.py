"""Counting what is used."""

import json
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.openai_client.usage import Usage, UsageTracker

COUNT = st.integers(0, 10**6)
USAGES = st.builds(Usage, COUNT, COUNT, COUNT, COUNT, COUNT, COUNT, COUNT, st.none() | st.integers(0, 1000).map(float))


@given(USAGES, USAGES, USAGES)
def test_totals_add_up_in_any_order(one, two, three):
    assert one + Usage() == one
    assert one + two == two + one
    assert (one + two) + three == one + (two + three)
    assert (one + two).calls == one.calls + two.calls
    assert ((one + two).cost is None) == (one.cost is None or two.cost is None)


@given(USAGES)
def test_totals_survive_a_file_but_what_is_in_flight_does_not(used):
    again = Usage(**json.loads(json.dumps(used.as_dict())))
    assert again + Usage(in_flight=used.in_flight) == used
    assert again.in_flight == 0


def test_a_meter_goes_on_where_it_was_and_loses_nothing_between_threads():
    meter = UsageTracker(Usage(calls=5, cost=1.0))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [meter.add(Usage(calls=1, cost=0.5)) for _ in range(200)], range(8)))
    assert meter.snapshot() == Usage(calls=1605, cost=801.0)
