"""Inside a stage's worker process: takes values off its line, one by one, and answers each.

Knows no framework. ``stages`` is the other end.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigdl._base.environment import allocator_in_use, environment, stay_on, thread_variables
from bigdl._base.machine import core_ids
from bigdl._base.nursery import describe, take_over
from bigdl.nano.pipeline.wire import Inbox, Message, gathered, pack, send, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FAILED", "ITEM", "READY", "VALUE", "Facts", "serve"]

# Kinds of messages: to the worker; from it.
ITEM, READY, VALUE, FAILED = range(4)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a worker process is, as it has found itself.

    Args:
        pid: Its number.
        cores: The cores that it may run on.
        threads: How many threads its libraries were told to use; None: not told.
        allocator: "jemalloc", "tcmalloc", or None: the C library's.
    """

    pid: int
    cores: tuple[int, ...]
    threads: int | None
    allocator: str | None


def serve(
    open_fn: Callable[[], Callable[[Any], Any]], cores: tuple[int, ...] | None, threads: int | None
) -> None:
    """A worker's life: until its line ends.

    Args:
        open_fn: Gives the stage's function, here.
        cores: The cores to run on; None leaves them.
        threads: Threads for each library's pool; None leaves them.
    """
    stay_on(cores)
    variables: dict[str, str | None] = dict(thread_variables(threads)) if threads else {}
    with environment(**variables), socket.socket(fileno=take_over()) as line:
        fn = open_fn()
        facts = Facts(
            pid=os.getpid(), cores=core_ids(), threads=threads, allocator=allocator_in_use()
        )
        send(line, gathered(Message(READY, 0, 0, pack(facts))))
        inbox = Inbox()
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
            while True:
                message = inbox.receive(line)
                if message is not None:
                    send(line, gathered(_answer(fn, message)))


def _answer(fn: Callable[[Any], Any], message: Message) -> Message:
    try:
        kind, parts = VALUE, pack(fn(unpack(message.parts)))
    except Exception as exc:  # noqa: BLE001  (it is raised again in the caller)
        kind, parts = FAILED, pack(describe(exc))
    return Message(kind, message.run, message.index, parts)
