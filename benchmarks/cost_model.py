"""The cost model of ``est.explain`` against what 1, 2 and 4 local workers take, as one JSON line.

    python benchmarks/cost_model.py [--only mlp resnet18 ncf] [--rounds 3]

The model is calibrated by ``explain`` (one worker and two, some seconds), then the same program
trains with 1, 2 and 4 workers, in turns. Per number of workers: ``predicted_ms`` and
``measured_ms`` of a step, and their ratio, the median over rounds of each round's own (goal 0.8
to 1.25). One worker and two are what the model was fitted to; four, more than there are cores on
a laptop, are what it has to know by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from workers import CORES, Task

from bigdl.orca import init_orca_context
from bigdl.orca.learn.pytorch import Estimator

WORKERS = (1, 2, 4)
GOAL = (0.8, 1.25)


def estimator(task: Task, workers: int | None) -> Estimator:
    model = task.model()
    return Estimator.from_torch(model, task.optimizer(model), task.loss, workers=workers)


def predicted(task: Task) -> dict[int, float]:
    """Seconds of a step by number of workers."""
    with init_orca_context(cores=CORES):
        found = estimator(task, 1).explain(task.rows, batch_size=task.batch)
    if found.memory is None:
        raise SystemExit("A machine with one core has no workers to tell apart.")
    return {count: found.model.step_s(count, found.memory) for count in WORKERS}


def measured(task: Task, workers: int) -> float:
    """Seconds of a step, in epochs after the first."""
    with init_orca_context(cores=max(CORES, workers)):
        rows = estimator(task, workers).fit(
            task.rows, epochs=1 + task.epochs, batch_size=task.batch
        )
    return statistics.median(row["seconds"] / row["steps"] for row in rows[1:])


def checked(name: str, rounds: int) -> dict[str, Any]:
    task = Task(name)
    said: dict[int, list[float]] = {count: [] for count in WORKERS}
    took: dict[int, list[float]] = {count: [] for count in WORKERS}
    for _ in range(rounds):
        model = predicted(task)
        for count in WORKERS:
            said[count].append(model[count])
            took[count].append(measured(task, count))
    row: dict[str, Any] = {}
    for count in WORKERS:
        ratios = [a / b for a, b in zip(said[count], took[count], strict=True)]
        ratio = statistics.median(ratios)
        row[str(count)] = {
            "predicted_ms": round(1e3 * statistics.median(said[count]), 3),
            "measured_ms": round(1e3 * statistics.median(took[count]), 3),
            "ratio": round(ratio, 3),
            "of_rounds": [round(min(ratios), 3), round(max(ratios), 3)],
            "reached": GOAL[0] <= ratio <= GOAL[1],
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["mlp", "resnet18", "ncf"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"benchmark": "cost_model", "cores": CORES, "goal": GOAL}
    for name in arguments.only:
        found[name] = checked(name, arguments.rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
