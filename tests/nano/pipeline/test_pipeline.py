"""Functions in worker processes: order, back-pressure, failures, and nothing left behind."""

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

import numpy as np
import pytest

from bigdl._base.machine import core_ids
from bigdl.errors import ArgumentError, ConfigError, ContextError, NotReadyError, WorkerLostError
from bigdl.nano import Pipeline
from bigdl.testing.processes import are_gone

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are made the POSIX way")


class OwnError(Exception):
    """Of a module that a worker cannot import by name."""


def _pids(pipeline) -> list[int]:
    return [facts.pid for stage in pipeline.workers().values() for facts in stage]


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """Descriptors, temporary files and shared memory are as before each test."""

    def found():
        return (
            set(os.listdir("/proc/self/fd")),
            set(os.listdir(tempfile.gettempdir())),
            # other programs on this machine may spool; a pipeline never does
            {name for name in os.listdir("/dev/shm") if not name.startswith("bigdl-spool-")},
        )

    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = found()
    yield
    assert found() == before


@pytest.fixture
def doubling():
    """Reads a number, makes an array of it, doubles that: in five processes."""
    factor = 2
    with Pipeline(
        [
            ("make", lambda number: np.full(3, float(number))),
            ("double", lambda array: array * factor, {"worker_num": 2}),
            ("sum", lambda array: float(array.sum()), {"worker_num": 2}),
        ]
    ) as pipeline:
        yield pipeline


# --- what comes out ---------------------------------------------------------------------------


def test_values_pass_all_stages_in_order(doubling):
    assert doubling.run(range(100)) == [6.0 * number for number in range(100)]
    assert doubling.run(iter([5, 4])) == [30.0, 24.0]
    assert doubling.run([]) == []


def test_order_is_kept_though_workers_are_of_unequal_speed():
    def slow_at_even(number):
        time.sleep(0.02 if number % 2 == 0 else 0)
        return number, os.getpid()

    with Pipeline([("one", slow_at_even, {"worker_num": 3})]) as pipeline:
        out = pipeline.run(range(12))
    assert [number for number, _ in out] == list(range(12))
    assert len({pid for _, pid in out}) == 3


def test_a_stage_of_one_worker_may_keep_a_state():
    seen = []

    def count(value):
        seen.append(value)
        return len(seen), value

    stages = [("many", lambda v: v, {"worker_num": 3}), ("count", count)]
    with Pipeline(stages) as pipeline:
        assert pipeline.run("abcdefgh"[i] for i in range(8)) == list(
            zip(range(1, 9), "abcdefgh", strict=True)
        )
    assert seen == []  # the caller's is the caller's


def test_stages_work_at_the_same_time():
    """Each stage waits until the other has begun a later value: alone, none could go on."""
    here = Path(tempfile.gettempdir())

    def first(number):
        (here / f"first-{number}").touch()
        return number

    def second(number):
        deadline = time.monotonic() + 20
        while number < 3 and not (here / f"first-{number + 1}").exists():
            assert time.monotonic() < deadline, "the first stage waits for the second"
            time.sleep(0.005)
        return number

    with Pipeline([("first", first), ("second", second)]) as pipeline:
        assert pipeline.run(range(4)) == [0, 1, 2, 3]
    for file in here.glob("first-*"):
        file.unlink()


def test_inputs_are_read_no_faster_than_the_stages_take_them(doubling):
    """No more values are read than twice the workers, beyond those that have come out."""
    taken = []

    def inputs():
        for number in range(1000):
            taken.append(number)
            yield -1 if number == 30 else number

    def refuse(value):
        if value < 0:
            raise OwnError("enough")
        return value

    stages = [("refuse", refuse), ("pass", lambda value: value)]
    with Pipeline(stages) as pipeline, pytest.raises(OwnError):
        pipeline.run(inputs())
    assert 31 <= len(taken) <= 31 + 4


def test_large_values_both_ways():
    array = np.arange(3_000_000.0)  # 24 MB: more than any buffer of the system's
    with Pipeline([("negate", lambda x: -x), ("name", lambda x: {"x": x, "sum": x.sum()})]) as p:
        out = p.run([array, array + 1, array])
    assert [item["sum"] for item in out] == [-array.sum(), -(array + 1).sum(), -array.sum()]
    np.testing.assert_array_equal(out[2]["x"], -array)
    out[2]["x"][0] = 5.0  # what comes out is the caller's to change


def test_inputs_may_be_changed_as_soon_as_the_next_is_asked_for():
    def inputs():
        array = np.zeros(200_000)
        for number in range(6):
            array[:] = number
            yield array

    with Pipeline([("mean", lambda x: float(x.mean()))]) as pipeline:
        assert pipeline.run(inputs()) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


# --- how workers run --------------------------------------------------------------------------


def test_cores_and_threads_are_in_force():
    def facts(_):
        return sorted(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")

    core = core_ids()[0]
    with Pipeline([("own", facts, {"cores_per_worker": 1})]) as pipeline:
        assert pipeline.run([0]) == [([core], "1")]
        (own,) = pipeline.workers()["own"]
    assert own.cores == (core,)
    assert own.threads == 1


def test_stages_share_no_core():
    if len(core_ids()) < 2:
        pytest.skip("needs two cores")
    one = {"cores_per_worker": 1}
    with Pipeline([("a", lambda v: v, one), ("b", lambda v: v, one)]) as pipeline:
        (a,), (b,) = pipeline.workers().values()
    assert len({*a.cores, *b.cores}) == 2


# --- failures ---------------------------------------------------------------------------------


def test_an_exception_keeps_its_type_and_names_its_stage(doubling):
    def picky(number):
        if number in (3, 5):
            raise OwnError(f"no {number}")
        return number

    with Pipeline([("make", lambda n: n), ("pick", picky, {"worker_num": 2})]) as pipeline:
        with pytest.raises(OwnError, match="no 3") as caught:
            pipeline.run(range(8))
        assert "stage 'pick', for input 3" in str(caught.value.__cause__)
        assert "in picky" in caught.value.__cause__.traceback
        pids = _pids(pipeline)
        assert pipeline.run([1, 2, 4]) == [1, 2, 4]
        assert _pids(pipeline) == pids  # nobody was started anew for that


def test_an_exception_of_the_inputs_is_the_caller_s(doubling):
    def inputs():
        yield 1
        raise OwnError("the file has ended")

    with pytest.raises(OwnError, match="has ended"):
        doubling.run(inputs())
    assert doubling.run([2]) == [12.0]


def test_a_killed_worker_is_an_error_within_seconds_and_replaced():
    def slow(value):
        time.sleep(30 if value == "slow" else 0)
        return value

    with Pipeline([("pass", lambda value: value), ("slow", slow)]) as pipeline:
        victim = pipeline.workers()["slow"][0].pid
        threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
        started = time.monotonic()
        with pytest.raises(WorkerLostError, match=r"Stage 'slow' .*SIGKILL.* input 1") as caught:
            pipeline.run(["quick", "slow"])
        assert time.monotonic() - started < 8
        assert str(victim) in str(caught.value)
        assert pipeline.run(["a", "b"]) == ["a", "b"]
        assert pipeline.workers()["slow"][0].pid != victim


def test_a_worker_that_exits_and_a_nursery_that_is_killed():
    with Pipeline([("leave", lambda code: os._exit(code) if code else code)]) as pipeline:
        with pytest.raises(WorkerLostError, match="exited with code 3"):
            pipeline.run([0, 3])
        assert pipeline.run([0]) == [0]
        os.kill(pipeline._stages._workers._nursery.pid, signal.SIGKILL)
        assert are_gone(_pids(pipeline))
        assert pipeline.run([0]) == [0]


def test_ctrl_c_leaves_it_usable():
    def slow(value):
        time.sleep(value)
        return value

    with Pipeline([("slow", slow)]) as pipeline:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            pipeline.run([30])
        assert time.monotonic() - started < 8
        assert pipeline.run([0]) == [0]


# --- its end ----------------------------------------------------------------------------------


def test_close_ends_the_processes_and_is_told(doubling):
    pids = _pids(doubling)
    doubling.close()
    doubling.close()
    assert are_gone(pids)
    with pytest.raises(NotReadyError, match="closed"):
        doubling.run([1])


def test_closed_while_it_runs(doubling):
    def inputs():
        yield 1
        doubling.close()
        yield 2

    pids = _pids(doubling)
    with pytest.raises(NotReadyError, match="closed"):
        doubling.run(inputs())
    assert are_gone(pids)


def test_run_within_a_run(doubling):
    with pytest.raises(ContextError, match="running already"):
        doubling.run(doubling.run([number])[0] for number in range(3))
    assert doubling.run([1]) == [6.0]


def test_runs_of_several_threads_take_turns(doubling):
    out = {}
    threads = [
        threading.Thread(target=lambda n=n: out.update({n: doubling.run([n] * 5)}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert out == {n: [6.0 * n] * 5 for n in range(4)}


def test_without_close_it_ends_with_the_caller():
    code = """
        import os, signal, sys
        from bigdl.nano import Pipeline
        class Own:                       # of __main__
            def __init__(self, value): self.value = value
        pipeline = Pipeline([("wrap", lambda v: Own(v)), ("open", lambda o: o.value + 1)])
        assert pipeline.run([1, 2]) == [2, 3]
        print(*[f.pid for s in pipeline.workers().values() for f in s], flush=True)
        if sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    """
    for how in ("end", "kill"):
        done = subprocess.run(
            [sys.executable, "-", how],
            input=textwrap.dedent(code), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == (0 if how == "end" else -signal.SIGKILL), done.stderr
        assert done.stderr == ""
        assert are_gone([int(pid) for pid in done.stdout.split()])
        deadline = time.monotonic() + 10
        while os.listdir(tempfile.gettempdir()) and time.monotonic() < deadline:
            time.sleep(0.02)


# --- misuse -----------------------------------------------------------------------------------

MISUSE = {
    "no list": (lambda: Pipeline({"a": abs}), ArgumentError, "takes a list of"),
    "no stage": (lambda: Pipeline([]), ConfigError, "no stage"),
    "a function alone": (lambda: Pipeline([abs]), ArgumentError, "Stage 0 of the Pipeline"),
    "no function": (lambda: Pipeline([("a", 3)]), ArgumentError, "'a' takes a function"),
    "no name": (lambda: Pipeline([(abs, "a")]), ArgumentError, "name takes text"),
    "twice": (lambda: Pipeline([("a", abs), ("a", abs)]), ConfigError, "Two stages"),
    "an option": (
        lambda: Pipeline([("a", abs, {"worker_nums": 2})]),
        ArgumentError,
        "Did you mean 'worker_num'",
    ),
    "no dict": (lambda: Pipeline([("a", abs, 2)]), ArgumentError, "need a dict"),
    "no worker": (lambda: Pipeline([("a", abs, {"worker_num": 0})]), ConfigError, "at least 1"),
    "half a worker": (
        lambda: Pipeline([("a", abs, {"worker_num": 0.5})]),
        ArgumentError,
        "whole number",
    ),
    "too many cores": (
        lambda: Pipeline([("a", abs), ("b", abs, {"worker_num": 2, "cores_per_worker": 999})]),
        ConfigError,
        "stage 'b' 1998",
    ),
    "cannot be sent": (
        lambda: Pipeline([("a", threading.Lock().acquire)]),
        ArgumentError,
        "stage 'a'.*cannot be sent",
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case):
    call, kind, words = MISUSE[case]
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("inputs", [3, "text", None])
def test_inputs_are_a_list(doubling, inputs):
    with pytest.raises(ArgumentError, match="list of inputs"):
        doubling.run(inputs)


def test_an_input_that_cannot_be_sent(doubling):
    with pytest.raises(ArgumentError, match="Input 1, a lock, cannot be sent"):
        doubling.run([1, threading.Lock()])
    assert doubling.run([1]) == [6.0]
