"""Spark DataFrames on the Spark engine: the numbers of local workers, also after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from bigdl.orca import init_orca_context
from bigdl.orca.learn.callbacks import Callback, ModelCheckpoint
from bigdl.orca.learn.pytorch import Estimator
from bigdl.testing.processes import lineage

pd = pytest.importorskip("pandas")
pytest.importorskip("pyspark")
pytestmark = [
    pytest.mark.skipif(
        shutil.which("java") is None and "JAVA_HOME" not in os.environ,
        reason="Spark needs Java 17 or 21",
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # py4j's sockets
]

FEATURES = [f"f{i}" for i in range(5)]
COLUMNS = {"feature_cols": FEATURES, "label_cols": "y"}
PLACES = [
    pytest.param({"runtime": "spark", "cores": 2}, id="local"),
    pytest.param(
        {"cluster_mode": "standalone", "master": "local-cluster[2,1,1024]"},
        id="local-cluster",
        marks=pytest.mark.slow,
    ),
]


class Columns(nn.Module):
    """Takes each feature as an argument of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, *columns):
        return self.net(torch.stack(columns, 1)).squeeze(1)


class Offset(nn.Module):
    def forward(self, number):
        return number.float() + 0.5


def table(rows=401, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((rows, 5)).astype(np.float32)
    frame = pd.DataFrame(dict(zip(FEATURES, x.T, strict=True)))
    return frame.assign(y=x.sum(1), n=np.arange(rows))


def make():
    torch.manual_seed(0)
    model = Columns()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Estimator.from_torch(model, optimizer, nn.MSELoss(), workers=2)


def weights(estimator):
    return torch.cat([p.detach().flatten() for p in estimator.get_model().parameters()])


@pytest.fixture(scope="module", autouse=True)  # before any context on Spark
def local():
    """What local workers make of the same rows as a pandas DataFrame."""
    with init_orca_context(cores=2):
        est = make()
        rows = est.fit(table(), epochs=2, batch_size=32, shuffle=False, **COLUMNS)
        return weights(est), rows, est.evaluate(table(99, seed=1), batch_size=32, **COLUMNS)


@pytest.fixture(scope="module", params=PLACES)
def spark(request):
    with init_orca_context(**request.param) as context:
        context.spark.sparkContext.setLogLevel("OFF")
        yield context.spark


def cut(spark, frame):
    """The same rows, in partitions of very different sizes."""
    whole = spark.createDataFrame(frame).coalesce(1)
    return whole.repartitionByRange(3, "n").sortWithinPartitions("n")


def test_the_same_weights_as_from_pandas(spark, local):
    expected, rows, metrics = local
    est = make()
    found = est.fit(cut(spark, table()), epochs=2, batch_size=32, shuffle=False, **COLUMNS)
    torch.testing.assert_close(weights(est), expected, rtol=1e-6, atol=1e-7)
    assert [row["rows"] for row in found] == [row["rows"] for row in rows] == [401, 401]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in rows])
    scored = est.evaluate(cut(spark, table(99, seed=1)), batch_size=32, **COLUMNS)
    assert scored == pytest.approx(metrics, rel=1e-6)


def test_shuffled_epochs_see_each_row_once(spark):
    est = make()
    rows = est.fit(cut(spark, table()), epochs=2, batch_size=32, **COLUMNS)
    assert [row["rows"] for row in rows] == [401, 401]
    assert rows[1]["loss"] < rows[0]["loss"]


def test_predictions_beside_their_rows(spark):
    frame = spark.range(0, 1000, 1, 7).selectExpr("id", "rand() r", "concat('row ', id) name")
    found = Estimator.from_torch(Offset()).predict(frame, feature_cols=["id"])
    assert found.columns == ["id", "r", "name", "prediction"]
    rows = found.filter("id % 3 = 0").orderBy("r").collect()
    assert len(rows) == 334
    for row in rows:
        assert np.ravel(row.prediction).tolist() == [row.id + 0.5]
        assert row.name == f"row {row.id}"


class KillOnce(Callback):
    """Ends a process above its worker, after some steps: 0 is the worker, 4 Spark's executor."""

    def __init__(self, mark, step, above):
        self.mark, self.step, self.above = mark, step, above

    def on_step_end(self, state):
        if state.step == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(lineage(os.getpid())[self.above], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("above", [0, 4])
def test_a_killed_executor_changes_no_weight(above, local, tmp_path):
    """Its rows are read from the files that it has left: the DataFrame runs once."""
    where = {"cluster_mode": "standalone", "master": "local-cluster[2,1,1024]"}
    with init_orca_context(**where) as context:
        context.spark.sparkContext.setLogLevel("OFF")
        runs = context.spark.sparkContext.accumulator(0)

        def counted(batches):
            for batch in batches:
                runs.add(batch.num_rows)
                yield batch

        frame = cut(context.spark, table())
        frame = frame.mapInArrow(counted, frame.schema)
        est = make()
        callbacks = [
            KillOnce(tmp_path / "mark", 20, above),
            ModelCheckpoint(tmp_path / "saved", every_steps=3),
        ]
        found = est.fit(
            frame, epochs=2, batch_size=32, shuffle=False, callbacks=callbacks, max_failures=1,
            **COLUMNS,
        )  # fmt: skip
        assert runs.value == 401
    assert (tmp_path / "mark").exists()
    torch.testing.assert_close(weights(est), local[0], rtol=1e-6, atol=1e-7)
    assert [row["rows"] for row in found] == [401, 401]


CTRL_C = textwrap.dedent("""
    import glob, os, signal, time
    import torch
    from pyspark import TaskContext
    from torch import nn
    from bigdl.orca import init_orca_context
    from bigdl.orca.data.spool_lease import Lease
    from bigdl.orca.learn.callbacks import Callback
    from bigdl.orca.learn.pytorch import Estimator

    names, begin = [], Lease.__init__
    def noted(lease, *args):
        begin(lease, *args)
        names.append(lease.ticket.name)
    Lease.__init__ = noted

    driver, folder = os.getpid(), os.environ["TMPDIR"]

    def press(batches):
        if TaskContext.get().partitionId() == 0:  # once
            os.kill(driver, signal.SIGINT)
        time.sleep(300)
        yield from batches

    class Press(Callback):
        def on_step_end(self, state):
            if state.step == 3 and state.rank == 0:
                os.kill(driver, signal.SIGINT)
                time.sleep(300)

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)
        def forward(self, x):
            return self.net(x[:, None].float())[:, 0]

    def fit(frame, **more):
        model = Line()
        est = Estimator.from_torch(
            model, torch.optim.SGD(model.parameters(), lr=0.01), nn.MSELoss(), workers=2
        )
        rows = est.fit(frame, batch_size=20, feature_cols="x", label_cols="y", **more)
        est.shutdown()
        return rows

    def soon(what):
        deadline = time.monotonic() + 30
        while what() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not what()

    def spooled():
        places = [f"/dev/shm/bigdl-spool-*{name}*" for name in names]
        places += [f"{folder}/**/bigdl-spool-*{name}*" for name in names]
        return [path for place in places for path in glob.glob(place, recursive=True)]

    with init_orca_context(runtime="spark", cores=2) as context:
        context.spark.sparkContext.setLogLevel("OFF")
        frame = context.spark.range(0, 401, 1, 3).selectExpr("float(id % 7) x", "float(id % 3) y")
        active = context.spark.sparkContext.statusTracker().getActiveJobsIds
        for name, call in {
            "spool": lambda: fit(frame.mapInArrow(press, frame.schema)),
            "fit": lambda: fit(frame, callbacks=[Press()]),
        }.items():
            try:
                call()
            except KeyboardInterrupt:
                print(name, "broken off", soon(active), soon(spooled), flush=True)
        print([row["rows"] for row in fit(frame)], soon(spooled))
""")


@pytest.mark.slow
def test_ctrl_c_in_the_spool_and_in_the_fit(tmp_path):
    """Either ends Spark's work and leaves no file, and the session serves the next fit."""
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C], capture_output=True, text=True, timeout=240,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    wanted = ["spool broken off True True", "fit broken off True True", "[401] True"]
    assert done.stdout.splitlines() == wanted, done.stderr[-3000:]
