"""Callbacks that keep an epoch's record somewhere: what is read back is the record."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigdl.errors import ArgumentError, ConfigError, WorkerLostError
from bigdl.orca import init_orca_context, stop_orca_context
from bigdl.orca.learn.callbacks import (
    Callback,
    LearningRateMonitor,
    MLflow,
    ModelCheckpoint,
    Progress,
    TensorBoard,
    TrainingState,
)
from bigdl.orca.learn.progress import ProgressLine

torch = pytest.importorskip("torch", reason="needs the [torch] extra")

from bigdl.orca.learn.pytorch import Estimator  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes")
nn = torch.nn


@pytest.fixture(scope="module", autouse=True)
def context():
    yield init_orca_context(cores=2)
    stop_orca_context()


X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(24, 1)
DATA = (X, 3 * X)


def make(workers=1, groups=1, interval="epoch"):
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    parts = [model.parameters()] if groups == 1 else [[model.weight], [model.bias]]
    optimizer = torch.optim.SGD(
        [{"params": part, "lr": 0.4 / (n + 1)} for n, part in enumerate(parts)]
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return Estimator.from_torch(
        model,
        optimizer,
        nn.MSELoss(),
        scheduler=scheduler,
        scheduler_interval=interval,
        workers=workers,
    )


# --- LearningRateMonitor ------------------------------------------------------------------------


def test_the_rate_an_epoch_began_with():
    rows = make(2).fit(DATA, epochs=3, batch_size=12, callbacks=[LearningRateMonitor()])
    assert [row["lr"] for row in rows] == [0.4, 0.2, 0.1]


def test_groups_have_a_rate_each_and_a_step_schedule_is_read_at_the_start():
    est = make(groups=2, interval="step")
    rows = est.fit(DATA, epochs=2, batch_size=12, callbacks=[LearningRateMonitor()])
    assert [(row["lr_0"], row["lr_1"]) for row in rows] == [(0.4, 0.2), (0.1, 0.05)]
    assert "lr" not in rows[0]


def test_an_optimizer_without_groups_is_refused():
    with pytest.raises(ConfigError, match="cannot read a object"):
        LearningRateMonitor().on_epoch_start(TrainingState(optimizer=object()))


# --- TensorBoard --------------------------------------------------------------------------------


def points(folder):
    """Epochs and values of each scalar, as TensorBoard itself reads them."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = loading.EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def check_points(found, rows):
    assert set(found) == {"loss", "rows", "steps", "seconds", "val_loss", "lr"}
    for key in found:
        wanted = [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in rows]
        assert found[key] == wanted, key


def test_events_read_back_are_the_records(tmp_path):
    board = TensorBoard(tmp_path / "run")
    callbacks = [LearningRateMonitor(), board]
    est = make(2)
    rows = est.fit(DATA, 2, 8, validation_data=DATA, callbacks=callbacks)
    rows += est.fit(DATA, 1, 8, validation_data=DATA, callbacks=callbacks)
    check_points(points(tmp_path / "run"), rows)
    assert board._writer is None


class KillAt(Callback):
    """Kills its own worker at a step, once."""

    def __init__(self, mark, step):
        self.mark, self.step = str(mark), step

    def on_step_end(self, state):
        if state.step == self.step and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_epochs_that_are_trained_again_have_one_point(tmp_path):
    callbacks = [
        LearningRateMonitor(),
        TensorBoard(tmp_path / "run"),
        KillAt(tmp_path / "mark", 8),
        ModelCheckpoint(tmp_path / "saved", every_epochs=2),
    ]
    rows = make().fit(DATA, 4, 8, validation_data=DATA, callbacks=callbacks, max_failures=1)
    assert (tmp_path / "mark").exists()
    check_points(points(tmp_path / "run"), rows)


# --- MLflow -------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of runs in files, and a client of it."""
    tracking = pytest.importorskip("mlflow.tracking", reason="needs the [tracking] extra")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = (tmp_path / "runs").as_uri()
    return uri, tracking.MlflowClient(tracking_uri=uri)


def test_one_object_is_one_run(store):
    uri, client = store
    flow = MLflow(uri, experiment="lines", run_name="first", params={"rate": 0.4})
    est = make(2)
    rows = est.fit(DATA, epochs=2, callbacks=[LearningRateMonitor(), flow])
    rows += est.fit(DATA, epochs=1, callbacks=[LearningRateMonitor(), flow])
    place = client.get_experiment_by_name("lines").experiment_id
    (run,) = client.search_runs([place])
    assert run.info.run_id == flow.run_id
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {"rate": "0.4"}
    assert set(run.data.metrics) == {"loss", "rows", "steps", "seconds", "lr"}
    for key in run.data.metrics:
        history = client.get_metric_history(flow.run_id, key)
        found = sorted((point.step, point.value) for point in history)
        assert found == [(row["epoch"], row[key]) for row in rows], key


class Fails(Callback):
    def __init__(self, how):
        self.how = how
        self.heard = []

    def on_step_end(self, state):
        if state.step == 1:
            if self.how == "exit":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no more")

    def on_exception(self, error):
        self.heard.append((os.getpid(), type(error).__name__))
        raise RuntimeError("is logged only")


@pytest.mark.parametrize(("how", "error"), [("raise", ValueError), ("exit", WorkerLostError)])
def test_a_run_that_fails_is_marked_so(store, how, error, caplog):
    uri, client = store
    flow, fails = MLflow(uri), Fails(how)
    with pytest.raises(error):
        make(2).fit(DATA, callbacks=[fails, flow])
    assert fails.heard == [(os.getpid(), error.__name__)]
    assert "Fails.on_exception failed" in caplog.text
    (run,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    assert run.info.status == "FAILED"
    make(2).fit(DATA, callbacks=[flow])  # the same object is the same run
    (run,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    assert run.info.status == "FINISHED"


def test_a_run_that_is_broken_off_is_marked_so(store):
    uri, client = store
    flow = MLflow(uri)
    flow.on_exception(KeyboardInterrupt())  # nothing was begun
    flow.on_fit_start(TrainingState())
    flow.on_exception(KeyboardInterrupt())
    assert client.get_run(flow.run_id).info.status == "KILLED"


# --- Progress -----------------------------------------------------------------------------------


def test_a_line_an_epoch_where_stderr_is_no_terminal(capfd):
    make().fit(DATA, epochs=2)
    assert capfd.readouterr().err == ""
    rows = make().fit(DATA, epochs=2, callbacks=[Progress()])
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(",")[:2] for line in lines] == [
        [f"epoch {row['epoch']}", f" loss {row['loss']:.4g}"] for row in rows
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_live_line(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressLine(epochs=1, first=1, rows=10) as line:
        line.heard(1, ("step", 1, 1, 5, 9.0))
        line.heard(0, ("step", 1, 1, 5, 0.5))
        line.heard(0, ("epoch", {"epoch": 1, "loss": 0.25}))
    blank, text, last = terminal.getvalue().partition("\n")[0].split("\r\x1b[K")
    assert (blank, text) == ("", "epoch 1/1: row 5/10, step 1, loss 0.5")
    assert last == "epoch 1, loss 0.25"


# --- misuse -------------------------------------------------------------------------------------

MISUSE = {
    "log_dir": (lambda: TensorBoard(3), "log_dir=3"),
    "uri": (lambda: MLflow(5), "tracking_uri=5"),
    "experiment": (lambda: MLflow(experiment=None), "experiment=None"),
    "params": (lambda: MLflow(params=[1]), r"params=\[1\]|params="),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name):
    call, words = MISUSE[name]
    with pytest.raises(ArgumentError, match=words):
        call()


@pytest.mark.parametrize("call", ["TensorBoard('x')", "MLflow()"])
def test_a_missing_package_names_the_extra(call):
    code = (
        "import sys\n"
        "sys.modules['tensorboard'] = sys.modules['mlflow'] = None\n"
        "from bigdl.errors import MissingDependencyError\n"
        "from bigdl.orca.learn.callbacks import MLflow, TensorBoard\n"
        "try:\n"
        f"    {call}\n"
        "except MissingDependencyError as exc:\n"
        "    sys.exit('bigdl-next[tracking]' not in str(exc))\n"
        "sys.exit(2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
