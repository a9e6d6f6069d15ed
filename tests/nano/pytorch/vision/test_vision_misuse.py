"""Wrong calls: one clear error each, before any picture is read."""

from __future__ import annotations

import importlib
import sys

import pytest

from bigdl.errors import ArgumentError, BigDLError, ConfigError, MissingDependencyError
from bigdl.nano.pytorch.vision import transforms as t
from bigdl.nano.pytorch.vision.datasets import ImageFolder

# call: (the builtin kind, what its text says)
MISUSES = {
    "Resize('big')": (lambda: t.Resize("big"), TypeError, r"Resize\(size='big'\).*not str"),
    "Resize('ab')": (lambda: t.Resize("ab"), TypeError, r"not str"),
    "Resize(None)": (lambda: t.Resize(None), TypeError, r"not NoneType"),
    "Resize()": (lambda: t.Resize(), TypeError, r"missing .*'size'"),
    "Resize(0)": (lambda: t.Resize(0), ValueError, r"at least 1"),
    "Resize(-5)": (lambda: t.Resize(-5), ValueError, r"at least 1"),
    "Resize((1, 2, 3))": (lambda: t.Resize((1, 2, 3)), ValueError, r"this one has 3"),
    "Resize((224, None))": (lambda: t.Resize((224, None)), TypeError, r"NoneType"),
    "Resize(sise=3)": (lambda: t.Resize(sise=3), TypeError, r"'sise'.*Did you mean 'size'"),
    "Resize(3, 'bilinear')": (
        lambda: t.Resize(3, "bilinear"),
        TypeError,
        r"Did you mean InterpolationMode.BILINEAR",
    ),
    "Resize(3, 9)": (lambda: t.Resize(3, 9), ValueError, r"0 to 5"),
    "Resize(3, max_size=0)": (lambda: t.Resize(3, max_size=0), ValueError, r"at least 1"),
    "Resize(30, max_size=20)": (
        lambda: t.Resize(30, max_size=20),
        ValueError,
        r"max_size=20.*larger than size=30",
    ),
    "Resize((3, 4), max_size=9)": (
        lambda: t.Resize((3, 4), max_size=9),
        ValueError,
        r"max_size=9.*size=\(3, 4\)",
    ),
    "RandomCrop('big')": (lambda: t.RandomCrop("big"), TypeError, r"not str"),
    "RandomCrop(None)": (lambda: t.RandomCrop(None), TypeError, r"not NoneType"),
    "CenterCrop(-1)": (lambda: t.CenterCrop(-1), ValueError, r"at least 1"),
    "RandomResizedCrop(0)": (lambda: t.RandomResizedCrop(0), ValueError, r"at least 1"),
    "RandomHorizontalFlip('x')": (
        lambda: t.RandomHorizontalFlip("x"),
        TypeError,
        r"a probability is a number, not a str",
    ),
    "RandomHorizontalFlip(1.5)": (
        lambda: t.RandomHorizontalFlip(1.5),
        ValueError,
        r"between 0 and 1",
    ),
    "RandomVerticalFlip(nan)": (
        lambda: t.RandomVerticalFlip(float("nan")),
        ValueError,
        r"between 0 and 1",
    ),
    "RandomHorizontalFlip(prob=.5)": (
        lambda: t.RandomHorizontalFlip(prob=0.5),
        TypeError,
        r"no argument 'prob'.*\['p'\]",
    ),
    "ColorJitter(brigthness=1)": (
        lambda: t.ColorJitter(brigthness=1),
        TypeError,
        r"Did you mean 'brightness'",
    ),
    "ColorJitter(hue=2)": (lambda: t.ColorJitter(hue=2), ValueError, r"hue"),
    "ColorJitter('x')": (lambda: t.ColorJitter("x"), TypeError, r"brightness"),
    "Normalize('x', 1)": (lambda: t.Normalize("x", 1), TypeError, r"needs numbers.*'x'"),
    "Normalize([None], [1])": (lambda: t.Normalize([None], [1]), TypeError, r"needs numbers"),
    "ToTensor(1)": (lambda: t.ToTensor(1), TypeError, r"too many positional"),
    "ToTensor()(3)": (lambda: t.ToTensor()(3), TypeError, r"PIL Image or ndarray"),
    "Compose(3)": (lambda: t.Compose(3), TypeError, r"a list of callables"),
    "Compose('abc')": (lambda: t.Compose("abc"), TypeError, r"a list of callables"),
    "Compose([Resize(3), 4])": (
        lambda: t.Compose([t.Resize(3), 4]),
        TypeError,
        r"entry 1 is a int, which cannot be called",
    ),
    "Compose(Resize, CenterCrop)": (
        lambda: t.Compose(t.Resize(3), t.CenterCrop(4)),
        TypeError,
        r"too many positional",
    ),
    "RandomApply([3])": (lambda: t.RandomApply([3]), TypeError, r"entry 0 is a int"),
    "RandomApply([], p=2)": (lambda: t.RandomApply([], p=2), ValueError, r"between 0 and 1"),
    "RandAugment(interpolation='x')": (
        lambda: t.RandAugment(interpolation="nearest"),
        TypeError,
        r"InterpolationMode.NEAREST",
    ),
    "transforms.RandomCropp": (lambda: t.RandomCropp, AttributeError, r"RandomCropp"),
}

FOLDERS = {
    "on_error='ignore'": ({"on_error": "ignore"}, ValueError, r"\['raise', 'skip'\]"),
    "on_error='skipp'": ({"on_error": "skipp"}, ValueError, r"Did you mean 'skip'"),
    "on_error=None": ({"on_error": None}, TypeError, r"must be one of"),
    "onerror='skip'": ({"onerror": "skip"}, TypeError, r"Did you mean 'on_error'"),
    "transforms=…": ({"transforms": None}, TypeError, r"Did you mean 'transform'"),
    "transform=3": ({"transform": 3}, TypeError, r"a int cannot be called"),
    "target_transform=3": ({"target_transform": 3}, TypeError, r"cannot be called"),
    "loader='pil'": ({"loader": "pil"}, TypeError, r"cannot be called"),
    "is_valid_file='*.jpg'": ({"is_valid_file": "*.jpg"}, TypeError, r"cannot be called"),
    "root=3": ({"root": 3}, TypeError, r"a folder is a str or a Path, not int"),
    "root='nowhere'": ({"root": "nowhere"}, FileNotFoundError, r"nowhere"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_transforms(name):
    call, kind, text = MISUSES[name]
    with pytest.raises(kind, match=text) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", FOLDERS)
def test_image_folder(name, folder):
    options, kind, text = FOLDERS[name]
    with pytest.raises(kind, match=text) as caught:
        ImageFolder(**{"root": folder, **options})
    assert len(str(caught.value).splitlines()) == 1


def test_no_folder_at_all():
    with pytest.raises(ArgumentError, match="missing a required argument: 'root'"):
        ImageFolder()


def test_errors_are_of_our_tree():
    for call in (lambda: t.Resize("big"), lambda: t.Resize(sise=3)):
        with pytest.raises(ArgumentError):
            call()
    with pytest.raises(ConfigError):
        t.Resize(0)
    assert issubclass(ConfigError, BigDLError)


def test_what_torchvision_takes_is_taken():
    import numpy as np
    import torch

    assert t.RandomCrop(224.0).size == (224, 224)
    assert t.CenterCrop(np.int64(5)).size == (5, 5)
    assert t.Resize([7]).size == [7]
    assert t.RandomHorizontalFlip(1).p == 1
    assert t.RandomHorizontalFlip(torch.tensor(0.5)).p == 0.5
    assert t.Resize(3, 2).interpolation is t.InterpolationMode.BILINEAR
    assert len(t.Compose(torch.nn.ModuleList([t.Resize(3)])).transforms) == 1
    assert t.Compose(iter([t.Resize(3)])) is not None


def test_without_torchvision_the_answer_is_what_to_install(monkeypatch):
    for name in list(sys.modules):
        if name.startswith("bigdl.nano.pytorch.vision"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'bigdl-next\[torch\]'"):
        importlib.import_module("bigdl.nano.pytorch.vision")
