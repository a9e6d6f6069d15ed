"""A worker's model of PyTorch, and the loop that trains it together with the other workers'."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.errors import DataError, NotReadyError
from bigdl.nano.pytorch.processes.memory import broadcast
from bigdl.nano.pytorch.processes.streams import Streams
from bigdl.orca.learn.program import Cursor, Hooks, ReplicaContext, State, StepEnd
from bigdl.orca.learn.pytorch import calling, storing
from bigdl.orca.learn.pytorch.gradients import Gradients, connect_gradients
from bigdl.orca.learn.pytorch.work import summed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from bigdl._base.sync import Outcome
    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import Batch
    from bigdl.orca.learn.pytorch.accelerated import Accelerated
    from bigdl.orca.learn.pytorch.acceleration import Acceleration
    from bigdl.orca.learn.pytorch.metrics import Tally
    from bigdl.orca.learn.pytorch.schedules import Schedule
    from bigdl.orca.learn.pytorch.work import Work

__all__ = ["TorchReplica"]


class TorchReplica:
    """Made by ``TorchProgram.build``; see ``bigdl.orca.learn.program.Replica``.

    Args:
        ctx: This worker's place.
        model: The module.
        optimizer: Over its parameters; only training needs one.
        schedule: Of the optimizer's learning rate.
        work: What is done with a batch; None = it cannot be trained.
    """

    def __init__(
        self,
        *,
        ctx: ReplicaContext,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        schedule: Schedule | None,
        work: Work,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = None if schedule is None else schedule.scheduler
        self.work = work
        #: Batches of the present epoch that all workers together have had.
        self.batches = 0
        self._ctx = ctx
        self._schedule = schedule
        self._streams = Streams(ctx.seed, ctx.rank)
        self._gradients: Gradients | None = None
        self._run: _Run | None = None
        self._accelerated: Accelerated | None = None
        self._acceleration: Acceleration | None = None

    @property
    def gradient_bytes(self) -> int:
        """What several workers sum in a step; see ``Replica``."""
        return sum(
            parameter.numel() * max(4, parameter.element_size())  # halves are summed as float32
            for parameter in self.model.parameters()
            if parameter.requires_grad
        )

    # --- training ---

    def train(self, epochs: int, start: Cursor, hooks: Hooks) -> list[dict[str, Any]]:
        """Train for ``epochs`` epochs, from ``start``; see ``Replica.train``."""
        if self.optimizer is None or not self.work.has_loss:
            raise NotReadyError(
                "Training needs an optimizer and a loss: give optimizer= and loss= where the "
                "model is given."
            )
        self._gradients = connect_gradients(self._ctx, self.optimizer, averages=self.work.averages)
        self._gradients.clear()
        modes = [(module, module.training) for module in self.model.modules()]
        if not self.model.training:
            self.model.train()
        try:
            with self._streams.drawn(), self._accelerating(hooks) as faster:
                self._run = _Run(self, self._gradients, hooks, start, faster)
                rows = self._run.epochs(epochs)
            for buffer in self.model.buffers():
                broadcast(self._ctx.collective, buffer.detach())
            self._gradients.finish(self.optimizer)
            return rows
        finally:
            for module, mode in modes:
                module.training = mode
            self._gradients.close()
            self._gradients = self._run = None

    @contextlib.contextmanager
    def _accelerating(self, hooks: Hooks) -> Iterator[Acceleration | None]:
        """What makes the block's steps faster; None if nothing is asked."""
        if self._ctx.options.acceleration == "off":
            yield None
            return
        from bigdl.orca.learn.pytorch.acceleration import Acceleration

        assert self.optimizer is not None
        faster = Acceleration(self._ctx, self.model, self.optimizer, self.work, hooks)
        self._acceleration = faster
        try:
            faster.begin()
            yield faster
            faster.end()
        finally:
            faster.undo()
            self._acceleration = None

    def step_scheduler(self, interval: str, number: int, row: dict[str, Any]) -> None:
        """The ``number``-th epoch or step is over: step the scheduler if it is due."""
        if self._schedule is not None:
            self._schedule.step(interval, number, row)

    def equalize(self) -> None:
        """Give all workers rank 0's weights and buffers."""
        for tensor in itertools.chain(self.model.parameters(), self.model.buffers()):
            broadcast(self._ctx.collective, tensor.detach())

    @contextlib.contextmanager
    def _rank_0_buffers(self) -> Iterator[None]:
        """Rank 0's buffers, such as a batch norm's statistics; each has its own afterwards."""
        buffers = [buffer.detach() for buffer in self.model.buffers()]
        own = [buffer.clone() for buffer in buffers] if self._ctx.world > 1 else []
        for buffer in buffers:
            broadcast(self._ctx.collective, buffer)
        try:
            yield
        finally:
            for buffer, value in zip(buffers, own, strict=False):
                buffer.copy_(value)

    # --- evaluation and prediction ---

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Loss, rows and metrics over the batches of all workers; see ``Replica.evaluate``."""
        with self._rank_0_buffers(), calling.evaluating(self.model):
            return self.work.evaluate(batches, self._ctx.collective)

    def predict(self, features: Tree) -> Tree:
        """Outputs for one batch, as NumPy arrays; see ``Replica.predict``."""
        options = self._ctx.options
        if options.accelerator is not None:
            if self._accelerated is None:
                from bigdl.orca.learn.pytorch.accelerated import Accelerated

                self._accelerated = Accelerated(self.model, options.accelerator, options.precision)
            return calling.to_arrays(self._accelerated(features))
        with calling.evaluating(self.model):
            return calling.to_arrays(self.work.predict(features))

    # --- state ---

    def state(self) -> State:
        """All that a checkpoint needs; see ``Replica.state``. All workers call it."""
        with self._rank_0_buffers():
            state = storing.state_of(self, self._gradients, self._streams, self._ctx.collective)
        if self._acceleration is not None and self._acceleration.force is not None:
            users = {"state_dict": state["model"], "optimizer_states": [state["optimizer"]]}
            self._acceleration.force.as_users(users)
        return state

    def part(self) -> Any:
        """What the present epoch's record is made of; see ``Replica.part``."""
        return None if self._run is None else self._run.part()

    def load(self, state: State) -> None:
        """Go on from a state; see ``Replica.load``."""
        storing.load_into(self, state, self._gradients, self._streams, self._ctx)


class _Run:
    """One call of ``train``: where it is, and what it has still to do."""

    def __init__(
        self,
        replica: TorchReplica,
        gradients: Gradients,
        hooks: Hooks,
        start: Cursor,
        faster: Acceleration | None,
    ) -> None:
        self._replica = replica
        self._faster = faster
        self._gradients = gradients
        self._hooks = hooks
        self._cursor = start
        self._ctx = replica._ctx
        self._work = replica.work
        self._options = replica._ctx.options
        self._steps_left = self._options.max_steps
        self._record = _Record(self._work.tally())
        if start.row == 0:
            replica.batches = 0

    def epochs(self, epochs: int) -> list[dict[str, Any]]:
        rows = []
        self._work.at(self._cursor)
        self._work.moment("on_fit_start")
        self._work.moment("on_train_start")
        for _ in range(epochs):
            row, goes_on = self._epoch()
            rows.append(row)
            if not goes_on:
                break
        self._work.moment("on_train_end")
        self._work.moment("on_fit_end")
        return rows

    def part(self) -> Any:
        return self._record.part(self._cursor, self._ctx.collective)

    def _epoch(self) -> tuple[dict[str, Any], bool]:
        """An epoch's record, and whether another may follow."""
        first, replica, hooks, work = self._cursor, self._replica, self._hooks, self._work
        had = hooks.had() or {}
        tally = work.tally(had.get("shares", ()))
        self._record = _Record(tally, first, had.get("steps", 0), had.get("seconds", 0.0))
        work.at(first)
        work.moment("on_train_epoch_start")
        if self._faster is not None:
            self._faster.epoch_started()
        hooks.on_epoch_start(replica, first)
        batches = iter(hooks.batches(first))
        is_stopped = self._steps(batches, tally)
        is_whole = not is_stopped
        if self._steps_left == 0 and not is_stopped:
            is_whole = self._all_agree(next(batches, None) is None)
        if is_whole and self._cursor.row == 0:
            raise DataError("There are no rows to train on.")
        self._record.end()
        found: dict[str, Any] = {}
        if is_whole:
            self._cursor = replace(self._cursor, epoch=first.epoch + 1, row=0)
            found = dict(hooks.validate(replica, self._cursor))
        work.epoch_ended(tally, self._ctx.collective)
        row = self._record.row(self._cursor, self._ctx.collective)
        row.update(found)
        work.recorded(row)
        if is_whole:
            replica.batches = 0
            replica.step_scheduler("epoch", self._cursor.epoch, row)
        hooks.on_epoch_end(replica, self._cursor, row)
        goes_on = is_whole and self._steps_left != 0
        return row, self._all_agree(not hooks.should_stop()) and goes_on

    def _all_agree(self, claim: bool) -> bool:
        against = np.array([not claim], np.int64)
        return int(self._ctx.collective.all_reduce(against)[0]) == 0

    def _steps(self, batches: Iterator[Batch], tally: Tally) -> bool:
        """Make updates until there are no batches, or no more are wanted; whether stopped."""
        many = self._options.accumulation_steps
        while self._steps_left != 0:
            window = itertools.islice(batches, many)
            outcome = self._step(window, tally)
            if outcome.is_stopped or outcome.rows == 0:
                return outcome.is_stopped and outcome.rows > 0
            self._cursor = replace(
                self._cursor, row=self._cursor.row + outcome.rows, step=self._cursor.step + 1
            )
            if self._steps_left is not None:
                self._steps_left -= 1
            over = outcome.weight if self._work.averages else outcome.rows
            loss = outcome.loss / over if over else float("nan")
            self._work.at(self._cursor)
            self._work.stepped(tally)
            self._replica.step_scheduler("step", self._cursor.step, {"loss": loss})
            self._hooks.on_step_end(
                self._replica, StepEnd(cursor=self._cursor, loss=loss, rows=outcome.rows)
            )
            if self._faster is not None:
                self._faster.stepped()
        return False

    def _step(self, window: Iterable[Batch], tally: Tally) -> Outcome:
        """One update from some batches: gradients of each, their sum, the optimizer's step."""
        stop = self._hooks.should_stop()
        if self._work.leaves_traces and self._ctx.world > 1:
            stop = not self._all_agree(not stop)
        faster = self._faster
        if faster is not None:
            window = list(window)
            faster.meets(window)
        done, outcome = self._summed(window, stop)
        if faster is not None and faster.is_tripped(outcome.loss):
            faster.give_up(self._cursor.step + 1)
            self._gradients.clear()
            self._work.forget()
            done, outcome = self._summed(window, stop)
        if outcome.rows and not outcome.is_stopped:
            optimizer = self._replica.optimizer
            assert optimizer is not None
            self._work.moment("on_before_optimizer_step", optimizer)
            self._gradients.update(optimizer, outcome)
            self._replica.batches += done.batches
            tally.add(loss=done.loss, weight=done.weight, rows=done.rows)
        self._gradients.clear()
        if faster is not None:
            faster.updated(done.batches)
        return outcome

    def _summed(self, window: Iterable[Batch], stop: bool) -> tuple[_Done, Outcome]:
        """The gradients of some batches, those of all workers in each ``grad``."""
        done = _Done()
        for batch in window:
            if batch.rows and not stop:
                self._backward(batch, done)
            done.rows += batch.rows
            done.batches += 1
        loss = done.loss
        if self._faster is not None and not self._faster.is_finite():
            loss = float("nan")  # so that all workers hear of it
        outcome = self._gradients.reduce(
            rows=done.rows,
            weight=done.weight,
            loss=loss,
            unit=1.0 if done.unit is None else done.unit,
            stop=stop,
        )
        return done, outcome

    def _backward(self, batch: Batch, done: _Done) -> None:
        """Add one batch's gradients to those of the batches before it."""
        term = self._work.loss_of(batch, self._replica.batches + done.batches)
        if done.unit is None:
            done.unit = self._gradients.unit(term, batch.global_rows)
        if not term.is_void:
            scale = term.weight / done.unit if self._work.averages else 1.0
            self._work.backward(term.value if scale == 1.0 else term.value * scale)
        done.weight += term.weight
        done.loss += summed(term, self._work.averages)


class _Done:
    """What this worker has of an update, batch by batch."""

    def __init__(self) -> None:
        self.unit: float | None = None
        self.rows = 0
        self.batches = 0
        self.weight = 0.0
        self.loss = 0.0


class _Record:
    """An epoch's record in the making.

    Args:
        tally: Of its rows.
        first: Where it began.
        steps: Updates before that, in an epoch that is gone on with.
        seconds: What those took.
    """

    def __init__(
        self, tally: Tally, first: Cursor | None = None, steps: int = 0, seconds: float = 0.0
    ) -> None:
        self._tally, self._first = tally, first or Cursor()
        self._steps = steps
        self._began = time.monotonic() - seconds
        self._seconds: float | None = None

    def end(self) -> None:
        """The last update was made; validation takes no time of its record's."""
        self._seconds = time.monotonic() - self._began

    def part(self, now: Cursor, collective: Any) -> dict[str, Any]:
        return {**self._so_far(now), "shares": self._tally.gather(collective)}

    def row(self, now: Cursor, collective: Any) -> dict[str, Any]:
        found = self._tally.merge(collective)
        row = {"epoch": self._first.epoch + 1, "loss": found["loss"], "rows": found["rows"]}
        row |= self._so_far(now)
        return row | {key: value for key, value in found.items() if key not in row}

    def _so_far(self, now: Cursor) -> dict[str, Any]:
        return {
            "steps": self._steps + now.step - self._first.step,
            "seconds": time.monotonic() - self._began if self._seconds is None else self._seconds,
        }
