"""Worker processes: results, failures in words, and nothing left behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from bigdl._base.errors import TimeLimitError, WorkerError, WorkerLostError
from bigdl._base.nursery import emit
from bigdl._base.workers import Workers, run_in_child
from bigdl.testing.processes import are_gone, is_alive, within

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are made the POSIX way")


class OwnError(Exception):
    """Of a module that a worker cannot import by name."""


class TwoArguments(Exception):
    """Does not survive pickling: its constructor wants more than its args."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")
        self.second = second


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """Others write to the common one, too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def _leftovers() -> tuple[set[str], set[str]]:
    return set(os.listdir("/proc/self/fd")), set(os.listdir(tempfile.gettempdir()))


def test_a_value_comes_back():
    offset = 3
    assert run_in_child(lambda x: [x, offset, os.getpid()], 4)[:2] == [4, 3]


def test_it_is_another_process_and_the_same_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "of_the_caller.py").write_text("VALUE = 7\n")

    def look():
        import of_the_caller

        return os.getpid(), os.getcwd(), of_the_caller.VALUE, os.environ["COLOUR"]

    pid, folder, value, colour = run_in_child(look, env={"COLOUR": "blue"})
    assert pid != os.getpid()
    assert Path(folder).samefile(tmp_path)
    assert (value, colour) == (7, "blue")
    assert "COLOUR" not in os.environ


def test_events_arrive_in_order_while_it_runs():
    seen = []

    def work():
        for i in range(3):
            emit({"step": i})
        return "done"

    assert run_in_child(work, on_event=seen.append) == "done"
    assert seen == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_emit_outside_a_worker_does_nothing():
    emit("nobody listens")


def test_large_values_travel_both_ways():
    data = os.urandom(20_000_000)
    assert run_in_child(lambda d: d[::-1], data) == data[::-1]


def test_an_exception_keeps_its_type_and_says_where():
    def fail():
        raise OwnError("boom")

    with pytest.raises(OwnError, match="boom") as caught:
        run_in_child(fail)
    cause = caught.value.__cause__
    assert isinstance(cause, WorkerError)
    assert "in fail" in cause.traceback
    assert "OwnError: boom" in str(cause)


def test_an_exception_that_cannot_travel_arrives_as_text():
    def fail():
        raise TwoArguments("this", "that")

    with pytest.raises(WorkerError, match="TwoArguments: this and that"):
        run_in_child(fail)


def test_a_value_that_cannot_travel_is_an_error():
    with pytest.raises(TypeError, match="pickle"):
        run_in_child(lambda: threading.Lock())


def test_an_argument_that_cannot_travel_starts_nothing():
    before = _leftovers()
    with pytest.raises(TypeError, match="pickle"):
        run_in_child(lambda lock: lock, threading.Lock())
    assert _leftovers() == before


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (lambda: os._exit(3), "exited with code 3"),
        (lambda: sys.exit(4), "exited with code 4"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGABRT), "SIGABRT"),
    ],
)
def test_a_lost_worker_says_how(end, text):
    with pytest.raises(WorkerLostError, match=text):
        run_in_child(end)


def test_a_crash_shows_where_it_was():
    def crash():
        import ctypes

        ctypes.string_at(0)

    with (
        Workers(output="capture") as workers,
        pytest.raises(WorkerLostError, match="SIGSEGV") as caught,
    ):
        workers.start(crash).result()
    assert "in crash" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 12


def test_captured_output_stays_inside(capfd):
    with Workers(output="capture") as workers:
        workers.start(lambda: os.system("echo loud; echo louder >&2")).result()
    assert capfd.readouterr() == ("", "")


def test_a_hanging_worker_is_killed_with_its_own_children():
    pids = []

    def hang():
        child = subprocess.Popen(["sleep", "300"])
        # one that wants to get away: a session of its own
        other = subprocess.Popen(["sleep", "300"], start_new_session=True)
        emit([os.getpid(), child.pid, other.pid])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(300)

    started = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"limit of 1\.5 s"):
        run_in_child(hang, timeout_s=1.5, on_event=pids.extend)
    assert time.monotonic() - started < 8
    assert len(pids) == 3
    if sys.platform == "linux":
        assert are_gone(pids)


def test_children_of_a_finished_worker_are_gone():
    def leave_one():
        return subprocess.Popen(["sleep", "300"], start_new_session=True).pid

    pid = run_in_child(leave_one)
    if sys.platform == "linux":
        assert are_gone([pid])


def test_nothing_is_left_after_any_end():
    run_in_child(int, "1")  # what is loaded and kept on first use
    before = _leftovers()

    def leave_a_file():
        tempfile.mkstemp(prefix="bigdl-worker-")
        raise OwnError

    for end in (leave_a_file, lambda: os._exit(1), lambda: time.sleep(60)):
        with pytest.raises((OwnError, WorkerLostError, TimeLimitError)):
            run_in_child(end, timeout_s=3)
    assert _leftovers() == before


def test_exit_handlers_of_a_worker_run(tmp_path):
    mark = tmp_path / "mark"

    def work():
        import atexit

        atexit.register(mark.write_text, "left")

    run_in_child(work)
    assert mark.read_text() == "left"


def test_workers_of_one_nursery_are_apart_and_start_fast():
    def touch():
        import json

        already = getattr(json, "touched", False)
        json.touched = True
        return already

    with Workers(preload=["json", "no_such_module"]) as workers:
        assert workers.start(touch).result() is False
        started = time.monotonic()
        assert workers.start(touch).result() is False
        assert time.monotonic() - started < 2


def test_a_preloaded_thread_makes_workers_cold_not_wrong(tmp_path, monkeypatch):
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def look():
        return "starts_a_thread" in sys.modules, threading.active_count()

    with Workers(preload=["starts_a_thread"]) as workers:
        assert workers.start(look).result() == (False, 1)
        with pytest.raises(WorkerLostError, match="code 5"):
            workers.start(lambda: os._exit(5)).result()


def test_two_workers_at_once():
    with Workers() as workers:
        slow = workers.start(lambda: (time.sleep(0.5), "slow")[1])
        fast = workers.start(lambda: "fast")
        assert fast.result(timeout_s=20) == "fast"
        assert slow.result(timeout_s=20) == "slow"


def test_a_cancelled_worker_is_gone_and_the_others_are_not():
    with Workers() as workers:
        first = workers.start(time.sleep, 60)
        second = workers.start(lambda: (time.sleep(1), os.getpid())[1])
        first.cancel()
        first.cancel()
        assert first.pid is not None
        assert not is_alive(first.pid)
        assert second.result(timeout_s=20) == second.pid


def test_closing_ends_everything():
    workers = Workers()
    running = workers.start(time.sleep, 300)
    while running.pid is None:
        workers._hear()
    nursery = workers._nursery.pid
    workers.close()
    workers.close()
    assert are_gone([running.pid, nursery])


def test_a_listener_that_raises_ends_the_worker():
    def work():
        emit(os.getpid())
        time.sleep(300)

    pids = []

    def listen(pid):
        pids.append(pid)
        raise OwnError("enough")

    with pytest.raises(OwnError, match="enough"):
        run_in_child(work, on_event=listen)
    assert are_gone(pids)


# --- programs of their own --------------------------------------------------------------------

SCRIPT = textwrap.dedent("""
    from bigdl._base.workers import run_in_child

    print("the script runs")

    class Mine(Exception):
        pass

    class Box:
        def __init__(self, value):
            self.value = value

    def double(box):
        if box.value < 0:
            raise Mine("negative")
        return Box(box.value * 2)

    answer = run_in_child(double, Box(21))
    assert type(answer) is Box, type(answer)
    print(answer.value)
    try:
        run_in_child(double, Box(-1))
    except Mine as exc:
        print("caught", exc)
""")
EXPECTED = "the script runs\n42\ncaught negative\n"


def _run(arguments, **kwargs):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, **kwargs
    )


def test_from_a_script_without_a_main_guard(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = _run([str(tmp_path / "script.py")])
    assert (done.stdout, done.stderr) == (EXPECTED, "")


def test_from_a_pipe():
    done = _run(["-"], input=SCRIPT)
    assert (done.stdout, done.stderr) == (EXPECTED, "")


@pytest.mark.parametrize("is_below_a_root", [False, True])
def test_from_a_module_loaded_from_a_path(tmp_path, is_below_a_root):
    """Its name leads nowhere, whether or not ``sys.path`` has a folder around its file."""
    (tmp_path / "file.py").write_text(
        "def f(x):\n    return g(x) + 1\n\ndef g(x):\n    return -x\n"
    )
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('odd', {str(tmp_path / 'file.py')!r})\n"
        f"sys.path += [{str(tmp_path)!r}] * {is_below_a_root}\n"
        "odd = sys.modules['odd'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(odd)\n"
        "from bigdl._base.workers import run_in_child\n"
        "print(run_in_child(odd.f, 5))\n"
    )
    done = _run(["-c", code])
    assert (done.stdout, done.stderr) == ("-4\n", "")


HANGING = textwrap.dedent("""
    import os, subprocess, sys, time
    from bigdl._base.nursery import emit
    from bigdl._base.workers import Workers

    def hang():
        child = subprocess.Popen(["sleep", "300"])
        emit([os.getpid(), os.getppid(), child.pid])
        time.sleep(300)

    workers = Workers()
    worker = workers.start(hang)
    worker.result(on_event=lambda pids: print(*pids, workers._scratch, flush=True))
""")


def _hanging():
    program = subprocess.Popen(
        [sys.executable, "-c", HANGING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    *pids, scratch = program.stdout.readline().split()
    return program, [int(pid) for pid in pids], Path(scratch)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_caller(how):
    program, pids, scratch = _hanging()
    assert all(map(is_alive, pids))
    program.send_signal(how)
    program.communicate(timeout=20)
    assert are_gone(pids)
    assert not scratch.exists()


def test_ctrl_c_is_a_keyboard_interrupt_and_leaves_nothing():
    program, pids, scratch = _hanging()
    os.killpg(program.pid, signal.SIGINT)  # as the terminal does
    _, errors = program.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors
    assert program.returncode == -signal.SIGINT
    assert are_gone(pids)
    assert not scratch.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a parent's death signal")
def test_a_worker_dies_with_its_nursery():
    program, pids, scratch = _hanging()
    os.kill(pids[1], signal.SIGKILL)
    _, errors = program.communicate(timeout=20)
    assert "WorkerLostError" in errors
    assert are_gone(pids)
    assert not scratch.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a parent's death signal")
def test_a_worker_that_is_gone_shows_before_its_nursery_has_told():
    with Workers() as workers:
        worker = workers.start(time.sleep, 60)
        assert not worker.is_over()
        assert within(10, lambda: not worker.is_over() and worker.pid is not None)
        nursery = workers._nursery.pid
        os.kill(nursery, signal.SIGSTOP)
        os.kill(worker.pid, signal.SIGKILL)
        assert within(10, worker.is_over)
        os.kill(nursery, signal.SIGKILL)
        with pytest.raises(WorkerLostError, match="SIGKILL"):
            worker.result()
        assert not workers.is_alive
