"""What processes log, as one process would have logged it.

Logged numbers are brought together at two moments that all processes share: after each step,
and when an epoch has ended. A mean is weighed by rows. Between these moments nothing travels, so
that any process may look at its metrics whenever it likes.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bigdl.nano.pytorch.lightning.host import part
from bigdl.nano.pytorch.processes.exchange import gather_values

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bigdl._base.collective import Collective

__all__ = ["SummedLogs", "follow_metrics", "sum_step", "unfollow_metrics"]

_StockConnector = part("trainer.connectors.logger_connector:_LoggerConnector")
_result = "trainer.connectors.logger_connector.result"
_ResultMetric = part(f"{_result}:_ResultMetric")
_Metadata = part(f"{_result}:_Metadata")
_Sync = part(f"{_result}:_Sync")
_Metric = part(f"{_result}:Metric")


class SummedLogs(_StockConnector):  # type: ignore[misc,valid-type]
    """Lightning's connector, which knows that an epoch was trained by several."""

    def epoch_end_reached(self) -> None:
        super().epoch_end_reached()
        self._sum_epoch()

    def on_epoch_end(self) -> None:
        self._sum_epoch()  # what the hooks at the end of the epoch have logged
        super().on_epoch_end()

    def _sum_epoch(self) -> None:
        collective = self.trainer.strategy.collective
        results = self.trainer._results
        if collective is not None and results is not None:
            _sum_epoch(collective, results, self.trainer.lightning_module)


# --- a step -----------------------------------------------------------------------------------


def sum_step(collective: Collective, results: Any, before: Mapping[str, Any], rows: int) -> None:
    """After a step: numbers that it logged become those of the global batch.

    Args:
        collective: The processes.
        results: Lightning's collection of what was logged.
        before: By key, what stood there before the step.
        rows: Of this process.
    """
    mine = {
        key: (_how(one), one._forward_cache, float(rows))
        for key, one in results.items()
        if isinstance(one._forward_cache, torch.Tensor)
        and one.meta.on_step
        and one._forward_cache is not before.get(key)
    }
    for key, value in _merged(gather_values(collective, mine)).items():
        one = results.get(key)
        if one is not None:
            one._forward_cache = value
            if one.is_tensor and not one.meta.on_epoch:
                one.value = value


def _how(one: Any) -> str:
    """How values of several processes become one; those of a metric by their mean."""
    return str(one.meta.reduce_fx.__name__) if one.is_tensor else "mean"


def _merged(every: list[dict[str, tuple[str, Any, float]]]) -> dict[str, Any]:
    """One number for each key, of (how, number, weight) of each process that has it."""
    found: dict[str, list[tuple[str, Any, float]]] = {}
    for one in every:
        for key, value in one.items():
            found.setdefault(key, []).append(value)
    return {key: _one_of(values) for key, values in found.items()}


def _one_of(values: list[tuple[str, Any, float]]) -> Any:
    how, first, _ = values[0]
    numbers = torch.stack([value.double() for _, value, _ in values])
    if how == "mean":
        weights = torch.tensor([weight for _, _, weight in values], dtype=torch.float64)
        total = weights.sum()
        shape = (-1, *[1] * first.ndim)
        made = (numbers * (weights / total).view(shape)).sum(0) if total else numbers.mean(0)
    else:
        reduce: Any = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}[how]
        made = reduce(numbers, 0)
    return made.to(first.dtype)


# --- an epoch ---------------------------------------------------------------------------------


def _sum_epoch(collective: Collective, results: Any, module: Any) -> None:
    """Every process gets the values of the epoch; one that logged nothing gets them too."""
    mine = {
        key: _contribution(one)
        for key, one in results.items()
        if one.meta.on_epoch and not one.has_reset and one._computed is None
    }
    every = gather_values(collective, mine)
    for key in dict.fromkeys(key for one in every for key in one):
        told = [one[key] for one in every if key in one]
        meta, is_tensor = told[0]["meta"], told[0]["is_tensor"]
        entry = results.get(key)
        if entry is None:
            entry = results[key] = _entry(meta, is_tensor, module)
        entry.has_reset = False
        if is_tensor:
            values = [(_how(entry), one["value"], one["weight"]) for one in told]
            entry._computed = _one_of(values).to(told[0]["dtype"])
        else:
            metric = entry.value
            metric._update_count = max(metric._update_count, *(one["updates"] for one in told))
            entry._computed = metric.compute()
        entry._update_count = max(1, entry._update_count)


def _contribution(one: Any) -> dict[str, Any]:
    """What a process has to say of one thing that it logged."""
    told = {field.name: getattr(one.meta, field.name) for field in fields(one.meta)}
    told["_sync"] = one.meta.sync.rank_zero_only
    if not one.is_tensor:
        return {"meta": told, "is_tensor": False, "updates": one.value._update_count}
    value, weight = one.value.double(), 1.0
    if one.meta.is_mean_reduction:
        weight = float(one.cumulated_batch_size)
        value = value / one.cumulated_batch_size
    dtype = one.value.dtype
    return {"meta": told, "is_tensor": True, "value": value, "weight": weight, "dtype": dtype}


def _entry(meta: dict[str, Any], is_tensor: bool, module: Any) -> Any:
    """A place for what others have logged."""
    data = _Metadata(**{**meta, "_sync": None})
    # equal to what this process will log itself: Lightning compares
    data.sync = _Sync(fn=module.trainer.strategy.reduce, rank_zero_only=meta["_sync"])
    entry = _ResultMetric(data, is_tensor)
    if not is_tensor:
        entry.value = module.get_submodule(meta["metric_attribute"])
    return entry


# --- metrics of torchmetrics ------------------------------------------------------------------


def follow_metrics(collective: Collective, module: torch.nn.Module) -> None:
    """Let the module's metrics be computed over all processes' rows; all compute them alike."""
    for one in module.modules():
        if isinstance(one, _Metric) and type(one)._sync_dist is _Metric._sync_dist:
            vars(one).update(
                distributed_available_fn=_is_available,
                _sync_dist=partial(_gather_state, one, collective),
            )


def unfollow_metrics(module: torch.nn.Module) -> None:
    """Leave the metrics as they were made."""
    for one in module.modules():
        if isinstance(one, _Metric) and vars(one).pop("_sync_dist", None) is not None:
            one.distributed_available_fn = _is_torch_distributed


def _gather_state(metric: Any, collective: Collective, *args: Any, **kwargs: Any) -> None:
    """In place of torchmetrics' own way, which needs as many tensors from every process."""
    mine = {name: getattr(metric, name) for name in metric._reductions}
    every = gather_values(collective, mine)
    for name, reduce in metric._reductions.items():
        values = [one[name] for one in every]
        if isinstance(mine[name], list):
            made: Any = [item for value in values for item in value]
            made = reduce(made) if made and reduce is not None else made
        else:
            made = torch.stack(values)
            made = reduce(made) if reduce is not None else made
        setattr(metric, name, made)


def _is_available() -> bool:
    return True


#: What torchmetrics asks where nobody says otherwise.
_is_torch_distributed = _Metric.__init__.__globals__["jit_distributed_available"]
