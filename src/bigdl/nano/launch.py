"""One script in several processes of this machine, as ``bigdl launch`` starts it."""

from __future__ import annotations

import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, BinaryIO

from bigdl._base.environment import ProcessSettings, find_allocator
from bigdl.nano import launched
from bigdl.nano.cores import divided

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["Launch", "planned"]

_ADDRESS = "127.0.0.1"
_LOOK_S = 0.1
_GRACE_S = 5.0  # between being asked to end and being ended
_LAST_WORDS_S = 1.0  # for what a process's own children, still alive, hold of its output
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")
_FORWARDED = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What is to be started.

    Args:
        command: The script and its arguments.
        settings: How each process shall run, by rank.
    """

    command: tuple[str, ...]
    settings: tuple[ProcessSettings, ...]

    def variables(self, rank: int, port: int | str) -> dict[str, str]:
        """What rank ``rank`` finds in its environment, by torchrun's names."""
        world = str(len(self.settings))
        return {
            **self.settings[rank].variables(),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "GROUP_RANK": "0",
            "MASTER_ADDR": _ADDRESS,
            "MASTER_PORT": str(port),
        }

    def shown(self) -> str:
        """The processes in words, for a look before they are started."""
        lines = []
        for rank, settings in enumerate(self.settings):
            cores = "any" if settings.cores is None else ",".join(map(str, settings.cores))
            variables = self.variables(rank, "<free>")
            lines.append(f"[{rank}] cores {cores}: {shlex.join([sys.executable, *self.command])}")
            lines += [f"[{rank}]   {name}={value}" for name, value in variables.items()]
        return "\n".join(lines)

    def run(self, out: BinaryIO, err: BinaryIO) -> int:
        """Start all, wait for all, and end what is left when the first fails.

        Called in the main thread: Ctrl-C and SIGTERM reach the processes through it.

        Args:
            out: Gets the lines that they write to stdout, each with its rank.
            err: Gets the lines of stderr.

        Returns:
            0, or the exit code of the first that failed; 128 + the number of a signal that
            ended it, or us.
        """
        with ExitStack() as stack:
            asked = stack.enter_context(_signals())
            port = stack.enter_context(_free_port())
            gang = stack.enter_context(_Gang(out, err))
            for rank, settings in enumerate(self.settings):
                cores = "-" if settings.cores is None else ",".join(map(str, settings.cores))
                gang.start(rank, cores, self.command, self.variables(rank, port))
            return gang.watch(asked)


def planned(processes: int, script: Path, arguments: Sequence[str]) -> Launch:
    """A launch on cores that no two processes share, with an allocator where one is found.

    Raises:
        ConfigError: ``processes`` is less than 1.
    """
    settings = divided(processes, allocator=find_allocator(), names=("-n", "", ""))
    return Launch(command=(str(script), *arguments), settings=settings)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that the signals which are to be forwarded are put in."""
    asked: list[int] = []
    before = {one: signal.signal(one, lambda n, _: asked.append(n)) for one in _FORWARDED}
    try:
        yield asked
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def _free_port() -> Iterator[int]:
    """A port that nobody else is given meanwhile, and that rank 0 can listen at."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((_ADDRESS, 0))  # not listening: who sets the same option may bind it, too
        yield held.getsockname()[1]


class _Gang:
    """The processes, each the leader of a process group that ends with it."""

    def __init__(self, out: BinaryIO, err: BinaryIO) -> None:
        self._out, self._err = out, err
        self._selector = selectors.DefaultSelector()
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> _Gang:
        return self

    def __exit__(self, *exc: object) -> None:
        self._send(signal.SIGKILL)
        for process in self._running:
            process.wait()
        for key in list(self._selector.get_map().values()):
            key.data.close()
        self._selector.close()

    def start(
        self, rank: int, cores: str, command: Sequence[str], variables: dict[str, str]
    ) -> None:
        process = subprocess.Popen(
            [*_become(cores), sys.executable, *command],
            # what goes through a pipe should be seen when it is written
            env={"PYTHONUNBUFFERED": "1", **os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._running.append(process)
        for source, sink in ((process.stdout, self._out), (process.stderr, self._err)):
            assert source is not None  # both are pipes
            lines = _Lines(source, sink, b"[%d] " % rank)
            self._selector.register(source, selectors.EVENT_READ, lines)

    def watch(self, asked: list[int]) -> int:
        """Pass on output and signals until all have ended; gives the exit code."""
        code, end_by = 0, float("inf")
        while self._running:
            self._pass_on(_LOOK_S)
            failed = [status for status in self._ended() if status]
            if failed and not code:
                code = failed[0]
                asked.append(signal.SIGTERM)
            while asked:
                number = asked.pop(0)
                code = code or 128 + number
                end_by = min(end_by, time.monotonic() + _GRACE_S)
                self._send(number)
            if time.monotonic() > end_by:
                self._send(signal.SIGKILL)
        end_by = time.monotonic() + _LAST_WORDS_S
        while self._selector.get_map() and time.monotonic() < end_by:
            self._pass_on(_LOOK_S)
        return code

    def _pass_on(self, wait_s: float) -> None:
        if not self._selector.get_map():
            time.sleep(wait_s)
        for key, _ in self._selector.select(wait_s):
            if not key.data.pass_on():
                self._selector.unregister(key.fileobj)
                key.data.close()

    def _ended(self) -> Iterator[int]:
        """The exit codes of those that have ended since, with all that they had started."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        for process in list(self._running):
            # its number is its own until it is reaped, so this ends nobody else's group
            if os.waitid(os.P_PID, process.pid, options) is not None:
                self._signal(process, signal.SIGKILL)
                status = process.wait()
                self._running.remove(process)
                yield status if status >= 0 else 128 - status

    def _send(self, number: int) -> None:
        for process in self._running:
            self._signal(process, number)

    @staticmethod
    def _signal(process: subprocess.Popen[bytes], number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


def _become(cores: str) -> tuple[str, ...]:
    """The command before the command: it needs neither the user's variables nor his packages."""
    return (sys.executable, "-ES", launched.__file__, str(os.getpid()), cores)


class _Lines:
    """Whole lines of one stream, passed on with a label."""

    def __init__(self, source: IO[bytes], sink: BinaryIO, label: bytes) -> None:
        self._source, self._sink, self._label = source, sink, label
        self._rest = b""

    def pass_on(self) -> bool:
        """Pass on what is there; False at the end."""
        read = os.read(self._source.fileno(), 1 << 16)
        self._rest += read
        start = 0
        for end in _LINE_END.finditer(self._rest):
            self._write(self._rest[start : end.end()])
            start = end.end()
        self._rest = self._rest[start:]
        return bool(read)

    def close(self) -> None:
        """Pass on a last line that has no end, and close the stream."""
        if self._rest:
            self._write(self._rest.rstrip(b"\r") + b"\n")
            self._rest = b""
        self._source.close()

    def _write(self, line: bytes) -> None:
        self._sink.write(self._label + line)
        self._sink.flush()
