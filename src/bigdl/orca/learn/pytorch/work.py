"""What is done with a batch: the contract, and that of a plain module with its loss.

A LightningModule does the same things by its own steps (``lightning.py``); the loop over epochs
and all that workers do together is the replica's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bigdl._base import trees
from bigdl.orca.learn.pytorch import calling
from bigdl.orca.learn.pytorch.metrics import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bigdl._base.collective import Collective
    from bigdl._base.trees import Tree
    from bigdl.nano.pytorch.plan.plan import InForce
    from bigdl.orca.data.contract import Batch
    from bigdl.orca.learn.program import Cursor
    from bigdl.orca.learn.pytorch.losses import Term, WeightedLoss
    from bigdl.orca.learn.pytorch.metrics import Metric, Share

__all__ = ["PlainWork", "Work", "summed"]


class Work(Protocol):
    """A model's own part of training, evaluation and prediction, on one worker.

    Attributes:
        has_loss: Whether it can be trained.
        averages: Whether losses are means, else sums.
        leaves_traces: Whether the user's code runs beside ``forward``, so that no loss may be
            computed in vain.
        force: What makes training steps faster; None = nothing does.
    """

    force: InForce | None

    @property
    def has_loss(self) -> bool: ...

    @property
    def averages(self) -> bool: ...

    @property
    def leaves_traces(self) -> bool: ...

    def tally(self, earlier: Sequence[Share] = ()) -> Tally:
        """For the record of an epoch."""

    def at(self, cursor: Cursor) -> None:
        """Training is here now."""

    def moment(self, name: str, *arguments: Any) -> None:
        """A moment of training that Lightning has a hook for, by its name."""

    def loss_of(self, batch: Batch, number: int) -> Term:
        """The loss of a batch to train on, the ``number``-th of its epoch."""

    def backward(self, loss: torch.Tensor) -> None:
        """Make gradients."""

    def forget(self) -> None:
        """The last losses are of no account: their update will be made again."""

    def stepped(self, tally: Tally) -> None:
        """The update that the last losses were for has been made."""

    def epoch_ended(self, tally: Tally, collective: Collective) -> None:
        """Before the record is made; all workers call it."""

    def recorded(self, row: dict[str, Any]) -> None:
        """The record is made."""

    def evaluate(self, batches: Iterable[Batch], collective: Collective) -> dict[str, Any]:
        """See ``Replica.evaluate``; the model is in eval mode."""

    def predict(self, features: Tree) -> Any:
        """The outputs of a batch; the model is in eval mode."""


class PlainWork:
    """A module, and a loss of its output.

    Args:
        model: Called with the features.
        loss: Called with output and labels; None = there is none.
        metrics: Of output and labels; they are not changed.
        precision: "fp32" or "bf16".
    """

    leaves_traces = False

    def __init__(
        self,
        model: torch.nn.Module,
        loss: WeightedLoss | None,
        metrics: Sequence[Metric],
        precision: str,
    ) -> None:
        self._call = calling.caller(model)
        self._loss = loss
        self._metrics = metrics
        self._precision = precision
        #: (output, labels, rows) of the update's batches, for metrics.
        self._outputs: list[tuple[Any, Any, int]] = []
        self.force: InForce | None = None

    @property
    def has_loss(self) -> bool:
        return self._loss is not None

    @property
    def averages(self) -> bool:
        return self._loss is None or self._loss.averages

    def tally(self, earlier: Sequence[Share] = ()) -> Tally:
        fresh = [metric.fresh() for metric in self._metrics]
        return Tally(fresh, averages=self.averages, earlier=earlier)

    def at(self, cursor: Cursor) -> None:
        """Nobody here asks."""

    def moment(self, name: str, *arguments: Any) -> None:
        """Nobody here listens."""

    def loss_of(self, batch: Batch, number: int) -> Term:
        features, labels = calling.split(calling.to_tensors(batch.data))
        output, term = self.term_of(self._call, features, labels, batch.rows, force=self.force)
        if self._metrics:
            self._outputs.append((_detached(output), labels, batch.rows))
        return term

    def term_of(
        self,
        call: Callable[[Any], Any],
        features: Any,
        labels: Any,
        rows: int,
        *,
        force: InForce | None,
    ) -> tuple[Any, Term]:
        """Output and loss of a module that ``call`` calls, with ``force`` in force."""
        assert self._loss is not None
        if force is None:
            with calling.precision(self._precision):
                output = call(features)
                return output, self._loss(output, labels, rows)
        with force.step(), calling.precision(self._precision):
            features, labels = force.batch((features, labels))
            output = call(features)
            term = self._loss(output, labels, rows)
        return output, replace(term, value=force.output(term.value))

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        self._outputs.clear()

    def stepped(self, tally: Tally) -> None:
        with torch.no_grad():
            for output, labels, rows in self._outputs:
                tally.measure(output, labels, rows)
        self._outputs.clear()

    def epoch_ended(self, tally: Tally, collective: Collective) -> None:
        self._outputs.clear()

    def recorded(self, row: dict[str, Any]) -> None:
        """Nobody here asks."""

    def evaluate(self, batches: Iterable[Batch], collective: Collective) -> dict[str, Any]:
        tally = self.tally()
        for batch in batches:
            if batch.rows:
                self._score(batch, tally)
        return tally.merge(collective, has_loss=self.has_loss)

    def _score(self, batch: Batch, tally: Tally) -> None:
        features, labels = calling.split(calling.to_tensors(batch.data))
        with calling.precision(self._precision):
            output = self._call(features)
            if self._loss is None:
                tally.add(loss=0.0, weight=0.0, rows=batch.rows)
            else:
                term = self._loss(output, labels, batch.rows)
                tally.add(loss=summed(term, self.averages), weight=term.weight, rows=batch.rows)
        tally.measure(output, labels, batch.rows)

    def predict(self, features: Tree) -> Any:
        with calling.precision(self._precision):
            return self._call(calling.to_tensors(features))


def summed(term: Term, averages: bool) -> float:
    """The sum that a mean was made of, or the sum itself; nothing's sum is 0."""
    if not averages:
        return float(term.value.detach())
    return float(term.value.detach()) * term.weight if term.weight else 0.0


def _detached(output: Any) -> Any:
    return trees.map_leaves(
        lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, output
    )
