"""How a model of PyTorch is called with what a batch holds, and what comes back."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigdl._base import trees
from bigdl._base.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "arguments",
    "caller",
    "evaluating",
    "positions",
    "precision",
    "split",
    "to_arrays",
    "to_tensors",
]


def to_tensors(data: trees.Tree) -> trees.Tree:
    """The same nest with tensors for NumPy arrays, which share their memory if they may.

    Raises:
        DataError: An array holds Python objects.
    """
    return trees.map_leaves(_tensor, data, name="batch")


def _tensor(leaf: Any) -> Any:
    if not isinstance(leaf, (np.ndarray, np.generic)):
        return leaf
    array = np.asarray(leaf)
    if array.dtype.kind in "OUSM":
        raise DataError(
            f"A batch holds an array of {array.dtype}, of which PyTorch can make no tensor. "
            "Turn it into numbers with transform=."
        )
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def to_arrays(outputs: trees.Tree) -> trees.Tree:
    """The same nest with NumPy arrays for tensors; bf16, which NumPy lacks, becomes float32."""

    def array(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tensor = leaf.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return trees.map_leaves(array, outputs, name="output")


def split(data: trees.Tree) -> tuple[Any, Any]:
    """Features and labels of a batch.

    Raises:
        DataError: It has not two parts.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return data[0], data[1]
    kind = type(data).__name__
    size = f" of {len(data)} parts" if isinstance(data, (tuple, list)) else ""
    raise DataError(
        f"A batch is a {kind}{size}: training and evaluation need (features, labels). "
        "Let collate_fn or the data set return those."
    )


def arguments(model: torch.nn.Module) -> Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]:
    """What ``model`` is called with for some features: by position, and by keyword.

    A tuple goes by position, a dict by keyword, else there is one input. A dict is one input if
    ``forward`` lacks any of its names.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = {
        name
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }

    def bind(features: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(features, Mapping) and (takes_any or set(features) <= names):
            return (), dict(features)
        if isinstance(features, (tuple, list)):
            return tuple(features), {}
        return (features,), {}

    return bind


def caller(model: torch.nn.Module) -> Callable[[Any], Any]:
    """Calls ``model`` with features; see ``arguments``."""
    bind = arguments(model)

    def call(features: Any) -> Any:
        positional, by_name = bind(features)
        return model(*positional, **by_name)

    return call


def positions(function: Callable[..., Any]) -> int:
    """How many arguments it takes by position."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return sys.maxsize
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def precision(name: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast for "bf16", nothing for "fp32"."""
    if name == "bf16":
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; each module's mode is as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
