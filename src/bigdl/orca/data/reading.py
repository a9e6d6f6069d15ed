"""Files of tables, one a shard: which there are, in order, and how a worker reads one.

Knows no pandas: the function that reads is named, and looked up in the worker.
"""

from __future__ import annotations

import importlib
import lzma
import os
import posixpath
import re
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import fsspec

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["File", "Read", "compression_of", "files_at"]

_MAGIC = re.compile(r"[*?[]")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_WHOLE = re.compile(r"0|-?[1-9]\d{0,17}")
#: Endings of compressed files, and what pandas calls their compression.
_COMPRESSED = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tar.bz2": "tar",
    ".tar.xz": "tar",
}
#: What a file that is not what it should be makes pandas raise, and those below it.
_UNREADABLE: tuple[type[Exception], ...] = (
    ValueError,
    LookupError,
    OverflowError,
    EOFError,
    OSError,
    RuntimeError,  # an encrypted archive, a type of Parquet's that pandas has not
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
)


@dataclass(frozen=True)
class File:
    """A file of a table.

    Args:
        system: fsspec's file system.
        path: Its path there.
        added: Columns that the names of its folders give ("year=2020"): value, and pandas' type.
    """

    system: Any
    path: str
    added: Mapping[str, tuple[int | str | None, str]]

    def __str__(self) -> str:
        return (
            self.path if _is_local(self.system) else str(self.system.unstrip_protocol(self.path))
        )


@dataclass(frozen=True)
class Read:
    """Reads a file, in a worker, as a function of pandas' does.

    Args:
        function: Its name.
        options: Its options.
        columns: Parquet's: which, in order, those of folders too; None = all.
    """

    function: str
    options: Mapping[str, Any]
    columns: Sequence[str] | None = None

    def __call__(self, file: File) -> Any:
        read = getattr(importlib.import_module("bigdl.orca.data.frames"), self.function)
        try:
            with file.system.open(file.path, "rb") as opened:
                return read(opened, file, self.options, self.columns)
        except FileNotFoundError as exc:
            raise FileNotFoundError(f"This worker sees no file {file}.") from exc
        except PermissionError as exc:
            raise PermissionError(f"{file} may not be read: {exc}") from exc
        except (*_UNREADABLE, *_of_zstd()) as exc:
            raise DataError(f"{self.function}() cannot read {file}: {_line(exc)}") from exc


def _of_zstd() -> tuple[type[Exception], ...]:
    """What its package raises, where it was loaded."""
    zstd = sys.modules.get("zstandard")
    return () if zstd is None else (zstd.ZstdError,)


def compression_of(path: str) -> str | None:
    """What pandas calls the compression that the file's name tells."""
    name = posixpath.basename(path).lower()
    for ending in sorted(_COMPRESSED, key=len, reverse=True):
        if name.endswith(ending):
            return _COMPRESSED[ending]
    return None


def files_at(call: str, path: Any, storage_options: Mapping[str, Any] | None) -> list[File]:
    """The files of a path, a folder, a glob, or a list of those.

    Those of a folder or a glob come in the order of their names; a list keeps its own. In a
    folder, names that begin with a dot or underscore are others' notes.

    Raises:
        ArgumentError: It is no path.
        ConfigError: The list is empty.
        FileNotFoundError: Nothing is there.
        DataError: Files that lie in folders of differing kinds ("year=2020").
    """
    asked = list(path) if isinstance(path, (list, tuple)) else [path]
    if not asked:
        raise ConfigError(f"{call}() got an empty list of paths.")
    found: list[tuple[Any, str, dict[str, str | None]]] = []
    for one in asked:
        if not isinstance(one, (str, os.PathLike)) or not os.fspath(one):
            raise ArgumentError(f"{call}() needs a path, or a list of paths, not {shown(one)}.")
        found += _found(os.fspath(one), dict(storage_options or {}))
    keys = list(found[0][2])
    for _, name, added in found:
        if list(added) != keys:
            raise DataError(
                f"{call}() cannot make one table of these files: {found[0][1]} lies in folders "
                f"that name {_listed(keys)}, {name} in ones that name {_listed(list(added))}."
            )
    types = {key: _type([added[key] for _, _, added in found]) for key in keys}
    return [
        File(system, name, {key: (_typed(text, types[key]), types[key]) for key, text in pairs})
        for system, name, added in found
        for pairs in [added.items()]
    ]


def _found(url: str, options: dict[str, Any]) -> list[tuple[Any, str, dict[str, str | None]]]:
    """Files of one path, each with what its folders name."""
    system, path = fsspec.core.url_to_fs(url, **options)
    if _MAGIC.search(path) and not system.exists(path):
        base = posixpath.dirname(path[: _MAGIC.search(path).start()])  # type: ignore[union-attr]
        names = [name for name in system.glob(path) if system.isfile(name)]
        nothing = "No file matches"
    elif system.isdir(path):
        base, nothing = path, "No file lies in"
        names = [name for name in system.find(path) if _is_data(name, path)]
    else:
        names, base, nothing = [path] if system.exists(path) else [], "", "There is no file"
    if not names:
        raise FileNotFoundError(f"{nothing} {url!r}.")
    return [(system, name, _named(name, base) if base else {}) for name in sorted(names)]


def _is_data(name: str, folder: str) -> bool:
    return not any(step.startswith((".", "_")) for step in _steps(name, folder))


def _named(name: str, base: str) -> dict[str, str | None]:
    """Columns by the folders between ``base`` and the file: "year=2020" is one."""
    pairs = [step.split("=", 1) for step in _steps(name, base)[:-1] if "=" in step]
    return {unquote(key): None if value == _HIVE_NULL else unquote(value) for key, value in pairs}


def _steps(name: str, folder: str) -> list[str]:
    return name[len(folder) :].strip("/").split("/") if name.startswith(folder) else [name]


def _type(texts: Sequence[str | None]) -> str:
    """Whole numbers if all of them are, as they would be written; else text."""
    given = [text for text in texts if text is not None]
    if not given or not all(map(_WHOLE.fullmatch, given)):
        return "object"
    return "int64" if len(given) == len(texts) else "Int64"


def _typed(text: str | None, kind: str) -> int | str | None:
    return text if text is None or kind == "object" else int(text)


def _is_local(system: Any) -> bool:
    protocol = system.protocol
    return "file" in ([protocol] if isinstance(protocol, str) else protocol)


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys) or "nothing"


def _line(exc: BaseException) -> str:
    return f"{exc}".strip() or type(exc).__name__
