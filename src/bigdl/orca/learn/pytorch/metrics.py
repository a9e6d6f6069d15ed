"""Metrics over the rows of all workers, equal to those of one process.

A torchmetrics' metric has a state, and the states of all workers are put together before its
value is computed; values are never averaged. A plain function is a mean over rows. Imports no
torchmetrics: an object of it brings it along.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError, DataError
from bigdl._base.sync import gather_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl._base.collective import Collective

__all__ = [
    "Metric",
    "MetricState",
    "Share",
    "Tally",
    "collections_in",
    "metrics_in",
    "part_groups",
    "plain",
    "put_together",
    "read_metrics",
    "state_of",
]


#: How often a metric of torchmetrics was updated, and its state by name.
MetricState: TypeAlias = "tuple[int, dict[str, Any]]"


@dataclass(frozen=True)
class Share:
    """What one worker has for a record: the sum of losses, what that is over, rows, metrics."""

    loss: float
    weight: float
    rows: int
    parts: list[Any]


class Metric(Protocol):
    """One metric, on one worker."""

    def fresh(self) -> Metric:
        """The same metric, of no rows; the two know nothing of each other."""

    def update(self, output: Any, labels: Any, rows: int) -> None: ...

    def parts(self) -> Any:
        """What this worker has found, to be put together with the others'."""

    def value(self, parts: Sequence[Any]) -> dict[str, Any]:
        """Values by key, from all workers' parts."""


def read_metrics(metrics: Any) -> list[Metric]:
    """The user's metrics: one, a list, or a dict with keys of the user's own.

    Raises:
        ArgumentError: One is neither of torchmetrics nor a function.
        ConfigError: Two have one key.
    """
    if metrics is None:
        return []
    if isinstance(metrics, Mapping) and not _is_torchmetrics(metrics):
        named = list(metrics.items())
    else:
        several = metrics if isinstance(metrics, (list, tuple)) else [metrics]
        named = [(_key(metric), metric) for metric in several]
    keys = [key for key, _ in named]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(
            f"Two metrics have the key {twice[0]!r}. Name them: metrics={{'a': …, 'b': …}}."
        )
    return [
        _State(key, metric) if _is_torchmetrics(metric) else _Mean(key, metric)
        for key, metric in named
    ]


def _key(metric: Any) -> str:
    if _is_torchmetrics(metric):
        return type(metric).__name__
    if callable(metric) and not isinstance(metric, type):
        return getattr(metric, "__name__", type(metric).__name__)
    hint = f" Give an instance, {metric.__name__}(…)." if isinstance(metric, type) else ""
    raise ArgumentError(
        "A metric is one of torchmetrics, or a function of (predictions, labels), not "
        f"{shown(metric)}.{hint}"
    )


def _is_torchmetrics(metric: Any) -> bool:
    loaded = sys.modules.get("torchmetrics")
    return loaded is not None and isinstance(metric, (loaded.Metric, loaded.MetricCollection))


class _Mean:
    """A function of predictions and labels, as a mean over rows."""

    def __init__(self, key: str, function: Callable[[Any, Any], Any]) -> None:
        if not callable(function) or isinstance(function, type):
            _key(function)
        self._key = key
        self._function = function
        self._total = 0.0
        self._rows = 0

    def fresh(self) -> _Mean:
        return _Mean(self._key, self._function)

    def update(self, output: Any, labels: Any, rows: int) -> None:
        value = self._function(output, labels)
        try:
            number = float(value)
        except (TypeError, ValueError) as exc:
            raise DataError(
                f"The metric {self._key!r} gave {shown(value)}: need one number."
            ) from exc
        self._total += number * rows
        self._rows += rows

    def parts(self) -> tuple[float, int]:
        return self._total, self._rows

    def value(self, parts: Sequence[tuple[float, int]]) -> dict[str, Any]:
        rows = sum(part[1] for part in parts)
        return {self._key: sum(part[0] for part in parts) / rows if rows else float("nan")}


class _State:
    """A metric of torchmetrics, or a collection of them, by its state."""

    def __init__(self, key: str, metric: Any) -> None:
        self._key = key
        self._metric = metric
        self._is_collection = isinstance(metric, sys.modules["torchmetrics"].MetricCollection)

    def fresh(self) -> _State:
        made = _State(self._key, copy.deepcopy(self._metric))
        made._metric.reset()
        return made

    def update(self, output: Any, labels: Any, rows: int) -> None:
        self._metric.update(output, labels)

    def parts(self) -> list[MetricState]:
        if self._is_collection:
            part_groups(self._metric)
        return [state_of(metric) for metric in metrics_in(self._metric)]

    def value(self, parts: Sequence[list[MetricState]]) -> dict[str, Any]:
        whole = copy.deepcopy(self._metric)
        for number, metric in enumerate(metrics_in(whole)):
            put_together(metric, [part[number] for part in parts])
        value = whole.compute()
        if isinstance(value, Mapping):
            return {str(name): plain(one) for name, one in value.items()}
        return {self._key: plain(value)}


# --- states of torchmetrics -------------------------------------------------------------------


def metrics_in(module: Any) -> list[Any]:
    """The metrics of torchmetrics among a module and those within it."""
    loaded = sys.modules.get("torchmetrics")
    if loaded is None:
        return []
    return [one for one in module.modules() if isinstance(one, loaded.Metric)]


def collections_in(module: Any) -> list[Any]:
    """The collections of torchmetrics among a module and those within it."""
    loaded = sys.modules.get("torchmetrics")
    if loaded is None:
        return []
    return [one for one in module.modules() if isinstance(one, loaded.MetricCollection)]


def part_groups(collection: Any) -> None:
    """Members of a collection's group share a state: give each its own again."""
    dict(collection.items(keep_base=True, copy_state=True))


def state_of(metric: Any) -> MetricState:
    """How often a metric was updated, and its state: not copied."""
    return metric._update_count, {name: getattr(metric, name) for name in metric._defaults}


def put_together(metric: Any, parts: Sequence[MetricState]) -> None:
    """Give a metric the state of all ``parts`` together; without updates it stays as it is."""
    found = [part for part in parts if part[0] > 0]
    if not found:
        return
    counts = [count for count, _ in found]
    for name, reduction in metric._reductions.items():
        setattr(metric, name, _together(reduction, [state[name] for _, state in found], counts))
    metric._update_count = sum(counts)
    metric._computed = None


def _together(reduction: Any, states: list[Any], counts: list[int]) -> Any:
    """One state of all workers', as the metric says that its states are put together."""
    if len(states) == 1:
        return list(states[0]) if isinstance(states[0], list) else states[0]
    if any(isinstance(state, list) for state in states):
        return [
            item for state in states for item in (state if isinstance(state, list) else [state])
        ]
    if reduction is None:
        return torch.stack(states)
    name = getattr(reduction, "__name__", "")
    if name == "dim_zero_cat":
        return torch.cat([state.reshape(1) if state.dim() == 0 else state for state in states])
    if name == "dim_zero_mean":
        total = sum(state * count for state, count in zip(states, counts, strict=True))
        return total / sum(counts)
    return reduction(torch.stack(states))


def plain(value: Any) -> Any:
    """A metric's value as a number, or a list of them."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value


class Tally:
    """Loss, rows and metrics of some batches on this worker, and then those of all workers.

    Args:
        metrics: Of no rows yet; they are this tally's.
        averages: Whether losses are means. The loss of sums is given per row.
        earlier: What a tally of the same batches had (``gather``) that was broken off.
    """

    def __init__(
        self, metrics: Sequence[Metric], *, averages: bool, earlier: Sequence[Share] = ()
    ) -> None:
        self.metrics = metrics
        self._averages = averages
        self.earlier = earlier
        self._loss = 0.0
        self._weight = 0.0
        self._rows = 0

    def add(self, *, loss: float, weight: float, rows: int) -> None:
        """``loss`` is the sum: mean times weight."""
        self._loss += loss
        self._weight += weight
        self._rows += rows

    def measure(self, output: Any, labels: Any, rows: int) -> None:
        for metric in self.metrics:
            metric.update(output, labels, rows)

    def gather(self, collective: Collective) -> list[Share]:
        """What all workers have so far, and what there was before; all of them call it."""
        parts = [metric.parts() for metric in self.metrics]
        mine = Share(self._loss, self._weight, self._rows, parts)
        payloads = gather_bytes(collective, pickle.dumps(mine))
        # between workers of one gang, which trust each other
        return [*self.earlier, *(pickle.loads(payload) for payload in payloads)]

    def merge(self, collective: Collective, *, has_loss: bool | None = True) -> dict[str, Any]:
        """``loss``, ``rows`` and metrics of all workers; all of them call it.

        Args:
            collective: Between the workers.
            has_loss: Whether there is a loss; None = if any worker has added one.
        """
        every = self.gather(collective)
        rows = sum(one.rows for one in every)
        row: dict[str, Any] = {}
        over = sum(one.weight for one in every) if self._averages else rows
        if has_loss or (has_loss is None and over):
            row["loss"] = sum(one.loss for one in every) / over if over else float("nan")
        row["rows"] = rows
        if rows:
            for number, metric in enumerate(self.metrics):
                found = metric.value([one.parts[number] for one in every])
                row.update((key, value) for key, value in found.items() if key not in row)
        return row
