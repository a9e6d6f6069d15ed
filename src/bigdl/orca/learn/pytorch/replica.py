"""A worker's model of PyTorch, and the loop that trains it together with the other workers'."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigdl._base import trees
from bigdl._base.errors import DataError, NotReadyError
from bigdl.nano.pytorch.processes.memory import broadcast
from bigdl.nano.pytorch.processes.streams import Streams
from bigdl.orca.learn.program import Cursor, Hooks, ReplicaContext, State, StepEnd
from bigdl.orca.learn.pytorch import calling, storing
from bigdl.orca.learn.pytorch.gradients import Gradients, connect_gradients
from bigdl.orca.learn.pytorch.metrics import Tally

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bigdl._base.sync import Outcome
    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import Batch
    from bigdl.orca.learn.pytorch.losses import WeightedLoss
    from bigdl.orca.learn.pytorch.metrics import Metric

__all__ = ["TorchReplica"]


class TorchReplica:
    """Made by ``TorchProgram.build``; see ``bigdl.orca.learn.program.Replica``."""

    def __init__(
        self,
        *,
        ctx: ReplicaContext,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        loss: WeightedLoss | None,
        scheduler: Any,
        scheduler_interval: str,
        metrics: Sequence[Metric],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._ctx = ctx
        self._loss = loss
        self._scheduler_interval = scheduler_interval
        self._metrics = metrics
        self._call = calling.caller(model)
        self._streams = Streams(ctx.seed, ctx.rank)
        self._gradients: Gradients | None = None

    # --- training ---

    def train(self, epochs: int, start: Cursor, hooks: Hooks) -> list[dict[str, Any]]:
        """Train for ``epochs`` epochs, from ``start``; see ``Replica.train``."""
        if self.optimizer is None or self._loss is None:
            raise NotReadyError(
                "Training needs an optimizer and a loss: give optimizer= and loss= where the "
                "model is given."
            )
        self._gradients = connect_gradients(
            self._ctx, self.optimizer, averages=self._loss.averages
        )
        self._gradients.clear()
        modes = [(module, module.training) for module in self.model.modules()]
        if not self.model.training:
            self.model.train()
        try:
            with self._streams.drawn():
                rows = _Run(self, self._gradients, hooks, start).epochs(epochs)
            for buffer in self.model.buffers():
                broadcast(self._ctx.collective, buffer.detach())
            self._gradients.finish(self.optimizer)
            return rows
        finally:
            for module, mode in modes:
                module.training = mode
            self._gradients.close()
            self._gradients = None

    def step_scheduler(self, interval: str, row: dict[str, Any]) -> None:
        """Step the scheduler if it steps at that interval."""
        if self.scheduler is None or interval != self._scheduler_interval:
            return
        arguments = []
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            arguments = [row.get("val_loss", row["loss"])]
        with warnings.catch_warnings():
            # the mark that the optimizer's step is watched does not travel to a worker
            warnings.filterwarnings("ignore", message="Seems like `optimizer.step")
            self.scheduler.step(*arguments)

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
        averages = self._loss is None or self._loss.averages
        tally = Tally(self._metrics, averages=averages)
        with self._rank_0_buffers(), calling.evaluating(self.model):
            for batch in batches:
                if batch.rows:
                    self._score(batch, tally)
        return tally.merge(self._ctx.collective, has_loss=self._loss is not None)

    def _score(self, batch: Batch, tally: Tally) -> None:
        features, labels = calling.split(calling.to_tensors(batch.data))
        with calling.precision(self._ctx.options.precision):
            output = self._call(features)
            if self._loss is None:
                tally.add(loss=0.0, weight=0.0, rows=batch.rows)
            else:
                term = self._loss(output, labels, batch.rows)
                tally.add(loss=_sum(self._loss, term), weight=term.weight, rows=batch.rows)
        tally.measure(output, labels, batch.rows)

    def predict(self, features: Tree) -> Tree:
        """Outputs for one batch, as NumPy arrays; see ``Replica.predict``."""
        inputs = calling.to_tensors(features)
        with (
            calling.evaluating(self.model),
            calling.precision(self._ctx.options.precision),
        ):
            return calling.to_arrays(self._call(inputs))

    # --- state ---

    def state(self) -> State:
        """All that a checkpoint needs; see ``Replica.state``. All workers call it."""
        with self._rank_0_buffers():
            return storing.state_of(self, self._gradients, self._streams, self._ctx.collective)

    def load(self, state: State) -> None:
        """Go on from a state; see ``Replica.load``."""
        storing.load_into(self, state, self._gradients, self._streams, self._ctx)


class _Run:
    """One call of ``train``: where it is, and what it has still to do."""

    def __init__(
        self, replica: TorchReplica, gradients: Gradients, hooks: Hooks, start: Cursor
    ) -> None:
        self._replica = replica
        self._gradients = gradients
        self._hooks = hooks
        self._cursor = start
        self._ctx = replica._ctx
        self._loss: Any = replica._loss
        self._options = replica._ctx.options
        self._steps_left = self._options.max_steps

    def epochs(self, epochs: int) -> list[dict[str, Any]]:
        rows = []
        for _ in range(epochs):
            row, goes_on = self._epoch()
            rows.append(row)
            if not goes_on:
                break
        return rows

    def _epoch(self) -> tuple[dict[str, Any], bool]:
        """An epoch's record, and whether another may follow."""
        began, first = time.monotonic(), self._cursor
        replica, hooks = self._replica, self._hooks
        hooks.on_epoch_start(replica, first)
        tally = Tally(replica._metrics, averages=self._loss.averages)
        batches = iter(hooks.batches(first))
        is_stopped = self._steps(batches, tally)
        is_whole = not is_stopped
        if self._steps_left == 0 and not is_stopped:
            is_whole = self._all_agree(next(batches, None) is None)
        found = tally.merge(self._ctx.collective)
        if is_whole and found["rows"] == 0 and first.row == 0:
            raise DataError("There are no rows to train on.")
        row: dict[str, Any] = {"epoch": first.epoch + 1, "loss": found["loss"]}
        row |= {
            "rows": found["rows"],
            "steps": self._cursor.step - first.step,
            "seconds": time.monotonic() - began,
        }
        row |= {key: value for key, value in found.items() if key not in row}
        if is_whole:
            self._cursor = replace(self._cursor, epoch=first.epoch + 1, row=0)
            row.update(hooks.validate(replica, self._cursor))
            replica.step_scheduler("epoch", row)
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
            over = outcome.weight if self._loss.averages else outcome.rows
            loss = outcome.loss / over if over else float("nan")
            self._replica.step_scheduler("step", {"loss": loss})
            self._hooks.on_step_end(
                self._replica, StepEnd(cursor=self._cursor, loss=loss, rows=outcome.rows)
            )
        return False

    def _step(self, window: Iterable[Batch], tally: Tally) -> Outcome:
        """One update from some batches: gradients of each, their sum, the optimizer's step."""
        stop = self._hooks.should_stop()
        done = _Done()
        for batch in window:
            if batch.rows and not stop:
                self._backward(batch, done)
            done.rows += batch.rows
        outcome = self._gradients.reduce(
            rows=done.rows,
            weight=done.weight,
            loss=done.loss,
            unit=1.0 if done.unit is None else done.unit,
            stop=stop,
        )
        if outcome.rows and not outcome.is_stopped:
            assert self._replica.optimizer is not None
            self._gradients.update(self._replica.optimizer, outcome)
            tally.add(loss=done.loss, weight=done.weight, rows=done.rows)
            with torch.no_grad():
                for output, labels, rows in done.outputs:
                    tally.measure(output, labels, rows)
        self._gradients.clear()
        return outcome

    def _backward(self, batch: Batch, done: _Done) -> None:
        """Add one batch's gradients to those of the batches before it."""
        features, labels = calling.split(calling.to_tensors(batch.data))
        with calling.precision(self._options.precision):
            output = self._replica._call(features)
            term = self._loss(output, labels, batch.rows)
        if done.unit is None:
            done.unit = self._gradients.unit(term, batch.global_rows)
        if not term.is_void:
            scale = term.weight / done.unit if self._loss.averages else 1.0
            (term.value if scale == 1.0 else term.value * scale).backward()
        done.weight += term.weight
        done.loss += _sum(self._loss, term)
        if self._replica._metrics:
            done.outputs.append((_detached(output), labels, batch.rows))


class _Done:
    """What this worker has of an update, batch by batch."""

    def __init__(self) -> None:
        self.unit: float | None = None
        self.rows = 0
        self.weight = 0.0
        self.loss = 0.0
        #: (output, labels, rows) of each batch, for metrics.
        self.outputs: list[tuple[Any, Any, int]] = []


def _sum(loss: WeightedLoss, term: Any) -> float:
    """The sum that a mean was made of, or the sum itself; nothing's sum is 0."""
    if not loss.averages:
        return float(term.value.detach())
    return float(term.value.detach()) * term.weight if term.weight else 0.0


def _detached(output: Any) -> Any:
    return trees.map_leaves(
        lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, output
    )
