"""Shards as pickles in a folder on any fsspec path. Reading them runs code: only when trusted.

A folder is whole once ``shards.json`` is there, which is written last and names the pickles in
order. What is replaced stays whole until then, and goes afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import posixpath
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fsspec

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError, DataError
from bigdl.orca.data.plan import Given, Mapped, Plan, values
from bigdl.orca.engines.pickling import dumps

if TYPE_CHECKING:
    from os import PathLike

    from bigdl.orca.engines.base import Engine

__all__ = ["Target", "save", "stored", "target"]

SCHEMA_VERSION = 1
_HEAD = "shards.json"
_OURS = re.compile(r"shard-[0-9a-f]{16}-[0-9a-f]{16}\.pickle")


@dataclass(frozen=True)
class Target:
    """A folder that shards may be written to.

    Args:
        files: Its file system.
        root: Its path there.
        before: Names of what is replaced.
        is_new: Whether it has to be made.
    """

    files: Any
    root: str
    before: tuple[str, ...]
    is_new: bool


def target(path: str | PathLike[str], overwrite: bool) -> Target:
    """Where to write; nothing is written yet.

    Raises:
        ArgumentError: ``path`` is no path, or ``overwrite`` no bool.
        FileExistsError: Something is there that may not be replaced.
    """
    files, root = _folder("save_pickle", path)
    if not isinstance(overwrite, bool):
        raise ArgumentError(f"overwrite has to be True or False, not {shown(overwrite)}.")
    if not files.exists(root):
        return Target(files, root, (), is_new=True)
    if not files.isdir(root):
        raise FileExistsError(f"save_pickle() needs a folder, and {path} is a file.")
    found = tuple(posixpath.basename(name.rstrip("/")) for name in files.ls(root, detail=False))
    others = [name for name in found if name != _HEAD and not _OURS.fullmatch(name)]
    if others:
        raise FileExistsError(
            f"save_pickle() writes no shards among other files: {path} has {others[0]!r}. "
            "Name another folder."
        )
    if _HEAD in found and not overwrite:  # without it, they are what a broken call has left
        raise FileExistsError(f"There are shards in {path} already; overwrite=True replaces them.")
    return Target(files, root, found, is_new=False)


def save(engine: Engine, plan: Plan, to: Target) -> None:
    """Run the plan and write its shards.

    Raises:
        DataError: The workers wrote where this process does not see it.
    """
    files, token = to.files, secrets.token_hex(8)
    files.makedirs(to.root, exist_ok=True)
    try:
        written = values(engine, plan, _Write(files, to.root, token), "save_pickle")
        files.invalidate_cache(to.root)
        for name, size in written:
            _check(files, to.root, name, size)
        shards = [{"name": name, "bytes": size} for name, size in written]
        head = {"schema_version": SCHEMA_VERSION, "shards": shards}
        unfinished = posixpath.join(to.root, f"shard-{token}-{secrets.token_hex(8)}.pickle")
        with files.open(unfinished, "wb") as file:
            file.write(json.dumps(head).encode())
        files.mv(unfinished, posixpath.join(to.root, _HEAD))
    except BaseException:
        _remove(files, to.root, [f"shard-{token}-*"])
        if to.is_new:
            _remove(files, to.root)
        raise
    names = {name for name, _ in written}  # a worker that was tried again may have left another
    spare = [n for n in _names(files, to.root, f"shard-{token}-*") if n not in names]
    _remove(files, to.root, [*spare, *(name for name in to.before if name != _HEAD)])


def stored(path: str | PathLike[str], trusted: bool) -> Plan:
    """What ``save`` has written, as a plan.

    Raises:
        ArgumentError: ``path`` is no path.
        ConfigError: ``trusted`` is not True.
        FileNotFoundError: Nothing is there.
        DataError: What is there is not ours, or not whole.
    """
    files, root = _folder("load_pickle", path)
    if trusted is not True:
        raise ConfigError(
            "Unpickling can run any code. If you know who wrote these shards, say so: "
            "XShards.load_pickle(path, trusted=True)."
        )
    if not files.exists(root):
        raise FileNotFoundError(f"There are no shards at {path}.")
    try:
        head = json.loads(files.cat_file(posixpath.join(root, _HEAD)))
        shards = [(str(one["name"]), int(one["bytes"])) for one in head["shards"]]
        version = head["schema_version"]
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise DataError(
            f"{path} has no whole shards: save_pickle() did not write it, or not to the end."
        ) from exc
    if version != SCHEMA_VERSION:
        raise DataError(
            f"The shards in {path} have schema version {version!r}; this version reads "
            f"{SCHEMA_VERSION}."
        )
    for name, size in shards:
        _check(files, root, name, size)
    places = [posixpath.join(root, name) for name, _ in shards]
    return Mapped(Given(places, root), _Read(files), "load_pickle")


def _folder(call: str, path: Any) -> tuple[Any, str]:
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"{call}() needs a path, not {shown(path)}.")
    files, root = fsspec.core.url_to_fs(os.fspath(path))
    return files, root.rstrip("/") or root


def _check(files: Any, root: str, name: str, size: int) -> None:
    if not _OURS.fullmatch(name):
        raise DataError(f"{root}: {name!r} is no name of a shard; {_HEAD} was changed.")
    place = posixpath.join(root, name)
    try:
        found = files.info(place)["size"]
    except FileNotFoundError:
        raise DataError(
            f"There is no {place}. It was removed, or a worker wrote it where this process does "
            "not see it: all have to share the path."
        ) from None
    if found != size:
        raise DataError(f"{place} has {found} bytes, and had {size} when it was written.")


def _names(files: Any, root: str, pattern: str) -> list[str]:
    return [posixpath.basename(place) for place in files.glob(posixpath.join(root, pattern))]


def _remove(files: Any, root: str, patterns: list[str] | None = None) -> None:
    """Take files out of a folder; or an empty folder, which is none on object stores."""
    if patterns is None:
        with contextlib.suppress(OSError):
            if files.exists(root) and not files.ls(root):
                files.rmdir(root)
        return
    for pattern in patterns:
        for name in _names(files, root, pattern):
            files.rm_file(posixpath.join(root, name))


@dataclass(frozen=True)
class _Write:
    files: Any
    root: str
    token: str

    def __call__(self, shard: Any) -> tuple[str, int]:
        data = dumps(shard)
        name = f"shard-{self.token}-{secrets.token_hex(8)}.pickle"
        with self.files.open(posixpath.join(self.root, name), "wb") as file:
            file.write(data)
        return name, len(data)


@dataclass(frozen=True)
class _Read:
    files: Any

    def __call__(self, place: str) -> Any:
        with self.files.open(place, "rb") as file:
            return pickle.load(file)
