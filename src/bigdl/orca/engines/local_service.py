"""The local engine's one thread: queues calls, starts worker processes, hears what they say.

Standard library only. Other threads hand it closures and wait; nothing of a user's runs here:
values, exceptions and events stay bytes until the thread that asked for them opens them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import selectors
import shutil
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from bigdl._base import wire
from bigdl._base.errors import BigDLError, WorkerError
from bigdl.orca.engines import local_store as store
from bigdl.orca.engines.base import closed
from bigdl.orca.engines.local_job import Mail
from bigdl.orca.engines.local_process import Cores, Crews, Door, Kind, Process, every
from bigdl.orca.engines.local_worker import END, EVENT, FAILED, HELLO, ORDER, VALUE
from bigdl.orca.engines.outcome import Failed, Lost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl.orca.engines.local_job import Job

__all__ = ["Service"]

logger = logging.getLogger(__name__)

#: A process that has done its work may tidy up for so long before it is killed.
_LINGER_S = 5.0
#: How often to look for processes that have ended in silence.
_LOOK_S = 0.5


class Service:
    """Owns the worker processes of one engine.

    Args:
        slots: Cores' worth of work at once.
        cpus: Cores to give to processes; () = let the system place them.
        home: The kind of process whose nursery keeps the engine's folder.
    """

    def __init__(self, slots: int, cpus: tuple[int, ...], home: Kind) -> None:
        self.slots = slots
        self._free = slots
        self._cores = Cores(cpus)
        self._home = home
        self._folder = ""
        self._settled = threading.Event()  # the folder is known, or never will be
        self._key = secrets.token_bytes(32)
        self._selector = selectors.DefaultSelector()
        self._door = Door(self._selector, self._key)
        self._door.welcome = self._welcome
        self._woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self._selector.register(
            self._woken, selectors.EVENT_READ, lambda _: self._woken.recv(4096)
        )
        self._calls: deque[Callable[[], None]] = deque()
        self._queue: deque[Sequence[Job]] = deque()
        self._crews = Crews(home)
        self._processes: dict[int, Process] = {}
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
        return self._free

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
            self._start(self._home)
            while not self._closing:
                for key, events in self._selector.select(_LOOK_S):
                    key.data(events)
                while self._calls:
                    self._calls.popleft()()
                self._look_after()
                self._dispatch()
        except Exception as exc:
            logger.debug("The local engine has failed.", exc_info=True)
            self._broken = str(exc)
        finally:
            with self._asking:
                self._closing = True
            self._end_all()

    def _look_after(self) -> None:
        """Notice processes that ended without hanging up, or do not end."""
        now = time.monotonic()
        for process in list(self._processes.values()):
            if process.deadline is not None and now > process.deadline:
                self._gone(process, kill=True)
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        self._door.look_at_clock()
        for process in list(self._processes.values()):
            # what it has sent is read first; a child of its own may hold its lines for ever
            if process.lost_since is not None:
                self._gone(process)
            elif process.is_lost():
                process.lost_since = now

    def _end_all(self) -> None:
        while self._calls:  # what was asked before the end
            with contextlib.suppress(BigDLError, OSError):
                self._calls.popleft()()
        for process in list(self._processes.values()):
            process.close(self._selector)
        self._crews.close()
        jobs = [process.job for process in self._processes.values() if process.job is not None]
        for job in [*jobs, *(job for batch in self._queue for job in batch)]:
            job.process = None
            if not job.ended.is_set():
                self._finish(job, self._over())
        self._processes.clear()
        self._queue.clear()
        self._settled.set()
        self._door.close()
        self._selector.close()
        self._woken.close()
        self._wakes.close()

    # --- jobs ---

    def _dispatch(self) -> None:
        """Start what is ready and has slots, in order."""
        waiting: deque[Sequence[Job]] = deque()
        is_full = False
        for batch in self._queue:
            needs = [need for job in batch for need in job.needs]
            if is_full or not all(need.ended.is_set() for need in needs):
                waiting.append(batch)
                continue
            failed = next((need for need in needs if not isinstance(need.outcome, bytes)), None)
            if failed is not None and failed.outcome is not None:
                for job in batch:
                    job.where = failed.where
                    self._finish(job, failed.outcome)
            elif sum(job.cores for job in batch) > self._free:
                is_full = True
                waiting.append(batch)
            else:
                for job in batch:
                    self._begin(job)
        self._queue = waiting

    def _begin(self, job: Job) -> None:
        process = next(every(self._processes, job.kind), None)
        if process is None:
            try:
                process = self._start(job.kind)
            except (BigDLError, OSError) as exc:
                self._finish(job, exc if isinstance(exc, BigDLError) else Lost(text=str(exc)))
                return
        process.job, job.process = job, process
        process.is_ordered = False
        process.slots = job.cores
        process.cpus = self._cores.take(job.cores)
        self._free -= job.cores
        self._order(process)

    def _start(self, kind: Kind) -> Process:
        """A new process; too many idle ones make room for it."""
        idle = [one for one in self._processes.values() if one.job is None and one.is_connected]
        for one in idle[: max(0, len(self._processes) + 1 - self.slots)]:
            self._gone(one, kill=True)
        busy = {one.crew.kind for one in self._processes.values()}
        self._count += 1
        crew = self._crews.get(kind, busy)
        process = crew.start(self._door.port, self._key, self._count)
        self._processes[process.number] = process
        return process

    def _order(self, process: Process) -> None:
        """Send the order once there are both a line and a folder."""
        job = process.job
        if job is None or process.is_ordered or not process.is_connected or not self._folder:
            return
        process.is_ordered = True
        job.where = f"{job.where} (process {process.pid})"
        self._say(process, ORDER, pickle.dumps(job.make(process.cpus, self._folder)))

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

    def _welcome(self, number: int, pid: int, is_control: bool, sock: socket.socket) -> None:
        process = self._processes.get(number)
        if process is None or (process.line if is_control else process.output) is not None:
            sock.close()
            return
        process.pid = pid
        hear = self._read_line if is_control else self._read_output
        self._selector.register(sock, selectors.EVENT_READ, lambda events: hear(process, events))
        if is_control:
            process.line = sock
        else:
            process.output = sock
        process.is_connected = process.line is not None and process.output is not None
        self._order(process)

    def _read_line(self, process: Process, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            process.flush(self._selector)
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
        if kind == HELLO and process.crew.kind == self._home and not self._folder:
            self._folder = os.fsdecode(payload)
            self._settled.set()
            for other in self._processes.values():
                self._order(other)
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
            self._selector.unregister(process.output)
            process.output.close()
            process.output = None

    def _show(self, job: Job, text: str) -> None:
        if text:
            job.mail.put(Mail("output", job, text))

    def _say(self, process: Process, kind: int, payload: bytes = b"") -> None:
        process.out += wire.frame(kind, payload)
        process.flush(self._selector)

    def _release(self, process: Process) -> None:
        """Its slots and cores are free again."""
        if process.cpus is not None:
            self._cores.give_back(process.cpus)
        self._free += process.slots
        process.slots, process.cpus = 0, None
        if process.job is not None:
            process.job.process = None
        process.job = None

    def _gone(self, process: Process, *, kill: bool = False) -> None:
        """A process has hung up, or is to be killed: let it end, and say so."""
        if self._processes.pop(process.number, None) is None:
            return
        how = process.end(kill=kill)
        job = process.job
        text = process.flush_output()
        if job is not None:
            self._show(job, text)
        process.close(self._selector)
        self._release(process)
        if job is not None and not job.ended.is_set():
            lost = Lost(
                text=how or "it ended before it gave an answer.", output=process.last_lines
            )
            self._finish(job, job.cancelled() if kill else lost)
        if process.crew.kind == self._home and not self._folder:
            raise WorkerError(f"No worker process could be started on this machine: {how}")


def _remove(paths: Sequence[str]) -> None:
    for path in paths:
        store.remove(path)
