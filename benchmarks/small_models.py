"""Small models on tables: a run under our Trainer beside the same run under stock Lightning.

    python benchmarks/small_models.py [--seconds 60] [--quick]

The two runs take turns in one process, a block of steps each, so that what slows the machine
down hits both; each is charged the time of its own turns, ours with all that it tries. One JSON
line for each model: seconds of either, the ratio (the limit is 1.02), what was chosen, and, where
nothing was, whether a run of its own ends with stock Lightning's weights bit for bit.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bigdl._base.environment import environment
from bigdl.nano.pytorch import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_S = 0.1
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
ROWS, COLUMNS = 8192, 14  # as wide as the census tables that people begin with


class Table(pl.LightningModule):
    """A regression on a table's columns."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net = net
        self.make = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).squeeze(1), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters(), lr=1e-3)


def perceptron(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in zip((COLUMNS, *widths), (*widths, 1), strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, Callable[[], Table]] = {
    "linear regression, SGD": lambda: Table(perceptron(), torch.optim.SGD),
    "MLP 14-64-32-1, Adam": lambda: Table(perceptron(64, 32), torch.optim.Adam),
    "MLP 14-256-256-1, AdamW": lambda: Table(perceptron(256, 256), torch.optim.AdamW),
}


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLUMNS, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1).sin()), batch_size=64, shuffle=True)


class Turns(pl.Callback):
    """Hands the machine to the other run every so many steps, and counts the time of its own."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore, steps: int) -> None:
        self.mine, self.other, self.steps = mine, other, steps
        self.seconds = 0.0
        self.start = 0.0

    def take(self) -> None:
        self.mine.acquire()
        self.start = time.perf_counter()

    def hand_on(self) -> None:
        self.seconds += time.perf_counter() - self.start
        self.other.release()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step % self.steps == 0:
            self.hand_on()
            self.take()


def in_turns(make: Callable[[], Table], seconds: float) -> dict[str, Any]:
    """Both runs, each about ``seconds`` long."""
    step_s = _step_s(make)
    epochs = max(2, round(seconds / step_s / (ROWS // 64)))
    gates = threading.Semaphore(1), threading.Semaphore(0)
    steps = max(1, round(BLOCK_S / step_s))
    turns = Turns(*gates, steps), Turns(*reversed(gates), steps)
    trainers = [
        kind(**QUIET, max_epochs=epochs, callbacks=[turn])
        for kind, turn in zip((pl.Trainer, Trainer), turns, strict=True)
    ]

    def run(place: int) -> None:
        turns[place].take()
        try:
            trainers[place].fit(make(), loader())
        finally:
            turns[place].hand_on()

    threads = [threading.Thread(target=run, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stock_s, ours_s = (turn.seconds for turn in turns)
    plan = trainers[1].plan
    return {
        "steps": trainers[1].global_step,
        "stock_s": round(stock_s, 2),
        "ours_s": round(ours_s, 2),
        "ratio": round(ours_s / stock_s, 4),
        "chosen": list(plan.chosen),
    }


def _step_s(make: Callable[[], Table]) -> float:
    """Seconds of a stock step, about."""
    trainer = pl.Trainer(**QUIET, max_epochs=2)
    start = time.perf_counter()
    trainer.fit(make(), loader())
    return (time.perf_counter() - start) / trainer.global_step


def is_bit_identical(make: Callable[[], Table]) -> bool:
    """Whether two epochs of ours end with the weights of stock Lightning's."""
    ends = []
    for kind in (pl.Trainer, Trainer):
        torch.manual_seed(0)
        model = make()
        kind(**QUIET, max_epochs=2).fit(model, loader())
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.equal(*ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each run")
    parser.add_argument("--quick", action="store_true", help="runs of six seconds")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as folder, environment(XDG_CACHE_HOME=folder):
            line = {"model": name} | in_turns(make, 6.0 if arguments.quick else arguments.seconds)
            if not line["chosen"]:
                line["bit_identical"] = is_bit_identical(make)
        print(json.dumps(line | {"threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
