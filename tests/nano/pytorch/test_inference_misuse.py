"""Wrong calls: one clear error each, before any work."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from bigdl._base import workers
from bigdl._base.errors import ArgumentError, ConfigError, DataError
from bigdl.nano.pytorch import InferenceOptimizer

X = torch.ones(4, 3)


class Counting(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        type(self).calls += 1
        return self.linear(x)


def optimize(model=None, data=X, **kwargs):
    return InferenceOptimizer().optimize(Counting() if model is None else model, data, **kwargs)


def trace(*args, **kwargs):
    return InferenceOptimizer.trace(Counting(), *args, **kwargs)


def quantize(*args, **kwargs):
    return InferenceOptimizer.quantize(Counting(), *args, **kwargs)


rows = torch.utils.data.TensorDataset(X)
MISUSE = {
    # models
    "no module": (lambda: optimize(model=X), ArgumentError, "model is a Tensor"),
    "a class": (lambda: optimize(model=Counting), ArgumentError, r"give Counting\("),
    "a function": (lambda: optimize(model=print), ArgumentError, "builtin_function"),
    "save no module": (
        lambda: InferenceOptimizer.save(X, "x"),
        ArgumentError,
        "model is a Tensor",
    ),
    "a path that is a number": (
        lambda: InferenceOptimizer.load(3),
        ArgumentError,
        "path takes a folder",
    ),
    "save to a number": (
        lambda: InferenceOptimizer.save(Counting(), 5),
        ArgumentError,
        "path takes a folder",
    ),
    "quantize TorchScript": (
        lambda: InferenceOptimizer.quantize(
            torch.jit.script(nn.Linear(3, 2)), accelerator="openvino", calib_data=X
        ),
        ConfigError,
        "is TorchScript, which cannot be exported",
    ),
    "load nothing": (
        lambda: InferenceOptimizer.load("/no/such/folder"),
        FileNotFoundError,
        "/no/such/folder",
    ),
    "context of no module": (
        lambda: InferenceOptimizer.get_context(X),
        ArgumentError,
        "model is a Tensor",
    ),
    # data
    "no data": (lambda: optimize(data=None), ArgumentError, "training_data is a NoneType"),
    "a number": (lambda: optimize(data=3), ArgumentError, "training_data is a int"),
    "text": (lambda: optimize(data="x.npz"), ArgumentError, "training_data is a str"),
    "rows": (lambda: optimize(data=rows), ArgumentError, r"DataLoader\(training_data"),
    "an empty list": (lambda: optimize(data=[]), DataError, "training_data is an empty list"),
    "a used iterator": (lambda: optimize(data=iter(())), DataError, "need a fresh one"),
    "validation": (lambda: optimize(validation_data=3), ArgumentError, "validation_data is a int"),
    "a sample": (lambda: optimize(input_sample=[X]), ArgumentError, "input_sample is a list"),
    # keywords
    "unknown": (lambda: optimize(valid_data=X), ArgumentError, "Did you mean 'validation_data'"),
    "nearest": (lambda: optimize(budget=9), ArgumentError, "Did you mean 'budget_s'"),
    "trace unknown": (lambda: trace(X, acelerator="x"), ArgumentError, "'accelerator'"),
    # values
    "metric": (lambda: optimize(metric="f1"), ArgumentError, "metric takes"),
    "a sample as metric": (lambda: optimize(metric=X), ArgumentError, "metric takes"),
    "direction": (lambda: optimize(direction="max"), ConfigError, "Did you mean 'maximize'"),
    "objective": (lambda: optimize(objective="speed"), ConfigError, "'latency' or 'throughput'"),
    "budget": (lambda: optimize(budget_s=0), ConfigError, "budget_s=0"),
    "budget text": (lambda: optimize(budget_s="3m"), ArgumentError, "budget_s takes seconds"),
    "timeout": (lambda: optimize(method_timeout_s=-1), ConfigError, "method_timeout_s=-1"),
    "includes text": (lambda: optimize(includes="bf16"), ArgumentError, r"Did you mean \['bf16'"),
    "includes name": (lambda: optimize(includes=["openvno_int8"]), ConfigError, "'openvino_int8'"),
    "includes none": (lambda: optimize(includes=[]), ConfigError, "includes nothing"),
    "includes number": (lambda: optimize(includes=[3]), ArgumentError, "names of methods"),
    "excludes original": (lambda: optimize(excludes=["original"]), ConfigError, "'original'"),
    "both": (
        lambda: optimize(includes=["bf16"], excludes=["bf16"]),
        ConfigError,
        "both name bf16",
    ),
    "contradiction": (
        lambda: optimize(includes=["bf16"], accelerator="openvino"),
        ConfigError,
        "leave out",
    ),
    "nothing left": (
        lambda: optimize(accelerator="onnxruntime", precision="bf16"),
        ConfigError,
        "No method is left",
    ),
    "accelerator": (lambda: optimize(accelerator="openvno"), ConfigError, "'openvino'"),
    "precision": (lambda: optimize(precision="fp16"), ConfigError, "No precision 'fp16'"),
    "trace accelerator": (lambda: trace(X, "onnx"), ConfigError, "No accelerator 'onnx'"),
    "trace number": (lambda: trace(X, 3), ArgumentError, "accelerator takes a name"),
    "trace no sample": (lambda: trace(), ConfigError, "input_sample"),
    "quantize fp32": (lambda: quantize("fp32", calib_data=X), ConfigError, r"trace\(\) makes"),
    "quantize int4": (lambda: quantize("int4", calib_data=X), ConfigError, "'int8' or 'bf16'"),
    "quantize a loader": (lambda: quantize(X), ArgumentError, "precision takes"),
    "no calibration": (lambda: quantize(accelerator="openvino"), ConfigError, "give calib_data"),
    "criterion": (
        lambda: quantize(calib_data=X, accuracy_criterion="1%"),
        ArgumentError,
        "accuracy_criterion takes",
    ),
    "criterion range": (
        lambda: quantize(calib_data=X, accuracy_criterion=1.5),
        ConfigError,
        "out of range",
    ),
    "criterion without data": (
        lambda: quantize("bf16", input_sample=X, accuracy_criterion=0.01),
        ConfigError,
        "needs data to measure on",
    ),
    # BigDL 2.x
    "jit": (lambda: trace(X, accelerator="jit"), ConfigError, "use accelerator='compile'"),
    "jit filter": (lambda: optimize(accelerator="jit"), ConfigError, "use 'compile'"),
    "use_ipex": (lambda: trace(X, use_ipex=True), ArgumentError, r"quantize\(model, 'bf16'\)"),
    "thread_num": (lambda: trace(X, thread_num=4), ArgumentError, "torch.set_num_threads"),
    "channels_last": (lambda: trace(X, channels_last=True), ArgumentError, "includes="),
    "openvino_config": (
        lambda: trace(X, "openvino", openvino_config={}),
        ArgumentError,
        "OpenVinoConfig",
    ),
    "session options": (
        lambda: trace(X, "onnxruntime", onnxruntime_session_options=1),
        ArgumentError,
        "OnnxRuntimeConfig",
    ),
    "eval_func": (
        lambda: quantize(calib_data=X, eval_func=print),
        ArgumentError,
        r"metric=fn\(model, loader\)",
    ),
    "approach": (
        lambda: quantize(calib_data=X, approach="dynamic"),
        ArgumentError,
        "'quantization': 'dynamic'",
    ),
    "tuning": (
        lambda: quantize(calib_data=X, tuning_strategy="bayesian"),
        ArgumentError,
        "accuracy_criterion",
    ),
    "search_mode": (lambda: optimize(search_mode="grid"), ArgumentError, "includes="),
    "both calibrations": (
        lambda: quantize(calib_data=X, calib_dataloader=X),
        ArgumentError,
        "both 'calib_dataloader' and 'calib_data'",
    ),
    "higher_is_better": (
        lambda: quantize(
            calib_data=X, accuracy_criterion={"relative": 0.1, "higher_is_better": True}
        ),
        ConfigError,
        "direction=",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case, monkeypatch):
    call, error, text = MISUSE[case]

    def started(*args, **kwargs):
        pytest.fail("a process was started")

    monkeypatch.setattr(workers.Workers, "_start_nursery", started)
    monkeypatch.setattr(Counting, "calls", 0)
    before = time.monotonic()
    with pytest.raises(error, match=text) as caught:
        call()
    assert time.monotonic() - before < 5
    assert Counting.calls == 0
    assert len(str(caught.value).splitlines()) <= 3
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_ipex": False, "thread_num": None, "logging": False},
        {"inplace": False, "output_tensors": True, "device": "CPU", "simplification": True},
    ],
)
def test_old_arguments_that_ask_for_nothing_still_work(arguments):
    model = trace(X, "onnxruntime", **arguments)
    assert model(X).shape == (4, 2)


def test_an_old_name_of_an_argument_works():
    model = quantize(accelerator="onnxruntime", calib_dataloader=[X])
    assert (model.name, model(X).shape) == ("onnxruntime_int8", (4, 2))


def test_an_accelerated_model_is_not_accelerated_again():
    model = trace(X, "onnxruntime")
    with pytest.raises(ArgumentError, match=r"accelerated already \(onnxruntime_fp32\)"):
        InferenceOptimizer.trace(model, X)
