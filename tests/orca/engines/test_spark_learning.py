"""Estimators on the Spark engine: the numbers of local workers, lost workers, resumed runs."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from bigdl.orca import init_orca_context, stop_orca_context
from bigdl.orca.engines import ENGINES
from bigdl.orca.engines.base import EngineSettings
from bigdl.orca.learn.callbacks import Callback, ModelCheckpoint
from bigdl.orca.learn.pytorch import Estimator
from bigdl.testing.processes import lineage


@pytest.fixture(scope="module", autouse=True)
def session():
    """One session for all; contexts join it."""
    engine = ENGINES.get("spark").open(EngineSettings(cores=2))
    yield
    stop_orca_context()
    engine.close()


def table(rows=101, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((rows, 5)).astype(np.float32)
    return x, (x.sum(1) > 0).astype(np.int64)


def make(workers=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Estimator.from_torch(model, optimizer, nn.CrossEntropyLoss(), workers=workers)


def flat(estimator):
    return torch.cat([p.detach().flatten() for p in estimator.get_model().parameters()])


def on(runtime, run):
    """``run()`` within a context, with what it gives."""
    stop_orca_context()
    with init_orca_context(runtime=runtime, cores=2):
        return run()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_weight_that_can_be_reckoned(workers):
    """w = 1 - 0.25 · 2 · mean(x²) · w: x = 0, 0 leaves it; x = 1, 1 halves it, twice."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    est = Estimator.from_torch(model, optimizer, nn.MSELoss(), workers=workers)
    x = np.array([[0.0], [0.0], [1.0], [1.0]], np.float32)
    data = x, np.zeros_like(x)
    rows = on("spark", lambda: est.fit(data, epochs=2, batch_size=2, shuffle=False))
    assert model.weight.item() == 0.25
    assert [(row["rows"], row["steps"]) for row in rows] == [(4, 2), (4, 2)]


def test_the_same_weights_metrics_and_predictions_as_local():
    def run():
        est = make()
        rows = est.fit(table(), epochs=2, batch_size=16)
        found = est.predict(table(40, seed=1)[0])
        return flat(est), [row["loss"] for row in rows], est.evaluate(table(33, seed=2)), found

    one, other = on(None, run), on("spark", run)
    torch.testing.assert_close(other[0], one[0], rtol=1e-6, atol=1e-7)
    assert other[1] == pytest.approx(one[1], rel=1e-6)
    assert other[2] == pytest.approx(one[2], rel=1e-6)
    np.testing.assert_allclose(other[3], one[3], rtol=1e-5, atol=1e-6)


class KillOnce(Callback):
    """Kills its own worker, or Spark's Python process above it, after one step."""

    def __init__(self, mark, step, above):
        self.mark, self.step, self.above = mark, step, above

    def on_step_end(self, state):
        if state.step == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(lineage(os.getpid())[self.above], signal.SIGKILL)


@pytest.mark.parametrize(
    "above",
    [
        pytest.param(0, id="training child"),
        pytest.param(2, id="Spark's Python worker", marks=pytest.mark.slow),
    ],
)
def test_what_is_killed_is_survived_with_the_same_weights(above, tmp_path):
    def whole():
        est = make()
        return est.fit(table(), epochs=2, batch_size=16), flat(est)

    def killed():
        est = make()
        callbacks = [
            KillOnce(tmp_path / "mark", 10, above),
            ModelCheckpoint(tmp_path / "saved", every_steps=2),
        ]
        rows = est.fit(table(), epochs=2, batch_size=16, callbacks=callbacks, max_failures=1)
        return rows, flat(est)

    (rows, weights), (found, again) = on(None, whole), on("spark", killed)
    assert (tmp_path / "mark").exists()
    torch.testing.assert_close(again, weights, rtol=1e-6, atol=1e-7)
    assert [row["rows"] for row in found] == [row["rows"] for row in rows] == [101, 101]


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_of_the_laptop_goes_on_here(workers, tmp_path):
    def whole():
        est = make()
        est.fit(table(), epochs=3, batch_size=16)
        return flat(est)

    def begin():
        est = make()
        est.fit(table(), epochs=1, batch_size=16)
        est.save_checkpoint(tmp_path / "saved")

    def go_on():
        est = make(workers)
        est.load_checkpoint(tmp_path / "saved")
        est.fit(table(), epochs=2, batch_size=16)
        return flat(est), est.epoch

    weights = on(None, whole)
    on(None, begin)
    found, epochs = on("spark", go_on)
    torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)
    assert epochs == 3
