"""int8 forms of trained networks: they answer as the original does, or within the limit."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bigdl.errors import AccuracyError, ConfigError
from bigdl.nano.accelerators.base import Calibration
from bigdl.nano.pytorch.inference.accelerated import build

INT8 = ("openvino", "onnxruntime", "torch_int8")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads that wait for each other take ages on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigdl._base.machine.cores", lambda: 1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    """A small network with reused activations, trained on real digits; pictures, labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    y = torch.from_numpy(data.target)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = _Digits()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        order = torch.randperm(len(x))
        train, test = order[:1200], order[1200:]
        for _ in range(12):
            for part in train.split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()
    return model.eval(), x[train], x[test], y[test]


class _Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)  # one module for all calls, as in torchvision's ResNets
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)) + x)
        return self.head(F.max_pool2d(x, 2).flatten(1))


def batches(x, rows=64, count=6):
    return [(part.numpy(),) for part in x[: rows * count].split(rows)]


def quantized(model, x, accelerator, **calibration):
    given = {"batches": batches(x)} | calibration
    return build(
        model, name=accelerator, accelerator=accelerator, precision="int8", sample=x[:8],
        calibration=Calibration(**given),
    )  # fmt: skip


def accuracy_on(x, y):
    """Accuracy of a flat call, the whole set in batches."""

    def validate(call):
        answers = [call(part.numpy())[0].argmax(1) for part in x.split(100)]
        return float((np.concatenate(answers) == y.numpy()).mean())

    return validate


@pytest.mark.parametrize("accelerator", INT8)
def test_digits(digits, accelerator):
    model, train, test, labels = digits
    with torch.no_grad():
        wanted = model(test).argmax(1)
    assert (wanted == labels).float().mean() > 0.95  # it has learnt something
    found = quantized(model, train, accelerator)(test).argmax(1)
    assert (found == wanted).float().mean() >= 0.97


def test_the_quantized_layers_are_int8(digits, tmp_path):
    """What is saved holds 8-bit weights: the file is a fraction of the original's."""
    from bigdl.nano.pytorch.inference.storage import save

    wide = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    x = torch.randn(64, 256)
    for accelerator, file in (("openvino", "model.bin"), ("onnxruntime", "model.onnx")):
        save(quantized(wide, x, accelerator), tmp_path / accelerator)
        size = (tmp_path / accelerator / file).stat().st_size
        floats = 4 * sum(parameter.numel() for parameter in wide.parameters())
        assert size < 0.45 * floats


@pytest.mark.parametrize("accelerator", INT8)
def test_a_limit_that_is_kept(digits, accelerator):
    model, train, test, labels = digits
    validate = accuracy_on(test, labels)
    with torch.no_grad():
        baseline = float((model(test).argmax(1) == labels).float().mean())
    fast = quantized(
        model, train, accelerator, validate=validate, max_drop=0.02, baseline=baseline
    )
    kept = validate(lambda array: [fast(torch.from_numpy(array)).numpy()])
    assert kept >= baseline * 0.98


class _Fragile(nn.Module):
    """Its answer hangs on a difference far below the range of what it is computed from."""

    def __init__(self):
        super().__init__()
        self.spread, self.gather = nn.Linear(4, 64), nn.Linear(64, 4)
        with torch.no_grad():
            self.spread.weight.zero_()
            self.spread.bias.zero_()
            self.gather.weight.zero_()
            self.gather.bias.zero_()
            for i in range(4):
                self.spread.weight[i, i] = 1.0
                self.gather.weight[i, i] = 1.0
            self.spread.bias[4:] = 1e4  # sets the range of the activations, and goes nowhere

    def forward(self, x):
        return self.gather(torch.relu(self.spread(x)))


@pytest.mark.parametrize("accelerator", ["onnxruntime", "torch_int8"])
def test_a_limit_that_cannot_be_kept(accelerator):
    model, x = _Fragile(), torch.rand(256, 4)
    labels = x.argmax(1)
    with pytest.raises(AccuracyError, match=r"accuracy 0\.\d+.*original 1.*at most 0\.01"):
        quantized(
            model, x, accelerator, validate=accuracy_on(x, labels), max_drop=0.01, relative=False
        )


def test_openvino_leaves_harmful_layers_in_full_precision_or_says_no():
    model, x = _Fragile(), torch.rand(256, 4)
    labels = x.argmax(1)
    validate = accuracy_on(x, labels)
    plain = quantized(model, x, "openvino")
    assert validate(lambda a: [plain(torch.from_numpy(a)).numpy()]) < 0.9
    try:
        kept = quantized(model, x, "openvino", validate=validate, max_drop=0.01)
    except AccuracyError as exc:
        said = str(exc)
    else:
        said = None
        assert validate(lambda a: [kept(torch.from_numpy(a)).numpy()]) >= 0.99
    assert said is None or "0.01" in said


def test_lower_may_be_better(digits):
    model, train, test, labels = digits

    def loss(call):
        scores = [torch.from_numpy(call(part.numpy())[0]) for part in test.split(100)]
        return float(F.cross_entropy(torch.cat(scores), labels))

    fast = quantized(model, train, "openvino", validate=loss, max_drop=0.2, higher_is_better=False)
    assert fast.precision == "int8"
    with pytest.raises(AccuracyError, match="OpenVINO int8"):
        quantized(
            model, train, "openvino", validate=lambda call: loss(call),
            max_drop=-0.5, higher_is_better=False,
        )  # fmt: skip


@pytest.mark.parametrize("accelerator", INT8)
def test_a_metric_s_own_error_is_raised_as_it_is(digits, accelerator):
    model, train, _, _ = digits

    def validate(call):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        quantized(model, train, accelerator, validate=validate, max_drop=0.1)


@pytest.mark.parametrize("accelerator", ["openvino", "torch_int8"])
def test_nothing_to_quantize(accelerator):
    model = nn.Sequential(nn.Flatten(), nn.Softmax(1))
    with pytest.raises(ConfigError, match="nothing to quantize"):
        quantized(model, torch.randn(64, 4), accelerator)


def test_dynamic_ranges_need_no_data():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    x = torch.randn(32, 64)
    fast = build(
        model, name="dynamic", accelerator="onnxruntime", precision="int8", sample=x,
        config={"quantization": "dynamic"},
    )  # fmt: skip
    wanted = model(x).detach()
    assert (fast(x) - wanted).norm() < 0.05 * wanted.norm()
    with pytest.raises(ConfigError, match="no matrix product"):
        build(
            nn.Conv2d(1, 2, 3), name="dynamic", accelerator="onnxruntime", precision="int8",
            sample=torch.randn(2, 1, 8, 8), config={"quantization": "dynamic"},
        )  # fmt: skip


def test_quantizing_prints_nothing_and_leaves_loggers_alone(digits, capfd):
    import logging

    model, train, _, _ = digits
    root = logging.getLogger()
    before = root.handlers[:], root.level, root.disabled
    capfd.readouterr()
    for accelerator in ("openvino", "onnxruntime"):
        quantized(model, train, accelerator)
    assert capfd.readouterr().out == ""
    assert (root.handlers, root.level, root.disabled) == before


@pytest.mark.parametrize("accelerator", INT8)
def test_random_streams_of_the_caller(digits, accelerator):
    import random

    model, train, _, _ = digits
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    wanted = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    quantized(model, train, accelerator)
    assert (torch.rand(1), np.random.rand(), random.random()) == wanted


# --- a deep network that others have trained --------------------------------------------------


def shared_data():
    named = os.environ.get("BIGDL_TEST_DATA")
    return Path(named) if named else ROOT.parent / "shared" / "data"


class _Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.more, self.stride = (after - before) // 2, stride

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more))
        return self.relu(y + x)


class _CifarResNet(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)

        def stage(before, after, stride):
            first = _Block(before, after, stride)
            return nn.Sequential(first, *(_Block(after, after, 1) for _ in range(blocks - 1)))

        self.layer1, self.layer2 = stage(16, 16, 1), stage(16, 32, 2)
        self.layer3, self.linear = stage(32, 64, 2), nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", INT8)
def test_resnet56_answers_as_before(accelerator):
    folder = shared_data()
    if not (folder / "weights" / "resnet56_cifar10.pth").is_file():
        pytest.skip("needs the shared data: name its folder in BIGDL_TEST_DATA")
    from PIL import Image

    model = _CifarResNet(9)
    model.load_state_dict(torch.load(folder / "weights" / "resnet56_cifar10.pth"))
    with zipfile.ZipFile(folder / "cifar10" / "test.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        pictures = np.stack([np.asarray(Image.open(archive.open(name))) for name in names])
    order = np.random.default_rng(0).permutation(len(pictures))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(pictures[order]) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        wanted = torch.cat([model.eval()(part).argmax(1) for part in x.split(100)])
    fast = quantized(model, x, accelerator, batches=batches(x, 32, 10))
    found = torch.cat([fast(part).argmax(1) for part in x.split(100)])
    assert (found == wanted).float().mean() >= 0.97
