"""What a fit costs, told before it runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bigdl.errors import ConfigError, DataError, NotReadyError
from bigdl.orca import init_orca_context, stop_orca_context
from bigdl.orca.learn.costs import Compute, CostModel, Line
from bigdl.orca.learn.explain import Explanation, Row
from bigdl.orca.learn.pytorch import Estimator


@pytest.fixture(scope="module", autouse=True)
def context():
    yield init_orca_context(cores=2)
    stop_orca_context()


def make(**more):
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Estimator.from_torch(model, optimizer, nn.MSELoss(), **more)


def table(rows=200):
    x = np.random.default_rng(0).standard_normal((rows, 5)).astype(np.float32)
    return x, x.sum(1, keepdims=True)


def test_it_measures_and_leaves_the_model_alone():
    est = make()
    before = {name: value.clone() for name, value in est.get_model().state_dict().items()}
    found = est.explain(table(), batch_size=64)
    assert found.row_bytes == 6 * 4
    assert found.gradient_bytes == (5 * 8 + 8 + 8 + 1) * 4
    assert (found.batch_rows, found.data_rows, found.cores) == (64, 200, 2)
    assert found.worker_bytes > 50e6  # an interpreter with torch is larger than that
    measured = [(row.workers, row.place) for row in found.rows if row.how == "measured"]
    assert measured == [(1, "this machine"), (2, "this machine")]
    simulated = {row.workers for row in found.rows if row.how == "simulated"}
    assert simulated == {2, 4, 8, 16, 32, 64}  # no more workers than rows
    assert all(row.step_ms > 0 for row in found.rows)
    assert all(row.rows_per_s == pytest.approx(64e3 / row.step_ms) for row in found.rows)
    text = str(found)
    for words in ("24 bytes; 200 rows are 4.8 KB", "10 Gbit/s", "simulated", found.verdict):
        assert words in text
    for name, value in est.get_model().state_dict().items():
        assert torch.equal(value, before[name])
    assert (est.epoch, est.step) == (0, 0)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*map(torch.from_numpy, table(40)), strict=True)


@pytest.mark.parametrize("dataset", [TensorDataset(*map(torch.from_numpy, table(40))), Stream()])
def test_a_loader_has_batches_of_its_own(dataset):
    found = make().explain(DataLoader(dataset, batch_size=8))
    assert found.batch_rows == 8
    assert found.row_bytes == 6 * 4


@pytest.mark.parametrize(
    ("data", "more", "error", "words"),
    [
        (table(), {"batch_size": 0}, ConfigError, "batch_size=0"),
        (table(), {"feature_cols": ["a"]}, ConfigError, "feature_cols"),
        (table(), {"accumulation_steps": 0}, ConfigError, "accumulation_steps=0"),
        (table(0), {}, DataError, "rows"),
    ],
)
def test_what_fit_refuses_is_refused_here(data, more, error, words):
    with pytest.raises(error, match=words):
        make().explain(data, **more)


def test_a_model_that_cannot_be_trained():
    with pytest.raises(NotReadyError, match="optimizer"):
        Estimator.from_torch(nn.Linear(5, 1)).explain(table())


def test_the_verdict_names_where_several_pay():
    def row(workers, place, step_ms, how):
        return Row(
            workers=workers,
            place=place,
            step_ms=step_ms,
            rows_per_s=1e3 / step_ms,
            speedup=10 / step_ms,
            how=how,
        )

    line = Line(fixed=0.0, each=0.01)
    found = Explanation(
        batch_rows=1,
        data_rows=None,
        row_bytes=4,
        gradient_bytes=4,
        reading_ms=0.1,
        worker_bytes=1,
        cores=2,
        rows=(
            row(1, "this machine", 10, "measured"),
            row(2, "this machine", 12, "measured"),
            row(2, "slow", 11, "simulated"),
            row(4, "slow", 9, "simulated"),
            row(2, "none", 20, "simulated"),
        ),
        model=CostModel(
            compute=Compute(cores=2, one_thread=line, all_threads=line),
            gradient_bytes=4,
            batch_rows=1,
        ),
        memory=None,
    )
    assert found.break_even == {"this machine": None, "slow": 4, "none": None}
    assert found.verdict == (
        "On this machine, one process is faster for this model. "
        "Machines like it break even over slow, from 4 machines on; over none, never."
    )
