"""The example programs are tested too."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning", reason="needs the [torch] extra")
pytest.importorskip("sklearn", reason="the pictures are bundled there")

pytestmark = pytest.mark.filterwarnings(  # Lightning's own
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:Found .* module.s. in eval mode",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
)

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_of_two_classes(demo, tmp_path, monkeypatch):
    from torchvision.datasets import ImageFolder

    monkeypatch.setattr(demo, "PICTURES", 6)
    demo.two_classes(tmp_path)
    found = ImageFolder(str(tmp_path))
    assert found.classes == ["china", "flower"]
    assert found.targets == [0, 0, 0, 1, 1, 1]
    pictures = [picture for picture, _ in found]
    assert {picture.size for picture in pictures} == {(500, 375)}
    assert len({picture.tobytes() for picture in pictures}) == 6  # each another part


def test_its_program_trains_the_last_layer_only(demo, tmp_path, monkeypatch):
    """The program as it is, with a small network and a few pictures."""
    import pytorch_lightning
    import torch
    import torchvision

    def small(weights):
        assert weights is None  # nothing is downloaded
        network = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
        return network.requires_grad_(True)

    monkeypatch.setattr(demo, "PICTURES", 6)
    monkeypatch.setattr(demo, "BATCH", 2)
    monkeypatch.setattr(torchvision.models, "resnet50", small)
    demo.two_classes(tmp_path)
    started = []

    class Recorder(pytorch_lightning.Trainer):
        def fit(self, model, loader):
            started.append({name: value.clone() for name, value in model.state_dict().items()})
            super().fit(model, loader)

    vision = (torchvision.datasets, torchvision.transforms)
    model, _, _, watch = demo.program(Recorder, *vision, tmp_path, 3, 60.0)
    changed = {
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value, started[0][name])
    }
    assert changed == {"head.weight", "head.bias"}
    assert watch.steps == 3
    assert 0 < watch.step_s <= watch.whole_s


def test_a_folder_that_is_not_there():
    done = subprocess.run(
        [sys.executable, DEMO, "/no/such/folder"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such folder: /no/such/folder" in done.stderr


@pytest.mark.slow
def test_it_prints_both_tables():
    done = subprocess.run(
        [sys.executable, DEMO], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "What was tried in training",
        "frozen_trunk",
        "a step, pictures included",
        "What was tried for the trained network",
        "openvino_int8",
        "get_best_model(accuracy_criterion=0.02) gives:",
        "All of this took",
    ):
        assert words in done.stdout
