"""Which parts of a batch are a model's inputs, and which are labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.errors import ArgumentError, DataError
from bigdl.nano.pytorch.export.binding import forward_signature
from bigdl.nano.pytorch.export.flat import as_module

if TYPE_CHECKING:
    from torch import nn

    from bigdl.nano.pytorch.export.binding import Sample

__all__ = ["split_batch"]

# Entries of a dict batch that are labels although forward could take them (Hugging Face).
_LABELS = ("labels", "label", "target", "targets")


def split_batch(batch: Any, model: nn.Module, sample: Sample | None = None) -> tuple[Sample, Any]:
    """Inputs and labels of one batch.

    Of a tuple or list as many leading items are inputs as forward has required parameters, or as
    the sample has entries; the rest are labels. Of a dict those entries are inputs that forward
    has parameters for, or that the sample has. A tensor is an input without labels.

    Args:
        batch: What a loader gives.
        model: Whose forward is asked.
        sample: An example of the inputs, if there is one.

    Returns:
        The inputs, as a tuple (by position) or a dict (by keyword), and the labels: None if there
        are none, the thing itself if there is one, else a tuple or a dict.

    Raises:
        DataError: There are fewer items than inputs.
        ArgumentError: It is no batch.
    """
    if isinstance(batch, torch.Tensor):
        return (batch,), None
    if isinstance(batch, Mapping):
        return _split_mapping(batch, model, sample)
    if not isinstance(batch, (tuple, list)):
        raise ArgumentError(
            f"A batch is a {type(batch).__name__}; need a tensor, a tuple, a list or a dict."
        )
    if batch and isinstance(batch[0], Mapping) and _by_keyword(batch[0], model, sample):
        return dict(batch[0]), _labels(tuple(batch[1:]))
    count = _input_count(model, sample)
    if len(batch) < count:
        raise DataError(
            f"A batch has {len(batch)} items, but {type(model).__name__} needs {count} inputs."
        )
    return tuple(batch[:count]), _labels(tuple(batch[count:]))


def _labels(rest: tuple[Any, ...]) -> Any:
    return (rest if len(rest) > 1 else rest[0]) if rest else None


def _input_count(model: nn.Module, sample: Sample | None) -> int:
    if isinstance(sample, torch.Tensor):
        return 1
    if isinstance(sample, (tuple, Mapping)):
        return len(sample)
    parameters = forward_signature(as_module(model)).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return max(1, len(required))


def _by_keyword(batch: Mapping[Any, Any], model: nn.Module, sample: Sample | None) -> bool:
    if sample is not None:
        return isinstance(sample, Mapping)
    parameters = forward_signature(as_module(model)).parameters
    return len(batch) > 0 and all(key in parameters for key in batch)


def _split_mapping(
    batch: Mapping[Any, Any], model: nn.Module, sample: Sample | None
) -> tuple[Sample, Any]:
    if isinstance(sample, Mapping):
        wanted = list(sample)
    else:
        parameters = forward_signature(as_module(model)).parameters
        wanted = [
            name
            for name, p in parameters.items()
            if name in batch and (name not in _LABELS or p.default is p.empty)
        ]
    missing_keys = [name for name in wanted if name not in batch]
    if not wanted and _input_count(model, sample) == 1:  # forward(batch): it takes the dict itself
        return (batch,), None
    if missing_keys or not wanted:
        raise DataError(
            f"A batch has the entries {', '.join(map(str, batch))}, "
            + (
                f"but no {missing_keys[0]!r}, which the sample has."
                if missing_keys
                else f"and {type(model).__name__}.forward has none of them as a parameter."
            )
        )
    rest = {key: value for key, value in batch.items() if key not in wanted}
    labels = (next(iter(rest.values())) if len(rest) == 1 else rest) if rest else None
    return {name: batch[name] for name in wanted}, labels
