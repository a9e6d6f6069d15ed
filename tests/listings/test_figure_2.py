"""Fig. 2: training on pictures, faster by its imports alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pytorch_lightning")
pytest.importorskip("torchvision")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Real photographs in one folder for each class."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    photos = Path(os.environ.get("BIGDL_TEST_DATA", beside)) / "cats_dogs" / "val"
    if photos.is_dir():
        for kind in ("cats", "dogs"):
            (tmp_path / kind).mkdir()
            for file in sorted((photos / kind).iterdir())[:16]:
                (tmp_path / kind / file.name).symlink_to(file)
        return tmp_path
    from PIL import Image
    from sklearn.datasets import load_sample_images

    for kind, picture in zip(("china", "flower"), load_sample_images().images, strict=True):
        (tmp_path / kind).mkdir()
        for index in range(16):
            left, top = 20 * index, 8 * index
            part = Image.fromarray(picture[top : top + 300, left : left + 320])
            part.save(tmp_path / kind / f"{index}.jpg", quality=90)
    return tmp_path


def network():
    import pytorch_lightning as pl

    class Net(pl.LightningModule):
        """Any LightningModule of the user's own."""

        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 5, stride=4),
                torch.nn.ReLU(),
                torch.nn.AdaptiveAvgPool2d(4),
                torch.nn.Flatten(),
                torch.nn.Linear(128, 2),
            )
            self.shapes = set()

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.shapes.add(tuple(x.shape))
            assert 0 <= x.min() <= x.max() <= 1
            return torch.nn.functional.cross_entropy(self.layers(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    return Net()


@pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:.*tensorboard",
)
def test_figure_2(folder, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("run"))  # Lightning's own logs and checkpoints
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    torch.manual_seed(0)
    net = network()
    before = [p.detach().clone() for p in net.parameters()]

    from torch.utils.data import DataLoader

    from bigdl.nano.pytorch import Trainer
    from bigdl.nano.pytorch.vision import transforms
    from bigdl.nano.pytorch.vision.datasets import ImageFolder

    data_transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.ColorJitter(),
            transforms.RandomCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.Resize(128),
            transforms.ToTensor(),
        ]
    )
    dataset = ImageFolder(folder, transform=data_transform)
    loader = DataLoader(dataset, batch_size=8, shuffle=True)
    trainer = Trainer(max_epochs=1)
    trainer.fit(net, loader)

    assert len(dataset) == 32
    assert len(dataset.classes) == 2
    assert net.shapes == {(8, 3, 128, 128)}
    assert trainer.global_step == 4
    assert not any(map(torch.equal, before, net.parameters()))
    assert trainer.plan is not None
    assert all(row.status == "chosen" or row.reason for row in trainer.plan.rows)
