"""An engine's one thread: queues calls, has worker processes started, hears what they say.

Standard library only. Other threads hand it closures and wait; nothing of a user's runs here:
values, exceptions and events stay bytes until the thread that asked for them opens them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import platform
import selectors
import shutil
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from bigdl._base import wire
from bigdl._base.errors import BigDLError, WorkerError
from bigdl.orca.engines import store
from bigdl.orca.engines.base import closed
from bigdl.orca.engines.host import (
    CONTROL,
    END,
    EVENT,
    FAILED,
    FETCH,
    HELLO,
    ORDER,
    PUT,
    PUT_DONE,
    PUT_PIECE,
    SEAT,
    VALUE,
)
from bigdl.orca.engines.job import Mail
from bigdl.orca.engines.outcome import Failed, Lost
from bigdl.orca.engines.process import Door, Process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl.orca.engines.job import Job
    from bigdl.orca.engines.process import Handle, Kind, Place, Places

__all__ = ["Service"]

logger = logging.getLogger(__name__)

#: A process that has done its work may tidy up for so long before it is killed.
_LINGER_S = 5.0
#: How often to look for processes that have ended in silence.
_LOOK_S = 0.5


class Service:
    """Owns the worker processes of one engine.

    Args:
        places: Where they run.
        address: Where they find this thread; the default is for processes on this machine.
    """

    def __init__(self, places: Places, address: str = "127.0.0.1") -> None:
        self.slots = places.slots
        self._places = places
        self._folder = ""
        self._settled = threading.Event()  # the folder is known, or never will be
        self.selector = selectors.DefaultSelector()
        self._door = Door(self.selector, address)
        self._door.welcome = self._welcome
        self.entrance = self._door.entrance
        self._woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self.selector.register(self._woken, selectors.EVENT_READ, lambda _: self._woken.recv(4096))
        self._calls: deque[Callable[[], None]] = deque()
        self._queue: deque[Sequence[Job]] = deque()
        #: Those that are there, by number.
        self.processes: dict[int, Process] = {}
        self._count = 0
        self._looked = 0.0
        self._asking = threading.RLock()  # a ref may be collected, and drop its job, within
        self._closing = False
        self._broken = ""
        self._thread = threading.Thread(target=self._run, name="bigdl-engine", daemon=True)
        self._thread.start()

    # --- asked from other threads ---

    def begin(self, jobs: Sequence[Job]) -> None:
        """Queue ``jobs``, which start together."""
        self._ask(lambda: self._queue.append(jobs))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End ``jobs``; their processes are gone when this returns."""
        done = threading.Event()

        def cancel() -> None:
            try:
                for job in jobs:
                    self._cancel(job)
            finally:
                done.set()

        self._ask(cancel)
        while not done.wait(0.5) and self._thread.is_alive():
            pass
        self.wait_gone(jobs)

    def wait_gone(self, jobs: Sequence[Job]) -> None:
        """Wait until the processes of ``jobs``, which have ended, are gone."""
        while any(job.process is not None for job in jobs) and self._thread.is_alive():
            time.sleep(0.005)

    def drop(self, job: Job) -> None:
        """Nobody will read the stored value of ``job``: end it, if it runs, and forget it."""
        self._ask(lambda: self._drop(job))

    def folder(self) -> str:
        """Where files of the engine lie.

        Raises:
            ContextError: It is closed.
            WorkerError: No process can be started here.
        """
        while not self._settled.wait(0.5) and self._thread.is_alive():
            pass
        if self._closing:
            raise self._over()
        return self._folder

    def sweep(self, name: str) -> None:
        """Remove what is in the part ``name`` of the folder."""
        if self._folder:
            shutil.rmtree(os.path.join(self._folder, name), ignore_errors=True)

    def free_slots(self) -> int:
        return self._places.free_slots()

    def ask(self, call: Callable[[], None]) -> None:
        """Have ``call`` run in the engine's thread. Raises ``ContextError`` once it is closed."""
        self._ask(call)

    @property
    def is_open(self) -> bool:
        """Whether work can still begin."""
        return not self._closing

    def close(self) -> None:
        with self._asking:
            self._closing = True
        self._wake()
        self._thread.join()

    def _over(self) -> BigDLError:
        return WorkerError(self._broken) if self._broken else closed()

    def _ask(self, call: Callable[[], None]) -> None:
        with self._asking:
            if self._closing:
                raise self._over()
            self._calls.append(call)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: it has ended
            self._wakes.send(b"!")

    # --- the thread ---

    def _run(self) -> None:
        try:
            self._settle(self._places.open(self))
            while not self._closing:
                for key, events in self.selector.select(_LOOK_S):
                    key.data(events)
                while self._calls:
                    self._calls.popleft()()
                self._look_after()
                self._dispatch()
        except Exception as exc:
            logger.debug("The engine has failed.", exc_info=True)
            self._broken = str(exc)
        finally:
            with self._asking:
                self._closing = True
            self._end_all()

    def _look_after(self) -> None:
        """Notice processes that ended without hanging up, or do not end."""
        now = time.monotonic()
        self._places.look_after()
        for process in list(self.processes.values()):
            if process.is_ending is not None:
                self._gone(process)
            elif process.deadline is not None and now > process.deadline:
                self._gone(process, kill=True)
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        self._door.look_at_clock()
        for process in list(self.processes.values()):
            # what it has sent is read first; a child of its own may hold its lines for ever
            if process.lost_since is not None:
                self._gone(process)
            elif process.handle.is_lost():
                process.lost_since = now

    def _end_all(self) -> None:
        while self._calls:  # what was asked before the end
            with contextlib.suppress(BigDLError, OSError):
                self._calls.popleft()()
        for process in list(self.processes.values()):
            process.close(self.selector)
        self._door.close()  # who still comes is not let in
        self._places.close()
        jobs = [process.job for process in self.processes.values() if process.job is not None]
        for job in [*jobs, *(job for batch in self._queue for job in batch)]:
            job.process = None
            if not job.ended.is_set():
                self._finish(job, self._over())
        self.processes.clear()
        self._queue.clear()
        self._settled.set()
        self.selector.close()
        self._woken.close()
        self._wakes.close()

    # --- jobs ---

    def _dispatch(self) -> None:
        """Start what is ready and has slots, in order."""
        waiting: deque[Sequence[Job]] = deque()
        wanted: list[int] = []  # by those that wait for nothing but slots
        for batch in self._queue:
            needs = [need for job in batch for need in job.needs]
            if not all(need.ended.is_set() for need in needs):
                waiting.append(batch)
                continue
            if wanted:
                waiting.append(batch)
                wanted += [job.cores for job in batch]
                continue
            failed = next((need for need in needs if not isinstance(need.outcome, bytes)), None)
            if failed is not None and failed.outcome is not None:
                for job in batch:
                    job.where, job.host, job.shard = failed.where, failed.host, failed.shard
                    self._finish(job, failed.outcome)
            elif (places := self._claim(batch)) is None:
                waiting.append(batch)
                wanted += [job.cores for job in batch]
            else:
                for job, place in zip(batch, places, strict=False):
                    self._begin(job, place)
        self._queue = waiting
        self._places.want(wanted)

    def _claim(self, batch: Sequence[Job]) -> list[Place] | None:
        """Places for all, or None: not now. None at all if there never will be any."""
        try:
            return self._places.claim(batch)
        except BigDLError as exc:
            for job in batch:
                self._finish(job, exc)
            return []

    def _begin(self, job: Job, place: Place) -> None:
        try:
            process = place.process(job.kind)
        except (BigDLError, OSError) as exc:
            place.release()
            self._finish(job, exc if isinstance(exc, BigDLError) else Lost(text=str(exc)))
            return
        process.job, job.process = job, process
        process.is_ordered = False
        process.place = place
        self._order(process)

    def new_process(self, kind: Kind, start: Callable[[int], Handle]) -> Process:
        """One that ``start`` brings into being under the number that it is given."""
        self._count += 1
        process = Process(kind, self._count, start(self._count))
        self.processes[process.number] = process
        return process

    def dismiss(self, process: Process) -> None:
        """End an idle process."""
        self._gone(process, kill=True)

    def _settle(self, folder: str) -> None:
        if folder and not self._folder:
            self._folder = folder
            self._settled.set()
            for process in self.processes.values():
                self._order(process)

    def _order(self, process: Process) -> None:
        """Send the order once there are both a line and a folder."""
        job = process.job
        if job is None or process.is_ordered or not process.is_connected or not self._folder:
            return
        process.is_ordered = True
        at = f" on {process.node}" if process.node else ""
        job.where = f"{job.where} (process {process.pid}{at})"
        job.host = process.node or platform.node()
        cpus = process.place.cpus if process.place is not None else None
        self._say(process, ORDER, pickle.dumps(job.make(cpus, self._folder)))

    def _finish(self, job: Job, outcome: bytes | Failed | Lost | BigDLError) -> None:
        job.end(outcome)
        if job.is_dropped:
            _remove(job.paths)

    def _drop(self, job: Job) -> None:
        job.is_dropped = True
        self._cancel(job)
        _remove(job.paths)

    def _cancel(self, job: Job) -> None:
        process = job.process
        if process is not None:
            self._gone(process, kill=True)
        elif not job.ended.is_set():
            self._queue = deque(batch for batch in self._queue if job not in batch)
            self._finish(job, job.cancelled())

    # --- processes ---

    def _welcome(self, number: int, pid: int, line: int, sock: socket.socket) -> None:
        if line == SEAT:
            self._places.welcome(number, pid, sock)
            return
        process, is_control = self.processes.get(number), line == CONTROL
        if process is None or (process.line if is_control else process.output) is not None:
            sock.close()
            return
        process.pid = pid
        hear = self._read_line if is_control else self._read_output
        self.selector.register(sock, selectors.EVENT_READ, lambda events: hear(process, events))
        if is_control:
            process.line = sock
        else:
            process.output = sock
        process.is_connected = process.line is not None and process.output is not None
        self._order(process)

    def _read_line(self, process: Process, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            process.flush(self.selector)
        if not events & selectors.EVENT_READ or process.line is None:
            return
        try:
            received = process.line.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._gone(process)
            return
        process.frames.feed(received)
        for kind, payload in process.frames:
            self._hear(process, kind, payload)

    def _hear(self, process: Process, kind: int, payload: bytes) -> None:
        job = process.job
        if kind == HELLO:
            self._settle(self._places.ready(process, payload))
        elif kind in (FETCH, PUT, PUT_PIECE, PUT_DONE):
            self._serve_file(process, kind, payload)
        elif job is not None and kind == EVENT:
            job.mail.put(Mail("event", job, payload))
        elif job is not None and kind in (VALUE, FAILED):
            self._show(job, process.flush_output())
            outcome = payload if kind == VALUE else pickle.loads(store.unpack(payload))
            if job.kind.once:
                process.deadline = time.monotonic() + _LINGER_S
                self._say(process, END)
            else:
                self._release(process)
            self._finish(job, outcome)

    def _read_output(self, process: Process, events: int) -> None:
        text = process.read_output()
        if process.job is not None:
            self._show(process.job, text)
        if process.is_quiet and process.output is not None:  # it has closed its stdout
            self.selector.unregister(process.output)
            process.output.close()
            process.output = None

    def _show(self, job: Job, text: str) -> None:
        if text:
            job.mail.put(Mail("output", job, text))

    def _say(self, process: Process, kind: int, payload: bytes = b"") -> None:
        process.out += wire.frame(kind, payload)
        process.flush(self.selector)

    def _release(self, process: Process) -> None:
        """Its slots and cores are free again."""
        if process.place is not None:
            process.place.release()
        process.place = None
        if process.job is not None:
            process.job.process = None
        process.job = None

    def _gone(self, process: Process, *, kill: bool = False) -> None:
        """A process has hung up, or is to be killed: let it end, and say so."""
        if process.number not in self.processes:
            return
        process.is_ending = bool(process.is_ending) or kill
        how = process.handle.end(kill=process.is_ending)
        if how is None:  # another machine has to say so
            process.hang_up(self.selector)
            return
        del self.processes[process.number]
        job = process.job
        text = process.flush_output()
        if job is not None:
            self._show(job, text)
        process.close(self.selector)
        self._release(process)
        if job is not None and not job.ended.is_set():
            lost = Lost(
                text=how or "it ended before it gave an answer.", output=process.last_lines
            )
            self._finish(job, job.cancelled() if process.is_ending else lost)
        self._places.gone(process, how)

    # --- files, for workers that do not see them ---

    def _serve_file(self, process: Process, kind: int, payload: bytes) -> None:
        """Bring a file to a worker, or take one from it."""
        try:
            if kind == FETCH:
                process.feeds.append(store.pieces(os.fsdecode(payload), self._folder))
            elif kind == PUT:
                process.receiving = store.receive(os.fsdecode(payload), self._folder)
            elif process.receiving is not None and kind == PUT_PIECE:
                process.receiving[0].write(payload)
            elif process.receiving is not None:
                file, path = process.receiving
                file.close()
                os.rename(file.name, path)
                process.receiving = None
                self._say(process, store.DONE)
        except OSError as exc:
            process.drop_file()
            self._say(process, store.DONE, store.said(exc))
        process.flush(self.selector)


def _remove(paths: Sequence[str]) -> None:
    for path in paths:
        store.remove(path)
