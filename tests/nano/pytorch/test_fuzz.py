"""Generated models: right results or a clear refusal, and never a crash of the caller."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from bigdl._base import trees
from bigdl.nano.pytorch.export.axes import resize
from bigdl.nano.pytorch.inference.accelerated import build

_spec = importlib.util.spec_from_file_location(
    "fuzz_models", Path(__file__).with_name("fuzz_models.py")
)
fuzz_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz_models)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads that wait for each other take ages on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigdl._base.machine.cores", lambda: 1)
        yield
    torch.set_num_threads(threads)


QUICK = range(15)
ALL = range(200)
COMPILED = range(1000, 1015)


def seeds(quick, every):
    slow = [pytest.param(seed, marks=pytest.mark.slow) for seed in every if seed not in quick]
    return [*quick, *slow]


def check(seed, accelerator):
    """Build, compare at four numbers of rows, and see that the model was left alone."""
    model, sample = fuzz_models.make(seed)
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    original = copy.deepcopy(model).eval()
    # a clear refusal would do for a user; that there is none here, keeps it so
    fast = build(model, name="fuzz", accelerator=accelerator, precision="fp32", sample=sample)
    assert modes == [module.training for module in model.modules()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for rows in (1, 2, 3, 7):
        inputs = trees.map_leaves(lambda t, n=rows: resize(t, 0, n), sample)
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        with torch.no_grad():
            wanted = original(*args, **kwargs)
        same(fast(*args, **kwargs), wanted)


def same(found, wanted):
    def compare(a, b):
        if not isinstance(b, torch.Tensor):
            assert a == b
            return b
        assert a.dtype is b.dtype
        assert a.shape == b.shape
        assert not a.requires_grad
        if b.is_floating_point():
            scale = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * scale + 1e-6, equal_nan=True)
        else:
            assert torch.equal(a, b)
        return b

    assert type(found) is type(wanted)
    trees.map_leaves(compare, found, wanted)


@pytest.mark.parametrize("seed", seeds(QUICK, ALL))
def test_onnxruntime(seed):
    check(seed, "onnxruntime")


@pytest.mark.parametrize("seed", seeds(QUICK, ALL))
def test_openvino(seed):
    check(seed, "openvino")


@pytest.mark.slow
@pytest.mark.parametrize("seed", COMPILED)
def test_compile(seed):
    check(seed, "compile")
