"""Shards given to an estimator: the numbers of arrays and frames, whatever the shards."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from bigdl.errors import ConfigError, DataError
from bigdl.orca import init_orca_context, stop_orca_context
from bigdl.orca.data import XShards
from bigdl.orca.learn.callbacks import Callback, ModelCheckpoint
from bigdl.orca.learn.pytorch import Estimator

pd = pytest.importorskip("pandas")

ROWS = 61


@pytest.fixture(scope="module", autouse=True)
def context():
    yield init_orca_context(cores=3)
    stop_orca_context()


def arrays(rows=ROWS):
    draw = np.random.default_rng(3)
    x = draw.standard_normal((rows, 5)).astype(np.float32)
    return x, (x.sum(1) > 0).astype(np.int64)


def frame():
    x, y = arrays()
    return pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "label": y, "who": "someone"})


def uneven(shards):
    """The same rows in the same order, in shards of 0, 41 and 20 rows."""
    cut = [slice(0, 0), slice(0, 41), slice(41, ROWS)]
    whole = shards.repartition(1).collect()[0]

    def take(number):
        part = cut[number[0]]
        if isinstance(whole, dict):
            return {name: array[part] for name, array in whole.items()}
        return whole.iloc[part]

    return XShards.partition(np.arange(3), 3).transform_shard(take)


def accuracy(output, labels):
    return (output.argmax(1) == labels).float().mean()


class Two(nn.Module):
    """Takes two columns."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, a, b):
        return self.linear(torch.stack([a, b], 1))


def make(model=None, workers=2):
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)) if model is None else model()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Estimator.from_torch(
        model, optimizer, nn.CrossEntropyLoss(), metrics=[accuracy], workers=workers
    )


def flat(estimator):
    return torch.cat([p.detach().flatten() for p in estimator.get_model().parameters()])


@pytest.fixture(scope="module")
def straight(context):
    """Weights of two epochs on shards by one worker, which nothing disturbed."""
    x, y = arrays()
    est = make(workers=1)
    est.fit(XShards.partition({"x": x, "y": y}, 3), epochs=2, batch_size=8)
    return flat(est)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_same_weights_from_shards_as_from_arrays(straight, shuffle):
    """Shuffled too, and wherever shards begin and end."""
    x, y = arrays()
    shards = uneven(XShards.partition({"x": x, "y": y}, 4))
    ends = []
    for data in ((x, y), shards):
        est = make()
        rows = est.fit(data, epochs=2, batch_size=8, shuffle=shuffle, validation_data=data)
        assert [row["rows"] for row in rows] == [ROWS] * 2
        ends.append((flat(est), [{**row, "seconds": 0} for row in rows]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    if shuffle:
        torch.testing.assert_close(ends[1][0], straight, rtol=1e-5, atol=1e-6)


def test_the_same_weights_from_frames():
    columns = {"feature_cols": ["a", "b"], "label_cols": ["label"]}
    ends = []
    for data in (frame(), XShards.partition(frame(), 3), uneven(XShards.partition(frame(), 3))):
        est = make(Two)
        est.fit(data, epochs=2, batch_size=8, shuffle=False, **columns)
        ends.append((flat(est), est.evaluate(data, **columns)["loss"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][0], ends[2][0])
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-6)
    assert ends[0][1] == pytest.approx(ends[2][1], rel=1e-6)


def test_predictions_are_shards_with_one_more_column():
    est = make(Two)
    whole = est.predict(frame(), feature_cols=["a", "b"])
    found = est.predict(uneven(XShards.partition(frame(), 2)), feature_cols=["a", "b"])
    assert isinstance(found, XShards)
    parts = found.collect()
    assert [len(part) for part in parts] == [0, 41, 20]
    joined = pd.concat([part for part in parts if len(part)])
    assert list(joined) == ["a", "b", "label", "who", "prediction"]
    pd.testing.assert_frame_equal(joined.drop(columns="prediction"), frame())
    np.testing.assert_allclose(
        np.stack(joined["prediction"]), np.stack(whole["prediction"]), rtol=1e-5, atol=1e-6
    )


def test_predictions_beside_arrays_feed_the_next_step():
    x, y = arrays()
    est = make()
    shards = XShards.partition({"x": x, "y": y}, 4)
    found = est.predict(shards, output_cols="scores")
    wrong = found.transform_shard(lambda s: int((s["scores"].argmax(1) != s["y"]).sum()))
    assert sum(wrong.collect()) == (est.predict(x).argmax(1) != y).sum()
    (whole,) = found.repartition(1).collect()
    np.testing.assert_allclose(whole["scores"], est.predict(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole["x"], x)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2)])
def test_resumed_in_mid_epoch_with_other_workers_and_shards(straight, before, after, tmp_path):
    x, y = arrays()
    shards = XShards.partition({"x": x, "y": y}, 4)
    broken = make(workers=before)
    broken.fit(shards, epochs=2, batch_size=8, max_steps=5)
    broken.save_checkpoint(tmp_path / "c")
    resumed = make(workers=after)
    resumed.load_checkpoint(tmp_path / "c")
    rows = resumed.fit(uneven(shards), epochs=2, batch_size=8)
    assert [row["rows"] for row in rows] == [ROWS - 40, ROWS]
    torch.testing.assert_close(flat(resumed), straight, rtol=1e-5, atol=1e-6)


class Kill(Callback):
    """Once, in the middle of the first epoch."""

    def __init__(self, folder):
        self.flag = os.path.join(folder, "killed")

    def on_step_end(self, state):
        if state.step == 4 and not os.path.exists(self.flag):
            with open(self.flag, "w"):
                pass
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_survived(straight, tmp_path):
    x, y = arrays()
    shards = XShards.partition({"x": x, "y": y}, 4)
    est = make()
    saver = ModelCheckpoint(str(tmp_path / "saved"), every_steps=2)
    rows = est.fit(
        shards, epochs=2, batch_size=8, callbacks=[saver, Kill(str(tmp_path))], max_failures=1
    )
    assert (tmp_path / "killed").exists()
    assert [row["rows"] for row in rows] == [ROWS] * 2
    torch.testing.assert_close(flat(est), straight, rtol=1e-6, atol=1e-7)


def test_misuse():
    x, y = arrays()
    est = make()
    before = flat(est)
    with pytest.raises(ConfigError, match="feature_cols"):
        est.fit(XShards.partition({"x": x, "y": y}, 2), feature_cols=["a"], label_cols=["b"])
    with pytest.raises(ConfigError, match="feature_cols"):
        est.fit(XShards.partition(frame(), 2))
    with pytest.raises(DataError, match=r'\{"x": features, "y": labels\}'):
        est.evaluate(XShards.partition(x, 2))
    with pytest.raises(DataError, match=r'\{"x": features\}, and got a dict with .features'):
        est.predict(XShards.partition({"features": x}, 2))
    assert torch.equal(flat(est), before)
    assert est.predict(XShards.partition({"x": x}, 2)).num_partitions() == 2
