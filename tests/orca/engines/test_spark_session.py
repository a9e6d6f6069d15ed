"""Spark sessions from start to stop: what is started ends, what is joined stays."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from bigdl.errors import ConfigError, MissingDependencyError
from bigdl.orca import init_orca_context
from bigdl.orca.engines import ENGINES, spark_session
from bigdl.orca.engines.base import EngineSettings
from bigdl.testing.processes import are_gone
from bigdl.testing.standalone import standalone_cluster

if TYPE_CHECKING:
    from pathlib import Path

LIFE = textwrap.dedent("""
    import os, signal, sys
    from pyspark import SparkContext
    from bigdl.orca import OrcaContext, init_orca_context, stop_orca_context
    from bigdl.orca.context import current_engine

    before = dict(os.environ), signal.getsignal(signal.SIGINT), list(sys.path)
    for cores in (1, 2):
        context = init_orca_context(runtime="spark", cores=cores)
        assert (context.runtime, context.slots) == ("spark", cores)
        assert context.spark is OrcaContext.get_spark_session()
        assert context.spark.sparkContext.uiWebUrl is None
        look = lambda ctx: (sys.executable, os.environ["OMP_NUM_THREADS"], os.getppid())
        found = current_engine().gang(look, 1)
        assert found[0][:2] == (sys.executable, str(cores)), found
        java = SparkContext._gateway.proc.pid
        print(java, found[0][2], flush=True)
        stop_orca_context()
        assert SparkContext._active_spark_context is SparkContext._gateway is None
        assert (dict(os.environ), signal.getsignal(signal.SIGINT), list(sys.path)) == before
    init_orca_context(runtime="spark", cores=1)
    print(SparkContext._gateway.proc.pid, flush=True)
    sys.exit(5)  # it stops by itself
""")


def test_started_stopped_started_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIFE],
        capture_output=True, text=True, timeout=120, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 5, done.stderr[-3000:]
    assert "Exception" not in done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 5
    assert are_gone(pids, 5)
    assert [path.name for path in tmp_path.iterdir()] == []


CONNECT = textwrap.dedent("""
    import os, signal, time
    from pyspark.sql import SparkSession
    from bigdl.errors import WorkerLostError
    from bigdl.orca import init_orca_context, stop_orca_context
    from bigdl.orca.context import current_engine

    spark = SparkSession.builder.remote("local[2]").getOrCreate()
    context = init_orca_context(runtime="spark")
    assert context.spark is spark
    assert context.slots == 2, context.slots
    engine = current_engine()
    assert engine.gang(lambda ctx: ctx.rank, 2) == [0, 1]
    assert engine.gather(engine.map(str, engine.scatter([1, 2, 3]))) == ["1", "2", "3"]
    task = engine.submit(time.sleep, 600)
    task.poll(1)
    task.cancel()
    try:
        engine.submit(lambda: os.kill(os.getpid(), signal.SIGKILL)).result()
    except WorkerLostError as exc:
        assert "SIGKILL" in str(exc)
    assert engine.gang(lambda ctx: ctx.rank, 2) == [0, 1]
    assert engine.preflight().faults() == []
    stop_orca_context()
    assert spark.range(7).count() == 7
    print("done")
    spark.stop()
""")


@pytest.mark.slow
def test_spark_connect(tmp_path):
    pytest.importorskip("grpc_status", reason="Spark Connect needs grpcio-status")
    done = subprocess.run(
        [sys.executable, "-c", CONNECT],
        capture_output=True, text=True, timeout=180, cwd=tmp_path,
        env={**os.environ, "PYSPARK_PYTHON": sys.executable},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr[-3000:]


@pytest.mark.slow
def test_a_real_standalone_cluster(tmp_path):
    """A master and two workers, started as from a download; the contract's calls."""
    with standalone_cluster(tmp_path) as url:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
             str(_contract(tmp_path, url))],
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:]
        assert " passed" in done.stdout


def _contract(folder: Path, url: str) -> Path:
    """The contract, as a file of tests for a process of its own."""
    file = folder / "test_standalone.py"
    file.write_text(
        textwrap.dedent(f"""
        import pytest
        from bigdl.orca.engines import ENGINES
        from bigdl.orca.engines.base import EngineSettings
        from bigdl.orca.engines.spark_session import Session
        from bigdl.testing.engine import EngineContract

        def _open(**settings):
            return ENGINES.get("spark").open(EngineSettings(**settings))

        @pytest.fixture(scope="module", autouse=True)
        def session():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Session, "is_here", False)  # as where the package is not seen
                engine = _open(cluster_mode="standalone", master={url!r}, cores=2, num_nodes=2,
                               memory_bytes=1 << 30)
            assert (engine.slots(), engine.node_slots()) == (4, 2)
            yield
            engine.close()

        class TestStandalone(EngineContract):
            @classmethod
            def open_engine(cls):
                return _open()

            def test_the_package_reaches_functions_that_spark_runs(self, engine):
                def where(batches):
                    import bigdl
                    import pyarrow

                    for _ in batches:
                        yield pyarrow.RecordBatch.from_pydict({{"at": [bigdl.__file__]}})

                rows = engine.spark.range(0, 4, 1, 4).mapInArrow(where, "at string").collect()
                assert rows
                assert all(".zip/bigdl/" in row.at for row in rows)
        """)
    )
    return file


ELASTIC = textwrap.dedent("""
    import time
    from bigdl.orca import init_orca_context, stop_orca_context
    from bigdl.orca.context import current_engine

    name = "spark.dynamicAllocation."
    context = init_orca_context(
        "standalone", master="local-cluster[2,2,1024]",
        conf={name + "enabled": "true", name + "shuffleTracking.enabled": "true",
              name + "minExecutors": "0", name + "maxExecutors": "2",
              name + "executorIdleTimeout": "3s", "spark.executor.cores": "2"},
    )
    java = context.spark.sparkContext._jsc.sc()
    count = lambda: java.statusTracker().getExecutorInfos().__len__() - 1
    deadline = time.monotonic() + 40
    while count() and time.monotonic() < deadline:
        time.sleep(0.2)
    before = count()
    ranks = current_engine().gang(lambda ctx: ctx.rank, 4)
    print(before, ranks, count())
    stop_orca_context()
""")


@pytest.mark.slow
def test_a_gang_where_spark_had_given_its_executors_back():
    done = subprocess.run(
        [sys.executable, "-c", ELASTIC], capture_output=True, text=True, timeout=180
    )
    assert done.stdout.splitlines()[-1:] == ["0 [0, 1, 2, 3] 2"], done.stderr[-3000:]


def test_executors_that_nobody_can_count_are_said_so_at_once():
    """With dynamic allocation that starts at none and has no limit, nobody knows how many."""
    java = Mock()
    java.maxNumConcurrentTasks.return_value = 0
    spark = Mock()
    spark.sparkContext._jsc.sc.return_value = java
    spark.sparkContext.getConf.return_value.getAll.return_value = [
        ("spark.master", "yarn"), ("spark.dynamicAllocation.enabled", "true"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"spark\.dynamicAllocation\.maxExecutors"):
        spark_session.Session(spark).slots()


# --- what cannot be started -------------------------------------------------------------------


def test_without_java_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(spark_session, "_running", lambda: None)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"Java 17 or 21.*openjdk-17-jre-headless"):
        ENGINES.get("spark").open(EngineSettings(cores=2))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"cluster_mode": "yarn-cluster"}, "spark-submit"),
        ({"cluster_mode": "k8s", "master": "k8s://https://x"}, "container.image"),
        ({"cluster_mode": "standalone", "master": "x:7077"}, "no standalone master"),
        ({"runtime": "spark", "cores": 2, "conf": {"spark.master": "local[3]"}}, "cores=2"),
    ],
    ids=str,
)
def test_misuse_is_answered_before_anything_starts(arguments, says, monkeypatch):
    monkeypatch.setattr(spark_session, "_running", lambda: None)
    monkeypatch.setattr(spark_session, "_need_java", lambda: pytest.fail("it goes on"))
    with pytest.raises(ConfigError, match=says):
        init_orca_context(**arguments)
