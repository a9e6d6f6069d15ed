"""What a quantizer may look at: a user's batches as flat arrays, and accuracy of a flat call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bigdl._base import trees
from bigdl._base.errors import DataError
from bigdl.nano.accelerators.base import Calibration
from bigdl.nano.pytorch.export.binding import (
    as_call,
    bind_sample,
    forward_signature,
    to_array,
    to_tensor,
)
from bigdl.nano.pytorch.export.source import split_batch
from bigdl.nano.pytorch.export.structure import flatten
from bigdl.nano.pytorch.inference.batches import kept_randomness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np

    from bigdl.nano.accelerators.base import Arrays
    from bigdl.nano.pytorch.export.binding import Sample
    from bigdl.nano.pytorch.inference.metrics import Metric
    from bigdl.nano.selection import Criterion

__all__ = ["FlatView", "calibration", "predictions", "rows_of"]

# Rows that a quantizer looks at. More change ranges by less than their rounding, and take time.
_ROWS = 512


class FlatView:
    """A model's calls as flat arrays in the order of its sample's tensors, and back.

    Args:
        model: The original; run once, without gradients, to learn how its result is nested.
        sample: An example of its inputs.
    """

    def __init__(self, model: torch.nn.Module, sample: Sample) -> None:
        self._signature = forward_signature(model)
        _, self._arguments = flatten(bind_sample(self._signature, sample)[0])
        args, kwargs = as_call(sample)
        with torch.no_grad():
            outputs, self._result = flatten(model(*args, **kwargs))
        self._dtypes = [output.dtype for output in outputs]

    def arrays(self, inputs: Sample) -> Arrays:
        """The flat inputs of a call.

        Raises:
            DataError: They are nested otherwise than the sample.
        """
        tensors, structure = flatten(bind_sample(self._signature, inputs)[0])
        if structure != self._arguments:
            raise DataError("A batch's inputs are not nested as the sample's are.")
        return tuple(to_array(tensor.cpu()) for tensor in tensors)

    def call(self, flat: Callable[..., Sequence[np.ndarray]]) -> Callable[..., Any]:
        """``flat`` as a function that is called, and answers, as the model."""

        def structured(*args: Any, **kwargs: Any) -> Any:
            arrays = flat(*self.arrays(kwargs if kwargs and not args else args))
            tensors = [to_tensor(a, d) for a, d in zip(arrays, self._dtypes, strict=True)]
            return self._result.build(tensors)

        return structured


class _Batches:
    """Flat inputs of a user's batches, batch by batch; can be iterated more than once."""

    def __init__(
        self, data: Iterable[Any], model: torch.nn.Module, sample: Sample, view: FlatView
    ) -> None:
        self._data, self._model, self._sample, self._view = data, model, sample, view

    def __iter__(self) -> Iterator[Arrays]:
        rows = 0
        with kept_randomness(self._data):
            for batch in self._data:
                inputs, _ = split_batch(batch, self._model, self._sample)
                arrays = self._view.arrays(inputs)
                yield arrays
                rows += max((array.shape[0] for array in arrays if array.ndim), default=1)
                if rows >= _ROWS:
                    return


def calibration(
    data: Iterable[Any],
    model: torch.nn.Module,
    sample: Sample,
    *,
    metric: Metric | None = None,
    validation: Iterable[Any] = (),
    criterion: Criterion | None = None,
    baseline: float | None = None,
) -> Calibration:
    """Calibration for any accelerator.

    Args:
        data: Batches to take ranges from; the first 512 rows are read.
        model: The original, in eval mode.
        sample: An example of its inputs.
        metric: What ``criterion`` is about.
        validation: The whole set that it is measured on.
        criterion: The largest loss; None is no limit.
        baseline: The original's own value of ``metric``.
    """
    view = FlatView(model, sample)
    batches = _Batches(data, model, sample, view)
    if criterion is None or metric is None:
        return Calibration(batches=batches)

    def validate(flat: Callable[..., Sequence[np.ndarray]]) -> float:
        call = view.call(flat)
        return metric.measure(
            call, lambda: predictions(call, validation, model, sample), validation
        )

    return Calibration(
        batches=batches,
        validate=validate,
        max_drop=criterion.limit,
        relative=criterion.relative,
        higher_is_better=metric.higher_is_better,
        baseline=baseline,
    )


def predictions(
    call: Callable[..., Any], data: Iterable[Any], model: torch.nn.Module, sample: Sample | None
) -> Iterator[tuple[Any, Any]]:
    """(prediction, labels) of each batch of ``data``; random streams are as before at the end."""
    with kept_randomness(data):
        for batch in data:
            inputs, labels = split_batch(batch, model, sample)
            args, kwargs = as_call(inputs)
            yield call(*args, **kwargs), labels


def rows_of(inputs: Any) -> int:
    """Rows of a batch: the first axis of its first tensor that has one."""
    tensors = (leaf for leaf in trees.leaves(inputs) if isinstance(leaf, torch.Tensor))
    return next((int(tensor.shape[0]) for tensor in tensors if tensor.ndim), 1)
