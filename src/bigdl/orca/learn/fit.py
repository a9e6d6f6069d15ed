"""The one path of fit and evaluate: data and program go to a gang of workers, and come back.

Names no framework and no cluster: a program, what reads the data, and an engine meet here. Each
worker builds its replica, opens its part of the data, and trains; rank 0 keeps the user's
callbacks. A gang that loses a worker is started again from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import WorkerLostError
from bigdl.orca.engines.base import GangSetup
from bigdl.orca.engines.pickling import dumps
from bigdl.orca.learn import checkpoint
from bigdl.orca.learn.callbacks import Callback, EarlyStopping, ModelCheckpoint, TrainingState
from bigdl.orca.learn.program import Cursor, Hooks, Options, ReplicaContext
from bigdl.orca.learn.watch import CallbackStates, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from bigdl.orca.data.contract import Batch, Reader, Sharded
    from bigdl.orca.engines.base import Engine
    from bigdl.orca.engines.worker import WorkerContext
    from bigdl.orca.learn.program import Program, Replica, State, StepEnd

__all__ = ["Fitted", "Job", "evaluate", "fit", "replica_in_gang"]

logger = logging.getLogger(__name__)

#: A worker tells of its steps at most so often.
_TELL_S = 0.2
#: With early stopping, a run is not counted on to last longer than this.
_EPOCHS_COUNTED_ON = 10


@dataclass(frozen=True, kw_only=True)
class Job:
    """A fit, as it travels to the workers.

    Args:
        program: What is trained.
        data: What it is trained on.
        validation: What it is validated on, if at all.
        options: How it is trained.
        epochs: Further epochs; the rest of a broken one counts as one.
        size: Rows of a global batch.
        seed: Of the order of rows; None = as they come.
        streams_seed: Of the random streams of the workers.
        start: Where it begins.
        state: What the replicas begin with; None = as the program has it.
        validate_every: Validate after each so many epochs.
        validate_every_steps: And after each so many updates.
        callbacks: The user's.
        run: Name of this run, for its checkpoints.
        restarts: Whether a lost worker may start it again: each checkpoint's news then has what
            the epoch's record is made of so far.
        had: That of the first epoch, when a lost worker broke it off.
        trains: Whether it trains, or only evaluates.
    """

    program: Program
    data: Sharded
    validation: Sharded | None = None
    options: Options = field(default_factory=Options)
    epochs: int = 1
    size: int = 32
    seed: int | None = 0
    streams_seed: int = 0
    start: Cursor = field(default_factory=Cursor)
    state: State | None = None
    validate_every: int = 1
    validate_every_steps: int | None = None
    callbacks: tuple[Callback, ...] = ()
    run: str = field(default_factory=checkpoint.new_run)
    restarts: bool = False
    had: Any = None
    is_stopped: bool = False
    trains: bool = True


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What comes back.

    Args:
        rows: A record for each epoch begun.
        state: Of the replicas, after the last update.
        cursor: How far training is.
        attributes: What each callback's attributes have become.
        failures: How many times workers were lost.
    """

    rows: list[dict[str, Any]]
    state: State
    cursor: Cursor
    attributes: list[dict[str, Any]]
    failures: int = 0


def fit(
    engine: Engine,
    job: Job,
    *,
    workers: int | Callable[[], int],
    cores: int | None = None,
    max_failures: int = 0,
    hang_timeout_s: float | str | None = "auto",
    on_event: Callable[[int, Any], None] | None = None,
) -> Fitted:
    """Train on a gang of workers.

    Args:
        engine: Where.
        job: What.
        workers: How many; a function is asked at each start.
        cores: Slots a worker.
        max_failures: How many times a lost worker starts the gang again.
        hang_timeout_s: Seconds without a step after which a worker is taken for hung; "auto" =
            10 times the longest, at least 60; 600 for the first; None = never.
        on_event: Called here with (rank, event) as the workers tell: ("step", epoch, step, rows
            of the epoch, loss), ("epoch", record), ("checkpoint", path, ``Replica.part``, what
            callbacks are), ("settled", ``Options.acceleration``), ("pausing", whether).

    Raises:
        WorkerLostError: More workers were lost than ``max_failures``.
        Exception: What the user's code raised in a worker.
    """
    job = replace(job, restarts=max_failures > 0)
    watch = Watch(job, hang_timeout_s, on_event)
    failures = 0
    while True:
        setup = GangSetup(
            cores=cores,
            preload=tuple(getattr(job.program, "preload", ())),
            silence_s=None if hang_timeout_s is None else watch.silence_s,
        )
        try:
            many = workers() if callable(workers) else workers
            results = engine.gang(
                partial(_train, job=job), many, on_event=watch.heard, setup=setup
            )
        except WorkerLostError as exc:
            failures += 1
            if failures > max_failures:
                raise
            logger.warning("A worker was lost (%s); training goes on from %s.", exc, watch.place)
            job = watch.again(job)
            continue
        fitted = results[0]
        assert fitted is not None  # rank 0's
        return replace(fitted, rows=[*watch.earlier, *fitted.rows], failures=failures)


def evaluate(
    engine: Engine,
    program: Program,
    data: Sharded,
    *,
    workers: int,
    size: int,
    options: Options,
    state: State | None = None,
    cores: int | None = None,
) -> dict[str, Any]:
    """Loss, ``rows`` and metrics over all rows, each once."""
    setup = GangSetup(cores=cores, preload=tuple(getattr(program, "preload", ())))
    job = Job(program=program, data=data, options=options, size=size, state=state, trains=False)
    found: dict[str, Any] = engine.gang(partial(_evaluate, job=job), workers, setup=setup)[0]
    return found


# --- in a worker --------------------------------------------------------------------------------


def _train(ctx: WorkerContext, job: Job) -> Fitted | None:
    with replica_in_gang(ctx, job) as replica, contextlib.ExitStack() as stack:
        reader = stack.enter_context(contextlib.closing(job.data.open(ctx.rank, ctx.world)))
        against = None
        if job.validation is not None:
            against = job.validation.open(ctx.rank, ctx.world)
            stack.enter_context(contextlib.closing(against))
        hooks = _Hooks(ctx, job, reader, against)
        hooks.begin(replica)
        rows: list[dict[str, Any]] = []
        # without steps left there may still be an epoch to end that has had its rows
        is_over = job.options.max_steps == 0 or job.is_stopped
        if job.epochs and (not is_over or job.start.row):
            rows = replica.train(job.epochs, job.start, hooks)
        hooks.end(replica)
        state = replica.state()
        if ctx.rank:
            return None
        attributes = [dict(vars(one)) for one in job.callbacks]
        return Fitted(rows=rows, state=state, cursor=hooks.cursor, attributes=attributes)


def _evaluate(ctx: WorkerContext, job: Job) -> dict[str, Any]:
    with (
        replica_in_gang(ctx, job) as replica,
        contextlib.closing(job.data.open(ctx.rank, ctx.world)) as reader,
    ):
        found: dict[str, Any] = replica.evaluate(reader.batches(job.size))
        return found


@contextlib.contextmanager
def replica_in_gang(ctx: WorkerContext, job: Job) -> Any:
    """This worker's replica, connected to the others'."""
    with ctx.connect() as collective:
        place = ReplicaContext(
            collective=collective, options=job.options, seed=job.streams_seed, trains=job.trains
        )
        replica = job.program.build(place)
        if job.state is not None:
            replica.load(job.state)
        yield replica


class _Hooks(Hooks):
    """Batches for a replica, and callbacks, checkpoints and news from it."""

    def __init__(
        self, ctx: WorkerContext, job: Job, reader: Reader, against: Reader | None
    ) -> None:
        self._ctx, self._job, self._reader, self._against = ctx, job, reader, against
        self._is_first = ctx.rank == 0
        self._savers = [one for one in job.callbacks if isinstance(one, ModelCheckpoint)]
        self._seen = TrainingState(world=ctx.world, step=job.start.step, is_stopped=job.is_stopped)
        self._told = 0.0
        self._rows_a_step = 0
        self._validated: dict[str, float] = {}
        self._had = job.had
        self.cursor = job.start

    def begin(self, replica: Replica) -> None:
        self._seen.model = getattr(replica, "model", None)
        self._seen.optimizer = getattr(replica, "optimizer", None)
        self._seen.epoch = self.cursor.epoch + 1
        self._call("on_fit_start")

    def end(self, replica: Replica) -> None:
        self._call("on_fit_end")

    # --- what the loop asks for ---

    def batches(self, cursor: Cursor) -> Iterable[Batch]:
        return self._reader.batches(
            self._job.size, epoch=cursor.epoch, seed=self._job.seed, start=cursor.row
        )

    def had(self) -> Any:
        had, self._had = self._had, None
        return had

    def validate(self, replica: Replica, cursor: Cursor) -> Mapping[str, float]:
        if self._against is None or cursor.epoch % self._job.validate_every:
            return self._validated
        return self._validate(replica)

    def should_stop(self) -> bool:
        return self._seen.is_stopped

    def batches_left(self) -> int | None:
        job, cursor, rows = self._job, self.cursor, self._job.data.rows
        bounds = []
        if job.options.max_steps is not None:
            bounds.append(job.options.max_steps - (cursor.step - job.start.step))
        if rows is not None and self._rows_a_step:
            epochs = job.epochs - (cursor.epoch - job.start.epoch)
            if any(isinstance(one, EarlyStopping) for one in job.callbacks):
                epochs = min(epochs, _EPOCHS_COUNTED_ON)
            bounds.append(-(-(epochs * rows - cursor.row) // self._rows_a_step))
        return job.options.accumulation_steps * max(0, min(bounds)) if bounds else None

    # --- what the loop tells ---

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        self._ctx.emit(("pausing", True))
        try:
            yield
        finally:
            self._ctx.emit(("pausing", False))

    def on_settled(self, acceleration: str) -> None:
        if self._is_first:
            self._ctx.emit(("settled", acceleration))

    def on_epoch_start(self, replica: Replica, cursor: Cursor) -> None:
        self._validated = {}
        self._seen.epoch, self._seen.row = cursor.epoch + 1, {}
        self._call("on_epoch_start")

    def on_step_end(self, replica: Replica, step: StepEnd) -> None:
        self.cursor = step.cursor
        self._rows_a_step = step.rows
        self._seen.step = step.cursor.step
        self._call("on_step_end")
        every = self._job.validate_every_steps
        if every is not None and self._against is not None and step.cursor.step % every == 0:
            self._validate(replica)
        self._save(replica, is_epoch_end=False)
        cursor = step.cursor
        self._tell(("step", cursor.epoch + 1, cursor.step, cursor.row, step.loss))

    def on_epoch_end(self, replica: Replica, cursor: Cursor, row: dict[str, Any]) -> None:
        is_whole = cursor.epoch > self.cursor.epoch
        self.cursor = cursor
        if self._is_first:
            self._seen.row = row
            self._call("on_epoch_end")
            self._ctx.emit(("epoch", dict(row)))
        if is_whole:
            self._save(replica, is_epoch_end=True)

    # --- inside ---

    def _call(self, moment: str) -> None:
        if self._is_first:
            for one in self._job.callbacks:
                getattr(one, moment)(self._seen)

    def _validate(self, replica: Replica) -> dict[str, float]:
        assert self._against is not None
        found = replica.evaluate(self._telling(self._against.batches(self._job.size)))
        self._validated = {
            key if key.startswith("val_") else f"val_{key}": value
            for key, value in found.items()
            if key != "rows"
        }
        self._seen.row = {**self._seen.row, **self._validated}
        self._call("on_validation_end")
        return self._validated

    def _telling(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The same batches; the caller hears that this worker is at work."""
        for batch in batches:
            self._tell(("alive",))
            yield batch

    def _tell(self, event: tuple[Any, ...]) -> None:
        now = time.monotonic()
        if now - self._told >= _TELL_S:
            self._told = now
            self._ctx.emit(event)

    def _save(self, replica: Replica, *, is_epoch_end: bool) -> None:
        """Write the checkpoints that are due: their state is made by all workers together."""
        cursor = self.cursor
        due = [
            one
            for one in self._savers
            if one.is_due(step=cursor.step, epoch=cursor.epoch, is_epoch_end=is_epoch_end)
        ]
        if not due:
            return
        state = replica.state()
        part = replica.part() if self._job.restarts and cursor.row else None
        if not self._is_first:
            return
        saved = checkpoint.Checkpoint(state=state, cursor=cursor, seed=self._job.seed)
        for one in due:
            path = f"{one.directory.rstrip('/')}/{checkpoint.new_name(self._job.run, cursor)}"
            checkpoint.write(path, saved, self._job.program.codec)
            one.paths = [*(old for old in one.paths if old != path), path]
            spare = [] if one.keep_last is None else one.paths[: -one.keep_last]
            one.paths = one.paths[len(spare) :]
            # told before the old ones go: who starts again looks for the last that was told of
            self._ctx.emit(("checkpoint", path, part, self._kept()))
            for old in spare:
                checkpoint.remove(old)

    def _kept(self) -> CallbackStates | None:
        """The callbacks as they are now, where a new start may need them so."""
        if not self._job.restarts:
            return None
        attributes = [_picklable(vars(one)) for one in self._job.callbacks]
        return CallbackStates(attributes=attributes, is_stopped=self._seen.is_stopped)


def _picklable(attributes: dict[str, Any]) -> dict[str, bytes]:
    """Those that can travel: an open file or a connection is made anew by ``on_fit_start``."""
    found = {}
    for name, value in attributes.items():
        with contextlib.suppress(Exception):  # objects of the user's refuse in any way
            found[name] = dumps(value)
    return found
