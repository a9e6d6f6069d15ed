"""Timing of calls on this machine. Standard library only; knows no framework.

Machines are shared and change their clock, so a time by itself says little. What is to be
compared is timed in turns within one run, and ratios are taken turn by turn.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigdl._base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Timing", "compare", "measure", "speedup"]

# A turn of a fast call repeats it for about so long, so that the clock, the caches left by the
# other calls and the threads that they have woken don't count.
_TURN_S = 0.004
_MOST_CALLS_A_TURN = 200
# Slow calls settle at once; more of them would only take the time that timing needs.
_SETTLING_S = 1.0
# Between two calls of a turn, threads of a runtime that wait busily for its next call must give
# up the cores that the other runtime's threads need (some spin for milliseconds).
_REST_S = 0.002


@dataclass(frozen=True)
class Timing:
    """How long calls took.

    Args:
        turns: Milliseconds of each call, turn by turn.
    """

    turns: tuple[tuple[float, ...], ...]

    @property
    def calls_ms(self) -> list[float]:
        """All calls, fastest first."""
        return sorted(ms for turn in self.turns for ms in turn)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.calls_ms)

    @property
    def p90_ms(self) -> float:
        return self.percentile_ms(90)

    @property
    def p99_ms(self) -> float:
        return self.percentile_ms(99)

    def percentile_ms(self, share: float) -> float:
        """The time within which ``share`` per cent of the calls were done."""
        calls = self.calls_ms
        return calls[max(0, math.ceil(share / 100 * len(calls)) - 1)]

    def __repr__(self) -> str:
        return (
            f"Timing(median {self.median_ms:.4g} ms, p90 {self.p90_ms:.4g} ms, "
            f"p99 {self.p99_ms:.4g} ms, {len(self.calls_ms)} calls)"
        )


def measure(
    call: Callable[[], object],
    *,
    warmup: int = 3,
    turns: int = 50,
    budget_s: float | None = None,
) -> Timing:
    """Time ``call()`` alone; the arguments are those of ``compare``."""
    return compare({"call": call}, warmup=warmup, turns=turns, budget_s=budget_s)["call"]


def compare(
    calls: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 3,
    turns: int = 50,
    budget_s: float | None = None,
) -> dict[str, Timing]:
    """Time several calls in turns, so that whatever disturbs the machine disturbs them all.

    Args:
        calls: Functions without arguments, by name. Each turn runs all of them, in an order
            that changes from turn to turn.
        warmup: Untimed calls of each first, so caches and compilers settle; at least one, and
            no more once they took a second.
        turns: Turns to time at most. A call that takes microseconds is repeated within a turn.
        budget_s: No turn begins after so many seconds of timing, but for the first three.

    Returns:
        Milliseconds per call (not per row), by name.

    Raises:
        ConfigError: Nothing to time, or a number that makes no sense.
    """
    _check(calls, warmup, turns, budget_s)
    repeats = {name: _settle(call, warmup) for name, call in calls.items()}
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    names = list(calls)
    started = time.perf_counter()
    for turn in range(turns):
        if budget_s is not None and turn >= 3 and time.perf_counter() - started > budget_s:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(_turn(calls[name], repeats[name]))
    return {name: Timing(tuple(each)) for name, each in taken.items()}


def speedup(reference: Timing, other: Timing) -> float:
    """How many times faster ``other`` is than ``reference``, both from one ``compare``.

    The median over the turns of what each turn's quicker calls took: a disturbance only ever
    adds time, and it meets both calls of a turn or is outvoted.
    """
    return statistics.median(
        _quick(slow) / max(_quick(fast), 1e-9)
        for slow, fast in zip(reference.turns, other.turns, strict=True)
    )


def _quick(turn: tuple[float, ...]) -> float:
    """The time within which a quarter of a turn's calls were done."""
    return sorted(turn)[(len(turn) - 1) // 4]


def _check(
    calls: Mapping[str, Callable[[], object]], warmup: int, turns: int, budget_s: float | None
) -> None:
    wrong = []
    if not calls:
        wrong.append("no calls (need at least one)")
    if warmup < 0:
        wrong.append(f"warmup={warmup} (need >= 0)")
    if turns < 1:
        wrong.append(f"turns={turns} (need >= 1)")
    if budget_s is not None and not budget_s > 0:
        wrong.append(f"budget_s={budget_s} (need > 0)")
    if wrong:
        raise ConfigError("Cannot time this: " + ", ".join(wrong) + ".")


def _settle(call: Callable[[], object], warmup: int) -> int:
    """Run the untimed calls; return how often a turn should repeat the call."""
    began = time.perf_counter()
    for _ in range(max(1, warmup)):
        started = time.perf_counter()
        call()
        now = time.perf_counter()
        took = now - started
        if now - began > _SETTLING_S:
            break
    return max(1, min(_MOST_CALLS_A_TURN, int(_TURN_S / max(took, 1e-7))))


def _turn(call: Callable[[], object], repeats: int) -> tuple[float, ...]:
    clock = time.perf_counter
    time.sleep(_REST_S)
    for _ in range(min(repeats - 1, 10)):
        call()  # brings its data, its threads and the clock back after the rest
    times = []
    for _ in range(repeats):
        before = clock()
        call()
        times.append((clock() - before) * 1e3)
    return tuple(times)
