"""Transfer learning on pictures: an ordinary Lightning program, as it is and with our imports.

    python examples/demo.py            pictures cut out of two photographs of scikit-learn's
    python examples/demo.py FOLDER     your pictures, one folder for each class

Prints two tables: what was tried to make training faster, and what was tried to make the trained
network faster, each with what it gave and what was kept. Nothing is downloaded: the network has
random weights, so its times are those of the real network and its accuracy is of no interest.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytorch_lightning
import torch
import torchvision
from torch.utils.data import DataLoader, Subset

import bigdl.nano.pytorch
import bigdl.nano.pytorch.vision.datasets
import bigdl.nano.pytorch.vision.transforms

BATCH = 16
PICTURES = 320  # used of a large folder
# Of the program as it is a few steps are enough: its time does not change after the first.
STOCK_STEPS, STOCK_LIMIT_S = 14, 40.0
# Ours is planned as so long a run (as it is) that there is something to gain, and ended early.
PLANNED_S, OUR_LIMIT_S = 600.0, 110.0
BUDGET_S = 100.0  # for trying ways to run the trained network


class Classifier(pytorch_lightning.LightningModule):
    """A ResNet-50 whose trunk is frozen, with a new last layer to train."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = torchvision.models.resnet50(weights=None)
        self.trunk.fc = torch.nn.Identity()
        self.trunk.requires_grad_(False)
        self.trunk.eval()  # its batch statistics stay as they are; Lightning keeps modes
        self.head = torch.nn.Linear(2048, classes)

    def forward(self, x):
        return self.head(self.trunk(x))

    def training_step(self, batch, index):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.head.parameters(), lr=1e-3)


def program(trainer_class, datasets, transforms, folder: Path, steps: int, limit_s: float):
    """The user's program. What it imports is its only difference between the two runs."""
    pipeline = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.ColorJitter(),
            transforms.RandomCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.Resize(128),
            transforms.ToTensor(),
        ]
    )
    pictures = datasets.ImageFolder(str(folder), transform=pipeline)
    classes = len(pictures.classes)
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:PICTURES]
    loader = DataLoader(
        Subset(pictures, chosen.tolist()),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
    )
    torch.manual_seed(0)
    model = Classifier(classes)
    watch = Stopwatch(limit_s)
    trainer = trainer_class(
        max_steps=steps,
        max_epochs=-1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    return model, loader, trainer, watch


class Stopwatch(pytorch_lightning.Callback):
    """Times whole steps: fetching the pictures, forward, backward, update.

    Args:
        limit_s: The run ends after so many seconds, however far it is.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.ends: list[float] = []

    def on_train_start(self, trainer, module) -> None:
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.ends.append(time.perf_counter())
        if self.whole_s > self.limit_s:
            trainer.should_stop = True

    @property
    def steps(self) -> int:
        return len(self.ends) - 1

    @property
    def step_s(self) -> float:
        """Median of the second half, where everything is warm and chosen."""
        steps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(steps[len(steps) // 2 :])

    @property
    def whole_s(self) -> float:
        return self.ends[-1] - self.ends[0]


def train(folder: Path) -> tuple[torch.nn.Module, DataLoader]:
    """Both runs, and what they gave."""
    say("\nTraining, some steps of the program as it is ...")
    _, _, _, stock = program(
        pytorch_lightning.Trainer,
        torchvision.datasets,
        torchvision.transforms,
        folder,
        STOCK_STEPS,
        STOCK_LIMIT_S,
    )
    say("Training with our imports ...")
    steps = max(40, int(PLANNED_S / stock.step_s))
    model, loader, trainer, ours = program(
        bigdl.nano.pytorch.Trainer,
        bigdl.nano.pytorch.vision.datasets,
        bigdl.nano.pytorch.vision.transforms,
        folder,
        steps,
        OUR_LIMIT_S,
    )
    print(f"\nWhat was tried in training\n\n{trainer.plan}\n")
    rows = [
        ("", "as it is", "our imports", "ratio"),
        times("a step, pictures included", stock.step_s, ours.step_s),
        times(
            f"{ours.steps} steps, trying included", stock.step_s * ours.steps, ours.whole_s, "*"
        ),
    ]
    table(rows)
    print(f"* as it is: {stock.steps} steps were run, the time of the rest is reckoned from them")
    return model, loader


def run(model: torch.nn.Module, loader: DataLoader) -> None:
    """Every way to run the trained network."""
    say(f"\nTrying ways to run the trained network, {BUDGET_S:.0f} s ...")

    def accuracy(prediction, target):
        return (prediction.argmax(1) == target).float().mean()

    half = BATCH // 2
    batches = [(x[:half], y[:half]) for (x, y), _ in zip(loader, range(4), strict=False)]
    optimizer = bigdl.nano.pytorch.InferenceOptimizer()
    optimizer.optimize(
        model,
        training_data=batches,
        validation_data=batches,
        metric=accuracy,
        budget_s=BUDGET_S,
    )
    print("\nWhat was tried for the trained network\n")
    optimizer.summary()
    _, name = optimizer.get_best_model(accuracy_criterion=0.02)
    print(f"\nget_best_model(accuracy_criterion=0.02) gives: {name}")


def two_classes(folder: Path) -> None:
    """Cut pictures of two classes out of the two photographs that come with scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images()
    draw = torch.Generator().manual_seed(0)
    for name, pixels in zip(photographs.filenames, photographs.images, strict=True):
        photograph = Image.fromarray(pixels)
        target = folder / Path(name).stem
        target.mkdir()
        for number in range(PICTURES // 2):
            side = int(torch.randint(200, 400, (), generator=draw))
            left = int(torch.randint(0, photograph.width - side, (), generator=draw))
            top = int(torch.randint(0, photograph.height - side, (), generator=draw))
            picture = photograph.crop((left, top, left + side, top + side)).resize((500, 375))
            picture.save(target / f"{number:03}.jpg", quality=90)


def times(what: str, before_s: float, after_s: float, mark: str = "") -> tuple[str, ...]:
    return what, f"{before_s:.2f} s{mark}", f"{after_s:.2f} s", f"{before_s / after_s:.1f}x"


def table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print(f"{first:<{widths[0]}}  {'  '.join(cells)}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, help="one folder of pictures for each class"
    )
    folder = parser.parse_args().folder
    if folder is not None and not folder.is_dir():
        parser.error(f"no such folder: {folder}")
    # the program speaks for itself: Lightning's advice on loggers and workers is left out
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as made:
        if folder is None:
            folder = Path(made)
            two_classes(folder)
            print("Pictures: cut out of two photographs that come with scikit-learn")
        else:
            print(f"Pictures: {folder}")
        print("Network: ResNet-50 with random weights, trunk frozen; nothing is downloaded, so")
        print("         the times are those of the real network, the accuracy is of no interest")
        model, loader = train(folder)
        run(model, loader)
    print(f"\nAll of this took {time.perf_counter() - start:.0f} s, torch {torch.__version__}")


if __name__ == "__main__":
    main()
