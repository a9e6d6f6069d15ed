"""Checkpoints as folders of plain files: tensors, JSON, checksums; on any fsspec path.

Names no framework: a *codec* of the program's turns its tensors into bytes and back. A folder
is whole once ``checkpoint.json`` is there, which is written last and holds the checksum of the
rest; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
import secrets
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import fsspec

from bigdl._base.errors import StoredModelError
from bigdl.orca.learn.program import Cursor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from bigdl.orca.learn.program import State

__all__ = ["Checkpoint", "Codec", "latest", "new_name", "read", "remove", "write"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_HEAD, _BODY = "checkpoint.json", "state.bin"


class Codec(Protocol):
    """How a framework's tensors become bytes."""

    def is_tensor(self, value: Any) -> bool: ...

    def pack(self, tensors: Mapping[str, Any]) -> bytes: ...

    def unpack(self, content: bytes) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that a run needs to go on.

    Args:
        state: Of a replica.
        cursor: How far training is.
        seed: Of the order of rows; None = as they come.
    """

    state: State
    cursor: Cursor
    seed: int | None


def new_name(run: str, cursor: Cursor) -> str:
    """Name of a folder: in the order of their making, those of one run together."""
    return f"{run}-epoch{cursor.epoch:05d}-step{cursor.step:09d}"


def new_run() -> str:
    """A name that no other run has; later ones come later in the alphabet."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def write(path: str | PathLike[str], checkpoint: Checkpoint, codec: Codec) -> str:
    """Write a checkpoint; a reader sees all of it, or none.

    Returns:
        The path.
    """
    files, root = fsspec.core.url_to_fs(str(path))
    tensors: dict[str, Any] = {}
    plain = _apart(checkpoint.state, codec, tensors)
    body = codec.pack(tensors)
    head = {
        "schema_version": SCHEMA_VERSION,
        "cursor": asdict(checkpoint.cursor),
        "seed": checkpoint.seed,
        "state": plain,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    files.makedirs(root, exist_ok=True)
    _put(files, posixpath.join(root, _BODY), body)
    _put(files, posixpath.join(root, _HEAD), json.dumps(head).encode())
    return str(path)


def _put(files: Any, path: str, content: bytes) -> None:
    """Write a file under another name, then give it its own."""
    unfinished = f"{path}.{secrets.token_hex(4)}.part"
    with files.open(unfinished, "wb") as file:
        file.write(content)
    files.mv(unfinished, path)


def read(path: str | PathLike[str], codec: Codec) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        FileNotFoundError: There is none.
        StoredModelError: It is damaged, or of a version that this one does not know.
    """
    files, root = fsspec.core.url_to_fs(str(path))
    try:
        head = json.loads(files.cat_file(posixpath.join(root, _HEAD)))
        body = files.cat_file(posixpath.join(root, _BODY))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no whole checkpoint in {path}.") from None
    except ValueError as exc:
        raise StoredModelError(f"The checkpoint in {path} is damaged: {exc}") from exc
    if not isinstance(head, dict) or head.get("schema_version") != SCHEMA_VERSION:
        found = head.get("schema_version") if isinstance(head, dict) else head
        raise StoredModelError(
            f"The checkpoint in {path} has schema version {found!r}; this version reads "
            f"{SCHEMA_VERSION}."
        )
    if hashlib.sha256(body).hexdigest() != head.get("sha256"):
        raise StoredModelError(f"The checkpoint in {path} is damaged: {_BODY} has changed.")
    try:
        tensors = codec.unpack(body)
        state = _together(head["state"], tensors)
        return Checkpoint(state=state, cursor=Cursor(**head["cursor"]), seed=head["seed"])
    except (KeyError, TypeError, ValueError) as exc:
        raise StoredModelError(f"The checkpoint in {path} is damaged: {exc!r}") from exc


def latest(directory: str | PathLike[str], codec: Codec) -> str:
    """Path of the last whole checkpoint in a folder; a damaged one is passed over, and named.

    Raises:
        FileNotFoundError: There is none.
    """
    files, root = fsspec.core.url_to_fs(str(directory))
    heads = files.glob(posixpath.join(root, "*", _HEAD)) if files.exists(root) else []
    written = {posixpath.dirname(str(head)): files.info(head) for head in heads}

    def age(path: str) -> tuple[Any, str]:
        info = written[path]
        return (info.get("mtime") or info.get("LastModified") or info.get("created") or 0, path)

    for path in sorted(written, key=age, reverse=True):
        full = posixpath.join(str(directory), posixpath.basename(path))
        try:
            read(full, codec)
        except (StoredModelError, OSError) as exc:
            logger.warning("A checkpoint is passed over: %s", exc)
            continue
        return full
    raise FileNotFoundError(f"There is no whole checkpoint in {directory}.")


def remove(path: str) -> None:
    """Take a checkpoint away."""
    files, root = fsspec.core.url_to_fs(path)
    files.rm(root, recursive=True)


# --- tensors apart from plain values ------------------------------------------------------------


def _apart(value: Any, codec: Codec, tensors: dict[str, Any]) -> Any:
    """``value`` as JSON can hold it; tensors go to ``tensors``, and their names stay."""
    if codec.is_tensor(value):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[key, _apart(one, codec, tensors)] for key, one in value.items()]
        return {"dict": pairs}
    if isinstance(value, tuple):
        return {"tuple": [_apart(one, codec, tensors) for one in value]}
    if isinstance(value, list):
        return [_apart(one, codec, tensors) for one in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise StoredModelError(
        f"A {type(value).__name__} in the state cannot be stored: need tensors, numbers, texts, "
        "and dicts, lists and tuples of them."
    )


def _together(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_together(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_together(one, tensors) for one in value["tuple"])
    return {
        tuple(key) if isinstance(key, list) else key: _together(one, tensors)
        for key, one in value["dict"]
    }
