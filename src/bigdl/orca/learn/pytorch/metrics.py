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
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError, DataError
from bigdl._base.sync import gather_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl._base.collective import Collective

__all__ = ["Tally", "read_metrics"]


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

    def _all(self, metric: Any) -> list[Any]:
        kind = sys.modules["torchmetrics"].Metric
        return [module for module in metric.modules() if isinstance(module, kind)]

    def parts(self) -> list[tuple[int, dict[str, Any]]]:
        if self._is_collection:  # members of one group share a state: each gets its own again
            dict(self._metric.items(keep_base=True, copy_state=True))
        return [
            (metric._update_count, {name: getattr(metric, name) for name in metric._defaults})
            for metric in self._all(self._metric)
        ]

    def value(self, parts: Sequence[list[tuple[int, dict[str, Any]]]]) -> dict[str, Any]:
        whole = copy.deepcopy(self._metric)
        for number, metric in enumerate(self._all(whole)):
            found = [part[number] for part in parts if part[number][0] > 0]
            if not found:
                continue
            for name, reduction in metric._reductions.items():
                states = [state[name] for _, state in found]
                counts = [count for count, _ in found]
                setattr(metric, name, _together(reduction, states, counts))
            metric._update_count = sum(count for count, _ in found)
            metric._computed = None
        value = whole.compute()
        if isinstance(value, Mapping):
            return {str(name): _plain(one) for name, one in value.items()}
        return {self._key: _plain(value)}


def _together(reduction: Any, states: list[Any], counts: list[int]) -> Any:
    """One state of all workers', as the metric says that its states are put together."""
    if len(states) == 1:
        return states[0]
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


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value


class Tally:
    """Loss, rows and metrics of some batches on this worker, and then those of all workers.

    Args:
        metrics: From ``read_metrics``; they are not changed.
        averages: Whether losses are means. The loss of sums is given per row.
    """

    def __init__(self, metrics: Sequence[Metric], *, averages: bool) -> None:
        self._metrics = [metric.fresh() for metric in metrics]
        self._averages = averages
        self._loss = 0.0
        self._weight = 0.0
        self._rows = 0

    def add(self, *, loss: float, weight: float, rows: int) -> None:
        """``loss`` is the sum: mean times weight."""
        self._loss += loss
        self._weight += weight
        self._rows += rows

    def measure(self, output: Any, labels: Any, rows: int) -> None:
        for metric in self._metrics:
            metric.update(output, labels, rows)

    def merge(self, collective: Collective, *, has_loss: bool = True) -> dict[str, Any]:
        """``loss``, ``rows`` and metrics of all workers; all of them call it."""
        mine = (self._loss, self._weight, self._rows, [m.parts() for m in self._metrics])
        # between workers of one gang, which trust each other
        every = [pickle.loads(payload) for payload in gather_bytes(collective, pickle.dumps(mine))]
        rows = sum(one[2] for one in every)
        row: dict[str, Any] = {}
        if has_loss:
            over = sum(one[1] for one in every) if self._averages else rows
            row["loss"] = sum(one[0] for one in every) / over if over else float("nan")
        row["rows"] = rows
        if rows:
            for number, metric in enumerate(self._metrics):
                row.update(metric.value([one[3][number] for one in every]))
        return row
