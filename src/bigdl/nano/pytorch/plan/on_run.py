"""A candidate tried on the run itself: blocks of its own steps with it and without, in turns.

For what happens between steps and changes no numbers: a copy has no loader to show it on, and
the run loses nothing, as every step of the trial is one of its own.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from bigdl.nano.pytorch.plan.timing import LONG_STEP_S, Timing, timing_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigdl.nano.pytorch.plan.candidates import Applied, Candidate

__all__ = ["TrialOnRun"]

#: Steps of a block take about so long; its first one is not timed.
_BLOCK_S = 0.1
_TURNS, _TURNS_OF_LONG_STEPS = 8, 3
#: After so many turns what is slower beyond doubt is not asked again.
_TURNS_OF_HOPELESS = 3
#: Steps at the start of an epoch that are watched more closely, and are slower.
_SETTLING = 4


class TrialOnRun:
    """Switches a candidate on and off between the steps of a run, and times them.

    Args:
        candidate: What is tried.
        apply: Puts it in force.
        step_s: About how long a step takes, its loader included.
        epoch_steps: Steps of an epoch, None if unknown: a block has to fit into one, as loaders
            begin anew with each.
    """

    def __init__(
        self,
        candidate: Candidate,
        apply: Callable[[], Applied],
        *,
        step_s: float,
        epoch_steps: int | None = None,
    ) -> None:
        self.candidate = candidate
        self._apply = apply
        is_long = step_s >= LONG_STEP_S
        self._turns_wanted = _TURNS_OF_LONG_STEPS if is_long else _TURNS
        self._steps = 2 if is_long else max(3, min(200, round(_BLOCK_S / max(step_s, 1e-6))))
        if epoch_steps is not None:
            self._steps = min(self._steps, epoch_steps // 2 - _SETTLING)
        self._last: float | None = None  # when the last step ended
        self._seconds: list[float] = []  # steps of this block
        self._blocks: list[float] = []  # off, on, off, on, …
        #: In force while a block with it runs.
        self.applied: Applied | None = None
        #: What came out; None while it goes on.
        self.timing: Timing | None = None
        #: Why it cannot go on; None if it can.
        self.problem: str | None = None

    @property
    def has_room(self) -> bool:
        """Whether epochs are long enough for a block."""
        return self._steps >= 2

    @property
    def steps_needed(self) -> int:
        """Steps that the whole trial takes, about."""
        return 2 * self._turns_wanted * (self._steps + 1) + 8

    def after_step(self) -> bool:
        """A step of the run has ended; whether the trial is over.

        Once it is over, ``applied`` is still in force if ``timing`` or ``problem`` say nothing
        against it: the caller keeps or undoes it.
        """
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        if self.applied is not None and not self.applied.is_proven:
            self._seconds = []  # watched steps are slower
            self.problem = self.applied.problem
            if self.problem is not None:
                return True
        if len(self._seconds) > self._steps:
            # one validation in between does not move a median
            self._blocks.append(statistics.median(self._seconds[1:]))
            self._seconds = []
            self.timing = self._timed()
            if self.timing is not None:
                return True
            self._switch()
        self._last = time.perf_counter()
        return False

    def _timed(self) -> Timing | None:
        """What the turns say, once there are enough of them."""
        if len(self._blocks) % 2 or len(self._blocks) < 2 * _TURNS_OF_HOPELESS:
            return None
        pairs = list(zip(self._blocks[::2], self._blocks[1::2], strict=True))
        is_hopeless = all(off < on for off, on in pairs)
        if len(pairs) < self._turns_wanted and not is_hopeless:
            return None
        return timing_of(pairs)

    def _switch(self) -> None:
        if self.applied is None:
            self.applied = self._apply()
        else:
            self.undo()

    def epoch_started(self) -> None:
        """An epoch of the run begins: its loaders' iterators are new."""
        self._last = None  # what lies between epochs is no step
        if self.applied is not None:
            self.applied.epoch_started()

    def undo(self) -> None:
        """Take it back; calling it twice is harmless."""
        applied, self.applied = self.applied, None
        if applied is not None:
            applied.undo()
