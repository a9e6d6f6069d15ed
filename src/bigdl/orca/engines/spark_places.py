"""Where the Spark engine's processes run: seats, each a Spark task that offers its slots.

Standard library only: how a Spark job of so many tasks is run is given to it. Seats are asked
for as work needs them, serve one call after another, and go back to Spark when no work comes.
Everything here but ``ended`` belongs to the engine's one thread (``service``).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import selectors
import threading
import time
from typing import TYPE_CHECKING, Any

from bigdl._base import wire
from bigdl._base.errors import BigDLError, ConfigError, ContextError, WorkerError
from bigdl.orca.engines.preflight import Facts, Preflight, facts
from bigdl.orca.engines.process import every
from bigdl.orca.engines.spark_entry import (
    END,
    ENDED,
    FAULT,
    HELLO,
    KILL,
    NEED,
    PACKAGE,
    READY,
    START,
    WELCOME,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from bigdl.orca.engines.host import Entrance
    from bigdl.orca.engines.job import Job
    from bigdl.orca.engines.process import Kind, Place, Process
    from bigdl.orca.engines.service import Service

__all__ = ["SparkPlaces"]

logger = logging.getLogger(__name__)

#: A seat without work goes back to Spark after so long.
_IDLE_S = 1.0
#: A process that has hung up has so long to be seen to have ended.
_END_S = 5.0
_CLOSE_S = 15.0
_FRAME_LIMIT = 1 << 26


class _Batch:
    """A Spark job of ours: seats ``first`` … ``first + many - 1``."""

    def __init__(self, first: int, many: int) -> None:
        self.numbers = range(first, first + many)
        #: Seats that have not come yet.
        self.awaited = set(self.numbers)
        #: How it ended, once it has; "" = as it should.
        self.end: str | None = None
        self.thread: threading.Thread


class _Seat:
    """A task that has come."""

    def __init__(self, number: int, pid: int, sock: socket.socket, batch: _Batch) -> None:
        self.number = number
        self.pid = pid
        self.sock = sock
        self.batch = batch
        self.frames = wire.Frames(_FRAME_LIMIT)
        self.out = bytearray()
        self.node = ""
        self.cell = ""
        self.is_ready = False
        #: Whether it was told to end, or its line did.
        self.is_over = False
        self.place: _SparkPlace | None = None
        self.idle_since = time.monotonic()
        #: How its processes ended, by number, until they are asked for.
        self.ends: dict[int, str] = {}
        #: Attempts at the same task that came while this one lives.
        self.copies: list[socket.socket] = []

    @property
    def is_free(self) -> bool:
        usable = self.is_ready and not self.is_over and self.batch.end is None
        return usable and self.place is None


class _Seated:
    """A ``Handle``: a process that a seat has started."""

    def __init__(self, places: SparkPlaces, seat: _Seat, number: int) -> None:
        self._places = places
        self.seat = seat
        self._number = number
        self._is_killed = False
        self._asked = 0.0

    def is_lost(self) -> bool:
        return self._number in self.seat.ends or self.seat.is_over

    def end(self, *, kill: bool) -> str | None:
        if self._number in self.seat.ends:
            return self.seat.ends.pop(self._number)
        if self.seat.is_over:
            why = self.seat.batch.end
            return f"the Spark task it ran in is gone{': ' + why if why else ''}."
        self._asked = self._asked or time.monotonic()
        if not self._is_killed and (kill or time.monotonic() > self._asked + _END_S):
            self._is_killed = True
            self._places.say(self.seat, KILL, {"number": self._number})
        return None


class _SparkPlace:
    """A ``Place``: seats that can use each other's cores; the process is the first one's."""

    cpus: tuple[int, ...] | None = None

    def __init__(self, places: SparkPlaces, seats: list[_Seat]) -> None:
        self._places = places
        self._seats = seats
        for seat in seats:
            seat.place = self

    def process(self, kind: Kind) -> Process:
        return self._places.process(self._seats[0], kind)

    def release(self) -> None:
        for seat in self._seats:
            seat.place = None
            seat.idle_since = time.monotonic()


class SparkPlaces:
    """``Places`` in the tasks of Spark jobs.

    Args:
        seats: How many tasks Spark runs at once.
        cores: Cores a task.
        run: Runs a Spark job of ``many`` tasks numbered from ``first``, which come in at the
            entrance; returns when it has ended. Called in a thread of its own.
        folder: For the engine's files, on this machine.
        mark: A file that is seen only where the driver's files are.
        package: Gives (what tells our package from another, the package zipped).
    """

    def __init__(
        self,
        seats: int,
        cores: int,
        run: Callable[[Entrance, int, int], None],
        folder: str,
        mark: str,
        package: Callable[[], tuple[str, bytes]],
    ) -> None:
        self.slots = seats * cores
        self._total = seats
        self._cores = cores
        self._run = run
        self._folder = folder
        self._mark = mark
        self._package = package
        self._service: Service
        self._seats: dict[int, _Seat] = {}
        self._batches: list[_Batch] = []
        self._count = 0
        self._is_wanting = False
        self._is_asking_all = False
        self._fault: BigDLError | None = None
        #: What the seats' machines have said of themselves, by node.
        self._facts: dict[str, Facts] = {}
        self._here = facts()

    # --- Places ---

    def open(self, service: Service) -> str:
        self._service = service
        return self._folder

    def claim(self, jobs: Sequence[Job]) -> list[Place] | None:
        needs = [self._seats_for(job.cores) for job in jobs]
        found = self._choose(needs, [job.kind for job in jobs])
        if found is None and self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        return None if found is None else [_SparkPlace(self, seats) for seats in found]

    def want(self, slots: Sequence[int]) -> None:
        """Ask Spark for what is missing, as far as it has it."""
        self._is_wanting = bool(slots)
        if not slots:
            if not self._is_asking_all:
                self._fault = None  # nobody is left whom it concerns
            return
        needs = [self._seats_for(many) for many in slots]
        free = sum(seat.is_free for seat in self._seats.values())
        coming = self._coming()
        missing = sum(needs) - free - coming
        if missing <= 0 and not coming:  # they are there, in the wrong places
            missing = needs[0]
        self._launch(min(missing, self._spare()))

    def _seats_for(self, cores: int) -> int:
        return max(1, math.ceil(cores / self._cores))

    def _coming(self) -> int:
        """Seats that were asked for and cannot be used yet."""
        awaited = sum(len(batch.awaited) for batch in self._batches if batch.end is None)
        here = sum(not seat.is_ready and not seat.is_over for seat in self._seats.values())
        return awaited + here

    def _spare(self) -> int:
        """How many more seats Spark may have."""
        awaited = sum(len(batch.awaited) for batch in self._batches if batch.end is None)
        return self._total - len(self._seats) - awaited

    def free_slots(self) -> int:
        """Of the tasks that Spark runs for us now."""
        return sum(seat.is_free for seat in self._seats.values()) * self._cores

    def ready(self, process: Process, hello: bytes) -> str:
        handle = process.handle
        process.node = handle.seat.node if isinstance(handle, _Seated) else ""
        return ""

    def gone(self, process: Process, how: str) -> None:
        return

    def look_after(self) -> None:
        is_wanting = self._is_wanting or self._is_asking_all
        now = time.monotonic()
        for seat in list(self._seats.values()):
            if seat.is_free and not is_wanting and now - seat.idle_since > _IDLE_S:
                self._let_go(seat)

    def close(self) -> None:
        """End all seats; the jobs end with them."""
        for seat in list(self._seats.values()):
            self._let_go(seat)
            self._forget(seat)
        deadline = time.monotonic() + _CLOSE_S
        for batch in self._batches:
            batch.thread.join(max(0.0, deadline - time.monotonic()))

    # --- asking for seats ---

    def _choose(self, needs: Sequence[int], kinds: Sequence[Kind]) -> list[list[_Seat]] | None:
        """Seats for each, or None: those of one job in one cell, the largest first."""
        cells: dict[str, list[_Seat]] = {}
        for seat in self._seats.values():
            if seat.is_free:
                cells.setdefault(seat.cell, []).append(seat)
        found: dict[int, list[_Seat]] = {}
        for index in sorted(range(len(needs)), key=lambda i: -needs[i]):
            fitting = [free for free in cells.values() if len(free) >= needs[index]]
            if not fitting:
                return None
            kept = self._kept(kinds[index])
            free = min(fitting, key=lambda some: (not any(s in kept for s in some), -len(some)))
            free.sort(key=lambda seat: seat not in kept)
            found[index] = free[: needs[index]]
            del free[: needs[index]]
        return [found[index] for index in range(len(needs))]

    def _kept(self, kind: Kind) -> list[_Seat]:
        """Seats with an idle process of that kind."""
        processes = every(self._service.processes, kind)
        return [one.handle.seat for one in processes if isinstance(one.handle, _Seated)]

    def ask_all(self) -> None:
        """Ask for every task that Spark can run at once, to hear from each machine."""
        self._is_asking_all = True
        self._launch(self._spare())

    def ask_no_more(self) -> None:
        """Those without work may go; what did not fit is in the facts."""
        self._is_asking_all = False
        self._fault = None

    def has_all(self) -> bool:
        """Whether that many are there now, or no more will come. From any thread."""
        seats = list(self._seats.values())
        return sum(seat.is_ready for seat in seats) >= self._total or self._fault is not None

    def found(self) -> tuple[Facts, ...]:
        """What the machines have said of themselves, by name. From any thread."""
        return tuple(fact for _, fact in sorted(self._facts.copy().items()))

    def _launch(self, many: int) -> None:
        if many < 1:
            return
        batch = _Batch(self._count, many)
        self._count += many
        self._batches.append(batch)
        batch.thread = threading.Thread(
            target=self._work, args=(batch,), name="bigdl-spark-job", daemon=True
        )
        batch.thread.start()

    def _work(self, batch: _Batch) -> None:
        """A Spark job's life, in its own thread."""
        end = ""
        try:
            self._run(self._service.entrance, batch.numbers.start, len(batch.numbers))
        except Exception as exc:  # noqa: BLE001  (whatever Spark raises; it is told to the caller)
            end = f"{type(exc).__name__}: {exc}"
        with contextlib.suppress(ContextError, WorkerError):
            self._service.ask(lambda: self._ended(batch, end))

    def _ended(self, batch: _Batch, end: str) -> None:
        batch.end = end
        self._batches.remove(batch)
        if end:
            logger.debug("A Spark job of ours has ended: %s", end)
            if "PYTHON_VERSION_MISMATCH" in end:  # said by Spark before we come to it
                self._fault = ConfigError(
                    f"The executors run another Python than this one: {end} Set PYSPARK_PYTHON, "
                    "or conf's spark.pyspark.python, to the same version there."
                )
            elif batch.awaited and (self._is_wanting or self._is_asking_all):
                self._fault = WorkerError(f"Spark has not given the tasks that were asked: {end}")

    # --- the seats' lines ---

    def welcome(self, number: int, pid: int, sock: socket.socket) -> None:
        batch = next((one for one in self._batches if number in one.numbers), None)
        seat = self._seats.get(number)
        if seat is not None:  # a speculative copy, or a retry that is faster than bad news
            seat.copies.append(sock)
        elif batch is None or number not in batch.awaited:
            _send_off(sock)
        else:
            batch.awaited.discard(number)
            seat = self._seats[number] = _Seat(number, pid, sock, batch)
            self._service.selector.register(
                sock, selectors.EVENT_READ, lambda events: self._hear(seat, events)
            )

    def say(self, seat: _Seat, kind: int, content: dict[str, Any] | bytes) -> None:
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        seat.out += wire.frame(kind, payload)
        self._flush(seat)

    def _flush(self, seat: _Seat) -> None:
        if seat.number not in self._seats:
            return
        try:
            sent = seat.sock.send(seat.out) if seat.out else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            seat.out.clear()
            return  # its end is read in a moment
        del seat.out[:sent]
        selector = self._service.selector
        writes = selectors.EVENT_WRITE if seat.out else 0
        data = selector.get_key(seat.sock).data
        selector.modify(seat.sock, selectors.EVENT_READ | writes, data)

    def _hear(self, seat: _Seat, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(seat)
        if not events & selectors.EVENT_READ or seat.number not in self._seats:
            return
        try:
            received = seat.sock.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._forget(seat)
            return
        seat.frames.feed(received)
        for kind, payload in seat.frames:
            self._take(seat, kind, json.loads(payload))

    def _take(self, seat: _Seat, kind: int, content: dict[str, Any]) -> None:
        if kind == HELLO:
            digest, _ = self._package()
            self.say(seat, WELCOME, {"digest": digest, "mark": self._mark})
        elif kind == NEED:
            self.say(seat, PACKAGE, self._package()[1])
        elif kind == READY:
            seat.node, seat.cell = content["node"], content["cell"]
            seat.is_ready, seat.idle_since = True, time.monotonic()
            found = Facts(**content["facts"])
            self._facts[found.node] = found
            if not self._fits(found):
                self._let_go(seat)
        elif kind == ENDED:
            seat.ends[content["number"]] = content["text"]
            process = self._service.processes.get(content["number"])
            if process is not None and process.is_ending is None and process.lost_since is None:
                process.lost_since = time.monotonic()  # when its lines are read
        elif kind == FAULT:
            logger.debug("A seat cannot serve: %s", content["traceback"])
            self._fault = WorkerError(
                f"A Spark task cannot run work of ours: {content['text']}",
                traceback=content["traceback"],
            )

    def _fits(self, found: Facts) -> bool:
        """Whether work can go there; asked before any does, as it would fail in stranger ways."""
        known = Preflight(self._here, (found,))
        if known.faults():
            self._fault = ConfigError(
                f"The executors' environment does not fit this one:\n{known}\nGive them the "
                "same packages; docs/spark.md says how."
            )
        return not known.faults()

    def _let_go(self, seat: _Seat) -> None:
        """Give it back to Spark."""
        self.say(seat, END, {})
        seat.is_over = True

    def _forget(self, seat: _Seat) -> None:
        """Its line has ended."""
        if self._seats.pop(seat.number, None) is None:
            return
        seat.is_over = True
        self._service.selector.unregister(seat.sock)
        seat.sock.close()
        for sock in seat.copies:
            _send_off(sock)

    # --- processes ---

    def process(self, seat: _Seat, kind: Kind) -> Process:
        """An idle process of that kind on a seat, or a new one."""
        for one in list(self._service.processes.values()):
            if isinstance(one.handle, _Seated) and one.handle.seat is seat and one.job is None:
                if one.kind == kind and one.deadline is None and one.is_ending is None:
                    return one
                self._service.dismiss(one)  # one idle process a seat is enough

        def start(number: int) -> _Seated:
            content = {"number": number, "env": sorted(kind.env), "preload": kind.preload}
            self.say(seat, START, content)
            return _Seated(self, seat, number)

        return self._service.new_process(kind, start)


def _send_off(sock: socket.socket) -> None:
    """Tell a task that it is not needed, and hang up."""
    with contextlib.suppress(OSError):
        sock.setblocking(True)
        sock.settimeout(1.0)
        sock.sendall(wire.frame(END))
    sock.close()
