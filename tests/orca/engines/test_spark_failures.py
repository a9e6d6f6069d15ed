"""The Spark engine when processes die: noticed, told, nothing run twice, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from bigdl.errors import WorkerLostError
from bigdl.orca.engines import ENGINES
from bigdl.orca.engines.base import EngineSettings
from bigdl.testing.processes import are_gone, is_alive, lineage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def engine():
    engine = ENGINES.get("spark").open(
        EngineSettings(cluster_mode="standalone", master="local-cluster[2,2,1024]")
    )
    yield engine
    engine.close()


# Above a worker.
ABOVE = {"worker": 0, "nursery": 1, "Python worker": 2, "executor": 4, "daemon": 3}


def _work(ctx, folder):
    child = subprocess.Popen(["sleep", "300"])
    open(f"{folder}/{ctx.rank}-{os.getpid()}", "x").close()
    ctx.emit((os.getpid(), child.pid))
    time.sleep(300)


@pytest.mark.parametrize("victim", ABOVE)
def test_what_dies_ends_the_gang(engine, victim, tmp_path):
    pids, killed_at = {}, []

    def listen(rank, event):
        pids[rank] = event
        if len(pids) == 2:
            killed_at.append(time.monotonic())
            os.kill(lineage(pids[1][0])[ABOVE[victim]], signal.SIGKILL)

    with pytest.raises(WorkerLostError) as caught:
        engine.gang(_work, 2, args_of=lambda _: (tmp_path,), on_event=listen)
    assert time.monotonic() - killed_at[0] < 15
    assert caught.value.rank == 1 or victim == "executor"  # both may have been there
    assert are_gone([pid for some in pids.values() for pid in some], 5)
    assert engine.gang(lambda ctx: ctx.rank, 4) == [0, 1, 2, 3]
    time.sleep(1.0)
    assert len(list(tmp_path.iterdir())) == 2  # Spark's own retries have run nothing


def test_work_of_others_goes_on(engine):
    """A task that dies takes nothing with it that runs elsewhere."""
    other = engine.submit(lambda: (time.sleep(3), "done")[1])
    task = engine.submit(
        lambda: (os.kill(lineage(os.getpid())[2], signal.SIGKILL), time.sleep(60))
    )
    with pytest.raises(WorkerLostError, match="Spark task it ran in is gone"):
        task.result(timeout_s=30)
    assert other.result(timeout_s=30) == "done"


PROGRAM = textwrap.dedent("""
    import os, subprocess, sys, time
    from bigdl.orca.engines import ENGINES
    from bigdl.orca.engines.base import EngineSettings

    engine = ENGINES.get("spark").open(EngineSettings(cores=2))
    refs = engine.scatter([1])
    java = engine.spark.sparkContext._gateway.proc.pid

    def work(ctx):
        child = subprocess.Popen(["sleep", "300"])
        ctx.emit([os.getpid(), os.getppid(), child.pid])
        time.sleep(300)

    pids = [java]
    def listen(rank, event):
        pids.extend(event)
        if len(pids) == 7:
            print(*pids, flush=True)

    try:
        engine.gang(work, 2, on_event=listen)
    except KeyboardInterrupt:
        print("interrupted", engine.gang(lambda ctx: ctx.rank, 2), flush=True)
        engine.close()
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
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 7
    assert all(map(is_alive, pids))
    return program, pids


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_all_dies_with_the_driver(tmp_path, how):
    program, pids = _running(tmp_path)
    program.send_signal(how)
    program.communicate(timeout=20)
    assert are_gone(pids, 15)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("bigdl")] == []


@pytest.mark.slow
def test_ctrl_c_ends_the_gang_and_leaves_the_engine_usable(tmp_path):
    program, pids = _running(tmp_path)
    os.killpg(program.pid, signal.SIGINT)  # as the terminal does
    out, errors = program.communicate(timeout=60)
    assert out == "interrupted [0, 1]\n"
    assert "KeyboardInterrupt" in errors
    assert program.returncode == -signal.SIGINT
    assert are_gone(pids)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("bigdl")] == []
