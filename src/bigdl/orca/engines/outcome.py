"""How a call in a worker ended, as it travels to the caller, and as the caller raises it.

Standard library only, the same for every engine.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from bigdl._base.errors import WorkerError, WorkerLostError
from bigdl._base.nursery import describe

__all__ = ["Failed", "Lost", "failed", "opened"]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """An exception, as plain data.

    Args:
        kind: Its type's name.
        text: What it says.
        traceback: The worker's.
        blob: The exception pickled; None if that does not survive.
    """

    kind: str
    text: str
    traceback: str
    blob: bytes | None


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A worker that ended without an answer.

    Args:
        text: How it ended, in words.
        output: The last that it wrote.
    """

    text: str
    output: str = ""


def failed(exc: BaseException) -> Failed:
    """Describe an exception, in the worker."""
    kind, text, trace, blob = describe(exc)
    return Failed(kind=kind, text=text, traceback=trace, blob=blob)


def opened(
    end: Failed | Lost,
    where: str,
    *,
    rank: int | None = None,
    host: str | None = None,
    shard: int | None = None,
) -> Exception:
    """The exception to raise in the caller; a new one each time, with its cause set.

    Args:
        end: How it ended.
        where: "worker 1 of 4 (process 77 on node)", "shard 2 of 4".
        rank: The worker's, where it has one.
        host: The worker's, where it was there.
        shard: The shard's number, where it worked on one.
    """
    if isinstance(end, Lost):
        last = f" The last that it wrote:\n{end.output}" if end.output else ""
        text = f"{where[:1].upper()}{where[1:]} is lost: {end.text}{last}"
        return WorkerLostError(text, rank=rank, host=host, shard=shard, traceback=end.output)

    def told(text: str) -> WorkerError:
        return WorkerError(text, rank=rank, host=host, shard=shard, traceback=end.traceback)

    error = _rebuilt(end) or told(f"{end.kind}: {end.text} (in {where})")
    error.__cause__ = told(f"Raised in {where}:\n{end.traceback}")
    return error


def _rebuilt(end: Failed) -> Exception | None:
    if end.blob is None:
        return None
    try:
        error: Any = pickle.loads(end.blob)
    except Exception:  # noqa: BLE001  (any code may run in there; the text is what matters)
        return None
    return error if isinstance(error, Exception) else None
