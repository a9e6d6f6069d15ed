"""What the workers of a fit tell, and where a new start would go on."""

from __future__ import annotations

import pickle
import time
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bigdl.orca.learn import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl.orca.learn.callbacks import Callback
    from bigdl.orca.learn.fit import Job

__all__ = ["CallbackStates", "Watch"]

#: A worker is taken for hung when it tells nothing for so long: in its first step, and later at
#: the least, or so many times its longest step.
_FIRST_S, _LEAST_S, _TIMES = 600.0, 60.0, 10.0


@dataclass(frozen=True, kw_only=True)
class CallbackStates:
    """What callbacks had become when a checkpoint was written.

    Args:
        attributes: Of each, pickled one by one.
        is_stopped: Whether one of them had asked for the end.
    """

    attributes: list[dict[str, bytes]]
    is_stopped: bool

    def restored(self, callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
        """Copies of ``callbacks`` as they were then."""
        found = []
        for one, attributes in zip(callbacks, self.attributes, strict=True):
            same = copy(one)
            vars(same).update({name: pickle.loads(value) for name, value in attributes.items()})
            found.append(same)
        return tuple(found)


class Watch:
    """The caller's ear: what the workers tell, and what that means for a new start."""

    def __init__(
        self,
        job: Job,
        hang_timeout_s: float | str | None,
        on_event: Callable[[int, Any], None] | None,
    ) -> None:
        self._job, self._limit, self._on_event = job, hang_timeout_s, on_event
        self._path: str | None = None
        self._had: Any = None
        self._callbacks: CallbackStates | None = None
        self._rows: list[dict[str, Any]] = []
        self._last: dict[int, float] = {}
        self._longest = 0.0
        self._is_pausing = False
        self._acceleration: str | None = None
        #: Records of the epochs that are not trained again.
        self.earlier: list[dict[str, Any]] = []

    @property
    def place(self) -> str:
        """Where a new start would go on, in words."""
        return self._path or "where this call began"

    def heard(self, rank: int, event: Any) -> None:
        now = time.monotonic()
        if event[0] == "step":
            if rank in self._last:
                self._longest = max(self._longest, now - self._last[rank])
            self._last[rank] = now
        elif event[0] == "epoch":
            self._rows.append(event[1])
        elif event[0] == "checkpoint":
            _, self._path, self._had, self._callbacks = event
        elif event[0] == "pausing":
            self._is_pausing = event[1]
        elif event[0] == "settled":
            self._acceleration = event[1]
        if self._on_event is not None:
            self._on_event(rank, event)

    def silence_s(self) -> float:
        """How long a worker may tell nothing."""
        if isinstance(self._limit, (int, float)):
            return float(self._limit)
        if self._is_pausing or not self._last:
            return _FIRST_S
        return max(_LEAST_S, _TIMES * self._longest)

    def again(self, job: Job) -> Job:
        """The rest of the job, from the last checkpoint of this call or from its start."""
        rows, self._rows = self._rows, []
        self._last.clear()
        self._is_pausing = False
        if self._acceleration is not None:  # what was measured is not measured again
            job = replace(job, options=replace(job.options, acceleration=self._acceleration))
        if self._path is None:
            return replace(self._job, run=job.run, options=job.options)
        saved = checkpoint.read(self._path, job.program.codec)
        done = saved.cursor.epoch - self._job.start.epoch
        self.earlier = [
            row for row in (*self.earlier, *rows) if row["epoch"] <= saved.cursor.epoch
        ]
        steps = job.options.max_steps
        if self._job.options.max_steps is not None:
            used = saved.cursor.step - self._job.start.step
            steps = self._job.options.max_steps - used
        assert self._callbacks is not None  # a job that may start again tells of them
        return replace(
            job,
            callbacks=self._callbacks.restored(self._job.callbacks),
            is_stopped=self._callbacks.is_stopped,
            state=saved.state,
            start=saved.cursor,
            epochs=self._job.epochs - done,
            had=self._had if saved.cursor.row else None,
            options=replace(job.options, max_steps=steps),
        )
