"""Local worker processes: started clean, watched, and gone with the call that needed them.

Standard library and cloudpickle only. A *nursery*, one fresh interpreter, stands between the
caller and its workers. It imports what every worker will need and then forks a worker for each
request, so that the imports are paid once. That fork is safe because the nursery never runs
anything else: it has one thread, which it checks. Where it cannot fork safely it starts a new
interpreter for each worker instead; the caller sees no difference.

The caller is never forked and its ``__main__`` is never imported, so scripts need no main guard,
and pipes, notebooks and REPLs work. However the caller ends, the nursery notices (its line to
the caller closes), kills every worker with all that these have started, and removes their
temporary files.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import platform
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar, cast

from bigdl._base.errors import ConfigError, TimeLimitError, WorkerError, WorkerLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from multiprocessing.connection import Connection
    from types import ModuleType

__all__ = ["Worker", "Workers", "dumps", "first_ended", "is_importable", "rebuilt", "run_in_child"]

T = TypeVar("T")

# Frames between caller and nursery: (kind, worker's number, value)
FRAME = struct.Struct("!Bii")
START, KILL, STARTED, ENDED = range(4)

_BOOT = (
    "import sys, json\n"
    "sys.path[:] = json.loads(sys.argv[1])\n"
    "from bigdl._base import nursery\n"
    "nursery._nurse(**json.loads(sys.argv[2]))\n"
)

#: A worker that has answered may tidy up for so long before it is killed.
_LINGER_S = 5.0


def run_in_child(
    fn: Callable[..., T],
    *args: Any,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    on_event: Callable[[Any], None] | None = None,
    preload: Sequence[str] = (),
) -> T:
    """Run ``fn(*args)`` in a process of its own and return what it returns.

    Args:
        fn: Any function that cloudpickle can send; classes of ``__main__`` included.
        args: Its arguments.
        timeout_s: The process is killed, with its own children, when it takes longer.
        env: Variables for the process, set before it starts.
        on_event: Called here with each object that the process gives to ``emit``.
        preload: Modules that the process imports before ``fn`` arrives.

    Raises:
        TimeLimitError: ``timeout_s`` was reached.
        WorkerLostError: The process died; the text holds its signal or exit code.
        Exception: What ``fn`` raised, as its own type; its cause is a ``WorkerError``.
    """
    with Workers(preload=preload, env=env) as workers:
        return cast("T", workers.start(fn, *args).result(timeout_s=timeout_s, on_event=on_event))


class Workers:
    """A nursery and the workers it has started; used by one thread at a time.

    Args:
        preload: Modules imported once for all workers. They must not start threads when
            imported; if one does, each worker gets an interpreter of its own.
        env: Variables for every worker, set before the interpreter starts.
        output: "inherit" lets workers write to our stdout and stderr; "capture" keeps it, and a
            lost worker's error shows the end of it.
    """

    def __init__(
        self,
        *,
        preload: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        output: Literal["inherit", "capture"] = "inherit",
    ) -> None:
        if not hasattr(socket, "send_fds"):
            raise ConfigError(
                f"Worker processes need Linux or macOS; this is {sys.platform}. "
                "Run the work in this process instead."
            )
        self._preload = tuple(preload)
        self._env = dict(env or {})
        self._output: BinaryIO | None = (
            cast("BinaryIO", tempfile.TemporaryFile(prefix="bigdl-"))  # noqa: SIM115  (close)
            if output == "capture"
            else None
        )
        self._workers: dict[int, Worker] = {}
        self._count = 0
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._scratch = ""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self, fn: Callable[..., Any], *args: Any) -> Worker:
        """Begin ``fn(*args)`` in a new worker."""
        from multiprocessing.connection import Connection

        payload = dumps((fn, args))  # before anything is started: it may be refused
        if self._control is None:
            self._start_nursery()
        ours, theirs = socket.socketpair()
        channel = Connection(ours.detach())
        self._count += 1
        worker = Worker(self, self._count, channel, self._output_end())
        self._workers[worker.number] = worker
        try:
            with theirs:
                frame = FRAME.pack(START, worker.number, 0)
                socket.send_fds(self._line(), [frame], [theirs.fileno()])
            channel.send_bytes(pickle.dumps((search_path(), os.getcwd())))
            channel.send_bytes(payload)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died at once; ``result`` finds out how
        except BaseException:
            worker.cancel()
            raise
        return worker

    def scratch(self) -> Path:
        """A folder for files that the workers read: gone with them, however the caller ends."""
        if self._control is None:
            self._start_nursery()
        return Path(self._scratch)

    @property
    def is_alive(self) -> bool:
        """Whether workers can be started: False once the nursery is gone."""
        return self._nursery is None or self._nursery.poll() is None

    def close(self) -> None:
        """Kill what still runs and give everything back; calling it twice is harmless."""
        control, self._control = self._control, None
        nursery, self._nursery = self._nursery, None
        if control is not None:
            control.close()  # the nursery's sign to kill its workers and to end
        if nursery is not None:
            try:
                nursery.wait(_LINGER_S)
            except subprocess.TimeoutExpired:
                nursery.kill()
                nursery.wait()
        for worker in self._workers.values():
            worker._channel.close()
        self._workers.clear()
        if self._scratch:
            self._sweep()
            self._scratch = ""
        if self._output is not None:
            self._output.close()
            self._output = None

    # --- the nursery, seen from the caller ---

    def _start_nursery(self) -> None:
        if not sys.executable:
            raise ConfigError(
                "Cannot start worker processes: sys.executable is empty, so Python's own "
                "program is not known here. Set sys.executable to it."
            )
        self._scratch = tempfile.mkdtemp(prefix="bigdl-workers-")
        # should the nursery be killed, and nobody close these workers
        self._sweep = weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        ours, theirs = socket.socketpair()
        boot = {
            "control": theirs.fileno(),
            "parent": os.getpid(),
            "preload": self._preload,
            "scratch": self._scratch,
        }
        env = {**os.environ, **self._env, "TMPDIR": self._scratch}
        with theirs, contextlib.ExitStack() as stack:
            stack.enter_context(ours)
            self._nursery = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(search_path()), json.dumps(boot)],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                env=env,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for the caller; it ends the workers
            )
            stack.pop_all()  # it lives: the line to it stays open
        self._control = ours

    def _line(self) -> socket.socket:
        if self._control is None:
            raise ConfigError("These workers are closed.")
        return self._control

    def _hear(self) -> None:
        """Read one frame of the nursery's; its end is the end of all its workers."""
        try:
            frame = self._line().recv(FRAME.size, socket.MSG_WAITALL)
        except ConnectionResetError:
            frame = b""
        if len(frame) < FRAME.size:
            code = self._nursery.wait() if self._nursery is not None else 0
            for worker in self._workers.values():
                if worker._status is None:
                    worker._status = code << 8 if code >= 0 else -code
                    if worker.pid is not None:  # nobody else is left to end its children
                        with contextlib.suppress(ProcessLookupError, PermissionError):
                            os.killpg(worker.pid, signal.SIGKILL)
            return
        kind, number, value = FRAME.unpack(frame)
        worker_ = self._workers.get(number)
        if worker_ is not None and kind == STARTED:
            worker_.pid = value
        elif worker_ is not None and kind == ENDED:
            worker_._status = value

    def _output_end(self) -> int:
        return os.fstat(self._output.fileno()).st_size if self._output is not None else 0

    def _output_since(self, start: int, limit: int = 4000) -> str:
        """The end of what was written since ``start``, "" unless captured."""
        if self._output is None:
            return ""
        size = self._output_end()
        start = max(start, size - limit)
        return os.pread(self._output.fileno(), size - start, start).decode(errors="replace")


class Worker:
    """One running function. Made by ``Workers.start``."""

    def __init__(self, owner: Workers, number: int, channel: Connection, output: int) -> None:
        self.number = number
        self.pid: int | None = None
        self._owner = owner
        self._channel = channel
        self._output = output  # where its captured output begins
        self._status: int | None = None  # as os.waitpid gives it
        self._answer: tuple[str, Any] | None = None
        self._drained = False  # nothing more can come over the channel

    def result(
        self,
        *,
        timeout_s: float | None = None,
        on_event: Callable[[Any], None] | None = None,
    ) -> Any:
        """Wait for the function's value; the worker is gone when this returns or raises.

        Args:
            timeout_s: Seconds from now after which the worker is killed.
            on_event: Called here with each object that the worker emits.

        Raises:
            TimeLimitError: ``timeout_s`` was reached.
            WorkerLostError: The worker died without an answer.
            Exception: What the function raised.
        """
        started = time.monotonic()
        try:
            while self._answer is None and not self._is_lost():
                left = None if timeout_s is None else timeout_s - (time.monotonic() - started)
                if left is not None and left <= 0:
                    raise TimeLimitError(
                        f"A worker process took longer than its limit of {timeout_s:g} s "
                        "and was ended."
                    )
                self._wait(left, on_event)
            if self._answer is not None:
                self._let_end()
        finally:
            self.cancel()
        return self._open_answer()

    def is_over(self) -> bool:
        """Whether an answer has come, or none can come any more; never waits.

        That a process is gone shows at its channel before the nursery has told of it.
        """
        while self._answer is None and not self._is_lost() and self._wait(0.0, None):
            continue
        return self._answer is not None or self._drained or self._is_lost()

    def hand_over(self, fd: int) -> None:
        """Give the worker a file descriptor, which its function takes by ``take_over``.

        Nothing with a name has to be made for the two to share a socket or a file, so that
        nothing can be left behind.
        """
        with (
            socket.socket(fileno=os.dup(self._channel.fileno())) as line,
            contextlib.suppress(BrokenPipeError, ConnectionResetError),  # seen by ``result``
        ):
            socket.send_fds(line, [b"f"], [fd])

    def cancel(self) -> None:
        """Kill the worker, if it still runs, with everything it has started."""
        owner = self._owner
        if owner._workers.pop(self.number, None) is None:
            return
        owner._workers[self.number] = self  # still heard of until it is gone
        try:
            if self._status is None and owner._control is not None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    owner._control.sendall(FRAME.pack(KILL, self.number, 0))
                while self._status is None:
                    owner._hear()
        finally:
            owner._workers.pop(self.number, None)
            self._channel.close()

    def _wait(self, left: float | None, on_event: Callable[[Any], None] | None) -> bool:
        """Hear what comes next, within ``left`` seconds; False if nothing did."""
        from multiprocessing.connection import wait

        ends: list[Connection | socket.socket] = [self._owner._line()]
        if not self._drained:
            ends.append(self._channel)
        ready = wait(ends, left)
        if self._channel in ready:
            self._read(on_event)
        elif ready:
            self._owner._hear()
        return bool(ready)

    def _read(self, on_event: Callable[[Any], None] | None) -> None:
        try:
            kind, content = pickle.loads(self._channel.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._drained = True
            return
        if kind != "event":
            self._answer = kind, content
        elif on_event is not None:
            on_event(pickle.loads(content))

    def _is_lost(self) -> bool:
        """Whether it is gone and all that it had sent is read."""
        return self._status is not None and (self._drained or not self._channel.poll(0))

    def _let_end(self) -> None:
        """Give a worker that has answered the time to run its exit handlers."""
        deadline = time.monotonic() + _LINGER_S
        control = self._owner._line()
        while self._status is None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([control], [], [], left)[0]:
                return
            self._owner._hear()

    def _open_answer(self) -> Any:
        if self._answer is None:
            output = self._owner._output_since(self._output)
            raise WorkerLostError(
                f"A worker process {_ending(self._status or 0)} before it gave an answer."
                + _last_words(output),
                host=platform.node(),
                traceback=output,
            )
        kind, content = self._answer
        if kind == "value":
            return pickle.loads(content)
        raise rebuilt(content, "a worker process")


def rebuilt(
    description: tuple[str, str, str, bytes | None], where: str, rank: int | None = None
) -> BaseException:
    """The exception that a worker has described, to be raised here.

    Args:
        description: (type, text, traceback, the exception pickled or None).
        where: "worker 1 of 4", for the text of its cause.
        rank: The worker's, where it has one.

    Returns:
        The exception as its own type, or a ``WorkerError`` with its words; its cause is set.
    """
    name, text, trace, blob = description

    def told(text: str) -> WorkerError:
        return WorkerError(text, rank=rank, host=platform.node(), traceback=trace)

    try:
        error = None if blob is None else pickle.loads(blob)
    except Exception:  # noqa: BLE001  (any code may run in there; the text is what matters)
        error = None
    if not isinstance(error, BaseException):
        error = told(f"{name}: {text}")
    error.__cause__ = told(f"Raised in {where}:\n{trace}")
    return error


def first_ended(workers: Sequence[Worker]) -> Worker:
    """Wait until one of ``workers`` has answered or is lost: its ``result`` then comes at once.

    Their events are not kept.
    """
    from multiprocessing.connection import wait

    while True:
        for worker in workers:
            if worker._answer is not None or worker._is_lost():
                return worker
        lines = {worker._owner._line(): worker._owner for worker in workers}
        channels = {worker._channel: worker for worker in workers if not worker._drained}
        ready: Any
        for ready in wait([*channels, *lines]):
            if ready in channels:
                channels[ready]._read(None)
            else:
                lines[ready]._hear()


def _ending(status: int) -> str:
    """How a process ended, in words, from what ``os.waitpid`` gave."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        hint = "; was there too little memory?" if number == signal.SIGKILL else ""
        return f"was killed by {name} ({signal.strsignal(number)}{hint})"
    return f"exited with code {os.waitstatus_to_exitcode(status)}"


def _last_words(output: str, limit: int = 8) -> str:
    """The lines of ``output`` that say most about a crash, as the end of an error's text."""
    before, crash, after = output.partition("Fatal Python error")  # faulthandler's words
    lines = f"{crash}{after}".splitlines()[:limit] if crash else before.splitlines()[-limit:]
    text = "\n".join(line for line in lines if line.strip() and "Extension modules:" not in line)
    return f" The last that it wrote:\n{text}" if text else ""


# --- what travels -----------------------------------------------------------------------------

_registering = threading.Lock()


def dumps(value: Any, *, outside: Callable[[Any], Any] | None = None) -> bytes:
    """Pickle ``value`` so that a worker can read it.

    Code of modules that a worker cannot import (``__main__``, a module loaded from a path)
    travels by value, all other code by name.

    Args:
        value: Anything that cloudpickle can send.
        outside: Gives the name of an object that travels in another way, None for all others;
            the reader needs an ``Unpickler`` whose ``persistent_load`` knows the names.
    """
    import cloudpickle

    kind = cloudpickle.Pickler if outside is None else _pickler(outside)
    file = io.BytesIO()
    with _registering:  # cloudpickle's list of modules is global
        here = [module for module in _unreachable() if _register(module)]
        try:
            kind(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
            return file.getvalue()
        finally:
            for module in here:
                cloudpickle.unregister_pickle_by_value(module)


def _pickler(outside: Callable[[Any], Any]) -> Any:
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, item: Any) -> Any:
            return outside(item)

    return Pickler


def _register(module: ModuleType) -> bool:
    """Mark ``module`` to travel by value; False if it was marked already."""
    import cloudpickle

    if module.__name__ in cloudpickle.list_registry_pickle_by_value():
        return False
    cloudpickle.register_pickle_by_value(module)
    return True


def _unreachable() -> Iterable[ModuleType]:
    """Loaded modules whose files are not where ``sys.path`` would find them."""
    roots = tuple(os.path.join(os.path.realpath(path or os.curdir), "") for path in sys.path)
    places: dict[str, tuple[str, ...]] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name == "__main__" or name != getattr(module, "__name__", None) or not file:
            continue  # cloudpickle sends __main__ by value itself
        top = name.partition(".")[0]
        if top not in places:  # a file below a root is found there by its own name only
            places[top] = tuple(f"{root}{top}{end}" for root in roots for end in (".", os.sep))
        if not _real_path(file).startswith(places[top]) and not is_importable(top):
            yield module


@functools.cache
def _real_path(file: str) -> str:
    """A loaded file's; asked anew, those of all of torch's modules take 25 ms."""
    return os.path.realpath(file)


def is_importable(name: str) -> bool:
    """Whether an import hook (an editable install's, say) finds a top-level module."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and find(name, None) is not None:
            return True
    return False


def search_path() -> list[str]:
    return [str(path) for path in sys.path]
