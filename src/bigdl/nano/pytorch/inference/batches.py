"""The forms in which users give data to inference calls, as batches. Knows torch."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from bigdl.nano.pytorch.export.binding import Sample

__all__ = ["as_batches", "check_sample", "first_batch", "kept_randomness"]


def as_batches(data: Any, name: str) -> Iterable[Any]:
    """``data`` as something that gives its batches each time it is iterated.

    A tensor, a tuple or a dict is one batch, a list is batches, a loader gives its own; what can
    be read only once is read now and kept.

    Args:
        data: What the user gave.
        name: The argument's name, for error texts.

    Raises:
        ArgumentError: It is none of these.
        DataError: It holds no batch.
    """
    if isinstance(data, (torch.Tensor, tuple, Mapping)):
        return [data]
    if isinstance(data, list):
        if not data:
            raise DataError(f"{name} is an empty list; need at least one batch.")
        return data
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(
        data, torch.utils.data.IterableDataset
    ):
        raise ArgumentError(
            f"{name} is a data set, which gives single rows: give "
            f"DataLoader({name}, batch_size=…)."
        )
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise ArgumentError(
            f"{name} is a {type(data).__name__}; need a DataLoader, a list of batches, or one "
            "batch: a tensor, a tuple or a dict."
        )
    if isinstance(data, Iterator):
        with kept_randomness():
            batches = list(data)
        if not batches:
            raise DataError(f"{name} has given all its batches already; need a fresh one.")
        return batches
    return data


def first_batch(batches: Iterable[Any], name: str) -> Any:
    """The first of ``batches``.

    Raises:
        DataError: There is none.
    """
    with kept_randomness(batches):
        for batch in batches:
            return batch
    raise DataError(f"{name} holds no batch.")


def check_sample(sample: Any) -> Sample | None:
    """An ``input_sample`` in one of its forms, or None.

    Raises:
        ArgumentError: It has another.
    """
    if sample is not None:
        from bigdl.nano.pytorch.export.binding import as_call

        as_call(sample)
    return sample


@contextlib.contextmanager
def kept_randomness(*loaders: Any) -> Iterator[None]:
    """Put the process's random streams, and those of ``loaders``, back at the end."""
    generators = [g for loader in loaders for g in _generators(loader)]
    states = [generator.get_state() for generator in generators]
    numpy = sys.modules.get("numpy")
    before = random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])
        if numpy:
            numpy.random.set_state(before[2])
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that iterating ``loader`` draws from."""
    sampler = getattr(loader, "sampler", None)
    nested = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    found = {
        id(generator): generator
        for part in (loader, sampler, nested)
        if isinstance(generator := getattr(part, "generator", None), torch.Generator)
    }
    return list(found.values())
