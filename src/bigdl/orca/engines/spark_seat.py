"""Inside a Spark task: starts and ends worker processes there, as the driver says.

Standard library only; ``spark_places`` is the other end. User code never runs in Spark's own
Python process but in children of it, which die with it. A seat has no work of its own to lose:
Spark may try it again without running anything twice.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import select
import stat
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bigdl._base import wire
from bigdl._base.errors import BigDLError
from bigdl.orca.engines.crews import Crews
from bigdl.orca.engines.host import Abroad, Entrance
from bigdl.orca.engines.preflight import facts
from bigdl.orca.engines.process import Kind
from bigdl.orca.engines.spark_entry import END, ENDED, KILL, READY, START

if TYPE_CHECKING:
    import socket

    from bigdl.orca.engines.crews import Started

__all__ = ["serve"]

logger = logging.getLogger(__name__)

#: How often to look whether Spark's processes above this one are still there.
_LOOK_S = 0.5
_FRAME_LIMIT = 1 << 26


def serve(line: socket.socket, door: tuple[str, int, bytes], welcome: dict[str, Any]) -> None:
    """Serve the driver until it has had enough, or is gone, or Spark's own processes are.

    Args:
        line: To the driver.
        door: Where worker processes connect: address, port, key.
        welcome: What the driver has said: a file of its own that tells whether its files are
            seen here.
    """
    address, port, key = door
    seat = _Seat(
        line,
        Entrance(address=address, port=port, key=key),
        is_near=os.path.exists(welcome["mark"]),
    )
    try:
        seat.run()
    finally:
        seat.close()


class _Seat:
    """The worker processes of one task."""

    def __init__(self, line: socket.socket, entrance: Entrance, *, is_near: bool) -> None:
        self._line = line
        self._entrance = entrance
        self._abroad = Abroad(is_near=is_near)
        self._frames = wire.Frames(_FRAME_LIMIT)
        self._crews = Crews()
        self._started: dict[int, Started] = {}
        self._kinds: dict[int, Kind] = {}
        self._spark = _Spark()
        self._is_over = False

    def run(self) -> None:
        wire.settle(self._line)
        self._say(READY, {"node": platform.node(), "cell": _cell(), "facts": asdict(facts())})
        while not self._is_over and self._spark.is_there():
            ends = [self._line, *(end for one in self._started.values() for end in one.lines())]
            ready = select.select(list(set(ends)), [], [], _LOOK_S)[0]
            if self._line in ready:
                self._hear()
            for number in [n for n, one in self._started.items() if one.is_lost()]:
                self._end(number, kill=False)

    def close(self) -> None:
        """Kill all that runs."""
        self._crews.close()
        self._started.clear()

    def _hear(self) -> None:
        received = self._line.recv(1 << 20)
        if not received:
            self._is_over = True
            return
        self._frames.feed(received)
        for kind, payload in self._frames:
            if kind == END:
                self._is_over = True
                return
            content = json.loads(payload)
            if kind == START:
                self._start(**content)
            elif kind == KILL:
                self._end(content["number"], kill=True)

    def _start(self, number: int, env: list[list[str]], preload: list[str]) -> None:
        kind = Kind(
            env=frozenset((name, value) for name, value in env),
            preload=tuple(preload),
            around=frozenset(),
        )
        try:
            crew = self._crews.get(kind, set(self._kinds.values()))
            self._started[number] = crew.start(self._entrance, number, self._abroad)
            self._kinds[number] = kind
        except (BigDLError, OSError) as exc:
            self._say(ENDED, {"number": number, "text": f"it could not be started: {exc}"})

    def _end(self, number: int, *, kill: bool) -> None:
        started = self._started.pop(number, None)
        self._kinds.pop(number, None)
        text = started.end(kill=kill) if started is not None else ""
        self._say(ENDED, {"number": number, "text": text})

    def _say(self, kind: int, content: dict[str, Any]) -> None:
        self._line.sendall(wire.frame(kind, json.dumps(content).encode()))


class _Spark:
    """The processes above this one: Python's daemon, and the executor behind it.

    Spark lets a task be told to end by killing this process through the daemon. Without a
    daemon (killed, say) nobody does, and this process may even be used again: then only the
    executor's line, on which it sent the task, shows that it has gone or wants the task no more.
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._line = _executors_line()

    def is_there(self) -> bool:
        if os.getppid() != self._parent:
            return False
        if self._line is None:
            return True
        poll = select.poll()
        poll.register(self._line, select.POLLRDHUP)
        return not poll.poll(0)


def _executors_line() -> int | None:
    """The file descriptor of the executor's line to this process, if it can be found.

    Spark's own loop, far up on this stack, reads from it.
    """
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_locals.get("infile")
        if frame.f_globals.get("__name__", "").startswith("pyspark") and file is not None:
            return _descriptor(file)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _descriptor(file: Any) -> int | None:
    try:
        number = int(file.fileno())
        return number if stat.S_ISSOCK(os.fstat(number).st_mode) else None
    except (AttributeError, OSError, ValueError):
        return None


def _cell() -> str:
    """Equal for two tasks whose cores one process can use: one host, one set of limits."""
    group = ""
    if sys.platform == "linux":
        with open("/proc/self/cgroup") as file:
            group = file.read()
    return f"{wire.host_key()} {group}"
