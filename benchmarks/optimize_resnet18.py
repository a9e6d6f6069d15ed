"""``optimize`` on ResNet-18 with its defaults: does it end inside ``budget_s=180``?

    python benchmarks/optimize_resnet18.py [FOLDER_OF_IMAGES]

The folder holds one folder a class; without one, generated pictures are used. Progress goes to
stderr, one JSON line to stdout: seconds in all, the rows, and what was chosen.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torchvision import datasets, transforms
from torchvision.models import resnet18

from bigdl._base import machine
from bigdl.nano.pytorch import InferenceOptimizer

BUDGET_S = 180.0  # optimize's own default


def pictures(folder: Path | None) -> torch.utils.data.Dataset:
    """100 labelled pictures of 224 x 224."""
    prepare = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    )
    if folder is None:
        return datasets.FakeData(100, (3, 224, 224), 10, prepare)
    found = datasets.ImageFolder(str(folder), transform=prepare)
    step = max(1, len(found) // 100)
    return torch.utils.data.Subset(found, range(0, len(found), step)[:100])


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    torch.manual_seed(0)
    model = resnet18(weights=None)
    loader = torch.utils.data.DataLoader(pictures(folder), batch_size=8)
    # statistics of real pictures, so that outputs differ from picture to picture
    model.train()
    with torch.no_grad():
        for batch, _ in loader:
            model(batch)
    optimizer = InferenceOptimizer()
    started = time.monotonic()
    report = optimizer.optimize(model, loader)
    took = time.monotonic() - started
    print(report, file=sys.stderr)
    line = {
        "benchmark": "optimize_resnet18",
        "cores": machine.cores(),
        "seconds": round(took, 1),
        "budget_s": BUDGET_S,
        "kept": took <= BUDGET_S + 5,
        "chosen": optimizer.get_best_model()[1],
        "rows": {
            row.name: row.status if row.speedup is None else round(row.speedup, 2)
            for row in report.rows
        },
        "agreement": {
            row.name: round(row.accuracy, 4) for row in report.rows if row.accuracy is not None
        },
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
