"""Timing in turns."""

from __future__ import annotations

import time

import pytest

from bigdl._base.errors import ConfigError
from bigdl.nano.bench import Timing, compare, measure, speedup


def test_percentiles_of_known_times():
    timing = Timing((tuple(float(ms) for ms in range(1, 51)), tuple(map(float, range(51, 101)))))
    assert (timing.median_ms, timing.p90_ms, timing.p99_ms) == (50.5, 90.0, 99.0)
    assert "100 calls" in repr(timing)


def test_one_call_is_all_percentiles():
    timing = Timing(((3.0,),))
    assert (timing.median_ms, timing.p90_ms, timing.p99_ms) == (3.0, 3.0, 3.0)


def test_a_sleep_takes_as_long_as_it_sleeps():
    assert 20 <= measure(lambda: time.sleep(0.02), turns=5).median_ms < 40


def test_speedup_of_two_sleeps():
    timed = compare({"slow": lambda: time.sleep(0.03), "fast": lambda: time.sleep(0.01)}, turns=5)
    assert 2 < speedup(timed["slow"], timed["fast"]) < 3.5


def test_a_disturbed_turn_is_outvoted():
    slow = Timing(((10.0,), (10.0,), (500.0,), (10.0,), (10.0,)))
    fast = Timing(((5.0,), (5.0,), (5.0,), (5.0,), (800.0,)))
    assert speedup(slow, fast) == 2.0


def test_calls_take_turns_and_the_first_changes():
    order = []
    calls = {
        name: lambda name=name: (order.append(name), time.sleep(0.005)) for name in ("a", "b")
    }
    compare(calls, warmup=0, turns=4)
    assert "".join(order[2:]) == "abbaabba"  # after one settling call each


def test_warm_up_is_not_timed():
    count = 0

    def slow_at_first():
        nonlocal count
        count += 1
        time.sleep(0.2 if count <= 2 else 0.006)

    assert measure(slow_at_first, warmup=2, turns=3).calls_ms[-1] < 150


def test_fast_calls_are_repeated_within_a_turn():
    timing = measure(lambda: None, turns=3)
    assert all(len(turn) > 50 for turn in timing.turns)
    assert timing.median_ms < 0.1


def test_the_budget_ends_it_after_three_turns():
    started = time.perf_counter()
    timing = measure(lambda: time.sleep(0.05), warmup=0, turns=1000, budget_s=0.01)
    assert len(timing.turns) == 3
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"calls": {}}, "no calls"),
        ({"warmup": -1}, "warmup=-1"),
        ({"turns": 0}, "turns=0"),
        ({"budget_s": 0}, "budget_s=0"),
        ({"turns": 0, "budget_s": -1}, "turns=0.*budget_s=-1"),
    ],
)
def test_numbers_that_make_no_sense(arguments, text):
    with pytest.raises(ConfigError, match=text):
        compare(**{"calls": {"one": lambda: None}, **arguments})


def test_what_a_call_raises_comes_out():
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure(fail)
