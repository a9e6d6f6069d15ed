"""What a training step costs with so many workers: arithmetic on a few measured numbers.

NumPy only; measures nothing itself. The usual model of data-parallel training: each
worker's compute is a fixed part and a part for each row it has, and the sum of gradients costs
a fixed time and a time for each byte (R. W. Hockney, "The communication challenge for MPP",
Parallel Computing 20, 1994). A step is as long as both together: they do not overlap here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Compute", "CostModel", "Line", "Memory", "Network", "break_even"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A cost that grows in a straight line.

    Args:
        fixed: At nothing.
        each: More for each unit.
    """

    fixed: float
    each: float

    def at(self, amount: float) -> float:
        return self.fixed + self.each * amount

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> Line:
        """The line of least relative errors through (amount, cost); neither part is negative.

        Relative, since a microsecond matters as much to a short step as a millisecond to a long
        one.
        """
        amount, cost = np.array(list(points), np.float64).T
        if len(set(amount)) == 1:
            return cls(fixed=float(cost.mean()), each=0.0)
        each, fixed = np.polyfit(amount, cost, 1, w=1 / cost)
        if each < 0:
            return cls(fixed=float(cost.mean()), each=0.0)
        if fixed < 0:
            steepness = amount / cost
            return cls(fixed=0.0, each=float(steepness.sum() / (steepness**2).sum()))
        return cls(fixed=float(fixed), each=float(each))


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What one worker needs for its part of a step, before gradients are summed.

    Args:
        cores: Of the machine it was measured on.
        one_thread: Seconds by rows, with one thread.
        all_threads: The same with a thread on each core.
    """

    cores: int
    one_thread: Line
    all_threads: Line

    def seconds(self, rows: float, threads: int) -> float:
        """With any number of threads in between: a part runs on all of them, the rest on one."""
        one, most = self.one_thread.at(rows), self.all_threads.at(rows)
        if self.cores == 1 or threads <= 1:
            return one
        shared = (one - most) / (1 - 1 / self.cores)
        return one - shared + shared / min(threads, self.cores)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Workers of one machine, who sum through its memory.

    Args:
        cores: Of the machine.
        cost: Seconds by bytes of gradient, of two workers.
    """

    cores: int
    cost: Line

    def sum_seconds(self, workers: int, nbytes: float) -> float:
        """Every worker reads and writes all it has: memory carries so many arrays as workers."""
        if workers == 1:
            return 0.0
        crowd = max(1.0, workers / self.cores)
        return self.cost.fixed * crowd + self.cost.each * nbytes * workers / 2

    def compute_seconds(self, compute: Compute, rows: float, workers: int) -> float:
        """Workers share the cores; more of them than cores take turns."""
        threads = max(1, self.cores // workers)
        return compute.seconds(rows, threads) * max(1.0, workers * threads / self.cores)


@dataclass(frozen=True, kw_only=True)
class Network:
    """Machines like the one measured, with one worker each, between which numbers travel.

    Args:
        bits_per_s: What each machine sends and receives at once.
        delay_s: From machine to machine.
        message_s: Work of a worker for one message.
    """

    bits_per_s: float
    delay_s: float
    message_s: float

    def sum_seconds(self, workers: int, nbytes: float) -> float:
        """Two rounds; in each a worker exchanges a part with each of the others."""
        if workers == 1:
            return 0.0
        rounds = 2 * (self.delay_s + (workers - 1) * self.message_s)
        return rounds + 2 * (workers - 1) / workers * nbytes * 8 / self.bits_per_s

    def compute_seconds(self, compute: Compute, rows: float, workers: int) -> float:
        return compute.seconds(rows, compute.cores)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Seconds of a step.

    Args:
        compute: Of one worker.
        gradient_bytes: What is summed in each step.
        batch_rows: Rows of the global batch, which the workers share.
    """

    compute: Compute
    gradient_bytes: int
    batch_rows: int

    def step_s(self, workers: int, place: Memory | Network) -> float:
        """A step as long as that of the worker with most rows, and the sum of gradients."""
        rows = math.ceil(self.batch_rows / workers)
        work = place.compute_seconds(self.compute, rows, workers)
        return work + place.sum_seconds(workers, self.gradient_bytes)


def break_even(steps: Sequence[tuple[int, float]], alone_s: float) -> int | None:
    """The fewest of more than one worker that are faster than one; None if none is.

    Args:
        steps: (workers, seconds of a step).
        alone_s: Seconds of a step of one worker with all cores of a machine.
    """
    return min((count for count, step_s in steps if count > 1 and step_s < alone_s), default=None)
