"""Executors with folders of their own, killed ones, a killed driver, and Spark Connect."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bigdl.testing.processes import are_gone, within

pytest.importorskip("pyspark")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("java") is None and "JAVA_HOME" not in os.environ,
        reason="Spark needs Java 17 or 21",
    ),
]

BEGIN = """
import glob, json, os, signal, sys, time
from pyspark.sql import SparkSession
builder = SparkSession.builder
for name, value in json.loads(sys.argv[1]).items():
    builder = builder.config(name, value)
spark = (builder.remote("local[2]") if sys.argv[2] == "connect"
         else builder.master(sys.argv[2])).getOrCreate()
from bigdl.orca.data.adapters import adapt
from bigdl.orca.data.contract import Request
frame = spark.range(0, 20000, 1, 6).selectExpr("id", "double(id) y")
asked = Request(feature_cols=["id"], label_cols=["y"])
def ids(sharded, world=2):
    ranks = [sharded.open(rank, world).batches(1000) for rank in range(world)]
    return [int(i) for step in zip(*ranks) for batch in step for i in batch.data[0]]
def folders(*roots):
    names = [f"{root}/**/bigdl-spool-*" for root in roots]
    return [path for name in names for path in glob.glob(name, recursive=True)]
"""


def run(program, master, folder, *, checked=True):
    settings = {
        "spark.ui.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.local.dir": str(folder),
    }
    env = {
        **os.environ,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program, json.dumps(settings), master],
        cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    if checked:
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])
    return done


TWO_EXECUTORS = """
sharded = adapt(frame, asked)
shards = sharded.shards
homes = sorted(shards.folders)
guards = {shard.guard for shard in shards.shards}
by_home = {home: [s for s in shards.shards if s.path.startswith(home)] for home in homes}
forbidden = [homes[-1]]
def watch(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].startswith(forbidden[0]):
        raise PermissionError(13, "of another host", args[0])
sys.addaudithook(watch)
crossed = ids(sharded)
forbidden[0] = "?"
before = len(ids(sharded))
jvms = [p for p in os.listdir("/proc") if p.isdigit()
        and b"CoarseGrainedExecutorBackend" in open(f"/proc/{p}/cmdline", "rb").read()]
ours = [p for p in jvms if spark.sparkContext.applicationId.encode()
        in open(f"/proc/{p}/cmdline", "rb").read()]
os.kill(int(ours[0]), signal.SIGKILL)
time.sleep(1)
after = ids(sharded)
sharded.let_go()
left = [home for home in homes if os.path.exists(home)]
spark.stop()
print(json.dumps([len(homes), len(guards), crossed == list(range(20000)), before,
                  after == list(range(20000)), len(ours), left]))
"""


def test_two_executors_that_may_not_read_each_others_folders_and_one_is_killed(tmp_path):
    homes, guards, crossed, before, after, executors, left = run(
        TWO_EXECUTORS, "local-cluster[2,1,1024]", tmp_path
    )
    assert (homes >= 2, guards, executors) == (True, 2, 2)
    assert crossed
    assert before == 20_000
    assert after
    assert left == []


KILLED = """
sharded = adapt(frame, asked)
homes = sorted(sharded.shards.folders)
found = glob.glob(f"{os.getcwd()}/**/guard.json", recursive=True)
guards = [json.load(open(path))["pid"] for path in found]
print(json.dumps([homes, guards]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("master", ["local[2]", "local-cluster[2,1,1024]"])
def test_the_driver_is_killed(tmp_path, master):
    done = run(KILLED, master, tmp_path, checked=False)
    homes, guards = json.loads(done.stdout.strip().splitlines()[-1])
    assert homes
    assert guards
    assert within(15, lambda: not any(Path(home).exists() for home in homes))
    assert are_gone(guards)


CONNECT = """
import numpy as np, torch
from bigdl.orca import init_orca_context
from bigdl.errors import ContextError
from bigdl.orca.data import XShards
from bigdl.orca.learn.pytorch import Estimator
class Same(torch.nn.Module):
    def forward(self, x):
        return x
sharded = adapt(frame, asked)
found = ids(sharded)
sharded.let_go()
with init_orca_context(cores=1):
    predicted = Estimator.from_torch(Same()).predict(frame, feature_cols=["id"])
    rows = predicted.filter("id % 2 = 0").toPandas()
    shards = XShards.from_spark_df(frame.limit(3))
    try:
        shards.to_rdd()
    except ContextError as exc:
        assert "no RDDs" in str(exc)
    else:
        raise AssertionError
    del shards
print(json.dumps([type(frame).__module__, found == list(range(20000)),
                  bool((rows["id"] == rows["prediction"]).all()), len(rows)]))
spark.stop()
"""


@pytest.mark.skipif(find_spec("grpc_status") is None, reason="needs Spark Connect's packages")
@pytest.mark.skipif(find_spec("torch") is None, reason="needs the [torch] extra")
def test_over_spark_connect(tmp_path):
    kind, found, predicted, rows = run(CONNECT, "connect", tmp_path)
    assert kind == "pyspark.sql.connect.dataframe"
    assert found
    assert predicted
    assert rows == 10_000
    assert within(15, lambda: not list(tmp_path.glob("**/bigdl-spool-*")))
