"""Accuracy of a model on a whole data set. Knows torch; asks torchmetrics only if it is loaded.

A metric says whether its reading is one number of the whole set: state that is updated batch by
batch, or all predictions at once, never a mean over batches.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bigdl._base import trees
from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Agreement", "Metric", "check_direction", "read_metric"]

#: Of a batch: the model's inputs, and the labels or None.
Split = tuple[Any, Any]
_NO_CLASS = -(1 << 40)
_DIRECTIONS = {"maximize": True, "minimize": False}


class Metric(Protocol):
    """What is measured of each candidate."""

    #: Heading of its column.
    name: str
    higher_is_better: bool

    def measure(
        self,
        model: Callable[..., Any],
        predictions: Callable[[], Iterable[tuple[Any, Any]]],
        data: Iterable[Any],
    ) -> float:
        """Its value on the whole set.

        Args:
            model: The candidate.
            predictions: Runs the model over the set: (prediction, labels) of each batch.
            data: The set itself, as the user gave it.

        Raises:
            DataError: The value is not one finite number, or the labels it needs are missing.
        """


def check_direction(direction: Any) -> bool:
    """Whether higher is better, from "maximize" or "minimize"."""
    if not isinstance(direction, str):
        raise ArgumentError(
            f"direction takes 'maximize' or 'minimize', not {type(direction).__name__}."
        )
    if direction not in _DIRECTIONS:
        near = {"max": "maximize", "min": "minimize"}.get(direction[:3].lower())
        hint = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(f"direction={direction!r} is not 'maximize' or 'minimize'.{hint}")
    return _DIRECTIONS[direction]


def read_metric(metric: Any, direction: str = "maximize") -> Metric | None:
    """The metric that a user's argument means; None (agreement with the original) stays None.

    Raises:
        ArgumentError: It has none of the forms.
        ConfigError: ``direction`` is unknown, or contradicts what the metric says of itself.
    """
    higher = check_direction(direction)
    if metric is None:
        if not higher:
            raise ConfigError(
                "direction='minimize' needs a metric: without one, agreement with the original "
                "model is measured, and more of it is better."
            )
        return None
    if _is_torchmetric(metric):
        own = getattr(metric, "higher_is_better", None)
        if own is not None and own is not higher:
            right = "maximize" if own else "minimize"
            raise ConfigError(
                f"{type(metric).__name__} is better when {'higher' if own else 'lower'}: "
                f"pass direction={right!r}."
            )
        return _StateMetric(metric, higher)
    if isinstance(metric, type) or not callable(metric):
        found = f"the class {metric.__name__}" if isinstance(metric, type) else shown(metric)
        hint = f" Did you mean {metric.__name__}(…)?" if isinstance(metric, type) else ""
        raise ArgumentError(
            "metric takes a torchmetrics metric, fn(pred, target), fn(model, loader) or None, "
            f"not {found}.{hint}"
        )
    return (_ModelMetric if _wants_model(metric) else _FunctionMetric)(metric, higher)


def _is_torchmetric(metric: Any) -> bool:
    loaded = sys.modules.get("torchmetrics")
    return loaded is not None and isinstance(metric, loaded.Metric)


def _wants_model(function: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin that does not say
        return False
    return bool(parameters) and parameters[0] == "model"


def _label(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None) or type(function).__name__
    return "metric" if name == "<lambda>" else name


class _StateMetric:
    """A torchmetrics metric; the user's own object is never updated."""

    def __init__(self, metric: Any, higher_is_better: bool) -> None:
        self.name = type(metric).__name__
        self.higher_is_better = higher_is_better
        self._metric = metric

    def measure(
        self,
        model: Callable[..., Any],
        predictions: Callable[[], Iterable[tuple[Any, Any]]],
        data: Iterable[Any],
    ) -> float:
        own = copy.deepcopy(self._metric)
        own.reset()
        for prediction, labels in _labelled(predictions(), self.name):
            own.update(prediction, labels)
        return _number(own.compute(), self.name)


class _FunctionMetric:
    """``fn(pred, target)``, called once with all that the model predicts."""

    def __init__(self, function: Callable[..., Any], higher_is_better: bool) -> None:
        self.name = _label(function)
        self.higher_is_better = higher_is_better
        self._function = function

    def measure(
        self,
        model: Callable[..., Any],
        predictions: Callable[[], Iterable[tuple[Any, Any]]],
        data: Iterable[Any],
    ) -> float:
        pairs = list(_labelled(predictions(), self.name))
        if not pairs:
            raise DataError(f"The data for {self.name} holds no batch.")
        whole = [
            trees.concat(parts, join=_join, name=name)
            for parts, name in zip(zip(*pairs, strict=True), ("pred", "target"), strict=True)
        ]
        return _number(self._function(*whole), self.name)


class _ModelMetric:
    """``fn(model, loader)``: the user's function does the loop."""

    def __init__(self, function: Callable[..., Any], higher_is_better: bool) -> None:
        self.name = _label(function)
        self.higher_is_better = higher_is_better
        self._function = function

    def measure(
        self,
        model: Callable[..., Any],
        predictions: Callable[[], Iterable[tuple[Any, Any]]],
        data: Iterable[Any],
    ) -> float:
        return _number(self._function(model, data), self.name)


class Agreement:
    """Agreement with the original: share of equal top classes, else 1 - relative L2 error.

    The first model measured is the original; it sets the reference, which can be pickled.

    Args:
        reference: What an earlier measurement of the original left, to go on with.
    """

    name = "agreement"
    higher_is_better = True

    def __init__(self, reference: list[Any] | None = None) -> None:
        self.reference = reference

    def measure(
        self,
        model: Callable[..., Any],
        predictions: Callable[[], Iterable[tuple[Any, Any]]],
        data: Iterable[Any],
    ) -> float:
        digests = [_digest(prediction, labels) for prediction, labels in predictions()]
        if not digests:
            raise DataError("There is no batch to compare with the original's outputs on.")
        if self.reference is None:
            if not all(_is_usable(part) for each in digests for part in each):
                raise DataError("Your own model's outputs on this data are not all finite.")
            self.reference = digests
            return 1.0
        return _number(_agreement(self.reference, digests), self.name)


def _digest(prediction: Any, labels: Any) -> tuple[torch.Tensor, ...]:
    """What is kept of a prediction: the top classes if it has classes, else all numbers."""
    tensors = [leaf for leaf in trees.leaves(prediction) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise DataError(
            f"The model returns {type(prediction).__name__} without a tensor; pass a metric= "
            "that knows what to do with it."
        )
    named = getattr(prediction, "logits", None)
    scores = (
        named if isinstance(named, torch.Tensor) else tensors[0] if len(tensors) == 1 else None
    )
    axis = None if scores is None else _class_axis(scores, labels)
    if scores is None or axis is None:
        return tuple(tensor.detach().double().cpu() for tensor in tensors)
    # a row with a number that is not one has no top class: it agrees with nothing
    bad = ~torch.isfinite(scores).all(dim=axis)
    return (torch.where(bad, _NO_CLASS, scores.argmax(dim=axis)).cpu(),)


def _is_usable(digest: torch.Tensor) -> bool:
    return bool((torch.isfinite(digest) & (digest != _NO_CLASS)).all())


def _class_axis(scores: torch.Tensor, labels: Any) -> int | None:
    """The axis of classes: 1, or the last, where the labels lack one that the scores have."""
    if scores.ndim < 2 or not scores.is_floating_point():
        return None
    label = labels[0] if isinstance(labels, (tuple, list)) and labels else labels
    if not isinstance(label, torch.Tensor):  # unlabelled: only the plainest form is classes
        return 1 if label is None and scores.ndim == 2 and scores.shape[1] > 1 else None
    if label.is_floating_point() or label.is_complex():
        return None
    shape = tuple(scores.shape)
    for axis in (1, scores.ndim - 1):
        if shape[axis] > 1 and tuple(label.shape) == shape[:axis] + shape[axis + 1 :]:
            return axis
    return None


def _agreement(
    reference: list[tuple[torch.Tensor, ...]], found: list[tuple[torch.Tensor, ...]]
) -> float:
    if len(reference) != len(found):
        raise DataError(
            f"The data gave {len(reference)} batches for the original and {len(found)} for this "
            "method: it must give the same each time."
        )
    if not reference[0][0].is_floating_point():
        equal = sum(int((a == b).sum()) for (a,), (b,) in zip(reference, found, strict=True))
        return equal / max(1, sum(a.numel() for (a,) in reference))
    error = norm = 0.0
    for batch, other in zip(reference, found, strict=True):
        for a, b in zip(batch, other, strict=True):
            if a.shape != b.shape:
                raise DataError(
                    f"An output has shape {tuple(b.shape)}; the original's is {tuple(a.shape)}."
                )
            error += float((a - b).square().sum())
            norm += float(a.square().sum())
    return 1.0 - math.sqrt(error) / max(math.sqrt(norm), 1e-12)


def _labelled(pairs: Iterable[tuple[Any, Any]], name: str) -> Iterator[tuple[Any, Any]]:
    for prediction, labels in pairs:
        if labels is None:
            raise DataError(
                f"{name} needs labels, and the batches hold only the model's inputs. Give "
                "batches of (inputs, labels), or leave metric=None to compare with the original."
            )
        yield prediction, labels


def _join(parts: Any) -> Any:
    return torch.cat(list(parts)) if isinstance(parts[0], torch.Tensor) else _join_arrays(parts)


def _join_arrays(parts: Any) -> Any:
    import numpy as np

    return np.concatenate(list(parts))


def _number(value: Any, name: str) -> float:
    """``value`` as one finite number."""
    if isinstance(value, torch.Tensor) or hasattr(value, "item"):
        size = value.numel() if isinstance(value, torch.Tensor) else getattr(value, "size", 1)
        if size != 1:
            raise DataError(
                f"{name} gave {size} numbers; need one (an average over classes, say)."
            )
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{name} gave {type(value).__name__}; need one number.")
    if not math.isfinite(value):
        raise DataError(f"{name} gave {value}, which is not a finite number.")
    return float(value)
