"""What a LightningModule logs, for the record of all workers' rows.

Values are means weighted by rows (or sums, least, greatest, as ``reduce_fx`` says) over all
workers; a metric of torchmetrics is its value for the state of all workers together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import ConfigError
from bigdl.orca.learn.pytorch.metrics import (
    collections_in,
    metrics_in,
    part_groups,
    plain,
    put_together,
    state_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from bigdl.orca.learn.pytorch.metrics import MetricState

__all__ = ["Logbook", "metric_states", "named_metrics"]

_REDUCTIONS = {"mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max"}


@dataclass
class Entry:
    """One key's values on one worker.

    Args:
        reduction: "mean", "sum", "min" or "max".
        on_step: Whether the last step's value is asked for.
        on_epoch: Whether that of all steps is.
        metric: The name of the metric that is logged, in the module; None = numbers are.
        total: Reduced value; of a mean the sum of value times weight.
        weight: Rows that it is a mean over.
        last: The last value, and its rows.
        number: The batch that it was logged in; -1 = at the end of the epoch.
    """

    reduction: str
    on_step: bool
    on_epoch: bool
    metric: str | None = None
    total: float = 0.0
    weight: float = 0.0
    last: tuple[float, float] = (0.0, 0.0)
    number: int = -1
    is_empty: bool = True

    def add(self, value: float, weight: float, number: int) -> None:
        self.total = _joined(self.reduction, self, Entry.of(self, value, weight))
        self.weight += weight
        self.last, self.number, self.is_empty = (value, weight), number, False

    @staticmethod
    def of(like: Entry, value: float, weight: float) -> Entry:
        total = value * weight if like.reduction == "mean" else value
        return Entry(like.reduction, False, True, None, total, weight, is_empty=False)

    @property
    def value(self) -> float:
        if self.reduction != "mean":
            return self.total
        return self.total / self.weight if self.weight else float("nan")


def _joined(reduction: str, one: Entry, other: Entry) -> float:
    if one.is_empty or other.is_empty:
        return other.total if one.is_empty else one.total
    if reduction in ("mean", "sum"):
        return one.total + other.total
    return (min if reduction == "min" else max)(one.total, other.total)


@dataclass
class Logbook:
    """What was logged in an epoch, or in an evaluation, on this worker; a ``Metric``.

    Args:
        module: Whose metrics are logged.
        keeps_all: Whether its parts have the state of metrics that are not logged, too.
    """

    module: torch.nn.Module
    keeps_all: bool = False
    entries: dict[str, Entry] = field(default_factory=dict)

    def log(
        self,
        name: str,
        value: Any,
        *,
        on_step: bool,
        on_epoch: bool,
        reduce_fx: Any,
        metric: str | None,
        weight: float,
        number: int,
    ) -> None:
        """Take a value.

        Raises:
            ConfigError: The reduction is not known.
        """
        entry = self.entries.get(name)
        if entry is None:
            word = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "")
            if word.lower() not in _REDUCTIONS:
                raise ConfigError(
                    f"self.log({name!r}, reduce_fx={reduce_fx!r}): values of workers can be put "
                    'together by "mean", "sum", "min" or "max".'
                )
            entry = Entry(_REDUCTIONS[word.lower()], on_step, on_epoch, metric)
            self.entries[name] = entry
        if metric is None:
            entry.add(float(value), weight, number)

    def fresh(self) -> Logbook:
        return Logbook(self.module, self.keeps_all)

    def update(self, output: Any, labels: Any, rows: int) -> None:
        """What is logged comes by ``log``."""

    def parts(self) -> tuple[dict[str, Entry], dict[str, MetricState]]:
        logged = {entry.metric for entry in self.entries.values()}
        states = metric_states(self.module)
        if not self.keeps_all:
            states = {name: state for name, state in states.items() if name in logged}
        return self.entries, states

    def value(
        self, parts: Sequence[tuple[dict[str, Entry], dict[str, MetricState]]]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        keys = dict.fromkeys(key for entries, _ in parts for key in entries)
        for key in keys:
            every = [entries[key] for entries, _ in parts if key in entries]
            name = every[0].metric
            if name is not None:
                found[key] = self._computed(name, [s[name] for _, s in parts if name in s])
                continue
            step, epoch = _last(every), _all(every)
            if every[0].on_step and every[0].on_epoch:
                found |= {key: epoch, f"{key}_step": step, f"{key}_epoch": epoch}
            else:
                found[key] = epoch if every[0].on_epoch else step
        return found

    def _computed(self, name: str, states: list[MetricState]) -> Any:
        metric = named_metrics(self.module)[name].clone()
        metric.reset()
        put_together(metric, states)
        return plain(metric.compute())

    def end(self) -> None:
        """Reset the metrics that were logged, as Lightning does."""
        known = named_metrics(self.module)
        for entry in self.entries.values():
            if entry.metric in known:
                known[entry.metric].reset()


def _all(entries: Sequence[Entry]) -> float:
    whole = entries[0]
    for one in entries[1:]:
        total = _joined(whole.reduction, whole, one)
        whole = Entry(
            whole.reduction, False, True, None, total, whole.weight + one.weight, is_empty=False
        )
    return whole.value


def _last(entries: Sequence[Entry]) -> float:
    """The value of the last step, whose rows several workers may have had."""
    number = max(one.number for one in entries)
    return _all([Entry.of(one, *one.last) for one in entries if one.number == number])


def named_metrics(module: torch.nn.Module) -> dict[str, Any]:
    """The metrics of torchmetrics in a module, by name."""
    known = {id(metric) for metric in metrics_in(module)}
    return {name: one for name, one in module.named_modules() if id(one) in known}


def metric_states(module: torch.nn.Module) -> dict[str, MetricState]:
    """The states of those that were updated: not copied."""
    metrics = named_metrics(module)
    if not metrics:
        return {}
    for collection in collections_in(module):
        part_groups(collection)
    states = {name: state_of(metric) for name, metric in metrics.items()}
    return {name: state for name, state in states.items() if state[0] > 0}
