"""Killed with -9 at random steps, gone on from the checkpoint by any number of workers."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the [torch] extra")

from bigdl.errors import WorkerLostError  # noqa: E402
from bigdl.orca import init_orca_context, stop_orca_context  # noqa: E402
from bigdl.orca.learn.callbacks import ModelCheckpoint  # noqa: E402
from bigdl.orca.learn.pytorch import Estimator  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes")

ROWS, SIZE, EPOCHS = 101, 16, 2
STEPS = -(-ROWS // SIZE)
EVERY = 3  # updates between checkpoints


@pytest.fixture(scope="module", autouse=True)
def context():
    yield init_orca_context(cores=3)
    stop_orca_context()


class Mortal(torch.nn.Module):
    """The worker that is first to come to a certain call ends there, once."""

    def __init__(self, mark=None, last=0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ).double()
        self.mark, self.last, self.calls = mark, last, 0

    def forward(self, x):
        self.calls += self.training
        if self.mark is not None and self.calls == self.last:
            try:
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return self.layers(x)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(x)


def rows():
    x = np.random.default_rng(0).standard_normal((ROWS, 5))
    return x, x.sum(1, keepdims=True)


def estimator(model, workers):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Estimator.from_torch(model, optimizer, torch.nn.MSELoss(), workers=workers)


def trained(est, epochs, callbacks=()):
    found = est.fit(rows(), epochs=epochs, batch_size=SIZE, callbacks=list(callbacks), seed=5)
    return torch.cat([p.detach().flatten() for p in est.get_model().parameters()]), found


@pytest.fixture(scope="module")
def straight():
    return trained(estimator(Mortal(), 1), EPOCHS)[0]


def check_one(folder, straight, before, after, last):
    """Killed in the ``last``-th update of ``before`` workers, ended by ``after`` workers."""
    saver = ModelCheckpoint(folder / "saved", every_steps=EVERY)
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        trained(estimator(Mortal(str(folder / "mark"), last), before), EPOCHS, [saver])
    assert (folder / "mark").exists()
    est = estimator(Mortal(), after)
    with contextlib.suppress(FileNotFoundError):  # killed while the first was being written
        est.load_checkpoint(folder / "saved")
        # the last one may have been in writing too
        assert est.step in (due := (last - 1) // EVERY * EVERY, due - EVERY)
    start, begun = est.step, est.epoch
    weights, found = trained(est, EPOCHS - est.epoch)
    torch.testing.assert_close(weights, straight, rtol=1e-9, atol=1e-12)
    assert est.step == EPOCHS * STEPS
    assert sum(row["steps"] for row in found) == EPOCHS * STEPS - start
    assert [row["epoch"] for row in found] == list(range(begun + 1, EPOCHS + 1))


@pytest.mark.parametrize(("before", "after", "last"), [(2, 3, 5), (3, 1, 11)])
def test_another_number_of_workers_goes_on(tmp_path, straight, before, after, last):
    check_one(tmp_path, straight, before, after, last)


@pytest.mark.slow
def test_twenty_random_kills(tmp_path, straight):
    draw = random.Random(0)
    for number in range(20):
        before, after = draw.choice([(1, 2), (2, 2), (2, 3), (3, 1), (3, 3)])
        last = draw.randrange(1, EPOCHS * STEPS + 1)
        folder = tmp_path / str(number)
        folder.mkdir()
        check_one(folder, straight, before, after, last)
