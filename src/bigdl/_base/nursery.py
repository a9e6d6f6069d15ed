"""Inside worker processes: the nursery that starts and watches them, and a worker's own life.

Standard library only. ``workers`` has the caller's side and tells the whole story. This module
is imported by nothing but a process that ``workers`` has started, and by code that emits events.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from bigdl._base.environment import environment
from bigdl._base.errors import NotReadyError
from bigdl._base.workers import ENDED, FRAME, KILL, STARTED, dumps, search_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

__all__ = ["describe", "emit", "take_over"]


def emit(event: Any) -> None:
    """Send ``event`` from inside a worker to its caller; outside a worker it does nothing."""
    if _line is not None:
        _line.send("event", event)


def take_over() -> int:
    """Inside a worker: the next file descriptor that its caller hands over; waits for it."""
    if _line is None:
        raise NotReadyError("Only a worker process can take over a file descriptor.")
    return _line.take_over()


class _Line:
    """A worker's end of the channel to its caller."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def send(self, kind: str, value: Any) -> None:
        content = value if kind == "error" else dumps(value)
        with self._lock:
            self._channel.send_bytes(pickle.dumps((kind, content)))

    def take_over(self) -> int:
        # the channel reads no byte more than a message has, so that this one is still there
        with socket.socket(fileno=os.dup(self._channel.fileno())) as line:
            said, fds, _, _ = socket.recv_fds(line, 1, 1)
        if not said or not fds:
            raise ConnectionError("The caller has hung up.")
        os.set_inheritable(fds[0], False)
        return fds[0]


_line: _Line | None = None


# --- inside a worker --------------------------------------------------------------------------


def _work(fd: int) -> int:
    """Run the function that comes over ``fd``, answer, and return the exit code."""
    global _line
    import faulthandler
    from multiprocessing.connection import Connection

    with contextlib.suppress(ValueError, OSError, AttributeError):  # no usable stderr
        faulthandler.enable()
    channel = Connection(fd)
    _line = _Line(channel)
    try:
        search_path, folder = pickle.loads(channel.recv_bytes())
        sys.path[:] = search_path
        os.chdir(folder)
        fn, args = pickle.loads(channel.recv_bytes())
        _line.send("value", fn(*args))
    except SystemExit as exc:
        if exc.code is None or isinstance(exc.code, int):
            return exc.code or 0
        os.write(2, f"{exc.code}\n".encode())  # as the interpreter does
        return 1
    except Exception as exc:  # noqa: BLE001  (it is raised again in the caller)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the caller has gone
            _line.send("error", describe(exc))
    return 0


def _leave(code: int) -> NoReturn:
    """End this process after its exit handlers, without taking every module apart first.

    Torch alone takes half a second to be taken apart.
    """
    import atexit

    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    os._exit(code)


def describe(exc: BaseException) -> tuple[str, str, str, bytes | None]:
    """(type, text, traceback, the exception itself or None if it does not survive the way)."""
    trace = "".join(traceback.format_exception(exc))
    blob: bytes | None
    try:
        blob = dumps(exc)
        if type(pickle.loads(blob)) is not type(exc):
            blob = None
    except Exception:  # noqa: BLE001  (user classes pickle as they like)
        blob = None
    return type(exc).__qualname__, str(exc), trace, blob


# --- inside the nursery -----------------------------------------------------------------------

_BOOT = (
    "import sys, json\n"
    "sys.path[:] = json.loads(sys.argv[1])\n"
    "from bigdl._base import nursery\n"
    "nursery._die_with(int(sys.argv[3]))\n"
    "nursery._leave(nursery._work(int(sys.argv[2])))\n"
)


def _nurse(control: int, parent: int, preload: Sequence[str], scratch: str) -> None:
    """The nursery's whole life, and that of every worker forked from it."""
    _adopt_orphans()
    warm = sys.platform == "linux"
    if warm:
        # importing numpy starts OpenBLAS' threads, unless there is to be one only
        with environment(OPENBLAS_NUM_THREADS="1"):
            for name in preload:
                with contextlib.suppress(ImportError):  # the worker that needs it will say so
                    importlib.import_module(name)
        warm = len(os.listdir("/proc/self/task")) == 1
    nursery = _Nursery(socket.socket(fileno=control), parent, warm)
    job = nursery.run()
    if job is not None:  # this is a new worker
        _leave(_work(job))
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


class _Nursery:
    """Starts, watches and kills workers as the caller's frames ask."""

    def __init__(self, control: socket.socket, parent: int, warm: bool) -> None:
        self._control = control
        self._parent = parent
        self._warm = warm
        self._numbers: dict[int, int] = {}  # worker's pid -> its number
        self._woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self._woken.setblocking(False)

    def run(self) -> int | None:
        """Serve until the caller is gone (None); in a new worker, return its channel."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        while os.getppid() == self._parent:
            ready = select.select([self._control, self._woken], [], [], 1.0)[0]
            if self._woken in ready:
                self._woken.recv(4096)
            self._reap()
            if self._control in ready:
                try:
                    frame, fds, _, _ = socket.recv_fds(self._control, FRAME.size, 1)
                except ConnectionResetError:
                    break
                if not frame:
                    break
                kind, number, _ = FRAME.unpack(frame)
                if kind == KILL:
                    self._kill(number)
                elif self._start(number, fds[0]):
                    return fds[0]
        for number in list(self._numbers.values()):
            self._kill(number)
        _kill_orphans()
        return None

    def _start(self, number: int, fd: int) -> bool:
        """Start a worker on ``fd``; True in the worker itself."""
        os.set_inheritable(fd, False)
        nursery = os.getpid()
        if self._warm:
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                _die_with(nursery)
                for end in (self._control, self._woken, self._wakes):
                    end.close()
                return True
        else:
            arguments = [json.dumps(search_path()), str(fd), str(nursery)]
            pid = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments],
                pass_fds=(fd,),
                start_new_session=True,
            ).pid
        os.close(fd)
        self._numbers[pid] = number
        self._tell(STARTED, number, pid)
        return False

    def _kill(self, number: int) -> None:
        for pid, known in self._numbers.items():
            if known == number:
                _kill_group(pid)

    def _reap(self) -> None:
        """Report workers that have ended, and let nothing of theirs live on."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            number = self._numbers.pop(pid, None)
            if number is None:
                continue  # an orphan of a worker's
            _kill_group(pid)
            if not self._numbers:
                _kill_orphans()
            self._tell(ENDED, number, status)

    def _tell(self, kind: int, number: int, value: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.sendall(FRAME.pack(kind, number, value))


def _kill_group(pid: int) -> None:
    """Kill a process and its group, if they still are."""
    for kill in (os.killpg, os.kill):  # it may not lead a group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _kill_orphans() -> None:
    """Kill and bury every child, also those that come to us when their parent dies."""
    for _ in range(100):  # one generation a round
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:  # not Linux
        return []


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _adopt_orphans() -> None:
    """Processes whose parent dies become our children, so that none gets away (Linux)."""
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def _die_with(parent: int) -> None:
    """Have this process killed when its parent ends (Linux)."""
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was faster
        os._exit(1)
