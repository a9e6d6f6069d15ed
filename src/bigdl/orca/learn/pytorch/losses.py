"""What a loss is a mean over, so that parts of a batch can be put together again.

Most losses are means over rows. PyTorch's own cross-entropies are means over the rows that are
not ignored, each counting with its class's weight; sums are sums; and a user's loss may say
itself what it is a mean over, by returning ``(loss, weight)``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch.nn import functional

from bigdl._base.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LossReduction", "Term", "WeightedLoss", "read_loss"]

LossReduction = Literal["mean", "sum"] | None
_IGNORED = -100


@dataclass(frozen=True)
class Term:
    """The loss of some rows.

    Args:
        value: A single number, as the user's loss gave it.
        weight: What it is a mean over; for a sum the number of rows.
        is_void: Whether it is a mean over nothing, which no gradient can be taken of.
    """

    value: torch.Tensor
    weight: float
    is_void: bool = False


class WeightedLoss(Protocol):
    """A loss that knows its weight."""

    #: Whether values are means, else sums.
    averages: bool

    def __call__(self, output: Any, labels: Any, rows: int) -> Term: ...


def read_loss(loss: Any, reduction: LossReduction = None) -> WeightedLoss:
    """The user's loss, with its weight.

    Args:
        loss: ``loss(output, labels)``, giving a single number or ``(number, weight)``.
        reduction: "mean" or "sum" over rows; None = as PyTorch's own says, else a mean.

    Raises:
        ArgumentError: It cannot be called, or is a class.
        ConfigError: It gives no single number, or ``reduction`` contradicts it.
    """
    if isinstance(loss, type):
        raise ArgumentError(
            f"loss={loss.__name__} is a class: give an instance, {loss.__name__}()."
        )
    if not callable(loss):
        raise ArgumentError(f"loss has to be a function of (output, labels), not {loss!r}.")
    if reduction not in (None, "mean", "sum"):
        raise ConfigError(f'loss_reduction={reduction!r} is not known: need "mean" or "sum".')
    own = _own_reduction(loss)
    if own == "none":
        raise ConfigError(
            "The loss gives a number for each row (reduction='none'), training needs one for "
            "all: use reduction='mean'."
        )
    if own is not None and reduction not in (None, own):
        raise ConfigError(
            f"loss_reduction={reduction!r} contradicts the loss, which has reduction={own!r}."
        )
    if (own or reduction) == "sum":
        return _Plain(loss, averages=False)
    options = _cross_entropy(loss)
    if options is not None:
        return _CrossEntropy(loss, **options)
    return _Plain(loss, averages=True, may_weigh=reduction is None)


class _Plain:
    """A mean over rows or a sum; or a mean over what the loss itself says."""

    def __init__(
        self, loss: Callable[..., Any], *, averages: bool, may_weigh: bool = False
    ) -> None:
        self._loss = loss
        self.averages = averages
        self._may_weigh = may_weigh

    def __call__(self, output: Any, labels: Any, rows: int) -> Term:
        value = self._loss(output, labels)
        if not isinstance(value, tuple):
            return Term(_single(value), float(rows))
        if not self._may_weigh or len(value) != 2:
            raise ConfigError(
                f"The loss gave a tuple of {len(value)}: need one number, or (loss, weight) "
                "without loss_reduction=."
            )
        weight = float(value[1])
        if not weight >= 0:
            raise ConfigError(f"The loss gave the weight {weight}: need 0 or more.")
        return Term(_single(value[0]), weight, is_void=weight == 0)


class _CrossEntropy:
    """A mean over the labels that are not ignored, each with its class's weight."""

    averages = True

    def __init__(
        self,
        loss: Callable[..., Any],
        *,
        weight: torch.Tensor | None = None,
        ignore_index: int = _IGNORED,
    ) -> None:
        self._loss = loss
        self._weight = weight
        self._ignore_index = ignore_index

    def __call__(self, output: Any, labels: Any, rows: int) -> Term:
        return Term(_single(self._loss(output, labels)), self._weigh(labels, rows))

    def _weigh(self, labels: Any, rows: int) -> float:
        if not isinstance(labels, torch.Tensor) or labels.dtype.is_floating_point:
            return float(rows)  # probabilities of classes: all rows count alike
        kept = labels != self._ignore_index
        if self._weight is None:
            return float(kept.sum())
        return float(self._weight.double()[labels[kept]].sum())


def _single(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ConfigError(f"The loss gave a {type(value).__name__}: need a tensor of one number.")
    if value.numel() != 1:
        raise ConfigError(
            f"The loss gave a tensor of shape {tuple(value.shape)}: need a single number. "
            "Take its mean."
        )
    return value.reshape(())


def _own_reduction(loss: Any) -> str | None:
    """What a loss of PyTorch's own, or a call of one, does; None = nobody knows."""
    if isinstance(loss, functools.partial) and _is_functional(loss.func):
        found = loss.keywords.get("reduction", "mean")
    elif isinstance(loss, torch.nn.Module) and type(loss).__module__.startswith("torch.nn."):
        found = getattr(loss, "reduction", None)
    else:
        return None
    return {"batchmean": "mean"}.get(found, found) if isinstance(found, str) else None


def _is_functional(function: Any) -> bool:
    return getattr(functional, getattr(function, "__name__", ""), None) is function


def _cross_entropy(loss: Any) -> dict[str, Any] | None:
    """Class weights and ignored label of a cross-entropy of PyTorch's own."""
    kinds = (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss)
    if isinstance(loss, kinds):
        if not any(type(loss).forward is kind.forward for kind in kinds):
            return None
        return {"weight": loss.weight, "ignore_index": loss.ignore_index}
    calls = (functional.cross_entropy, functional.nll_loss)
    if any(loss is call for call in calls):
        return {}
    if isinstance(loss, functools.partial) and any(loss.func is call for call in calls):
        return {name: loss.keywords[name] for name in _NAMES if name in loss.keywords}
    return None


_NAMES = ("weight", "ignore_index")
