"""Prediction through Nano's accelerators, and by a Predictor: the outputs of the plain model."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bigdl.errors import ArgumentError, ConfigError
from bigdl.orca import init_orca_context, stop_orca_context
from bigdl.orca.learn import Predictor

torch = pytest.importorskip("torch", reason="needs the [torch] extra")

from bigdl.nano.accelerators.here import no_bf16  # noqa: E402
from bigdl.nano.pytorch import InferenceOptimizer  # noqa: E402
from bigdl.orca.learn.pytorch import Estimator  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes")
nn = torch.nn
X = np.random.default_rng(0).standard_normal((103, 5)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def context():
    yield init_orca_context(cores=2)
    stop_orca_context()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))


def outputs(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(X)).numpy()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, left, right):
        return {"sum": self.one(left) + right, "score": self.two(right)}


@pytest.fixture(scope="module")
def onnxruntime():
    return pytest.importorskip("onnxruntime", reason="needs the [inference] extra")


def test_through_onnxruntime(onnxruntime):
    model = network()
    est = Estimator.from_torch(model)
    found = est.predict(X, batch_size=10, accelerator="onnxruntime")
    assert model.training
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, outputs(model), rtol=1e-5, atol=1e-6)


def test_weights_of_now_and_structures_are_kept(onnxruntime):
    model = TwoInputs()
    est = Estimator.from_torch(model)
    for _ in range(2):
        features = {"right": X[:, 2:], "left": X[:, :2]}
        found = est.predict(features, accelerator="onnxruntime")
        with torch.no_grad():
            wanted = model(torch.from_numpy(X[:, :2]), torch.from_numpy(X[:, 2:]))
            model.two.weight += 1
        assert set(found) == {"sum", "score"}
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], value.numpy(), rtol=1e-5, atol=1e-6)


def test_bf16_through_openvino():
    """Where the processor has it; elsewhere the workers' refusal is the caller's error."""
    pytest.importorskip("openvino", reason="needs the [inference] extra")
    model = network()
    estimator = Estimator.from_torch(model)
    if no_bf16() is not None:
        with pytest.raises(ConfigError, match="no bf16 instructions"):
            estimator.predict(X, accelerator="openvino", precision="bf16")
        return
    found = estimator.predict(X, accelerator="openvino", precision="bf16")
    np.testing.assert_allclose(found, outputs(model), atol=0.02)


@pytest.mark.parametrize("workers", [None, 1, 2, 9])
def test_a_predictor_of_an_estimator(workers):
    model = network()
    predictor = Predictor(Estimator.from_torch(model), workers=workers)
    np.testing.assert_allclose(predictor.predict(X, 7), outputs(model), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        model[0].weight.mul_(2)
    np.testing.assert_allclose(predictor.predict(X), outputs(model), rtol=1e-5, atol=1e-6)


def test_a_table_keeps_its_rows():
    pd = pytest.importorskip("pandas", reason="needs pandas")
    frame = pd.DataFrame({"a": X[:, 0], "name": "n"}, index=range(103, 0, -1))
    model = nn.Linear(1, 1)
    predictor = Predictor(Estimator.from_torch(model), workers=1)
    wanted = model(torch.from_numpy(X[:, :1])).detach().numpy().ravel()
    found = predictor.predict(frame.assign(a=frame["a"]), feature_cols="a", transform=column)
    assert list(found.columns) == ["a", "name", "prediction"]
    assert found.index.equals(frame.index)
    np.testing.assert_allclose(found["prediction"], wanted, rtol=1e-5, atol=1e-6)


def column(features):
    return np.asarray(features).reshape(-1, 1)


def test_a_predictor_of_a_saved_model(onnxruntime, tmp_path):
    model = network()
    fast = InferenceOptimizer.trace(model, torch.from_numpy(X[:4]), "onnxruntime")
    InferenceOptimizer.save(fast, tmp_path / "fast")
    found = Predictor(tmp_path / "fast", workers=2).predict(X)
    np.testing.assert_allclose(found, outputs(model), rtol=1e-5, atol=1e-6)


def saved_by_estimator(path):
    Estimator.from_torch(network()).save(path)
    return Predictor(path)


MISUSE = {
    "a model": (lambda path: Predictor(network()), ArgumentError, "an estimator or the folder"),
    "nowhere": (lambda path: Predictor(path / "none"), FileNotFoundError, "none"),
    "weights": (saved_by_estimator, ConfigError, "keeps weights but no model"),
    "workers": (lambda path: Predictor(path, workers=0), ConfigError, "workers=0"),
    "text": (lambda path: Predictor(path, workers="2"), ArgumentError, "workers='2'"),
    "name": (
        lambda path: Predictor(path, accelerator="openvin"),
        ConfigError,
        "Did you mean 'openvino'",
    ),
    "int8": (lambda path: Predictor(path, precision="int8"), ConfigError, "precision='int8'"),
    "both": (
        lambda path: Predictor(path, accelerator="compile"),
        ConfigError,
        "beside a saved model",
    ),
    "jit": (
        lambda path: Estimator.from_torch(network()).predict(X, accelerator="jit"),
        ConfigError,
        "accelerator='jit'",
    ),
    "onnx bf16": (
        lambda path: Estimator.from_torch(network()).predict(
            X, accelerator="onnxruntime", precision="bf16"
        ),
        ConfigError,
        "no bf16",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name, tmp_path):
    call, kind, words = MISUSE[name]
    with pytest.raises(kind, match=words):
        call(tmp_path)
