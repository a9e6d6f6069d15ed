"""The readers of ``bigdl.orca.data.pandas``: tables into shards, on any fsspec path."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import TYPE_CHECKING, Any, ParamSpec

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError
from bigdl._base.optional import need
from bigdl._base.registry import nearest
from bigdl.orca.context import current_engine
from bigdl.orca.data.plan import Given, Mapped
from bigdl.orca.data.reading import Read, files_at
from bigdl.orca.data.xshards import XShards

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

    Paths = str | PathLike[str] | Sequence[str | PathLike[str]]

__all__ = ["read_csv", "read_json", "read_parquet"]

P = ParamSpec("P")

#: Options of pandas' that have no meaning here, and why.
_REFUSED = {
    "chunksize": "a file is a shard; repartition(n) makes other ones",
    "iterator": "a file is a shard",
}


def _with_old_name(function: Callable[P, XShards]) -> Callable[P, XShards]:
    """BigDL 2.x called the first argument ``file_path``."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> XShards:
        if "file_path" in kwargs and not args and "path" not in kwargs:
            kwargs["path"] = kwargs.pop("file_path")
        if not args and "path" not in kwargs:
            raise ArgumentError(f"{function.__name__}() needs a path.")
        return function(*args, **kwargs)

    return call


@_with_old_name
def read_csv(path: Paths, **options: Any) -> XShards:
    """Shards of frames, one for each file, read as ``pandas.read_csv`` does when needed.

    Args:
        path: A file, a folder (hive's too: "year=2020" becomes a column), a glob, or a list of
            these; any fsspec URL; compressed as the name says. Files of a folder or glob come
            in the order of their names, without those that begin with a dot or underscore.
        options: pandas', for each file.

    Raises:
        ArgumentError: An option that pandas does not have.
        FileNotFoundError: Nothing is there.
        DataError: When it runs: a file or a row that cannot be read; the text names the file.
    """
    return _reader("read_csv", path, options)


@_with_old_name
def read_json(path: Paths, **options: Any) -> XShards:
    """As ``read_csv``, with ``pandas.read_json`` and its options: ``lines=True``, say."""
    return _reader("read_json", path, options)


@_with_old_name
def read_parquet(path: Paths, columns: list[str] | None = None, **options: Any) -> XShards:
    """As ``read_csv``, with ``pandas.read_parquet`` and its options.

    Args:
        path: As for ``read_csv``.
        columns: Which to read, in this order; those that folders name too. None = all.
        options: pandas', and pyarrow's.
    """
    if columns is not None and (
        not isinstance(columns, (list, tuple)) or not all(isinstance(one, str) for one in columns)
    ):
        raise ArgumentError(
            f"read_parquet(columns=…) needs a list of names, not {shown(columns)}."
        )
    if options.get("engine") != "fastparquet":
        need("pyarrow", extra="spark", purpose="read_parquet()")
    return _reader("read_parquet", path, options, columns)


def _reader(
    call: str, path: Any, options: dict[str, Any], columns: list[str] | None = None
) -> XShards:
    _check_options(call, options)
    engine = current_engine()
    storage_options = options.pop("storage_options", None)
    if storage_options is not None and not hasattr(storage_options, "items"):
        raise ArgumentError(f"storage_options has to be a dict, not {shown(storage_options)}.")
    files = files_at(call, path, storage_options)
    found = Given(files, f"{len(files)} file{'s' * (len(files) != 1)}")
    step = Read(call, options, None if columns is None else tuple(columns))
    return XShards(engine, Mapped(found, step, call))


def _check_options(call: str, options: dict[str, Any]) -> None:
    """Refuse what pandas would, before any file is looked for."""
    pandas = need("pandas", extra="spark", purpose=f"{call}()")
    known = list(inspect.signature(getattr(pandas, call)).parameters)[1:]
    if call == "read_parquet":
        known.remove("kwargs")
        if options.get("engine") == "fastparquet":
            return  # whose options they are then is not known here
        arrow = importlib.import_module("pyarrow.parquet")
        known += list(inspect.signature(arrow.read_table).parameters)[1:]
    for name, value in options.items():
        if name not in known:
            raise ArgumentError(
                f"{call}() has no option {name!r}: it takes pandas'.{nearest(name, known)}"
            )
        if name in _REFUSED and value:
            raise ConfigError(f"{call}({name}={shown(value)}) cannot be: {_REFUSED[name]}.")
