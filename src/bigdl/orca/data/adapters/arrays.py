"""Arrays and nests of them. Tensors are recognised by what they can do; torch isn't imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.errors import DataError
from bigdl._base.trees import Tree, map_leaves, named_leaves, rows
from bigdl.orca.data.contract import Column, Schema
from bigdl.orca.data.memory import InMemory, Shaping

if TYPE_CHECKING:
    from bigdl.orca.data.contract import Request

__all__ = ["adapt_arrays"]


def adapt_arrays(data: Tree, request: Request) -> InMemory:
    """A recipe of ``(features, labels)``, or of features alone for predict.

    The arrays are the caller's: they are read when they are pickled or cut, and never written.

    Raises:
        ConfigError: Arguments that only tables take.
        DataError: No labels, unequal lengths, no rows, or values that are not numbers.
    """
    request.refuse(
        "arrays",
        "Only tables have columns and nulls; put arrays in order yourself.",
        "feature_cols",
        "label_cols",
        "fill",
    )
    if request.has_labels:
        data = _pair(data, request)
    total = rows(data)
    if total == 0 and request.has_labels:
        raise DataError(f"{request.call}() got no rows: the first axis of every array is 0.")
    for path, leaf in named_leaves(data):
        _check(leaf, path, request)
    data = map_leaves(_held, data)
    features, labels = data if request.has_labels else (data, None)
    return InMemory(
        data=data,
        rows=total,
        schema=Schema(features=_columns(features, "features"), labels=_columns(labels, "labels")),
        shaping=Shaping(
            has_labels=request.has_labels,
            transform=request.transform,
            target_transform=request.target_transform,
        ),
    )


def _pair(data: Tree, request: Request) -> tuple[Tree, Tree]:
    """``data`` as ``(features, labels)``."""
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return data[0], data[1]
    found = f"a {type(data).__name__}"
    if isinstance(data, (tuple, list)):
        found += f" of {len(data)}"
    elif isinstance(data, dict):
        found += f" with {', '.join(map(repr, data))}"
    raise DataError(
        f"{request.call}() needs a pair (features, labels), and got {found}. Several inputs go "
        "into one tuple or dict: ((x1, x2), y)."
    )


def _check(leaf: Any, path: str, request: Request) -> None:
    """Refuse what no model takes, unless a transform gets it first."""
    kind = getattr(getattr(leaf, "dtype", None), "kind", "f")  # torch's types have no kind
    if kind in "biufc":
        return
    is_label = request.has_labels and path.startswith("data[1]")
    transform = "target_transform" if is_label else "transform"
    if getattr(request, transform) is None:
        what = {"O": "Python objects", "U": "strings", "S": "bytes", "M": "times"}
        raise DataError(
            f"{path} holds {what.get(kind, str(leaf.dtype))}, which no model takes as they are. "
            f"Turn it into numbers, or give {transform}= that does so batch by batch."
        )


def _held(leaf: Any) -> Any:
    """A leaf as the recipe keeps it: without copy, off any graph and device."""
    if isinstance(leaf, np.ndarray):
        return leaf
    detach = getattr(leaf, "detach", None)
    if detach is None:
        return np.asarray(leaf)
    tensor = detach().cpu()
    try:
        return tensor.numpy(force=True)
    except TypeError:  # bfloat16 and its kin: a tensor of its own, as a view pickles all it views
        return tensor.contiguous().clone()


def _columns(nest: Tree, name: str) -> Tree:
    paths = (path for path, _ in named_leaves(nest, name))
    return map_leaves(
        lambda leaf: Column(name=next(paths), dtype=_type_name(leaf), shape=tuple(leaf.shape[1:])),
        nest,
    )


def _type_name(leaf: Any) -> str:
    return str(leaf.dtype).removeprefix("torch.")
