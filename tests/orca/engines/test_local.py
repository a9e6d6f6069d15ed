"""The local engine: the contract, and what only worker processes on this machine have."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bigdl._base import machine
from bigdl.errors import ConfigError, ContextError, WorkerError, WorkerLostError
from bigdl.orca.engines import ENGINES
from bigdl.orca.engines.base import EngineSettings, GangSetup
from bigdl.orca.engines.worker import emit
from bigdl.testing.collective import leftovers
from bigdl.testing.engine import EngineContract
from bigdl.testing.processes import are_gone, is_alive

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """Others write to the common one, too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def _open(slots: int | None = None):
    return ENGINES.get("local").open(EngineSettings(cores=slots))


@pytest.fixture
def engine():
    engine = _open(3)
    yield engine
    engine.close()


class TestLocal(EngineContract):
    @classmethod
    def open_engine(cls):
        return _open(4)


# --- cores and threads ------------------------------------------------------------------------


def _look(ctx):
    import torch

    said = os.environ["MKL_NUM_THREADS"]
    return sorted(os.sched_getaffinity(0)), torch.get_num_threads(), _blas_threads(), said


def _blas_threads() -> int:
    """What NumPy's own OpenBLAS says; as many as torch has where NumPy has another library."""
    import ctypes

    import torch

    maps = Path("/proc/self/maps").read_text().splitlines()
    for library in {line.split()[-1] for line in maps if "scipy_openblas64" in line}:
        return ctypes.CDLL(library).scipy_openblas_get_num_threads64_()
    return torch.get_num_threads()


@linux
@pytest.mark.skipif(machine.cores() < 2, reason="needs two cores")
@pytest.mark.skipif(machine.cores() < len(machine.core_ids()), reason="a quota limits the cores")
class TestCores:
    @pytest.mark.skipif(find_spec("torch") is None, reason="counts torch's threads")
    @pytest.mark.parametrize("preload", [(), ("torch",)])
    def test_workers_have_cores_and_threads_of_their_own(self, preload):
        engine = _open(2)
        try:
            one, other = engine.gang(_look, 2, setup=GangSetup(preload=preload))
            assert len(one[0]) == len(other[0]) == 1
            assert not set(one[0]) & set(other[0])
            assert one[1:] == other[1:] == (1, 1, "1")
            ((cores, *threads),) = engine.gang(_look, 1, setup=GangSetup(preload=preload))
            assert len(cores) == 2
            assert threads == [2, 2, "2"]
        finally:
            engine.close()

    def test_tasks_too(self):
        def look():
            time.sleep(0.5)
            return os.sched_getaffinity(0), os.environ["OMP_NUM_THREADS"]

        engine = _open(2)
        try:
            one, other = [task.result() for task in [engine.submit(look) for _ in range(2)]]
            assert len(one[0]) == len(other[0]) == 1
            assert not one[0] & other[0]
            assert one[1] == other[1] == "1"
            cores, threads = engine.submit(look, cores=2).result()
            assert len(cores) == 2
            assert threads == "2"
        finally:
            engine.close()

    def test_more_slots_than_cores_are_not_fixed_to_any(self):
        everything = os.sched_getaffinity(0)
        engine = _open(len(everything) + 1)
        try:
            assert engine.submit(os.sched_getaffinity, 0).result() == everything
        finally:
            engine.close()

    def test_the_caller_keeps_its_own(self, engine):
        before = os.sched_getaffinity(0), dict(os.environ), os.getcwd(), list(sys.path)
        engine.gang(lambda ctx: None, 2)
        assert (os.sched_getaffinity(0), dict(os.environ), os.getcwd(), list(sys.path)) == before


# --- processes --------------------------------------------------------------------------------


def test_processes_are_kept_as_many_as_there_are_slots(engine):
    pids = {engine.submit(os.getpid).result() for _ in range(20)}
    assert len(pids) == 1
    tasks = [engine.submit(lambda: (time.sleep(0.02), os.getpid())[1]) for _ in range(30)]
    assert 1 <= len({task.result() for task in tasks}) <= 3


@linux
def test_what_a_gang_had_is_gone_when_it_returns(engine):
    def start_one(ctx):
        return os.getpid(), subprocess.Popen(["sleep", "300"], start_new_session=True).pid

    pids = list(itertools.chain(*engine.gang(start_one, 3)))
    assert not any(is_alive(pid) for pid in pids[::2])
    assert are_gone(pids)


def test_it_runs_where_the_caller_is(engine, tmp_path, monkeypatch):
    engine.submit(int).result()
    (tmp_path / "of_the_caller.py").write_text("VALUE = 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLOUR", "green")

    def look(*_):
        import of_the_caller

        return os.getcwd(), of_the_caller.VALUE, os.environ.get("COLOUR")

    expected = (str(tmp_path), 7, "green")
    assert engine.submit(look).result() == expected
    assert engine.gang(look, 2) == [expected] * 2
    assert engine.gather(engine.map(look, engine.scatter([0]))) == [expected]


@linux
def test_a_dead_nursery_is_replaced(engine):
    refs = engine.scatter([1, 2])
    nursery = engine.submit(os.getppid).result()
    task = engine.submit(time.sleep, 600)
    task.poll(0.3)
    os.kill(nursery, signal.SIGKILL)
    with pytest.raises(WorkerLostError):
        task.result(timeout_s=30)
    assert engine.submit(os.getppid).result(timeout_s=30) != nursery
    assert engine.gather(refs) == [1, 2]


def test_an_interpreter_that_does_not_work_is_an_error(tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    engine = _open(2)
    for _ in range(2):
        with pytest.raises(WorkerError, match="exited with code 3"):
            engine.submit(int).result(timeout_s=30)
    engine.close()
    assert list(tmp_path.iterdir()) == [broken]


# --- what workers write -----------------------------------------------------------------------


def test_output_comes_with_its_rank(engine, capfd):
    def work(ctx):
        sys.stdout.write(f"from {ctx.rank}\n")
        os.system(f"echo deep {ctx.rank} >&2")
        sys.stderr.write("no end")

    engine.gang(work, 2)
    out, errors = capfd.readouterr()
    assert out == ""
    expected = {f"[worker {r}] {t}" for r in (0, 1) for t in (f"from {r}", f"deep {r}", "no end")}
    assert set(errors.splitlines()) == expected


def test_output_can_be_taken(engine, capfd):
    seen = []

    def work(ctx):
        for i in range(20_000):
            sys.stdout.write(f"{ctx.rank} {i}\n")

    engine.gang(work, 2, setup=GangSetup(on_output=lambda rank, text: seen.append((rank, text))))
    for rank in range(2):
        lines = "".join(text for who, text in seen if who == rank)
        assert lines == "".join(f"{rank} {i}\n" for i in range(20_000))
    assert capfd.readouterr() == ("", "")


def test_output_of_tasks_and_shards_is_named(engine, capfd):
    engine.submit(os.system, "echo hello").result()
    engine.gather(engine.map(lambda v: os.system(f"echo value {v}"), engine.scatter([5, 6])))
    errors = capfd.readouterr().err.splitlines()
    assert errors == ["[a task] hello", "[shard 1] value 5", "[shard 2] value 6"]


def test_a_crash_shows_where_it_was(engine, capfd):
    def crash():
        import ctypes

        ctypes.string_at(0)

    with pytest.raises(WorkerLostError, match=r"(?s)SIGSEGV.*in crash"):
        engine.submit(crash).result()


# --- nothing is left --------------------------------------------------------------------------


def _fail_in_all_ways(engine):
    """Use the engine, and give the names of its runs."""
    marks = set()

    def work(ctx, how):
        with ctx.connect() as collective:
            ctx.emit((ctx.gang.ticket.mark, np.zeros(400_000)))
            collective.all_reduce(np.zeros(100_000))
            if ctx.rank == 1:
                how()
            collective.barrier()
        return np.zeros(400_000)

    def fail():
        raise ValueError("boom")

    def listen(rank, event):
        marks.add(event[0])

    assert len(engine.gang(work, 2, args_of=lambda _: (int,), on_event=listen)) == 2
    for how in (fail, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(1)):
        with pytest.raises((ValueError, WorkerLostError)):
            engine.gang(work, 2, args_of=lambda _, how=how: (how,), on_event=listen)
    refs = engine.map(lambda x: x + 1, engine.scatter([np.zeros(400_000)] * 4))
    assert engine.gather(refs)[3].sum() == 400_000
    engine.submit(lambda: emit(np.zeros(400_000))).result()
    engine.submit(time.sleep, 600)
    return marks


@linux
def test_nothing_is_left_of_a_closed_engine():
    _open().close()
    temporary = Path(tempfile.gettempdir())
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    engine = _open(3)
    marks = _fail_in_all_ways(engine)
    assert any(temporary.iterdir())
    engine.close()
    assert list(temporary.iterdir()) == []
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert len(marks) == 4
    assert [leftovers(mark) for mark in marks] == [[]] * 4


@linux
def test_files_of_parts_go_one_by_one(engine):
    def count(n, within_s=10.0):
        deadline = time.monotonic() + within_s
        while True:
            found = len(list(Path(tempfile.gettempdir()).rglob("kept-*")))
            if found == n or time.monotonic() > deadline:
                return found
            engine.submit(int).result()

    refs = engine.scatter([0])
    [parts] = engine.split(lambda x: [x, x, x], refs, 3)
    engine.gather(parts)
    assert count(4) == 4
    del parts[0]
    assert count(3) == 3
    del parts
    assert count(1) == 1
    [parts] = engine.split(lambda x: [x, time.sleep(1)], refs, 2)
    del parts[0]  # before it is made
    engine.gather(parts)
    del parts
    assert count(1) == 1


def test_files_go_with_what_they_hold(engine):
    def kept():
        return [path for path in Path(tempfile.gettempdir()).rglob("kept-*")]

    def count(n, within_s=10.0):
        deadline = time.monotonic() + within_s
        while len(kept()) != n and time.monotonic() < deadline:
            engine.submit(int).result()
        return len(kept())

    refs = engine.scatter([np.zeros(1000)] * 3)
    made = engine.map(lambda x: x + 1, refs)
    engine.gather(made)
    assert count(6) == 6
    del refs
    assert count(3) == 3
    slow = engine.map(lambda x: (time.sleep(0.5), x)[1], made)
    del slow
    del made
    assert count(0) == 0
    engine.gang(lambda ctx, x: ctx.emit(x) or x, 2, args_of=lambda _: (np.zeros(2_000_000),))
    engine.submit(lambda x: (emit(x), x)[1], np.zeros(2_000_000)).result()
    engine.gather(engine.map(lambda _: emit(np.zeros(2_000_000)), engine.scatter([1])))

    def fail(ctx):
        for _ in range(5):
            ctx.emit(np.zeros(400_000))
        ctx.barrier()
        if ctx.rank == 1:
            raise ValueError("boom")
        return np.zeros(400_000)

    with pytest.raises(ValueError, match="boom"):
        engine.gang(fail, 2)
    with pytest.raises(TypeError, match="positional"):
        engine.gang(fail, 2, on_event=lambda one: None)
    assert count(0) == 0


@linux
def test_killed_workers_are_noticed_and_leave_nothing(engine):
    chance = random.Random(7)

    def work(ctx):
        with ctx.connect() as collective:
            ctx.emit((os.getpid(), ctx.gang.ticket.mark))
            array = np.zeros(200_000)
            while True:
                collective.all_reduce(array)

    for _ in range(6):
        victim, delay_s = chance.randrange(3), chance.random() * 0.3
        pids, marks = {}, set()
        killed_at = []

        def kill(pid, killed_at=killed_at):
            os.kill(pid, signal.SIGKILL)
            killed_at.append(time.monotonic())

        def listen(rank, event, pids=pids, marks=marks, kill=kill, victim=victim, delay_s=delay_s):
            pids[rank] = event[0]
            marks.add(event[1])
            if len(pids) == 3:
                threading.Timer(delay_s, kill, (pids[victim],)).start()

        with pytest.raises(WorkerLostError, match="SIGKILL") as caught:
            engine.gang(work, 3, on_event=listen)
        assert caught.value.rank == victim
        assert time.monotonic() - killed_at[0] < 10
        assert not any(map(is_alive, pids.values()))
        assert leftovers(marks.pop()) == []


def test_a_kept_value_goes_with_the_engine(engine):
    (ref,) = engine.scatter([1])
    stored = pickle.loads(pickle.dumps(ref))
    assert stored.get() == 1
    engine.close()
    for one in (ref, stored):
        with pytest.raises(ContextError, match=r"kept value is gone.*init_orca_context"):
            one.get()


def test_closing_while_others_ask():
    """Whoever asks at the moment of the end gets an answer, and never waits for ever."""
    for _ in range(15):
        engine = _open(3)
        engine.submit(int).result()
        answers = []

        def ask(engine=engine, answers=answers):
            while True:
                try:
                    engine.gather(engine.map(str, engine.scatter([1])))
                    engine.submit(abs, -1).result()
                except ContextError as exc:
                    answers.append(exc)
                    return

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        engine.close()
        for thread in threads:
            thread.join(10)
        assert len(answers) == 3


# --- programs of their own --------------------------------------------------------------------

PROGRAM = textwrap.dedent("""
    import os, subprocess, sys, time
    import numpy as np
    from bigdl.orca.engines import ENGINES
    from bigdl.orca.engines.base import EngineSettings

    engine = ENGINES.get("local").open(EngineSettings(cores=3))
    refs = engine.scatter([np.zeros(100_000)])
    idle = engine.submit(os.getpid).result()

    def work(ctx):
        child = subprocess.Popen(["sleep", "300"])
        with ctx.connect() as collective:
            collective.buffer(1 << 20)
            ctx.emit([os.getpid(), os.getppid(), child.pid])
            if ctx.rank == 0:
                ctx.emit([ctx.gang.ticket.mark])
            time.sleep(300)

    pids = [idle]
    def listen(rank, event):
        pids.extend(event)
        if len(pids) == 8:
            print(*sorted(pids, key=lambda pid: type(pid) is str), flush=True)

    try:
        engine.gang(work, 2, on_event=listen)
    except KeyboardInterrupt:
        print("interrupted", engine.gang(lambda ctx: ctx.rank, 3), flush=True)
        raise
""")


def _running(tmp_path):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    *pids, mark = program.stdout.readline().split()
    pids = [int(pid) for pid in pids]
    assert len(pids) == 7
    assert leftovers(mark)
    assert all(map(is_alive, pids))
    assert list(tmp_path.iterdir())
    return program, pids, mark


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_the_driver(tmp_path, how):
    program, pids, mark = _running(tmp_path)
    program.send_signal(how)
    program.communicate(timeout=20)
    assert are_gone(pids, 15)
    deadline = time.monotonic() + 15
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []
    assert leftovers(mark) == []


@linux
def test_ctrl_c_ends_the_gang_and_leaves_the_engine_usable(tmp_path):
    program, pids, mark = _running(tmp_path)
    os.killpg(program.pid, signal.SIGINT)  # as the terminal does
    out, errors = program.communicate(timeout=30)
    assert out == "interrupted [0, 1, 2]\n"
    assert "KeyboardInterrupt" in errors
    assert program.returncode == -signal.SIGINT
    assert are_gone(pids)
    assert list(tmp_path.iterdir()) == []
    assert leftovers(mark) == []


MAPPING = textwrap.dedent("""
    import os, signal, threading, time
    from bigdl.orca.engines import ENGINES

    engine = ENGINES.get("local")(2)
    engine.submit(int).result()
    refs = engine.map(lambda v: time.sleep(300), engine.map(str, engine.scatter(range(4))))
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        engine.gather(refs)
    except KeyboardInterrupt:
        print(engine.gang(lambda ctx: ctx.rank, 2))
    engine.close()
""")


def test_ctrl_c_ends_what_makes_values():
    done = subprocess.run(
        [sys.executable, "-c", MAPPING], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[0, 1]\n", "")


def test_work_for_a_value_that_nobody_wants_is_ended(engine):
    refs = engine.map(time.sleep, engine.scatter([600] * 5))
    time.sleep(0.5)
    del refs
    assert engine.gang(lambda ctx: ctx.rank, 3) == [0, 1, 2]


SCRIPT = textwrap.dedent("""
    from bigdl.orca.engines import ENGINES

    print("the script runs")

    class Mine(Exception):
        pass

    class Box:
        def __init__(self, value):
            self.value = value

    def double(ctx, box):
        if ctx.rank == box.value:
            raise Mine("equal")
        return Box(box.value * 2)

    engine = ENGINES.get("local")(2)
    boxes = engine.gang(double, 2, args_of=lambda rank: (Box(21 + rank),))
    assert all(type(box) is Box for box in boxes)
    print([box.value for box in boxes])
    try:
        engine.gang(double, 2, args_of=lambda rank: (Box(1),))
    except Mine as exc:
        print("caught", exc)
    engine.close()
""")


@pytest.mark.parametrize("way", ["script", "pipe"])
def test_from_a_script_without_a_main_guard(tmp_path, way):
    (tmp_path / "script.py").write_text(SCRIPT)
    if way == "script":
        command, given = [sys.executable, str(tmp_path / "script.py")], None
    else:
        command, given = [sys.executable, "-"], SCRIPT
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("the script runs\n[42, 44]\ncaught equal\n", "")


# --- what it is opened with -------------------------------------------------------------------


def test_settings_it_cannot_keep():
    kind = ENGINES.get("local")
    with pytest.raises(ConfigError, match=r"num_nodes=2.*master=.*conf="):
        kind.open(EngineSettings(num_nodes=2, master="spark://x:1", conf={"a": 1}))
    with pytest.raises(ConfigError, match="memory="):
        kind.open(EngineSettings(memory_bytes=1 << 60))


def test_the_default_is_all_usable_cores():
    engine = _open()
    assert engine.slots() == machine.cores()
    engine.close()


def test_preflight_sees_the_whole_machine(engine):
    found = engine.preflight()
    assert found.nodes[0] == found.caller
    assert found.caller.cores == machine.cores()
    assert str(found).splitlines()[0].split()[:3] == ["node", "python", "bigdl"]


def test_preflight_names_what_does_not_fit(engine):
    from dataclasses import replace

    found = engine.preflight()
    other = replace(found, nodes=(replace(found.caller, node="far", python="3.9.1"),))
    assert other.faults() == [f"far has python 3.9.1, the caller {found.caller.python}"]
    assert "far has python 3.9.1" in str(other)
