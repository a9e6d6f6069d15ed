"""Nested values taken apart into tensors and put together again, also in another process.

A ``Structure`` remembers how the tensors were nested and what stood beside them. It can be
written as JSON and read back; nothing is pickled. A class named in such JSON is used only if
the process has loaded it by itself and it is a plain container; else a ``Record`` stands in.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from bigdl._base.errors import ConfigError, StoredModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Record", "Structure", "flatten", "map_tensors"]

Kind = Literal["tensor", "constant", "tuple", "list", "dict", "odict", "namedtuple", "object"]
_PLAIN = (type(None), bool, int, float, str)


@dataclasses.dataclass(frozen=True)
class Unknown:
    """An object of a kind that is not taken apart."""

    type_name: str


class Record(OrderedDict[str, Any]):
    """Named values, reached by name, by attribute or by position.

    What a loaded model returns where the original returned an object of a class that this
    process does not know.
    """

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return self.to_tuple()[key]
        return super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(f"This output has no {name!r}; have {', '.join(self)}.") from None

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order."""
        return tuple(self.values())


@dataclasses.dataclass(frozen=True)
class Structure:
    """How tensors are nested.

    Args:
        kind: What stands at this place.
        children: The parts, in order.
        keys: A key or field name for each part, for kinds that have them.
        value: A constant's value.
        home: "module:qualified name" of a named tuple's or an object's class.
        cls: That class, where it is known.
    """

    kind: Kind
    children: tuple[Structure, ...] = ()
    keys: tuple[Any, ...] = ()
    value: Any = None
    home: str = ""
    cls: type | None = dataclasses.field(default=None, compare=False)

    @property
    def is_tensor(self) -> bool:
        """Whether this is one tensor and nothing else."""
        return self.kind == "tensor"

    def build(self, tensors: Sequence[Any]) -> Any:
        """The nested value with ``tensors`` in their places."""
        return self._build(iter(tensors))

    def _build(self, tensors: Iterator[Any]) -> Any:
        if self.kind == "tensor":
            return next(tensors)
        if self.kind == "constant":
            return self.value
        parts = [child._build(tensors) for child in self.children]
        if self.kind == "tuple":
            return tuple(parts)
        if self.kind == "list":
            return parts
        named = zip(self.keys, parts, strict=True)
        if self.kind == "dict":
            return dict(named)
        if self.kind == "odict":
            return OrderedDict(named)
        if self.cls is None:
            return Record(named)
        if self.kind == "namedtuple":
            return self.cls(*parts) if hasattr(self.cls, "_fields") else self.cls(parts)
        return _new_object(self.cls, dict(named))

    def paths(self, name: str) -> Iterator[tuple[str, str]]:
        """(path as Python writes it, the same in letters, digits and "_") of each tensor."""
        yield from self._paths(name, name)

    def _paths(self, path: str, plain: str) -> Iterator[tuple[str, str]]:
        if self.kind == "tensor":
            yield path, plain
        for index, child in enumerate(self.children):
            key = self.keys[index] if self.keys else index
            dotted = self.kind in ("namedtuple", "object")
            step = f".{key}" if dotted else f"[{key!r}]"
            yield from child._paths(path + step, f"{plain}_{key}")

    def masked(self) -> Structure:
        """The same with objects of unknown kinds as mere names of their types.

        Two results of a model can then be compared.
        """
        if self.kind == "constant" and not isinstance(self.value, _PLAIN):
            return dataclasses.replace(self, value=Unknown(type(self.value).__name__))
        if not self.children:
            return self
        children = tuple(child.masked() for child in self.children)
        return dataclasses.replace(self, children=children)

    def constants(self, path: str) -> Iterator[tuple[str, Any]]:
        """(path, value) of each part that is not a tensor."""
        if self.kind == "constant":
            yield path, self.value
        for index, child in enumerate(self.children):
            key = self.keys[index] if self.keys else index
            yield from child.constants(f"{path}[{key!r}]")

    def to_json(self) -> dict[str, Any]:
        """Plain values that ``from_json`` reads.

        Raises:
            ConfigError: A constant or a key that JSON cannot hold.
        """
        if not isinstance(self.value, _PLAIN):
            raise ConfigError(
                f"Cannot save the argument {self.value!r}: only numbers, text, True, False and "
                "None can be stored beside tensors."
            )
        for key in self.keys:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise ConfigError(f"Cannot save the key {key!r}: only text and numbers can be.")
        written: dict[str, Any] = {"kind": self.kind}
        if self.kind == "constant":
            written["value"] = self.value
        if self.children or self.kind not in ("tensor", "constant"):
            written["children"] = [child.to_json() for child in self.children]
        if self.keys:
            written["keys"] = list(self.keys)
        if self.home:
            written["home"] = self.home
        return written

    @staticmethod
    def from_json(written: Any) -> Structure:
        """What ``to_json`` wrote.

        Raises:
            StoredModelError: It is not that.
        """
        known = {"kind", "value", "children", "keys", "home"}
        if not isinstance(written, dict) or not known.issuperset(written):
            raise StoredModelError(f"Not the structure of a model's values: {written!r}.")
        kind: Any = written.get("kind")
        home: Any = written.get("home", "")
        children = tuple(map(Structure.from_json, written.get("children", ())))
        keys = tuple(written.get("keys", ()))
        keyed = kind in ("dict", "odict", "namedtuple", "object")
        if (
            kind not in Kind.__args__  # type: ignore[attr-defined]
            or not isinstance(home, str)
            or len(keys) != (len(children) if keyed else 0)
            or not isinstance(written.get("value"), _PLAIN)
            or not all(isinstance(key, (str, int)) for key in keys)
        ):
            raise StoredModelError(f"Not the structure of a model's values: {written!r}.")
        return Structure(
            kind, children, keys, written.get("value"), home, _loaded_class(home, kind)
        )


def flatten(value: Any, like: Structure | None = None) -> tuple[list[torch.Tensor], Structure]:
    """The tensors of ``value``, depth first, and how they are nested.

    What is neither a tensor nor a container is a constant, an object of an unknown kind too.

    Args:
        value: What to take apart.
        like: Where a mapping has the keys of the one here, they are taken in its order.
    """
    if isinstance(value, torch.Tensor):  # the common case
        return [value], Structure("tensor")
    tensors: list[torch.Tensor] = []
    return tensors, _take_apart(value, tensors, like)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value`` with every tensor replaced; other parts as they are, and not copied deeply."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if value is None or isinstance(value, _PLAIN):
        return value
    tensors, structure = flatten(value)
    return structure.build([change(tensor) for tensor in tensors]) if tensors else value


def _take_apart(
    value: Any, tensors: list[torch.Tensor], like: Structure | None = None
) -> Structure:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return Structure("tensor")
    if isinstance(value, tuple) and (names := _field_names(type(value))):
        kind: Kind = "namedtuple"
        named: Any = zip(names, value, strict=True)
    elif isinstance(value, (tuple, list)):
        likes = like.children if like is not None and len(like.children) == len(value) else ()
        children = tuple(
            _take_apart(part, tensors, likes[index] if likes else None)
            for index, part in enumerate(value)
        )
        return Structure("tuple" if isinstance(value, tuple) else "list", children)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind, named = "object", _fields(value)
    elif isinstance(value, Mapping):
        kind = "odict" if isinstance(value, OrderedDict) else "dict"
        named = value.items()
        if like is not None and kind == like.kind and set(like.keys) == set(value):
            named = [(key, value[key]) for key in like.keys]
    else:
        return Structure("constant", value=value)
    known = dict(zip(like.keys, like.children, strict=True)) if like and like.keys else {}
    keys, parts = [], []
    for key, part in named:
        keys.append(key)
        parts.append(_take_apart(part, tensors, known.get(key)))
    own = type(value) if kind in ("namedtuple", "object") else None
    home = f"{own.__module__}:{own.__qualname__}" if own else ""
    return Structure(kind, tuple(parts), tuple(keys), home=home, cls=own)


def _field_names(cls: type) -> tuple[str, ...]:
    """Of a named tuple, or of the like that torch's own functions return; else ()."""
    if hasattr(cls, "n_sequence_fields"):  # torch.return_types
        return tuple(cls.__match_args__)  # type: ignore[attr-defined]
    return tuple(getattr(cls, "_fields", ()))


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of a dataclass; of one that is a mapping too (Hugging Face), what it maps."""
    if isinstance(value, Mapping):
        yield from value.items()
        return
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            yield field.name, getattr(value, field.name)


def _new_object(cls: type, fields: dict[str, Any]) -> Any:
    if issubclass(cls, Mapping):
        return cls(**fields)
    # without __init__: it may check, convert, or not take every field
    built = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(built, name, value)
    return built


def _loaded_class(home: str, kind: str) -> type | None:
    """The class at ``home`` if this process has it and it is the container that it should be."""
    module, _, qualified = home.partition(":")
    found: Any = sys.modules.get(module)
    for name in qualified.split(".") if found is not None else ():
        found = getattr(found, name, None)
    if not isinstance(found, type):
        return None
    if kind == "namedtuple":
        return found if issubclass(found, tuple) and _field_names(found) else None
    return found if dataclasses.is_dataclass(found) else None
