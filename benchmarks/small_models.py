"""Small models on tables: a run under our Trainer beside the same run under stock Lightning.

    python benchmarks/small_models.py [--seconds 60] [--rounds 1] [--quick] [--only M] [--itself]

The two runs take turns, a block of steps each, so that what slows the machine down hits both;
each has a process of its own, as a user's run has, and is charged the time of its own turns, ours
with all that it tries. A process keeps the speed it was born with (where its memory happens to
lie), some per cent up or down: one pair says little. The two are forked from one process that has
imported everything; a round runs each model twice, either first, from an empty plan cache.

One JSON line for each model. ``ratio`` (the limit is 1.02) is what ours takes more in the first
tenth of the run, where it tries, plus the mean of the later turns' ratios, each beside its
neighbour in time, less the fifth at either end: those that the machine stood still in. ``ratios``
has it for each pair, ``trying`` the first part alone, ``plain`` the bare sums'. Beside these,
seconds of either, what was chosen, and, where nothing was, whether a run of its own ends with
stock Lightning's weights bit for bit. ``--itself`` puts stock Lightning beside itself: what the
frame is good for.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import tempfile
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

BLOCK_S = 0.05
TRYING = 0.1  # of the run
TRIMMED = 0.2
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

    def __init__(self, mine: Any, other: Any, steps: int) -> None:
        self.mine, self.other, self.steps = mine, other, steps
        self.seconds: list[float] = []
        self.start = 0.0

    def take(self) -> None:
        self.mine.acquire()
        self.start = time.perf_counter()

    def hand_on(self) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.other.release()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step % self.steps == 0:
            self.hand_on()
            self.take()


def pairs(name: str, seconds: float, *, rounds: int, itself: bool) -> dict[str, Any]:
    """Pairs of runs of about ``seconds``, stock Lightning first and then the other first."""
    runs = []
    for index in range(2 * rounds):
        with tempfile.TemporaryDirectory() as folder:
            order = {"other_first": bool(index % 2), "itself": itself}
            runs.append(in_turns(name, seconds, folder, **order))
    ratios = [run["ratio"] for run in runs]
    stock_s, ours_s = (sum(run[who] for run in runs) for who in ("stock_s", "ours_s"))
    return {
        "ratio": round(statistics.mean(ratios), 4),
        "ratios": ratios,
        "trying": [run["trying"] for run in runs],
        "plain": round(ours_s / stock_s, 4),
        "steps": runs[0]["steps"],
        "stock_s": round(stock_s, 1),
        "ours_s": round(ours_s, 1),
        "chosen": [run["chosen"] for run in runs],
    }


def compared(stock: list[float], ours: list[float]) -> dict[str, float]:
    """Seconds of turns side by side."""
    count = min(len(stock), len(ours))
    first = round(TRYING * count)
    later = sorted(b / a for a, b in zip(stock[first:count], ours[first:count], strict=True))
    cut = round(TRIMMED * len(later))
    steady = statistics.mean(later[cut : len(later) - cut])
    trying = (sum(ours[:first]) - steady * sum(stock[:first])) / sum(stock)
    return {"ratio": round(steady + trying, 4), "trying": round(trying, 4)}


def in_turns(
    name: str, seconds: float, cache: str, *, other_first: bool, itself: bool
) -> dict[str, Any]:
    """Both runs, about ``seconds`` long, each in a process of its own."""
    step_s = _step_s(MODELS[name])
    epochs = max(2, round(seconds / step_s / (ROWS // 64)))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pytorch_lightning", "bigdl.nano.pytorch"])
    gates = processes.Semaphore(int(not other_first)), processes.Semaphore(int(other_first))
    steps = max(1, round(BLOCK_S / step_s))
    results = processes.Queue()
    started = processes.Barrier(2)
    runs = [
        processes.Process(
            target=_one_run,
            args=(results, started, gates[place], gates[1 - place]),
            kwargs={"name": name, "ours": bool(place) and not itself, "place": place}
            | {"cache": cache, "epochs": epochs, "steps": steps},
        )
        for place in (0, 1)
    ]
    for run in runs:
        run.start()
    ended = dict(results.get(timeout=60 + 10 * seconds) for _ in runs)
    for run in runs:
        run.join()
    (stock, *_), (turns, made, chosen) = ended[0], ended[1]
    return compared(stock, turns) | {
        "steps": made,
        "stock_s": sum(stock),
        "ours_s": sum(turns),
        "chosen": chosen,
    }


def _one_run(
    results: Any,
    started: Any,
    mine: Any,
    other: Any,
    *,
    name: str,
    ours: bool,
    place: int,
    cache: str,
    epochs: int,
    steps: int,
) -> None:
    """In a process of its own: a run that takes turns with the other."""
    _be_quiet()
    turns = Turns(mine, other, steps)
    trainer = (Trainer if ours else pl.Trainer)(**QUIET, max_epochs=epochs, callbacks=[turns])
    started.wait()
    turns.take()
    try:
        with environment(XDG_CACHE_HOME=cache):
            trainer.fit(MODELS[name](), loader())
    finally:
        turns.hand_on()
    chosen = list(trainer.plan.chosen) if ours else []
    results.put((place, (turns.seconds, trainer.global_step, chosen)))


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


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
    parser.add_argument("--rounds", type=int, default=1, help="pairs of runs in both orders")
    parser.add_argument("--only", choices=list(MODELS), help="this model alone")
    parser.add_argument("--itself", action="store_true", help="stock Lightning beside itself")
    parser.add_argument("--quick", action="store_true", help="runs of six seconds")
    arguments = parser.parse_args()
    _be_quiet()
    seconds = 6.0 if arguments.quick else arguments.seconds
    for name, make in MODELS.items():
        if arguments.only not in (None, name):
            continue
        line = {"model": name} | pairs(
            name, seconds, rounds=arguments.rounds, itself=arguments.itself
        )
        if not any(line["chosen"]):
            with tempfile.TemporaryDirectory() as folder, environment(XDG_CACHE_HOME=folder):
                line["bit_identical"] = is_bit_identical(make)
        print(json.dumps(line | {"threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
