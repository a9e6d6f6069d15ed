"""Two steps timed in turns, and what the turns say beyond doubt. Standard library only."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LONG_STEP_S", "Timing", "slower", "time_in_turns", "timing_of"]

#: Steps this long are timed twice after a warm-up; shorter ones until 2 % are resolved.
LONG_STEP_S = 0.2
#: Turns that long steps get at most.
_MOST_LONG = 6


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Two steps timed in turns.

    Args:
        own_s: Median seconds of the first.
        other_s: Median seconds of the second.
        speedup: Median of the ratio first / second over the turns.
        doubt: Half the width of what the speedup may be off by.
    """

    own_s: float
    other_s: float
    speedup: float
    doubt: float

    @property
    def is_faster(self) -> bool:
        """Whether the second is faster beyond doubt."""
        return self.speedup - self.doubt > 1.0 and self.speedup > 1.01

    @property
    def is_unclear(self) -> bool:
        """Whether the second may well be faster, and the turns are too few to say so."""
        return self.speedup > 1.05 and not self.is_faster


def time_in_turns(own: Any, other: Any, *, limit_s: float) -> Timing:
    """Time ``own(n)`` and ``other(n)``, each the seconds of a step over n steps, in turns.

    Both have taken a step before. Long steps get two turns, and more while the second seems much
    faster and the turns disagree; short ones blocks of some 10 ms, at least six turns (four where
    the second is much slower), and more until the doubt is below 1 % or the answer is clear.
    """
    first, second = own(1), other(1)
    step_s = max(first, second)
    if step_s >= LONG_STEP_S:
        again = other(1)  # in mirrored order: a machine that slows down meets both alike
        turns = [(first, second), (own(1), again)]
        # something else ran beside one of them: ask again, where there is something to win
        while len(turns) < _MOST_LONG and (timing := timing_of(turns)).is_unclear:
            turns.append((own(1), other(1)))
        return timing_of(turns)
    steps = max(1, min(200, round(0.01 / max(step_s, 1e-6))))
    turns = []
    spent = 0.0
    while len(turns) < 40:
        # who comes first changes: what slows a machine down does not hit the same one
        if len(turns) % 2:
            b = other(steps)
            a = own(steps)
        else:
            a = own(steps)
            b = other(steps)
        turns.append((a, b))
        spent += (a + b) * steps
        if len(turns) < 4:
            continue
        timing = timing_of(turns)
        if len(turns) < 6 and timing.speedup + 4 * timing.doubt > 0.9:  # not hopeless
            continue
        is_clear = abs(timing.speedup - 1) > 4 * timing.doubt or timing.doubt < 0.005
        if is_clear or spent > limit_s:
            break
    return timing_of(turns)


def timing_of(turns: Sequence[tuple[float, float]]) -> Timing:
    """What turns of (own, other) seconds say."""
    ratios = [math.log(a / b) for a, b in turns]
    middle = statistics.median(ratios)
    if len(turns) == 2:  # their spread is all there is to go by
        doubt = abs(ratios[0] - ratios[1]) / 2
    else:
        spread = 1.4826 * statistics.median(abs(one - middle) for one in ratios)
        doubt = 2 * 1.2533 * spread / math.sqrt(len(turns))  # two standard errors of a median
    against = sum(one * middle < 0 for one in ratios)
    if len(turns) <= _MOST_LONG and 4 * against > len(turns):
        doubt = max(doubt, abs(middle))  # too few turns for so many that say the contrary
    return Timing(
        own_s=statistics.median(a for a, _ in turns),
        other_s=statistics.median(b for _, b in turns),
        speedup=math.exp(middle),
        doubt=math.expm1(doubt) * math.exp(middle),
    )


def slower(timing: Timing) -> str:
    """Why a timing is no reason to choose, in words."""
    if timing.speedup < 1:
        return f"{1 / timing.speedup - 1:.1%} slower"
    return f"{timing.speedup - 1:.1%} faster, not beyond doubt (±{timing.doubt:.1%})"
