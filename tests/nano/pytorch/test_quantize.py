"""quantize: calibration, accuracy that is kept or refused; get_context; Fig. 3's ONNX mode."""

from __future__ import annotations

import copy
import pickle

import cloudpickle
import pytest
import torch
from torch import nn

from bigdl._base.errors import AccuracyError, ArgumentError, ConfigError, NotReadyError
from bigdl.nano.accelerators.onnxruntime import OnnxRuntimeConfig
from bigdl.nano.pytorch import InferenceOptimizer
from bigdl.nano.pytorch.inference.onnx_mode import add_onnx_mode

quantize = InferenceOptimizer.quantize


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


@pytest.fixture(scope="module")
def batches(net):
    x = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = copy.deepcopy(net).eval()(x).argmax(1)
    return list(zip(x.split(16), y.split(16), strict=True))  # 16, 16, 16, 2


def accuracy(pred, target):
    return (pred.argmax(1) == target).float().mean()


def test_a_train_mode_model_is_quantized_as_in_eval_and_stays_in_train(net, batches):
    net.train()
    state = torch.get_rng_state()
    model = quantize(net, accelerator="onnxruntime", calib_data=batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in net.modules())
    x, y = batches[0]
    assert torch.equal(model(x), model(x))  # no dropout
    assert accuracy(model(x), y) > 0.9
    assert (model.name, model.precision) == ("onnxruntime_int8", "int8")
    assert model.threads == torch.get_num_threads()


def test_a_kept_criterion_returns_the_model(net, batches):
    model = quantize(
        net,
        accelerator="onnxruntime",
        calib_data=batches,
        metric=accuracy,
        accuracy_criterion={"absolute": 0.1},
    )
    assert model.name == "onnxruntime_int8"


def test_an_unreachable_criterion_is_an_error_with_metric_value_and_limit(net, batches):
    def strict(model, loader):
        return 1.0 if _is_exact(model, net, loader) else 0.25

    with pytest.raises(AccuracyError, match=r"^strict: .*0\.25.* 1") as caught:
        quantize(
            net,
            accelerator="onnxruntime",
            calib_data=batches,
            metric=strict,
            accuracy_criterion=0.01,
        )
    assert "0.01" in str(caught.value)


def _is_exact(model, net, loader):
    still = copy.deepcopy(net).eval()
    with torch.no_grad():
        return all(torch.allclose(model(x), still(x), atol=1e-6) for x, _ in loader)


def test_agreement_needs_no_labels(net, batches):
    inputs = [x for x, _ in batches]
    model = quantize(
        net, accelerator="onnxruntime", calib_data=inputs, accuracy_criterion={"relative": 0.2}
    )
    assert model.precision == "int8"


def test_dynamic_int8_needs_no_data():
    model = quantize(
        nn.Linear(16, 4),
        accelerator="onnxruntime",
        input_sample=torch.ones(2, 16),
        config=OnnxRuntimeConfig(quantization="dynamic"),
    )
    assert model(torch.ones(3, 16)).shape == (3, 4)


@pytest.mark.usefixtures("bf16")
def test_bf16_of_torch_itself(net, batches):
    x, _ = batches[0]
    model = quantize(net, "bf16", input_sample=x)
    assert (model.name, model.accelerator, model.precision) == ("bf16", "eager", "bf16")
    assert model(x).dtype is torch.float32


def test_trace_takes_a_lightning_modules_own_example():
    model = nn.Linear(3, 2)
    model.example_input_array = torch.ones(2, 3)
    assert InferenceOptimizer.trace(model, accelerator="onnxruntime")(torch.ones(5, 3)).shape == (
        5,
        2,
    )


# --- get_context ------------------------------------------------------------------------------


def test_a_context_has_no_gradients_and_puts_everything_back(net, batches):
    model = quantize(net, accelerator="onnxruntime", calib_data=batches)
    own = torch.get_num_threads()
    context = InferenceOptimizer.get_context(model, net)
    torch.set_num_threads(own + 1)
    try:
        with context:
            assert not torch.is_grad_enabled()
            assert torch.get_num_threads() == model.threads
            with context:  # may be entered again
                assert not torch.is_grad_enabled()
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        assert torch.get_num_threads() == own + 1
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
        assert torch.is_grad_enabled()
        assert torch.get_num_threads() == own + 1
    finally:
        torch.set_num_threads(own)


def test_a_context_of_plain_models_leaves_the_threads(net):
    own = torch.get_num_threads()
    with InferenceOptimizer.get_context(net):
        assert torch.get_num_threads() == own
        assert not net(torch.ones(1, 1, 8, 8)).requires_grad


# --- ONNX mode --------------------------------------------------------------------------------


@pytest.fixture
def paper(net, batches):
    """A model of the caller's own, quantized as Fig. 3 does it."""
    model = copy.deepcopy(net).train()
    assert add_onnx_mode(model, calib_data=batches) is model
    return model


def test_onnx_mode_comes_and_goes(paper, batches):
    x, _ = batches[0]
    keys = list(paper.state_dict())
    expected = copy.deepcopy(paper).eval()(x).detach()
    assert paper.eval_onnx(quantize=True) is paper
    int8 = paper(x)
    assert not torch.equal(int8, expected)
    assert torch.allclose(int8, expected, atol=0.1 * float(expected.abs().max()))
    paper.eval_onnx()
    assert torch.allclose(paper(x), expected, atol=1e-5)
    assert not paper(x).requires_grad
    paper.exit_onnx()
    paper.eval()
    assert torch.equal(paper(x), expected)
    assert paper(x).requires_grad
    assert list(paper.state_dict()) == keys


def test_train_leaves_onnx_mode_and_eval_does_not(paper, batches):
    x, _ = batches[0]
    paper.eval_onnx(quantize=True)
    int8 = paper(x)
    paper.eval()
    assert torch.equal(paper(x), int8)
    paper.train()
    assert paper.training
    assert paper(x).requires_grad
    outer = nn.Sequential(paper)
    paper.eval_onnx(quantize=True)
    outer.train()
    assert paper(x).requires_grad


def test_changed_weights_are_noticed(paper, batches):
    with torch.no_grad():
        paper[0].weight.mul_(2)
    with pytest.raises(NotReadyError, match="weights have changed"):
        paper.eval_onnx(quantize=True)
    x, _ = batches[0]
    expected = copy.deepcopy(paper).eval()(x)
    paper.eval_onnx(input_sample=x)  # full precision is exported anew
    assert torch.allclose(paper(x), expected, atol=1e-4)


def test_copies_and_pickles_of_it_are_models_in_torch(paper, batches):
    x, _ = batches[0]
    paper.eval_onnx(quantize=True)
    expected = copy.deepcopy(paper[4])
    for again in (
        copy.deepcopy(paper),
        pickle.loads(pickle.dumps(paper)),
        cloudpickle.loads(cloudpickle.dumps(paper)),
    ):
        assert again(x).requires_grad
        assert torch.equal(again[4].weight, expected.weight)
        with pytest.raises(NotReadyError, match="no int8 form"):
            again.eval_onnx(quantize=True)
    paper.exit_onnx()


def test_wrong_calls_of_onnx_mode(paper, batches):
    x, _ = batches[0]
    with pytest.raises(ArgumentError, match="quantize takes True or False"):
        paper.eval_onnx(x, quantize="int8")
    with pytest.raises(ArgumentError, match="input_sample is a list"):
        paper.eval_onnx([x])
    paper.eval_onnx(quantize=True)
    with pytest.raises(ConfigError, match=r"call model.exit_onnx\(\) first"):
        InferenceOptimizer.trace(paper, x)
    paper.exit_onnx()


def test_a_failed_quantization_leaves_the_model_alone(net):
    model = copy.deepcopy(net)
    before = set(vars(model))
    with pytest.raises(ConfigError, match="give calib_data"):
        add_onnx_mode(model)
    assert set(vars(model)) == before
