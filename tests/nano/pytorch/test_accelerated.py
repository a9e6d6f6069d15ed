"""Accelerated models as their users meet them: any input form, any misuse, nothing disturbed."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
import threading
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from bigdl.errors import (
    ArgumentError,
    BigDLError,
    ConfigError,
    DataError,
    MissingDependencyError,
    NotReadyError,
)
from bigdl.nano.accelerators.base import Calibration
from bigdl.nano.pytorch.inference.accelerated import AcceleratedModule, build

FLAT = ("onnxruntime", "openvino")
FORMS = ("eager", *FLAT)

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    note: str = "as it was"
    extra: torch.Tensor | None = None


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads that wait for each other take ages on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigdl._base.machine.cores", lambda: 1)
        yield
    torch.set_num_threads(threads)


def make(model, sample, accelerator, **more):
    more.setdefault("precision", "fp32")
    return build(model, name=accelerator, accelerator=accelerator, sample=sample, **more)


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(4, 5),
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared():
    """One model in each form, for tests that only look."""
    model = small()
    x = torch.randn(4, 3, 8, 8)
    return model, {form: make(model, x, form) for form in FORMS}


# --- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [0, 1, 3, 9])
def test_the_originals_results(shared, form, rows):
    model, fast = shared
    x = torch.randn(rows, 3, 8, 8)
    wanted = copy.deepcopy(model).eval()(x)
    found = fast[form](x)
    assert found.dtype is wanted.dtype
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_in_any_layout_that_need_gradients_or_none(shared, form):
    _model, fast = shared
    x = torch.randn(4, 3, 8, 8)
    wanted = fast[form](x)
    for odd in (
        x.to(memory_format=torch.channels_last),
        x.expand(4, 3, 8, 8),
        torch.cat([x, x], 3)[..., :8],
        x.clone().requires_grad_(),
        nn.Parameter(x.clone()),
    ):
        before = odd.detach().clone()
        found = fast[form](odd)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert not found.requires_grad
        assert torch.equal(odd, before)


@pytest.mark.parametrize("form", FORMS)
def test_under_any_gradient_mode(shared, form):
    _, fast = shared
    x = torch.randn(2, 3, 8, 8)
    wanted = fast[form](x)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            found = fast[form](x)
        assert torch.equal(found, wanted)
        found += 1  # an ordinary tensor of the caller's


@pytest.mark.parametrize("form", FORMS)
def test_built_in_inference_mode(form):
    with torch.inference_mode():
        fast = make(small(), torch.randn(2, 3, 8, 8), form)
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(fast(x), small().eval()(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_threads_share_one_model(shared, form):
    _, fast = shared
    jobs = [torch.randn(n, 3, 8, 8) for n in (1, 2, 3, 5)]
    wanted = [fast[form](job) for job in jobs]
    wrong = []

    def work(number):
        try:
            for _ in range(25):
                torch.testing.assert_close(fast[form](jobs[number]), wanted[number])
        except Exception as exc:  # noqa: BLE001  (handed on to the test)
            wrong.append(exc)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Shapes(nn.Module):
    """Returns whatever ``form`` says, made of two tensors."""

    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(4, 3), form

    def forward(self, x):
        a, b = self.linear(x), x.sum(1)
        return {
            "tuple": lambda: (a, b),
            "list": lambda: [a, (b, None)],
            "dict": lambda: {"a": a, "b": [b], "name": "text", 3: a * 2},
            "ordered": lambda: OrderedDict(z=a, a=b),
            "named": lambda: Pair(a, b),
            "dataclass": lambda: Answer(a, extra=b),
            "returned": lambda: torch.max(a, 1),
            "twice": lambda: (a, a),
            "input": lambda: (x, a),
            "weight": lambda: (a, self.linear.weight),
            "integers": lambda: {
                "best": a.argmax(1),
                "positive": a > 0,
                "small": a.to(torch.int8),
            },
            "half": lambda: (a.half(), a.bfloat16(), a.double()),
        }[self.form]()


RESULTS = (
    "tuple", "list", "dict", "ordered", "named", "dataclass", "returned", "twice", "input",
    "weight", "integers", "half",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("result", RESULTS)
def test_results_keep_their_structure_and_types(form, result):
    model = Shapes(result)
    fast = make(model, torch.randn(2, 4), form)
    x = torch.randn(5, 4)
    with torch.no_grad():
        wanted = model(x)
    found = fast(x)
    same(found, wanted)
    x_before = x.clone()
    for tensor in tensors_in(found):
        tensor.zero_()  # must reach neither the inputs nor the model
    assert torch.equal(x, x_before)
    same(fast(x), wanted)


def tensors_in(value):
    from bigdl.nano.pytorch.export.structure import flatten

    return flatten(value)[0]


def same(found, wanted):
    from bigdl.nano.pytorch.export.structure import flatten

    (one, form), (other, wanted_form) = flatten(found), flatten(wanted)
    assert form == wanted_form
    assert type(found) is type(wanted)
    for a, b in zip(one, other, strict=True):
        assert a.dtype is b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(
            a, b, rtol=1e-2 if b.dtype is torch.bfloat16 else 1e-3, atol=1e-4
        )


# --- arguments --------------------------------------------------------------------------------


class Calls(nn.Module):
    """Every kind of argument."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, /, y, scale=1.0, *, mask=None, names=("a",), flags=None):
        out = self.linear(x + y) * scale
        if mask is not None:
            out = out * mask
        return out if names == ("a",) else (out, out)


@pytest.mark.parametrize("form", FORMS)
class TestArguments:
    def test_by_position_or_keyword_or_left_out(self, form):
        model = Calls()
        x, y = torch.randn(2, 4), torch.randn(2, 4)
        fast = make(model, (x, y), form)
        with torch.no_grad():
            wanted = model(x, y)
        for found in (
            fast(x, y), fast(x, y=y), fast(x, y, 1.0), fast(x, y, scale=1.0),
            fast(x, y, mask=None, names=("a",)),
        ):  # fmt: skip
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    def test_a_constant_of_the_sample_is_kept(self, form):
        model = Calls()
        x, y = torch.randn(2, 4), torch.randn(2, 4)
        fast = make(model, (x, y, 3.0), form)
        with torch.no_grad():
            wanted = model(x, y, 3.0)
        torch.testing.assert_close(fast(x, y, 3.0), wanted, rtol=1e-4, atol=1e-5)
        if form in FLAT:
            with pytest.raises(ArgumentError, match=r"scale=2\.0"):
                fast(x, y, 2.0)
            with pytest.raises(BigDLError, match="scale"):
                fast(x, y)  # the default is another value

    def test_what_the_sample_left_out_is_right_or_an_error(self, form):
        model = Calls()
        x, y = torch.randn(2, 4), torch.randn(2, 4)
        fast = make(model, (x, y), form)
        with torch.no_grad():
            wanted = model(x, y, 2.0, mask=torch.zeros(2, 3))
        if form in FLAT:
            with pytest.raises(ArgumentError, match=r"scale=2\.0.*default \(1\.0\)"):
                fast(x, y, 2.0)
            with pytest.raises(ArgumentError, match="mask"):
                fast(x, y, mask=torch.zeros(2, 3))
        else:
            torch.testing.assert_close(fast(x, y, 2.0, mask=torch.zeros(2, 3)), wanted)

    def test_unknown_and_missing_ones(self, form):
        x, y = torch.randn(2, 4), torch.randn(2, 4)
        fast = make(Calls(), (x, y), form)
        with pytest.raises(TypeError, match=r"skale.*Did you mean 'scale'"):
            fast(x, y, skale=1.0)
        with pytest.raises(TypeError, match="y"):
            fast(x)
        with pytest.raises(TypeError):
            fast(x, y, 1.0, 2.0)
        with pytest.raises(TypeError):
            fast()

    def test_a_dict_by_keyword(self, form):
        model = Calls()
        x = {"y": torch.randn(2, 4), "mask": torch.ones(2, 3)}
        fast = make(_Keywords(model), x, form)
        with torch.no_grad():
            wanted = model(x["y"], x["y"], mask=x["mask"])
        torch.testing.assert_close(fast(**x), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast(mask=x["mask"], y=x["y"]), wanted, rtol=1e-4, atol=1e-5)

    def test_nested_inputs(self, form):
        model = _Nested()
        batch = {"a": torch.randn(2, 4), "more": [torch.randn(2, 4), 2, None]}
        fast = make(model, (batch,), form)
        again = {"more": [torch.randn(3, 4), 2, None], "a": torch.randn(3, 4)}
        with torch.no_grad():
            wanted = model(again)
        torch.testing.assert_close(fast(again), wanted, rtol=1e-4, atol=1e-5)
        if form in FLAT:
            with pytest.raises(BigDLError, match="batch"):
                fast({"a": torch.randn(3, 4)})
            with pytest.raises(BigDLError, match="batch"):
                fast({"a": torch.randn(3, 4), "more": [torch.randn(3, 4), 3, None]})

    def test_any_number_of_positional_inputs(self, form):
        model = _Many()
        xs = tuple(torch.randn(2, 4) for _ in range(3))
        fast = make(model, xs, form)
        torch.testing.assert_close(fast(*xs), sum(xs), rtol=1e-5, atol=1e-5)
        if form in FLAT:
            with pytest.raises(DataError):
                fast(*xs[:2])


class _Keywords(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *, y, mask=None):
        return self.inner(y, y, mask=mask)


class _Nested(nn.Module):
    def forward(self, batch):
        other, factor, nothing = batch["more"]
        assert nothing is None
        return batch["a"] + other * factor


class _Many(nn.Module):
    def forward(self, *xs):
        return sum(xs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.randn(3, 8, 8), r"shape \(3, 8, 8\).*\(any, 3, 8, 8\)"),
        (torch.randn(2, 4, 8, 8), r"axis 1 in dynamic_axes"),
        (torch.randn(2, 3, 8, 9), r"axis 3 in dynamic_axes"),
        (torch.randn(2, 3, 8, 8, dtype=torch.float64), "float64.*float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64.*float32"),
        (torch.randn(2, 3, 8, 8).bfloat16(), "bfloat16.*float32"),
        (torch.randn(2, 3, 8, 8, device="meta"), "meta"),
        (torch.randn(2, 3, 8, 8).to_sparse(), "sparse"),
    ],
)
def test_wrong_tensors(shared, form, x, text):
    _, fast = shared
    with pytest.raises(DataError, match=text):
        fast[form](x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x", [None, 1.0, [1.0], "text", torch.randn(2, 3, 8, 8).numpy()])
def test_what_is_no_tensor(shared, form, x):
    _, fast = shared
    with pytest.raises(TypeError, match=r"input is a (NoneType|float|list|str|ndarray)"):
        fast[form](x)


# --- nothing is disturbed ---------------------------------------------------------------------


class Busy(nn.Module):
    """Counts its calls, keeps what it saw, draws random numbers, writes into its input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(1))
        self.calls, self.kept, self.lock = 0, [], threading.Lock()

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.kept.append(x)
        x.mul_(2)
        torch.rand(1)
        return self.frozen(torch.relu(self.linear(x)))


@pytest.mark.parametrize("form", FORMS)
def test_the_caller_s_model_inputs_and_streams_are_left_alone(form):
    model = Busy()
    model.linear.eval()
    model.train()
    model.frozen.eval()
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    identity = [id(p) for p in model.parameters()]
    weights = copy.deepcopy(dict(model.state_dict()))
    stream = torch.get_rng_state()
    threads = torch.get_num_threads()
    x = torch.randn(3, 4)
    before = x.clone()
    torch.set_rng_state(stream)
    fast = make(model, x, form)
    assert torch.equal(torch.get_rng_state(), stream)
    found = fast(x)
    assert torch.equal(x, before)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [id(p) for p in model.parameters()] == identity
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert (model.calls, model.kept) == (0, [])
    assert torch.get_num_threads() == threads
    with torch.no_grad():
        wanted = copy_of(model)(x.clone())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def copy_of(model):
    lock, model.lock = model.lock, None
    twin = copy.deepcopy(model).eval()
    model.lock = lock
    return twin


@pytest.mark.parametrize("form", FORMS)
def test_a_snapshot_training_the_original_does_not_change_it(form):
    model = small()
    x = torch.randn(2, 3, 8, 8)
    fast = make(model, x, form)
    before = fast(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(fast(x), before)


@pytest.mark.parametrize("form", FORMS)
def test_mixed_modes_are_compiled_as_eval(form):
    model = small().train()
    x = torch.randn(4, 3, 8, 8)
    fast = make(model, x, form)
    torch.testing.assert_close(
        fast(x), copy.deepcopy(model).eval()(x).detach(), rtol=1e-4, atol=1e-5
    )


def test_non_leaf_attributes_and_old_weight_norm():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    model(torch.randn(2, 4))  # the weight is now computed with gradients, which cannot be copied
    x = torch.randn(2, 4)
    for form in FORMS:
        fast = make(model, x, form)
        torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-5)


# --- a module among modules -------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
class TestAsModule:
    def test_what_it_says_of_itself(self, shared, form):
        _, fast = shared
        model = fast[form]
        assert isinstance(model, nn.Module)
        assert (model.name, model.accelerator, model.precision) == (form, form, "fp32")
        assert form in repr(model)
        assert model.threads >= 1

    def test_the_original_s_attributes_and_methods(self, form):
        model = small()
        model.classes = ["a", "b"]
        model.greet = lambda: "hello"
        fast = make(model, torch.randn(2, 3, 8, 8), form)
        assert fast.classes is model.classes
        assert fast.greet() == "hello"
        assert fast[0] is model[0] if hasattr(type(fast), "__getitem__") else True
        assert "classes" in dir(fast)
        with pytest.raises(AttributeError):
            fast.no_such_thing  # noqa: B018
        fast.mine = 1
        assert not hasattr(model, "mine")

    def test_modes(self, shared, form):
        _, fast = shared
        model = fast[form]
        assert model.eval() is model
        assert model.train(False) is model
        assert not model.training
        with pytest.raises(NotReadyError, match="cannot be trained"):
            model.train()
        with pytest.raises(NotReadyError):
            model.requires_grad_()

    def test_weights(self, shared, form):
        _, fast = shared
        model = fast[form]
        assert list(model.parameters()) == list(model.buffers()) == []
        with pytest.raises(NotReadyError, match="save"):
            model.state_dict()
        with pytest.raises(NotReadyError):
            model.load_state_dict({})
        outer = nn.Sequential(nn.Linear(2, 2), model)
        assert list(outer.state_dict()) == ["0.weight", "0.bias"]

    def test_moves(self, shared, form):
        _, fast = shared
        model = fast[form]
        assert model.to("cpu") is model
        assert model.float() is model
        for move in (model.half, model.double, lambda: model.to("meta")):
            with pytest.raises(ConfigError, match="make it anew"):
                move()

    def test_copies(self, form):
        fast = make(small(), torch.randn(2, 3, 8, 8), form)
        x = torch.randn(2, 3, 8, 8)
        wanted = fast(x)
        twins = [copy.deepcopy(fast), copy.copy(fast), fast.clone()]
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(fast)
        fast.close()
        fast.close()
        with pytest.raises(NotReadyError, match="closed"):
            fast(x)
        for twin in twins:
            assert isinstance(twin, AcceleratedModule)
            assert torch.equal(twin(x), wanted)

    def test_hooks(self, form):
        fast = make(small(), torch.randn(2, 3, 8, 8), form)
        seen = []
        fast.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        fast(torch.randn(3, 3, 8, 8))
        assert seen == [torch.Size([3, 5])]


# --- saying no before any work ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"accelerator": "onnx"}, ConfigError, "No accelerator 'onnx'.*onnxruntime"),
        ({"precision": "fp16"}, ConfigError, "No precision 'fp16'"),
        ({"precision": "int8"}, ConfigError, "torch_int8"),
        ({"sample": None}, ConfigError, "needs an input_sample"),
        ({"sample": [torch.randn(2, 3, 8, 8)]}, TypeError, "input_sample is a list"),
        ({"sample": ()}, TypeError, "missing a required argument: 'input'"),
        ({"sample": {"x": torch.randn(2, 3, 8, 8)}}, TypeError, "input"),
        ({"sample": {1: torch.randn(2, 3, 8, 8)}}, TypeError, "text as keys"),
        ({"sample": (torch.randn(2, 3, 8, 8), 1)}, TypeError, "too many"),
        ({"sample": (5,)}, TypeError, "holds no tensor"),
        ({"sample": (torch.randn(2, 3, 8, 8).numpy(),)}, TypeError, "no tensor|NumPy"),
        ({"sample": torch.randn(2, 4, 8, 8)}, ConfigError, "cannot run its sample"),
        ({"dynamic_axes": {"y": [0]}}, ConfigError, "names 'y'"),
        ({"dynamic_axes": {"input": [4]}}, ConfigError, "axis 4"),
        ({"dynamic_axes": {"input": ["0"]}}, TypeError, "'0'"),
        ({"dynamic_axes": {"input": [1]}}, ConfigError, "cannot take other lengths"),
        ({"dynamic_axes": [0]}, TypeError, "dynamic_axes is a list"),
        ({"config": {"channels_lst": True}}, TypeError, "Did you mean 'channels_last'"),
        ({"config": {"channels_last": 1}}, ConfigError, "need True or False"),
        ({"threads": 0}, ConfigError, "threads=0"),
        ({"model": torch.randn(2)}, TypeError, "need a torch.nn.Module"),
        ({"accelerator": "ipex", "precision": "bf16"}, ConfigError, "2.8.0"),
        ({"accelerator": "inc", "precision": "int8"}, ConfigError, "torch_int8"),
        ({"accelerator": "openvino", "precision": "int8"}, ConfigError, "calib_data"),
        ({"accelerator": "openvino", "config": {"preset": "mixed"}}, ConfigError, "int8.*only"),
        ({"accelerator": "onnxruntime", "precision": "bf16"}, ConfigError, "no bf16"),
    ],
)
def test_misuse(change, kind, text):
    arguments = {
        "model": small(), "sample": torch.randn(2, 3, 8, 8), "accelerator": "eager",
        "precision": "fp32", "name": "mine",
    } | change  # fmt: skip
    model = arguments.pop("model")
    with pytest.raises(kind, match=text) as caught:
        build(model, **arguments)
    assert isinstance(caught.value, BigDLError)


def test_another_accelerator_s_options():
    from bigdl.nano.accelerators.openvino import OpenVinoConfig

    with pytest.raises(TypeError, match="takes EagerConfig"):
        make(small(), torch.randn(2, 3, 8, 8), "eager", config=OpenVinoConfig())


def test_all_faults_of_options_at_once():
    from bigdl.nano.accelerators.openvino import OpenVinoConfig

    with pytest.raises(ConfigError, match=r"hint='fast'.*own_shapes=-1"):
        OpenVinoConfig(hint="fast", own_shapes=-1)


@pytest.mark.parametrize("module", ["onnxruntime", "openvino"])
def test_a_missing_package_is_said_with_its_remedy(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'bigdl-next\[inference\]'"):
        make(small(), torch.randn(2, 3, 8, 8), module)


def test_no_bf16_instructions(monkeypatch):
    monkeypatch.setattr("bigdl._base.machine.isa", lambda: frozenset({"avx2", "avx512"}))
    for accelerator in ("eager", "openvino", "compile"):
        with pytest.raises(ConfigError, match="no bf16 instructions"):
            make(small(), torch.randn(2, 3, 8, 8), accelerator, precision="bf16")


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        make(small(), torch.randn(2, 3, 8, 8), "compile")


def test_tensorflow_loaded_before_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", object())
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr("bigdl.nano.accelerators.here.is_installed", lambda name: True)
    for accelerator in ("compile", "torch_int8"):
        precision = "int8" if accelerator == "torch_int8" else "fp32"
        with pytest.raises(ConfigError, match="import triton before tensorflow"):
            make(small(), torch.randn(2, 3, 8, 8), accelerator, precision=precision)
    with pytest.raises(ConfigError, match="import triton before tensorflow"):
        make(small(), torch.randn(2, 3, 8, 8), "onnxruntime")


def test_int8_without_batches():
    for accelerator in FLAT:
        with pytest.raises(ConfigError, match="no batch"):
            make(
                small(), torch.randn(2, 3, 8, 8), accelerator,
                precision="int8", calibration=Calibration(batches=[]),
            )  # fmt: skip
