"""Wrong calls of an estimator: one clear error each, nothing started and nothing lost."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from bigdl.errors import ArgumentError, BigDLError, ConfigError, DataError, NotReadyError
from bigdl.orca import init_orca_context, stop_orca_context
from bigdl.orca.context import current_engine
from bigdl.orca.learn import estimator as estimator_module
from bigdl.orca.learn.callbacks import EarlyStopping, ModelCheckpoint
from bigdl.orca.learn.pytorch import Estimator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes")


@pytest.fixture(scope="module", autouse=True)
def context():
    yield init_orca_context(cores=4)
    stop_orca_context()


def table(rows=101):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((rows, 5)).astype(np.float32)
    return x, (x.sum(1) > 0).astype(np.int64)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


MODEL = network()


def make(workers=2, **more):
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.1)
    return Estimator.from_torch(MODEL, optimizer, nn.CrossEntropyLoss(), workers=workers, **more)


def fit(**wrong):
    return make().fit(table(), **wrong)


def frame(**columns):
    pd = pytest.importorskip("pandas", reason="needs pandas")
    return pd.DataFrame({"a": [1.0, 2.0], "y": [0, 1], **columns})


def loader():
    data = torch.utils.data.TensorDataset(*map(torch.from_numpy, table()))
    return torch.utils.data.DataLoader(data, batch_size=8)


def from_torch(**wrong):
    return Estimator.from_torch(MODEL, **wrong)


#: call, type of the error, words in it; refused before any worker starts.
AT_ONCE = {
    "no optimizer": (lambda: Estimator.from_torch(network()).fit(table()), NotReadyError, "optim"),
    "workers": (lambda: make(9).fit(table()), ConfigError, "asked 9 workers.*offers 4"),
    "workers 0": (lambda: make(0), ConfigError, "workers=0"),
    "workers text": (lambda: make("2"), ArgumentError, "workers='2'"),
    "epochs": (lambda: make().fit(table(), epochs=0), ConfigError, "epochs=0"),
    "batch_size": (lambda: make().fit(table(), batch_size=0), ConfigError, "batch_size=0"),
    "lengths": (lambda: make().fit((table()[0], table(7)[1])), DataError, "101.*7|7.*101"),
    "no rows": (lambda: make().fit(table(0)), DataError, "no rows|0 rows"),
    "precision": (lambda: make().fit(table(), precision="fp8"), ConfigError, "precision='fp8'"),
    "sync": (lambda: make().fit(table(), sync="ring"), ConfigError, "sync='ring'"),
    "acceleration": (lambda: fit(acceleration="fast"), ConfigError, "acceleration='fast'"),
    "acceleration true": (lambda: fit(acceleration=True), ConfigError, "acceleration=True"),
    "clip": (lambda: make().fit(table(), clip_norm=-1.0), ConfigError, "clip_norm=-1"),
    "typo": (lambda: make().fit(table(), batchsize=3), TypeError, "batchsize"),
    "callback": (lambda: make().fit(table(), callbacks=[print]), ArgumentError, "callbacks"),
    "failures": (lambda: make().fit(table(), max_failures=1), ConfigError, "ModelCheckpoint"),
    "hang": (lambda: make().fit(table(), hang_timeout_s=-1), ConfigError, "hang_timeout_s=-1"),
    "columns": (lambda: make().fit(table(), feature_cols="a"), ConfigError, "feature_cols"),
    "text data": (lambda: make().fit(object()), ArgumentError, "cannot read a object"),
    "nothing to checkpoint": (lambda: make().save_checkpoint("x"), NotReadyError, "fit"),
    "no checkpoint": (lambda: make().load_checkpoint("/nowhere"), FileNotFoundError, "nowhere"),
    "no model": (lambda: make().load("/nowhere"), FileNotFoundError, "nowhere"),
    "every": (lambda: ModelCheckpoint("x", every_steps=0), ConfigError, "every_steps=0"),
    "mode": (lambda: EarlyStopping(mode="up"), ConfigError, "mode='up'"),
    "foreign optimizer": (
        lambda: Estimator.from_torch(network(), torch.optim.SGD(network().parameters(), 0.1)),
        ConfigError,
        "not the model's",
    ),
    "epochs text": (lambda: fit(epochs="2"), ConfigError, "epochs='2'"),
    "seed": (lambda: fit(seed=-1), ConfigError, "seed=-1"),
    "validate_every": (lambda: fit(validate_every=0), ConfigError, "validate_every=0"),
    "every steps": (lambda: fit(validate_every_steps=0), ConfigError, "validate_every_steps=0"),
    "max_steps": (lambda: fit(max_steps=0), ConfigError, "max_steps=0"),
    "max_steps text": (lambda: fit(max_steps="4"), ConfigError, "max_steps='4'"),
    "accumulation": (lambda: fit(accumulation_steps=0), ConfigError, "accumulation_steps=0"),
    "clip_value": (lambda: fit(clip_value=0), ConfigError, "clip_value=0"),
    "failures -1": (lambda: fit(max_failures=-1), ConfigError, "max_failures=-1"),
    "two faults": (lambda: fit(epochs=0, seed=-1), ConfigError, "epochs=0.*seed=-1"),
    "one callback": (lambda: fit(callbacks=EarlyStopping()), ArgumentError, "a list"),
    "a class": (lambda: fit(callbacks=[EarlyStopping]), ArgumentError, "callbacks"),
    "workers order": (lambda: make((3, 1)), ConfigError, "fewest before the most"),
    "workers three": (lambda: make((1, 2, 3)), ArgumentError, "workers="),
    "workers true": (lambda: make(True), ArgumentError, "workers=True"),
    "a loader's size": (
        lambda: make().fit(loader(), batch_size=8),
        ConfigError,
        "batch_size",
    ),
    "a table": (lambda: make().fit(frame()), ConfigError, "feature_cols"),
    "a column": (
        lambda: make().fit(frame(), feature_cols="b", label_cols="y"),
        (ConfigError, DataError),
        "'b'",
    ),
    "no labels": (lambda: make().fit(frame(), feature_cols="a"), ConfigError, "label_cols"),
    "metrics": (lambda: make(metrics=[3]), (ArgumentError, ConfigError), "3"),
    "config": (lambda: make(config=[1]), ArgumentError, "config has to be a dict"),
    "interval": (
        lambda: make(scheduler=print, scheduler_interval="batch"),
        (ArgumentError, ConfigError),
        "scheduler",
    ),
    "reduction": (lambda: make(loss_reduction="none"), (ArgumentError, ConfigError), "none"),
    "a model's class": (lambda: Estimator.from_torch(nn.Linear), ArgumentError, "config"),
    "no model at all": (lambda: Estimator.from_torch(3), ArgumentError, "model has to be"),
    "an optimizer's name": (lambda: from_torch(optimizer="sgd"), ArgumentError, "optimizer"),
    "lbfgs": (
        lambda: from_torch(optimizer=torch.optim.LBFGS(MODEL.parameters())),
        ConfigError,
        "LBFGS",
    ),
    "evaluate's precision": (
        lambda: make().evaluate(table(), precision="int8"),
        ConfigError,
        "precision='int8'",
    ),
    "predict's accelerator": (
        lambda: make().predict(table()[0], accelerator="onnxruntim"),
        ConfigError,
        "Did you mean 'onnxruntime'",
    ),
    "keep_last": (lambda: ModelCheckpoint("x", keep_last=0), ConfigError, "keep_last=0"),
    "patience": (lambda: EarlyStopping(patience=-1), ConfigError, "patience=-1"),
    "no checkpoints": (
        lambda: Estimator.latest_checkpoint("/nowhere"),
        FileNotFoundError,
        "nowhere",
    ),
}

#: The same, refused by the workers: only they meet it.
LATER = {
    "monitor": (
        lambda: make().fit(table(), callbacks=[EarlyStopping(monitor="los")]),
        ConfigError,
        "Did you mean 'loss'",
    ),
    "labels": (
        lambda: make().fit((table()[0], np.full(101, 7))),
        IndexError,
        "Target 7",
    ),
    "shape": (
        lambda: make().predict(np.zeros((3, 4), np.float32)),
        RuntimeError,
        "shapes cannot be multiplied",
    ),
}


class Untouched:
    """An engine whose work may not be asked for."""

    def __init__(self, engine):
        self._engine = engine

    def slots(self):
        return self._engine.slots()

    def gang(self, fn, workers, **options):
        if workers > self.slots():  # which the engine itself refuses
            return self._engine.gang(fn, workers, **options)
        raise AssertionError("workers were started")

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for")


def check(call, kind, words):
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    with pytest.raises(kind, match=words) as caught:
        call()
    for name, value in MODEL.state_dict().items():
        assert torch.equal(value, before[name])
    assert len(str(caught.value)) < 1000
    return caught.value


@pytest.mark.parametrize("name", AT_ONCE)
def test_refused_at_once(name, monkeypatch):
    engine = Untouched(current_engine())
    monkeypatch.setattr(estimator_module, "current_engine", lambda: engine)
    error = check(*AT_ONCE[name])
    assert isinstance(error, (BigDLError, TypeError, FileNotFoundError))


@pytest.mark.parametrize("name", LATER)
def test_refused_by_the_workers(name):
    check(*LATER[name])
    assert make().evaluate(table())["rows"] == 101  # all is usable
