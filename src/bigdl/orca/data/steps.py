"""What is done to shards, as it travels to the workers. Loads no pandas: workers do so."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import DataError
from bigdl._base.optional import need
from bigdl._base.registry import nearest
from bigdl.orca.data.worker_values import PerWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Call", "DropMissing", "Pick", "WholeTable", "length"]


@dataclass(frozen=True)
class Call:
    """A function of the user's, with its further arguments."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]

    def __call__(self, shard: Any) -> Any:
        args = (one.value() if isinstance(one, PerWorker) else one for one in self.args)
        return self.fn(shard, *args)


@dataclass(frozen=True)
class Pick:
    """A part of each shard, by name or place."""

    key: Any

    def __call__(self, shard: Any) -> Any:
        try:
            return shard[self.key]
        except (KeyError, IndexError, TypeError) as exc:
            names = getattr(shard, "columns", shard.keys() if isinstance(shard, dict) else ())
            known = [str(name) for name in names]
            if not known:
                raise DataError(f"A {type(shard).__name__} has no {self.key!r}.") from exc
            raise DataError(
                f"No column {self.key!r}; have {', '.join(map(repr, known[:12]))}."
                f"{nearest(str(self.key), known)}"
            ) from exc


@dataclass(frozen=True)
class DropMissing:
    """Without rows in which a value is missing."""

    def __call__(self, shard: Any) -> Any:
        return _frames().drop_missing(shard)


@dataclass(frozen=True)
class WholeTable:
    """Work on the joined rows, by its name in ``frames``; None for options: a plain function."""

    name: str
    options: Mapping[str, Any] | None

    def __call__(self, *tables: Any) -> list[Any]:
        work = getattr(_frames(), self.name)
        if self.options is not None:
            work = work(**self.options)
        return work(*tables)


def length(shard: Any) -> int:
    """How many parts a shard has that is a tuple or a list."""
    if not isinstance(shard, (tuple, list)):
        raise DataError(
            f"split() needs shards that are tuples or lists, not a {type(shard).__name__}."
        )
    return len(shard)


def _frames() -> Any:
    need("pandas", extra="spark", purpose="Work on tables in shards")
    return importlib.import_module("bigdl.orca.data.frames")
