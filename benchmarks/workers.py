"""Workers against the plain PyTorch loop on the same rows in memory, as one JSON line.

    python benchmarks/workers.py [--only mlp resnet18 ncf startup] [--rounds 5]
                                 [--runtime local | spark]

The plain loop runs in this process: shuffled indices, rows by index, a step; both sides with all
cores, in turns, an epoch to warm up before those that are timed. Ratios are of throughput, the
median over rounds of each round's:

- ``one_worker``: one worker with all cores ÷ the plain loop (goal 0.97)
- ``two_by_one``: a worker for each of two cores, the same global batch ÷ the plain loop (goal 0.9
  for ResNet-18 and NCF)

``startup`` is the time from the call of ``fit`` to the end of the first step with two workers, in
parts; ``first`` is a program's first call, ``again`` a later one.

With ``--runtime spark`` the workers are tasks of a Spark session that runs already, and the rows
come from a cached DataFrame, which each call of ``fit`` spools: within ``startup``, outside the
epochs that are timed (goals 0.95 for one worker, 8 s for the start).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from bigdl.orca import init_orca_context
from bigdl.orca.learn.callbacks import Callback
from bigdl.orca.learn.pytorch import Estimator

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigdl.orca import OrcaContext

GOALS = {
    "mlp": {"one_worker": 0.97},
    "resnet18": {"one_worker": 0.97, "two_by_one": 0.9},
    "ncf": {"two_by_one": 0.9},
}
SPARK_GOALS = {name: {"one_worker": 0.95} for name in GOALS}
STARTUP_GOAL_S = {"local": 4.0, "spark": 8.0}
CORES = len(os.sched_getaffinity(0))


class NeuMF(nn.Module):
    """Two embeddings of users and items; ids come as one matrix of two columns."""

    def __init__(self, users: int = 6000, items: int = 4000, width: int = 32) -> None:
        super().__init__()
        self.gmf = nn.ModuleList([nn.Embedding(users, width), nn.Embedding(items, width)])
        self.mlp = nn.ModuleList([nn.Embedding(users, width), nn.Embedding(items, width)])
        self.net = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU()
        )
        self.last = nn.Linear(2 * width, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        user, item = ids[:, 0], ids[:, 1]
        product = self.gmf[0](user) * self.gmf[1](item)
        joined = self.net(torch.cat([self.mlp[0](user), self.mlp[1](item)], 1))
        return self.last(torch.cat([product, joined], 1)).squeeze(1)


class Task:
    """A model, its rows and how it is trained."""

    def __init__(self, name: str) -> None:
        draw = np.random.default_rng(0)
        self.name = name
        if name == "mlp":
            self.batch, self.epochs = 256, 4
            x = draw.standard_normal((100_000, 64)).astype(np.float32)
            self.rows = x, (x[:, :8].sum(1) > 0).astype(np.int64)
            self.loss: nn.Module = nn.CrossEntropyLoss()
        elif name == "resnet18":
            self.batch, self.epochs = 32, 2
            x = draw.standard_normal((256, 3, 96, 96)).astype(np.float32)
            self.rows = x, draw.integers(10, size=256)
            self.loss = nn.CrossEntropyLoss()
        else:
            self.batch, self.epochs = 10_240, 3
            ids = np.column_stack(
                [draw.integers(6000, size=400_000), draw.integers(4000, size=400_000)]
            )
            self.rows = ids, draw.integers(2, size=400_000).astype(np.float32)
            self.loss = nn.BCEWithLogitsLoss()

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        if self.name == "mlp":
            return nn.Sequential(
                nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)
            )
        if self.name == "resnet18":
            from torchvision.models import resnet18

            return resnet18(num_classes=10)
        return NeuMF()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.name == "resnet18":
            return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        return torch.optim.Adam(model.parameters(), lr=1e-3)


def plain(task: Task) -> float:
    """Seconds an epoch of the loop that one writes by hand."""
    torch.set_num_threads(CORES)
    x, y = map(torch.from_numpy, task.rows)
    model = task.model().train()
    optimizer = task.optimizer(model)
    times = []
    for _ in range(1 + task.epochs):
        started = time.perf_counter()
        total = torch.zeros(())
        for index in torch.randperm(len(x)).split(task.batch):
            loss = task.loss(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(index)
        total.item()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


class Given(NamedTuple):
    """What ``fit`` is given: the rows, and how it is to read them."""

    data: Any
    options: dict[str, Any]


def given(task: Task, spark: Any) -> Given:
    """The rows as arrays, or as a cached DataFrame with a column of arrays."""
    if spark is None:
        return Given(task.rows, {})
    import pyarrow as pa

    x, y = task.rows
    shape = x.shape[1:]
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x[0].size)
    table = pa.table({"x": column.cast(pa.list_(column.type.value_type)), "y": pa.array(y)})
    frame = spark.createDataFrame(table).repartition(CORES).cache()
    frame.count()
    reshape = {} if len(shape) == 1 else {"transform": lambda x: x.reshape(-1, *shape)}
    return Given(frame, {"feature_cols": "x", "label_cols": "y", **reshape})


def ours(task: Task, rows: Given, workers: int | None) -> float:
    """Seconds an epoch of workers."""
    model = task.model()
    est = Estimator.from_torch(model, task.optimizer(model), task.loss, workers=workers)
    found = est.fit(rows.data, epochs=1 + task.epochs, batch_size=task.batch, **rows.options)
    est.shutdown()
    return statistics.median(row["seconds"] for row in found[1:])


def compared(
    name: str, rounds: int, spark: Any, goals: dict[str, dict[str, float]]
) -> dict[str, Any]:
    task = Task(name)
    rows = given(task, spark)
    ways: dict[str, Callable[[], float]] = {
        "plain": lambda: plain(task),
        "one_worker": lambda: ours(task, rows, 1),
        "two_by_one": lambda: ours(task, rows, 2),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        order = list(ways) if turn % 2 == 0 else list(ways)[::-1]
        for way in order:
            times[way].append(ways[way]())
    row: dict[str, Any] = {
        f"{way}_ms": round(1e3 * statistics.median(each), 1) for way, each in times.items()
    }
    for way in ("one_worker", "two_by_one"):
        ratios = [a / b for a, b in zip(times["plain"], times[way], strict=True)]
        row[way] = round(statistics.median(ratios), 3)
        row[f"{way}_of_rounds"] = [round(min(ratios), 3), round(max(ratios), 3)]
    row["reached"] = {way: row[way] >= goal for way, goal in goals[name].items()}
    return row


# --- start-up -----------------------------------------------------------------------------------


class Clock(Callback):
    """Writes when its worker has done its first step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, state: Any) -> None:
        if state.step == 1:
            _once(self.folder / "step")


def model_of(config: dict[str, Any]) -> nn.Module:
    """Made in a worker; writes when, and when rows first come to it."""
    folder = Path(config["folder"])
    _once(folder / "model")
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2))
    model.register_forward_pre_hook(lambda *_: _once(folder / "rows"))
    return model


def _once(path: Path) -> None:
    """The time, by the worker that comes first."""
    if not path.exists():
        path.write_text(str(time.time()))


def optimizer_of(model: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def begun(rows: Given) -> dict[str, float]:
    """Seconds from the call of ``fit``, in parts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        est = Estimator.from_torch(
            model_of, optimizer_of, nn.CrossEntropyLoss(), config={"folder": name}, workers=2
        )
        called = time.time()
        est.fit(rows.data, epochs=1, batch_size=256, callbacks=[Clock(folder)], **rows.options)
        at = {part: float((folder / part).read_text()) for part in ("model", "rows", "step")}
    return {
        "processes_s": at["model"] - called,
        "model_and_data_s": at["rows"] - at["model"],
        "first_step_s": at["step"] - at["rows"],
        "whole_s": at["step"] - called,
    }


def bare(code: str) -> float:
    """Seconds of a Python process that does this."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def startup(rounds: int, runtime: str) -> dict[str, Any]:
    task = Task("mlp")
    first, again, interpreter, imported = [], [], [], []
    for _ in range(rounds):
        interpreter.append(bare("pass"))
        imported.append(bare("import torch"))
        with context_of(runtime) as context:
            rows = given(task, context.spark)
            first.append(begun(rows))
            again.append(begun(rows))

    def middle(rows: list[dict[str, float]]) -> dict[str, float]:
        return {part: round(statistics.median(row[part] for row in rows), 2) for part in rows[0]}

    found: dict[str, Any] = {"first": middle(first), "again": middle(again)}
    found["interpreter_s"] = round(statistics.median(interpreter), 2)
    found["interpreter_and_torch_s"] = round(statistics.median(imported), 2)
    found["reached"] = found["first"]["whole_s"] <= STARTUP_GOAL_S[runtime]
    return found


def context_of(runtime: str) -> OrcaContext:
    """On all cores."""
    if runtime == "local":
        return init_orca_context(cores=CORES)
    context = init_orca_context(runtime="spark", cores=CORES)
    context.spark.sparkContext.setLogLevel("ERROR")
    return context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = [*GOALS, "startup"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runtime", choices=list(STARTUP_GOAL_S), default="local")
    options = parser.parse_args()
    goals = GOALS if options.runtime == "local" else SPARK_GOALS
    found: dict[str, Any] = {"benchmark": "workers", "runtime": options.runtime, "cores": CORES}
    found["goals"] = goals
    if "startup" in options.only:
        found["startup"] = startup(options.rounds, options.runtime)
    with context_of(options.runtime) as context:
        for name in GOALS:
            if name in options.only:
                found[name] = compared(name, options.rounds, context.spark, goals)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
