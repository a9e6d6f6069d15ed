"""The bars of the paper's Figs. 5 and 6 on this machine: ResNet-50 at 224², batch 16.

    python benchmarks/figure_5_6.py [--quick] [--only scratch transfer epoch inference agreement]

Training is compared with stock Lightning in fp32 and torchvision's pipeline, inference with eager
fp32 in ``eval()`` and ``inference_mode``; the same threads for all. Runs to be compared take turns
within this process, and each ratio is the median of the turns' ratios. One JSON object a line.

Weights are random, from a fixed seed; where the trunk is frozen, its batch norm statistics are
taken from the photos. Photos: ``cats_dogs`` in ``$BIGDL_TEST_DATA`` or ``../shared/data``, else
generated JPEGs of 500 by 375.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset

from bigdl._base import machine
from bigdl.nano import bench
from bigdl.nano.pytorch import InferenceOptimizer, Trainer
from bigdl.nano.pytorch.vision import datasets as our_datasets
from bigdl.nano.pytorch.vision import transforms as our_transforms

BATCH, SIDE = 16, 224
STOCK = (torchvision.datasets.ImageFolder, torchvision.transforms)
OURS = (our_datasets.ImageFolder, our_transforms)


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    scratch_steps: int
    transfer_steps: int
    turn_steps: int
    turns: int
    epoch_rows: int


FULL = Sizes(scratch_steps=120, transfer_steps=200, turn_steps=6, turns=3, epoch_rows=640)
QUICK = Sizes(scratch_steps=40, transfer_steps=80, turn_steps=4, turns=2, epoch_rows=160)


# --- the programs -----------------------------------------------------------------------------


class Classifier(pl.LightningModule):
    """An ordinary program: from scratch, or a new head on a frozen trunk in eval mode."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.rate)


def new_net() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet50(num_classes=2)


def scratch() -> Classifier:
    return Classifier(new_net(), rate=1e-4)


class Transfer:
    """Makes equal programs: the trunk's statistics are taken once."""

    def __init__(self, photos: Path) -> None:
        net = new_net()
        data = STOCK[0](photos, transform=still(STOCK[1]))
        with torch.no_grad():
            for images, _ in DataLoader(Subset(data, every(len(data), 64)), BATCH):
                net(images)
        self.state = net.state_dict()

    def __call__(self) -> Classifier:
        net = new_net()
        net.load_state_dict(self.state)
        net.requires_grad_(False)
        net.fc = nn.Linear(net.fc.in_features, 2)
        return Classifier(net.eval(), rate=1e-3)


def every(rows: int, wanted: int) -> list[int]:
    """Evenly spread row numbers: both classes."""
    return [i * rows // wanted for i in range(wanted)]


def random(t):
    return t.Compose(
        [
            t.Resize(256),
            t.ColorJitter(),
            t.RandomCrop(SIDE),
            t.RandomHorizontalFlip(),
            t.ToTensor(),
        ]
    )


def still(t):
    return t.Compose([t.Resize(256), t.CenterCrop(SIDE), t.ToTensor()])


def loader_of(kind, photos: Path, pipeline, rows: int) -> DataLoader:
    folder, transforms = kind
    data = folder(photos, transform=pipeline(transforms))
    wanted = [i % len(data) for i in every(len(data), min(rows, len(data)))]
    wanted = (wanted * (rows // len(wanted) + 1))[:rows]
    order = torch.Generator().manual_seed(0)
    return DataLoader(Subset(data, wanted), BATCH, shuffle=True, generator=order, drop_last=True)


# --- a run ------------------------------------------------------------------------------------


@dataclass
class Watch(pl.Callback):
    """When each step and each epoch ended, and the losses."""

    ends: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    begun: float = 0.0

    def on_train_start(self, trainer, module):
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.ends.append(time.perf_counter())

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append(time.perf_counter())

    @property
    def steps_s(self) -> list[float]:
        """Whole steps, fetching their batches included."""
        return list(np.diff([self.begun, *self.ends]))

    @property
    def epochs_s(self) -> list[float]:
        return list(np.diff([self.begun, *self.epochs]))

    @property
    def total_s(self) -> float:
        return self.ends[-1] - self.begun

    def later_ms(self, skip: int) -> float:
        """The median step after the first ``skip``."""
        return 1e3 * statistics.median(self.steps_s[skip:])


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(trainer_class, module, loader, *, steps=-1, epochs=1000, **options):
    watch = Watch()
    trainer = trainer_class(
        max_steps=steps, max_epochs=epochs, callbacks=[watch], **QUIET, **options
    )
    torch.manual_seed(1)
    trainer.fit(module, loader)
    return watch, trainer


# --- the rows ---------------------------------------------------------------------------------


def training(name: str, make, photos: Path, sizes: Sizes, steps: int, target: float):
    """A step once the plan is chosen, the whole run beside it, and both runs' losses."""
    loaders = [loader_of(kind, photos, random, steps * BATCH) for kind in (STOCK, OURS)]
    own, _ = fit(pl.Trainer, make(), loaders[0], steps=steps)
    whole, trainer = fit(Trainer, make(), loaders[1], steps=steps)
    plan = trainer.plan
    print(plan, file=sys.stderr)
    ratios, stock_ms, ours_ms = [], [], []
    for _ in range(sizes.turns):
        turn = sizes.turn_steps + 3
        one, _ = fit(pl.Trainer, make(), loaders[0], steps=turn)
        other, _ = fit(Trainer, make(), loaders[1], steps=turn, acceleration=plan)
        stock_ms.append(one.later_ms(3))
        ours_ms.append(other.later_ms(3))
        ratios.append(stock_ms[-1] / ours_ms[-1])
    last = [statistics.fmean(run.losses[-20:]) for run in (own, whole)]
    yield {
        "row": name,
        "ratio": statistics.median(ratios),
        "target": target,
        "turns": ratios,
        "stock_ms": statistics.median(stock_ms),
        "ours_ms": statistics.median(ours_ms),
        "whole_run_ratio": own.total_s / whole.total_s,
        "steps": steps,
        "plan": list(plan.chosen),
        "loss_stock": last[0],
        "loss_ours": last[1],
        "loss_difference": abs(last[1] - last[0]) / last[0],
        "loss_limit": 0.03,
    }


def epochs(make, photos: Path, sizes: Sizes, plan=None):
    """An epoch of a pipeline without random parts, once features are remembered."""
    rows = sizes.epoch_rows
    loaders = [loader_of(kind, photos, still, rows) for kind in (STOCK, OURS)]
    steps = rows // BATCH
    first, trainer = fit(Trainer, make(), loaders[1], epochs=max(4, 200 // steps))
    ratios, stock_s = [], []
    later = first.epochs_s[-2:]
    for _ in range(sizes.turns):
        one, _ = fit(pl.Trainer, make(), loaders[0], epochs=1)
        other, _ = fit(Trainer, make(), loaders[1], epochs=4, acceleration=trainer.plan)
        later = other.epochs_s[-2:]
        stock_s.append(one.epochs_s[0])
        ratios.append(one.epochs_s[0] / statistics.fmean(later))
    loading_s = bench_loading(loaders[1])
    yield {
        "row": "transfer learning, an epoch with remembered features",
        "ratio": statistics.median(ratios),
        "target": 20.0,
        "turns": ratios,
        "stock_s": statistics.median(stock_s),
        "ours_s": statistics.fmean(later),
        "of_which_loading_s": loading_s,
        "rows": rows,
        "epochs_of_first_run_s": first.epochs_s,
        "plan": list(trainer.plan.chosen),
    }


def bench_loading(loader: DataLoader) -> float:
    begun = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - begun


def inference(make_net, photos: Path, sizes: Sizes):
    """Eager fp32 in eval and inference mode against OpenVINO int8 and fp32."""
    module = make_net().net
    data = our_datasets.ImageFolder(photos, transform=still(our_transforms))
    calib = DataLoader(Subset(data, every(len(data), 64)), BATCH)
    images = next(iter(calib))[0]
    fast = {
        "int8": InferenceOptimizer.quantize(
            module, "int8", "openvino", calib_data=[(x,) for x, _ in calib]
        ),
        "fp32": InferenceOptimizer.trace(module, images, "openvino"),
        "bf16": InferenceOptimizer.quantize(module, "bf16", "openvino", input_sample=images),
    }
    targets = {("int8", 16): 9.6, ("int8", 1): 6.0}
    for rows in (16, 1):
        x = images[:rows].clone()
        with torch.inference_mode():
            calls = {"eager": lambda x=x: module(x)}
            calls |= {name: (lambda model=model, x=x: model(x)) for name, model in fast.items()}
            timings = bench.compare(calls, turns=20 * sizes.turns, budget_s=40.0)
        for name in fast:
            yield {
                "row": f"inference {name}, batch {rows}",
                "ratio": bench.speedup(timings["eager"], timings[name]),
                "target": targets.get((name, rows)),
                "stock_ms": timings["eager"].median_ms,
                "ours_ms": timings[name].median_ms,
            }


# --- does int8 still see the same -------------------------------------------------------------


class CifarNet(nn.Module):
    """The ResNet for CIFAR of He et al. (2015), as the stored weights name its parts."""

    class Block(nn.Module):
        def __init__(self, inner: int, outer: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outer)
            self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outer)
            self.stride, self.pad = stride, (outer - inner) // 2

        def forward(self, x):
            out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            if self.pad:
                x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
            return torch.relu(out + x)

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inner = 16
        for stage, outer in enumerate((16, 32, 64), 1):
            blocks = []
            for index in range(depth):
                blocks.append(self.Block(inner, outer, 2 if stage > 1 and not index else 1))
                inner = outer
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def agreement(data: Path | None, sizes: Sizes):
    """Share of pictures to which a trained network's int8 form gives the same class."""
    needed = [data / name for name in ("weights", "cifar10/test.zip")] if data else []
    if not needed or not all(path.exists() for path in needed):
        yield {"row": "int8 agreement", "skipped": "no trained networks: set BIGDL_TEST_DATA"}
        return
    x, y = cifar(data / "cifar10" / "test.zip")
    for name, depth, target in (("resnet56_cifar10", 9, 0.97), ("resnet20_cifar10", 3, None)):
        net = CifarNet(depth).eval()
        net.load_state_dict(torch.load(data / "weights" / f"{name}.pth", weights_only=True))
        yield agrees(name, net, x, y, target)
    squeeze = torchvision.models.squeezenet1_1().eval()
    weights = torch.load(data / "weights" / "squeezenet1_1_imagenet_fp16.pth", weights_only=True)
    squeeze.load_state_dict({key: value.float() for key, value in weights.items()})
    folder = our_datasets.ImageFolder(data / "cats_dogs" / "val", transform=normal_still())
    pictures = torch.stack([folder[i][0] for i in every(len(folder), 400)])
    yield agrees("squeezenet1_1_imagenet", squeeze, pictures, None, None)


def normal_still():
    t = our_transforms
    normal = t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return t.Compose([t.Resize(256), t.CenterCrop(SIDE), t.ToTensor(), normal])


def agrees(name: str, net: nn.Module, x, y, target: float | None):
    calib = [(part,) for part in x[:: max(1, len(x) // 300)].split(50)]
    fast = InferenceOptimizer.quantize(net, "int8", "openvino", calib_data=calib)
    with torch.inference_mode():
        own = torch.cat([net(part) for part in x.split(100)]).argmax(1)
        new = torch.cat([fast(part) for part in x.split(100)]).argmax(1)
    found = {
        "row": f"int8 agreement, {name}",
        "ratio": (own == new).float().mean().item(),
        "target": target,
        "rows": len(x),
    }
    if y is not None:
        found |= {
            "accuracy_fp32": (own == y).float().mean().item(),
            "accuracy_int8": (new == y).float().mean().item(),
        }
    return found


def cifar(path: Path):
    with zipfile.ZipFile(path) as stored:
        names = [name for name in stored.namelist() if name.endswith(".jpg")]
        images = np.stack([np.asarray(Image.open(stored.open(name))) for name in names])
    classes = sorted({name.split("/")[0] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[0]) for name in names])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (x - mean) / std, labels


# --- all together -----------------------------------------------------------------------------


def find_data() -> Path | None:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("BIGDL_TEST_DATA", beside))
    return path if path.is_dir() else None


def generate_photos(folder: Path, count: int = 320) -> Path:
    """JPEGs of two classes that look like something: smooth shapes and noise."""
    random_ = np.random.default_rng(0)
    for index in range(count):
        kind = ("even", "odd")[index % 2]
        small = random_.integers(0, 255, (6 + 6 * (index % 2), 8, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC))
        noisy = np.clip(image + random_.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(folder / kind / f"{index}.jpg", quality=90)
    return folder


def rows(arguments, photos: Path, data: Path | None):
    sizes = QUICK if arguments.quick else FULL
    wanted = arguments.only
    transfer = Transfer(photos) if {"transfer", "epoch", "inference"} & set(wanted) else None
    if "inference" in wanted:
        yield from inference(transfer, photos, sizes)
    if "agreement" in wanted:
        yield from agreement(data, sizes)
    if "transfer" in wanted:
        yield from training(
            "transfer learning, a step", transfer, photos, sizes, sizes.transfer_steps, 5.8
        )
    if "epoch" in wanted:
        yield from epochs(transfer, photos, sizes)
    if "scratch" in wanted:
        yield from training(
            "training from scratch, a step", scratch, photos, sizes, sizes.scratch_steps, 2.6
        )


NAMES = ("inference", "agreement", "transfer", "epoch", "scratch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and turns")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument(
        "--threads", type=int, default=machine.cores(), help="for all (%(default)s)"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    data = find_data()
    short = False
    with contextlib.ExitStack() as stack:
        scratch_folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # plans and features of earlier runs must not help
        os.environ["XDG_CACHE_HOME"] = str(scratch_folder / "cache")
        photos = data / "cats_dogs" / "train" if data else scratch_folder / "photos"
        if not photos.is_dir():
            photos = generate_photos(scratch_folder / "photos")
        for row in rows(arguments, photos, data):
            row |= {
                "cores": machine.cores(),
                "threads": arguments.threads,
                "real_photos": bool(data),
            }
            print(json.dumps(rounded(row)), flush=True)
            target = row.get("target")
            short |= target is not None and row["ratio"] < target
            short |= row.get("loss_difference", 0.0) > row.get("loss_limit", 1.0)
    return int(short)


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return value


if __name__ == "__main__":
    sys.exit(main())
