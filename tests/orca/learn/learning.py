"""What the tests of programs share: data cut by rank, and gangs that train on it."""

from __future__ import annotations

import functools
import traceback

import numpy as np

from bigdl.orca.data.contract import Batch
from bigdl.orca.learn.program import Cursor, Hooks, Options, ReplicaContext
from bigdl.testing.collective import in_gang

PRELOAD = ("numpy", "torch", "torchmetrics", "bigdl.orca.learn.pytorch.replica")


def parts(arrays, size, rank, world, start=0, cuts=None):
    """This rank's part of each global batch, larger parts first, or of ``cuts`` rows."""
    rows = len(arrays[0])
    for begin in range(start, rows, size):
        end = min(begin + size, rows)
        each = cuts or [(end - begin + world - 1 - r) // world for r in range(world)]
        edges = begin + np.cumsum([0, *each])
        mine = slice(edges[rank], edges[rank + 1])
        n = int(mine.stop - mine.start)
        data = tuple(array[mine].copy() for array in arrays) if n else None
        yield Batch(data, n, end - begin)


class FromArrays(Hooks):
    """Batches of arrays in order; records what it is told."""

    def __init__(self, ctx, arrays, size, cuts=None):
        self.ctx, self.arrays, self.size, self.cuts = ctx, arrays, size, cuts
        self.steps = []
        self.rows = []
        self.stop_after = None

    def batches(self, cursor):
        ctx = self.ctx
        return parts(self.arrays, self.size, ctx.rank, ctx.world, cursor.row, self.cuts)

    def on_step_end(self, replica, step):
        self.steps.append(step)

    def on_epoch_end(self, replica, cursor, row):
        self.rows.append((cursor, row))

    def should_stop(self):
        return self.stop_after is not None and len(self.steps) >= self.stop_after


def weights(replica):
    return {name: value.numpy() for name, value in replica.state()["model"].items()}


def train(collective, program, arrays, size, epochs=1, cuts=None, **options):
    """Weights after training, rows of the record, steps."""
    ctx = ReplicaContext(collective=collective, options=Options(**options))
    replica = program.build(ctx)
    hooks = FromArrays(ctx, arrays, size, cuts)
    rows = replica.train(epochs, Cursor(), hooks)
    return weights(replica), rows, hooks.steps


def with_args(collective, fn, args):
    import torch

    torch.set_num_threads(1)
    return fn(*args, collective)


def gang(world, fn, *args):
    """``fn(*args, collective)`` in a gang of its own: values by rank; its error is raised."""
    results = in_gang(world, with_args, fn, args, preload=PRELOAD)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _all_cases(collective, cases):
    import torch

    torch.set_num_threads(1)
    found = {}
    for name, case in cases.items():
        try:
            found[name] = case(collective)
        except Exception:
            found[name] = AssertionError(traceback.format_exc())
            if collective.world > 1:
                raise
    return found


class Cases:
    """Functions of a collective, all run in one gang for each number of workers.

    Starting processes takes longer than most of the functions do.
    """

    def __init__(self):
        self._cases = {}
        self.results = functools.cache(self._run)

    def add(self, name, case):
        self._cases[name] = case

    def case(self, function):
        self.add(function.__name__, function)
        return function

    def _run(self, world):
        return in_gang(world, _all_cases, self._cases, preload=PRELOAD)

    def of(self, name, world):
        """Each rank's value of one function."""
        values = []
        for result in self.results(world):
            value = result if isinstance(result, Exception) else result[name]
            if isinstance(value, Exception):
                raise value
            values.append(value)
        return values
