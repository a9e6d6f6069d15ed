"""One worker process of a stage, as its caller sees it. Knows no framework."""

from __future__ import annotations

import platform
import selectors
import socket
from collections import deque
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import WorkerError, WorkerLostError
from bigdl.nano.pipeline.wire import Inbox, Message, gathered, send, unpack
from bigdl.nano.pipeline.worker import ITEM, READY, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl._base.environment import ProcessSettings
    from bigdl._base.workers import Workers
    from bigdl.nano.pipeline.wire import Parts
    from bigdl.nano.pipeline.worker import Facts

__all__ = ["Seat"]

#: One value is worked at while the next is on its way.
_DEPTH = 2
_LINGER_S = 5.0


class Seat:
    """A worker process and the line to it.

    Args:
        workers: Who starts it.
        where: Its name in error texts: "stage 'resize'", "instance 1 of 2".
        rank: Its number among those of its stage.
        settings: The cores and threads that it runs with.
        open_fn: Gives the function, in the worker.
        fds: File descriptors that ``open_fn`` takes over.
        selector: Where its line is registered, with this seat as data.
    """

    def __init__(
        self,
        workers: Workers,
        where: str,
        rank: int,
        settings: ProcessSettings,
        open_fn: Callable[[], Callable[[Any], Any]],
        fds: Sequence[int],
        selector: selectors.BaseSelector,
    ) -> None:
        self.where, self.rank = where, rank
        self.facts: Facts | None = None
        #: (run, index) of what it was given and has not answered, oldest first.
        self.busy: deque[tuple[int, int]] = deque()
        self._selector = selector
        self._inbox = Inbox()
        self._out: list[memoryview] = []
        threads = settings.threads or (len(settings.cores) if settings.cores else None)
        self._worker = workers.start(serve, open_fn, settings.cores, threads)
        self._line, theirs = socket.socketpair()
        with theirs:
            self._line.setblocking(False)
            selector.register(self._line, selectors.EVENT_READ, self)
            for fd in (theirs.fileno(), *fds):
                self._worker.hand_over(fd)

    @property
    def has_room(self) -> bool:
        return len(self.busy) < _DEPTH

    @property
    def is_sending(self) -> bool:
        return bool(self._out)

    def give(self, run: int, index: int, parts: Parts) -> None:
        """Send a value; the memory that it lies in may change as soon as this returns."""
        self.busy.append((run, index))
        pieces = gathered(Message(ITEM, run, index, parts))
        if not self._out:
            self._push(pieces)
        self._out.extend(memoryview(bytes(piece)) for piece in pieces)
        self._want_to_write()

    def push(self) -> None:
        """Send what waits, as far as that goes without waiting."""
        self._push(self._out)
        self._want_to_write()

    def _push(self, pieces: list[memoryview]) -> None:
        try:
            send(self._line, pieces)
        except BlockingIOError:
            pass
        except OSError:  # its end is read in a moment
            pieces.clear()

    def _want_to_write(self) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
        if self._selector.get_key(self._line).events != events:
            self._selector.modify(self._line, events, self)

    def receive(self) -> Message | None:
        """The next answer, if there is a whole one.

        Raises:
            EOFError: The worker is gone.
        """
        message = self._inbox.receive(self._line)
        if message is not None and message.kind == READY:
            self.facts = unpack(message.parts)
            return None
        if message is not None:
            self.busy.popleft()
        return message

    def is_lost(self) -> bool:
        """Whether the process has ended, though a child of it may hold its line; never waits."""
        return self._worker.is_over()

    def ending(self, run: int, advice: str) -> BaseException:
        """Why the worker has ended, as an error to raise.

        Args:
            run: The run under way: its inputs are named.
            advice: What can be done now, as a sentence.
        """
        name = self.where if self.facts is None else f"{self.where} (process {self.facts.pid})"
        at = [index for number, index in self.busy if number == run]
        work = f" It was given input {' and '.join(map(str, at))}." if at else ""
        try:
            self._worker.result(timeout_s=_LINGER_S)
        except WorkerLostError as exc:
            text, trace = str(exc), exc.traceback
        except Exception as exc:  # noqa: BLE001  (of the user's own code, when it was opened)
            trace = getattr(exc.__cause__, "traceback", "")
            exc.__cause__ = WorkerError(
                f"Raised in {self.where}, before its first input:\n{trace}",
                rank=self.rank,
                host=platform.node(),
                traceback=trace,
            )
            return exc
        else:
            text, trace = "it ended before it gave an answer.", ""
        return WorkerLostError(
            f"{name[:1].upper()}{name[1:]} is lost: {text}{work} {advice}",
            rank=self.rank,
            host=platform.node(),
            traceback=trace,
        )

    def close(self) -> None:
        """Kill the worker and give its line back; calling it twice is harmless."""
        if self._line.fileno() >= 0:
            self._selector.unregister(self._line)
            self._line.close()
        self._worker.cancel()
