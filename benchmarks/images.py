"""How long one core takes for a picture: our ``ImageFolder`` against torchvision's two ways.

    python benchmarks/images.py [--data FOLDER_OF_IMAGES] [--pictures 140] [--rounds 7]

Prints one JSON line. Each way reads the same JPEG files through an ``ImageFolder``: torchvision's
with PIL images, torchvision's with ``decode_jpeg`` and v2 transforms on tensors, and ours. The
ways take turns on groups of pictures; of each group the fastest round counts. Times are CPU time
of the whole process, so other programs on the machine disturb less and a second thread would not
go unseen.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms as pil_transforms
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from bigdl.nano.pytorch.vision import transforms
from bigdl.nano.pytorch.vision.datasets import ImageFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BARS = {"pil": 2.2, "v2": 1.2}
GROUP = 5


def figure_2(module: Any, last: Sequence[Any]) -> Any:
    return module.Compose(
        [
            module.Resize(256),
            module.ColorJitter(),
            module.RandomCrop(224),
            module.RandomHorizontalFlip(),
            module.Resize(128),
            *last,
        ]
    )


def evaluation(module: Any, last: Sequence[Any]) -> Any:
    normalize = module.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return module.Compose([module.Resize(256), module.CenterCrop(224), *last, normalize])


def ways(root: Path, pipeline: Callable[[Any, Sequence[Any]], Any]) -> dict[str, Any]:
    """The three datasets, by name."""
    folder = torchvision.datasets.ImageFolder
    floats = v2.ToDtype(torch.float32, scale=True)
    return {
        "ours": ImageFolder(root, transform=pipeline(transforms, [transforms.ToTensor()])),
        "pil": folder(root, transform=pipeline(pil_transforms, [pil_transforms.ToTensor()])),
        "v2": folder(
            root,
            transform=pipeline(v2, [floats]),
            loader=lambda path: decode_jpeg(read_file(path), ImageReadMode.RGB),
        ),
    }


def measure(datasets: dict[str, Any], rows: list[int], rounds: int) -> dict[str, float]:
    """Milliseconds a picture, by way."""
    groups = [rows[at : at + GROUP] for at in range(0, len(rows), GROUP)]
    best = {name: [float("inf")] * len(groups) for name in datasets}
    names = list(datasets)
    for turn in range(rounds):
        for at, group in enumerate(groups):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                dataset = datasets[name]
                dataset[group[0]]  # what the way before left in the caches is nobody's fault
                start = time.process_time()
                for row in group:
                    dataset[row]
                best[name][at] = min(best[name][at], time.process_time() - start)
    return {name: 1e3 * sum(times) / len(rows) for name, times in best.items()}


def largest_difference(datasets: dict[str, Any], rows: list[int]) -> float:
    """Mean difference of a picture to torchvision's PIL way, in steps of 1/255; the largest."""
    found = []
    for row in rows:
        pictures = []
        for name in ("ours", "pil"):
            torch.manual_seed(row)
            pictures.append(datasets[name][row][0])
        mine, other = pictures
        found.append(float((mine - other).abs().mean()))
    return 255 * max(found)


def photos(wanted: Path | None, pictures: int, scratch: Path) -> tuple[Path, list[int], str]:
    """A folder of pictures, the rows to read, and what they are."""
    root = wanted
    if root is None:
        shared = Path(__file__).parents[2] / "shared" / "data"
        root = Path(os.environ.get("BIGDL_TEST_DATA", shared)) / "cats_dogs" / "train"
    if not root.is_dir():
        if wanted is not None:
            raise SystemExit(f"There is no folder {root}.")
        return generate(scratch, pictures), list(range(pictures)), "generated"
    samples = torchvision.datasets.ImageFolder(root).samples
    rows = []
    for row in range(len(samples)):
        path = samples[row][0]
        if path.lower().endswith((".jpg", ".jpeg")):
            with Image.open(path) as image:
                if image.mode == "RGB" and min(image.size) >= 100:
                    rows.append(row)
    if not rows:
        raise SystemExit(f"There is no JPEG photo in {root}.")
    return root, rows[:: max(1, len(rows) // pictures)][:pictures], "photos"


def generate(root: Path, pictures: int) -> Path:
    """JPEGs of 500 x 375 with about as much detail as a photo has."""
    generator = np.random.default_rng(0)
    (root / "generated").mkdir()
    for at in range(pictures):
        layers = np.zeros((375, 500, 3))
        for cells in (3, 12, 48, 190):
            noise = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            layers += np.asarray(Image.fromarray(noise).resize((500, 375), 3)) / cells**0.7
        layers *= 255 / layers.max()
        Image.fromarray(layers.astype(np.uint8)).save(root / f"generated/{at:03}.jpg", quality=88)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with a folder of JPEGs a class")
    parser.add_argument("--pictures", type=int, default=140)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        import cv2
    except ModuleNotFoundError:
        opencv = None
    else:
        cv2.setNumThreads(1)
        opencv = cv2.__version__
    with tempfile.TemporaryDirectory() as scratch:
        root, rows, kind = photos(options.data, options.pictures, Path(scratch))
        result: dict[str, Any] = {
            "benchmark": "images",
            "pictures": len(rows),
            "kind": kind,
            "threads": 1,
            "torchvision": torchvision.__version__,
            "opencv": opencv,
        }
        for pipeline in (figure_2, evaluation):
            datasets = ways(root, pipeline)
            ms = measure(datasets, rows, options.rounds)
            result[pipeline.__name__] = {
                "ms": {name: round(value, 3) for name, value in ms.items()},
                "against": {
                    name: {"ratio": round(ms[name] / ms["ours"], 2), "bar": bar}
                    for name, bar in BARS.items()
                },
                "largest_mean_difference_255ths": round(largest_difference(datasets, rows), 3),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
