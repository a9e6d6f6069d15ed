"""What a fit will cost, before it runs: a few short runs, and a model for more workers.

Names no framework and no cluster. The runs train copies in worker processes; nothing of them
comes back but times and sizes.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bigdl._base import trees
from bigdl._base.errors import DataError
from bigdl._base.tables import aligned
from bigdl.orca.engines.base import GangSetup
from bigdl.orca.learn.costs import Compute, CostModel, Line, Memory, Network, break_even
from bigdl.orca.learn.fit import replica_in_gang
from bigdl.orca.learn.program import Cursor, Hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bigdl.orca.data.contract import Batch
    from bigdl.orca.engines.base import Engine
    from bigdl.orca.engines.worker import WorkerContext
    from bigdl.orca.learn.fit import Job
    from bigdl.orca.learn.program import StepEnd

__all__ = ["Explanation", "Row", "Stopwatch", "explain"]

#: A run is timed over so many steps at most, and the first of them is not.
_STEPS = 60
_FEWEST = 4
#: Parts of the global batch that a worker alone is timed with: as one of so many workers.
_SHARES = (1, 2, 4)
_SIMULATED = (8, 16, 32, 64, 128, 256)
_LOCAL = (1, 2, 4)
#: Assumed between machines of one rack; a message's work is measured here.
_DELAY_S = 50e-6
_NETWORKS = {"10 Gbit/s": 10e9, "25 Gbit/s": 25e9}
_SUMMED_BYTES = (64 << 10, 4 << 20)

How = Literal["measured", "estimated", "simulated"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step with one number of workers.

    Args:
        workers: How many.
        place: "this machine", or machines like it and what lies between them.
        step_ms: Milliseconds of a step.
        rows_per_s: Rows trained on in a second.
        speedup: Of one worker's step over it.
        how: "measured" here; "estimated" for this machine by the model; "simulated", for
            machines that were not there.
    """

    workers: int
    place: str
    step_ms: float
    rows_per_s: float
    speedup: float
    how: How


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a fit will cost; ``str`` gives the table.

    Args:
        batch_rows: Rows of a global batch.
        data_rows: Rows of the data; None if that is known only by reading.
        row_bytes: Bytes of a row as it comes to the model.
        gradient_bytes: What the workers sum in each step.
        reading_ms: Milliseconds of one worker's step that go into reading its rows.
        worker_bytes: Largest memory that a worker had, the interpreter included.
        cores: Of the machine.
        rows: A row for each number of workers and place.
        model: What the estimates are made with.
        memory: How workers of this machine sum; None where it has room for one only.
    """

    batch_rows: int
    data_rows: int | None
    row_bytes: int
    gradient_bytes: int
    reading_ms: float
    worker_bytes: int
    cores: int
    rows: tuple[Row, ...]
    model: CostModel
    memory: Memory | None

    @property
    def break_even(self) -> dict[str, int | None]:
        """For each place, the fewest workers that are faster than one; None if none is."""
        alone = self.rows[0].step_ms
        places = dict.fromkeys(row.place for row in self.rows)
        return {
            place: break_even(
                [(row.workers, row.step_ms) for row in self.rows if row.place == place], alone
            )
            for place in places
        }

    @property
    def verdict(self) -> str:
        """What to do, in sentences."""
        here, *others = self.break_even.items()
        place, count = here
        if count is None:
            first = f"On {place}, one process is faster for this model."
        else:
            first = f"On {place}, {count} workers are faster than one."
        rest = [
            f"over {name}, from {number} machines on" if number else f"over {name}, never"
            for name, number in others
        ]
        return first + (f" Machines like it break even {'; '.join(rest)}." if rest else "")

    def __str__(self) -> str:
        heads = ("workers", "place", "step ms", "rows/s", "speedup", "how")
        cells = [
            (
                str(row.workers),
                row.place,
                f"{row.step_ms:,.3g}" if row.step_ms < 100 else f"{row.step_ms:,.0f}",
                f"{row.rows_per_s:,.0f}",
                f"{row.speedup:.2f}×",  # noqa: RUF001  (it is a multiplication)
                row.how,
            )
            for row in self.rows
        ]
        table = aligned([heads, *cells], right=(0, 2, 3, 4))
        return "\n".join([*self._facts(), "", *table, "", self.verdict])

    def __repr__(self) -> str:
        return str(self)

    def _facts(self) -> list[str]:
        size = f"{self.row_bytes:,} bytes"
        if self.data_rows is not None:
            total = _in_words(self.row_bytes * self.data_rows)
            size += f"; {self.data_rows:,} rows are {total}"
        one = self.model.compute.all_threads
        lines = [
            ("a row", size),
            ("gradients", f"{_in_words(self.gradient_bytes)}, summed in each step"),
            ("peak memory", f"{_in_words(self.worker_bytes)} a worker, measured"),
            (
                "one worker",
                f"{one.fixed * 1e3:.3g} ms a step and {one.each * 1e6:.3g} µs a row, of which "
                f"{self.reading_ms:.3g} ms a step is reading ({self.batch_rows:,} rows)",
            ),
        ]
        return aligned(lines)


def explain(
    engine: Engine,
    job: Job,
    *,
    budget_s: float = 8.0,
    say: Callable[[str], None] = lambda text: None,
) -> Explanation:
    """Time short runs of one worker and of two, and say what more would cost.

    Args:
        engine: Where.
        job: As for ``fit``; its callbacks are not called, nor is it validated.
        budget_s: Seconds of training in all; starting the workers comes on top.
        say: Told what is done next.

    Raises:
        NotReadyError: There is no optimizer or no loss.
        DataError: There are no rows.
    """
    cores = engine.node_slots()
    preload = tuple(getattr(job.program, "preload", ()))
    runs = 2 * len(_SHARES) + 1
    each_s = budget_s / runs
    lines: dict[int, list[tuple[float, float]]] = {}
    found: dict[int, list[_Timed]] = {}
    for threads in sorted({1, cores}):
        say(f"one worker, {threads} threads" if threads > 1 else "one worker, one thread")
        setup = GangSetup(cores=threads, preload=preload)
        run = partial(_alone, job=job, seconds=each_s)
        found[threads] = engine.gang(run, 1, setup=setup)[0]
        lines[threads] = [(one.rows, one.step_s) for one in found[threads] if one.rows]
    whole = found[cores][0]
    compute = Compute(
        cores=cores,
        one_thread=Line.through(lines[1]),
        all_threads=Line.through(lines[cores]),
    )
    model = CostModel(
        compute=compute,
        gradient_bytes=whole.gradient_bytes,
        batch_rows=math.ceil(whole.rows),
    )
    together: _Together | None = None
    if cores > 1:
        say("two workers")
        run_two = partial(_together, job=job, seconds=each_s)
        together = engine.gang(run_two, 2, setup=GangSetup(preload=preload))[0]
    memory = None if together is None else Memory(cores=cores, cost=Line.through(together.sums))
    return Explanation(
        batch_rows=model.batch_rows,
        data_rows=job.data.rows,
        row_bytes=whole.row_bytes,
        gradient_bytes=whole.gradient_bytes,
        reading_ms=whole.reading_s * 1e3,
        worker_bytes=max(
            one.peak_bytes for one in (*found[cores], *((together.timed,) if together else ()))
        ),
        cores=cores,
        rows=tuple(_rows(model, whole.step_s, memory, together)),
        model=model,
        memory=memory,
    )


def _rows(
    model: CostModel, alone_s: float, memory: Memory | None, together: _Together | None
) -> Iterator[Row]:
    def row(workers: int, place: str, step_s: float, how: How) -> Row:
        return Row(
            workers=workers,
            place=place,
            step_ms=step_s * 1e3,
            rows_per_s=model.batch_rows / step_s,
            speedup=alone_s / step_s,
            how=how,
        )

    yield row(1, "this machine", alone_s, "measured")
    if memory is None or together is None:
        return
    yield row(2, "this machine", together.timed.step_s, "measured")
    for count in _LOCAL[2:]:
        if count <= min(memory.cores, model.batch_rows):
            yield row(count, "this machine", model.step_s(count, memory), "estimated")
    for name, bits_per_s in _NETWORKS.items():
        network = Network(bits_per_s=bits_per_s, delay_s=_DELAY_S, message_s=together.message_s)
        for count in (2, 4, *_SIMULATED):
            if count <= model.batch_rows:
                yield row(count, name, model.step_s(count, network), "simulated")


def _in_words(nbytes: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"


# --- in a worker --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """One short run of one worker: rows of its part, medians of its steps, sizes."""

    rows: float
    step_s: float
    reading_s: float
    row_bytes: int
    gradient_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Together:
    """Two workers: their step, (bytes, seconds) of sums, seconds of a message over TCP."""

    timed: _Timed
    sums: list[tuple[float, float]]
    message_s: float


class Stopwatch(Hooks):
    """Gives a replica its batches, and times the steps that it makes of them.

    Args:
        batches: Those of an epoch, by its number.
        seconds: After so long training ends, ...
        steps: ... or after so many steps.
    """

    def __init__(
        self, batches: Callable[[int], Iterable[Batch]], *, seconds: float, steps: int = _STEPS
    ) -> None:
        self._batches, self._seconds, self._steps = batches, seconds, steps
        self._start = time.perf_counter()
        self._reading = 0.0
        #: When each step ended, and what had gone into reading until then.
        self.ends: list[tuple[float, float]] = []
        self.first: Batch | None = None
        self.part_rows: list[int] = []
        #: Whether a further epoch had no rows: what can be read once only.
        self.is_dry = False

    def batches(self, cursor: Cursor) -> Iterator[Batch]:
        batches = iter(self._batches(cursor.epoch))
        count = len(self.part_rows)
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self._reading += time.perf_counter() - begun
            if batch is None:
                self.is_dry = bool(count) and count == len(self.part_rows)
                return
            self.first = self.first or batch
            self.part_rows.append(batch.rows)
            yield batch

    def on_step_end(self, replica: Any, step: StepEnd) -> None:
        self.ends.append((time.perf_counter(), self._reading))

    def should_stop(self) -> bool:
        made = len(self.ends)
        is_late = time.perf_counter() - self._start > self._seconds
        return made >= self._steps or (made >= _FEWEST and is_late)

    def medians(self) -> tuple[float, float]:
        """Seconds of a step, and of reading for it; the first step is left out if it can be."""
        if not self.ends:
            raise DataError("There are no rows to train on.")
        points = self.ends if len(self.ends) > 1 else [(self._start, 0.0), *self.ends]
        pairs = list(pairwise(points))
        return (
            statistics.median(after[0] - before[0] for before, after in pairs),
            statistics.median(after[1] - before[1] for before, after in pairs),
        )


def _alone(ctx: WorkerContext, job: Job, seconds: float) -> list[_Timed]:
    """One worker with the part of the first of 1, 2, 4 workers."""
    with replica_in_gang(ctx, job) as replica:
        return [_timed(replica, job, 0, share, seconds) for share in _SHARES]


def _together(ctx: WorkerContext, job: Job, seconds: float) -> _Together:
    with replica_in_gang(ctx, job) as replica:
        timed = _timed(replica, job, ctx.rank, ctx.world, seconds)
    with ctx.connect() as collective:
        sums = [
            (float(size), _sum_s(collective, size, calls=50 if size < 1 << 20 else 8))
            for size in _SUMMED_BYTES
        ]
    with ctx.connect("tcp") as collective:
        # two rounds, in each a message to the one other worker
        message_s = _sum_s(collective, 64, calls=50) / 2
    return _Together(timed=timed, sums=sums, message_s=message_s)


def _timed(replica: Any, job: Job, rank: int, world: int, seconds: float) -> _Timed:
    with contextlib.closing(job.data.open(rank, world)) as reader:

        def batches(epoch: int) -> Iterable[Batch]:
            return reader.batches(job.size, epoch=epoch, seed=job.seed)

        watch = Stopwatch(batches, seconds=seconds)
        try:
            replica.train(_STEPS, Cursor(), watch)
        except DataError:
            if not watch.is_dry:
                raise
    step_s, reading_s = watch.medians()
    many = job.options.accumulation_steps
    return _Timed(
        rows=many * max(watch.part_rows, default=0),
        step_s=step_s,
        reading_s=reading_s,
        row_bytes=_row_bytes(watch.first),
        gradient_bytes=int(replica.gradient_bytes),
        peak_bytes=_peak_bytes(),
    )


def _sum_s(collective: Any, size: int, calls: int) -> float:
    """Seconds of an all-reduce of ``size`` bytes where the step kernel has them."""
    array = collective.buffer(size).view(np.float32)
    times = []
    for _ in range(calls + 2):
        collective.barrier()
        begun = time.perf_counter()
        collective.all_reduce(array)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def _row_bytes(batch: Batch | None) -> int:
    if batch is None or not batch.rows:
        return 0
    sizes = [getattr(leaf, "nbytes", 0) for leaf in trees.leaves(batch.data)]
    return round(sum(sizes) / batch.rows)


def _peak_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0
