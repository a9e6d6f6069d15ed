"""Nested arrays: tuples, lists, dicts, named tuples and dataclasses with arrays as leaves.

Works for whatever has ``shape`` and slices (NumPy, torch, …) and imports only NumPy. ``None`` is
a nest without leaves. A path in an error text reads as in Python: ``batch['boxes'][0]``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from bigdl._base.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = [
    "Tree",
    "concat",
    "filler",
    "leaves",
    "map_leaves",
    "named_leaves",
    "rows",
    "slice_rows",
]

Tree: TypeAlias = Any

_NO_NEST = object()
_EMPTY = object()  # in the place of a leaf


def leaves(tree: Tree) -> list[Any]:
    """The leaves of ``tree``, depth first, dicts in the order of their keys' insertion."""
    return [leaf for _, leaf in named_leaves(tree)]


def named_leaves(tree: Tree, name: str = "data") -> Iterator[tuple[str, Any]]:
    """Each leaf with its path, which starts with ``name``."""
    parts = _parts(tree)
    if parts is None:
        yield name, tree
        return
    for step, part in parts.items():
        yield from named_leaves(part, name + _written(tree, step))


def map_leaves(fn: Callable[..., Any], tree: Tree, *others: Tree, name: str = "data") -> Tree:
    """A nest like ``tree`` with ``fn(leaf, *leaves of the others)`` in each leaf's place.

    Kinds of nests are kept (a subclass of dict, a named tuple, a dataclass); ``tree`` is not
    changed.

    Raises:
        DataError: The others are not nested as ``tree`` is; the text has the path.
    """
    parts = _parts(tree)
    if parts is None:
        for other in others:
            if _parts(other) is not None:
                raise DataError(
                    f"{name} is {_kind(tree)} in one place and {_kind(other)} in another."
                )
        return fn(tree, *others)
    other_parts = [_same_parts(tree, parts, other, name) for other in others]
    return _rebuild(
        tree,
        {
            step: map_leaves(
                fn, part, *(p[step] for p in other_parts), name=name + _written(tree, step)
            )
            for step, part in parts.items()
        },
        name,
    )


def filler(tree: Tree) -> Callable[[Iterable[Any]], Tree]:
    """What makes nests like ``tree`` out of their leaves, depth first; for many, one by one.

    Returns:
        A function of as many leaves as ``tree`` has; kinds of nests are kept as by
        ``map_leaves``.
    """
    fill = _filler(map_leaves(lambda leaf: _EMPTY, tree))  # holds no array
    return lambda given: fill(iter(given))


def _filler(tree: Tree) -> Callable[[Iterator[Any]], Tree]:
    parts = _parts(tree)
    if parts is None:
        return next
    fills = {step: _filler(part) for step, part in parts.items()}
    if type(tree) is tuple:
        every = tuple(fills.values())
        return lambda given: tuple([fill(given) for fill in every])
    return lambda given: _rebuild(
        tree, {step: fill(given) for step, fill in fills.items()}, "data"
    )


def rows(tree: Tree, name: str = "data") -> int:
    """The length of the first axis, which all leaves share.

    Raises:
        DataError: There is no leaf, a leaf has no axis, or two leaves disagree.
    """
    found: dict[int, str] = {}
    for path, leaf in named_leaves(tree, name):
        found.setdefault(_length(leaf, path), path)
        if len(found) > 1:
            (first, where), (other, elsewhere) = found.items()
            raise DataError(f"{where} has {first} rows, but {elsewhere} has {other}.")
    if not found:
        raise DataError(f"{name} holds no array.")
    return next(iter(found))


def slice_rows(tree: Tree, start: int, stop: int | None = None, name: str = "data") -> Tree:
    """Rows ``start`` up to ``stop`` of every leaf; views where the leaves' kind has views.

    Raises:
        DataError: As for ``rows``.
    """
    rows(tree, name)
    return map_leaves(lambda leaf: leaf[start:stop], tree, name=name)


def concat(
    trees: Iterable[Tree],
    *,
    join: Callable[[Sequence[Any]], Any] = np.concatenate,
    name: str = "data",
) -> Tree:
    """One nest with the rows of all ``trees``, in order.

    Args:
        trees: Nests of one structure, at least one. They may have no rows.
        join: Joins a list of leaves along the first axis (``torch.cat`` for tensors).
        name: What error texts call the nest.

    Raises:
        DataError: No nest, differing structures, a leaf without an axis, or leaves that differ
            in another axis than the first.
    """
    first, *others = list(trees) or [_NO_NEST]
    if first is _NO_NEST:
        raise DataError(f"No {name} to put together.")

    def joined(path_and_leaf: tuple[str, Any], *leaves: Any) -> Any:
        path, leaf = path_and_leaf
        for part in (leaf, *leaves):
            _length(part, path)
            if tuple(part.shape[1:]) != tuple(leaf.shape[1:]):
                raise DataError(
                    f"{path} cannot be put together: rows of shape {tuple(leaf.shape[1:])} "
                    f"and of shape {tuple(part.shape[1:])}."
                )
        return join([leaf, *leaves])

    return _map_named(joined, first, others, name)


def _map_named(fn: Callable[..., Any], tree: Tree, others: Sequence[Tree], name: str) -> Tree:
    """``map_leaves``, but the first argument of ``fn`` is (path, leaf)."""
    paths = (path for path, _ in named_leaves(tree, name))
    return map_leaves(lambda leaf, *more: fn((next(paths), leaf), *more), tree, *others, name=name)


def _length(leaf: Any, path: str) -> int:
    shape = getattr(leaf, "shape", None)
    if shape is None:
        raise DataError(f"{path} is {_kind(leaf)}, which has no rows; need an array.")
    if len(shape) == 0:
        raise DataError(f"{path} is a single number, which has no rows; need at least one axis.")
    return int(shape[0])


# --- one level of a nest ----------------------------------------------------------------------


def _parts(tree: Tree) -> dict[Any, Any] | None:
    """The parts of a nest by step (key, index, field); None for a leaf."""
    if tree is None:
        return {}
    if isinstance(tree, Mapping):
        return dict(tree)
    if isinstance(tree, (tuple, list)):
        return dict(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not _is_array(tree):
        fields = (field.name for field in dataclasses.fields(tree))
        return {field: getattr(tree, field) for field in fields if hasattr(tree, field)}
    return None


def _is_array(value: object) -> bool:
    """Array-like classes that are dataclasses too are leaves."""
    return hasattr(value, "shape") and hasattr(value, "__getitem__")


def _same_parts(tree: Tree, parts: dict[Any, Any], other: Tree, name: str) -> dict[Any, Any]:
    """The parts of ``other``, which must be nested at this level as ``tree`` is."""
    found = _parts(other)
    if found is None or _family(other) is not _family(tree):
        raise DataError(f"{name} is {_kind(tree)} in one place and {_kind(other)} in another.")
    if found.keys() != parts.keys():
        if isinstance(tree, (tuple, list)):
            raise DataError(
                f"{name} has {len(parts)} parts in one place, {len(found)} in another."
            )
        differing = ", ".join(sorted(map(repr, found.keys() ^ parts.keys())))
        raise DataError(f"{name} has {differing} in one place and not in another.")
    return found


def _family(tree: Tree) -> type:
    """What must agree for two nests to have one structure: subclasses may differ."""
    for family in (Mapping, tuple, list):
        if isinstance(tree, family):
            return family
    return type(tree)


def _rebuild(tree: Tree, parts: dict[Any, Any], name: str) -> Tree:
    """A nest of the kind of ``tree`` that has ``parts``."""
    if tree is None:
        return None
    if type(tree) is dict:
        return parts
    if hasattr(tree, "_make"):  # a named tuple
        return tree._make(parts.values())
    try:
        if isinstance(tree, (tuple, list)):
            return type(tree)(parts.values())
        if isinstance(tree, MutableMapping):  # keeps a default factory, an order, attributes
            built = copy.copy(tree)
            for key, value in parts.items():
                built[key] = value
            return built
        if isinstance(tree, Mapping):
            return type(tree)(parts)  # type: ignore[call-arg]
    except TypeError as exc:
        raise DataError(
            f"{name} is {_kind(tree)}, which cannot be made anew from its parts: {exc}."
        ) from exc
    built = copy.copy(tree)  # a dataclass; frozen ones and those that check themselves too
    for field, value in parts.items():
        object.__setattr__(built, field, value)
    return built


def _written(tree: Tree, step: Any) -> str:
    """``step`` as Python writes it after the name of ``tree``."""
    if hasattr(tree, "_make"):
        return f".{tree._fields[step]}"
    if isinstance(tree, (Mapping, tuple, list)):
        return f"[{step!r}]"
    return f".{step}"


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
