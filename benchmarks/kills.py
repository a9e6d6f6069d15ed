"""Rounds of kill -9 at random moments of short fits, counted, as one JSON line.

    python benchmarks/kills.py [--rounds 100] [--runtime local|spark] [--seed 0]

Each round runs a program that trains with two workers and writes a checkpoint every fifth
update, and kills, at a random moment, one of the workers or the program itself. A program that
lost a worker goes on by itself (``max_failures=1``); one that was killed is started again and goes
on from its last checkpoint. The weights have to be those of a run that nobody disturbed: no row is
lost, and none is met twice.

- ``detected_s``: from the kill until the other workers of that attempt are gone
- ``wrong``: rounds whose weights, or rows of an epoch, are not those of the undisturbed run
- ``late``: rounds in which all was over before the kill
- ``processes_left``, ``files_left``, ``shared_memory_left``: what was still there 15 s later
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

from bigdl.testing.processes import are_gone, is_alive, within

SPAN_S = 1.2  # after the first step; the fit lasts a little longer
MARK = "BIGDL_KILLS"  # in the environment of all that a round starts

PROGRAM = textwrap.dedent("""
    import json, os, sys, time
    from pathlib import Path
    import numpy as np
    import torch
    from torch import nn
    from bigdl.orca import init_orca_context
    from bigdl.orca.learn.callbacks import ModelCheckpoint
    from bigdl.orca.learn.pytorch import Estimator

    folder, runtime = Path(sys.argv[1]), sys.argv[2]
    EPOCHS = 3

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x):
            (folder / "pids" / str(os.getpid())).touch()
            time.sleep(0.02)
            return self.layers(x)

    draw = np.random.default_rng(0)
    x = draw.standard_normal((401, 5)).astype(np.float32)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    where = {"cores": 2} if runtime == "local" else {"runtime": "spark", "cores": 2}
    with init_orca_context(**where):
        est = Estimator.from_torch(model, optimizer, nn.MSELoss(), workers=2)
        if any((folder / "saved").glob("*")):
            est.load_checkpoint(folder / "saved")
        rows = []
        if est.epoch < EPOCHS:
            saver = ModelCheckpoint(folder / "saved", every_steps=5)
            rows = est.fit((x, x.sum(1, keepdims=True)), epochs=EPOCHS - est.epoch, batch_size=16,
                           callbacks=[saver], max_failures=1)
        weights = torch.cat([p.detach().flatten() for p in est.get_model().parameters()])
        print(json.dumps({"rows": [row["rows"] for row in rows], "weights": weights.tolist()}))
""")


class Run:
    """One program on its way."""

    def __init__(self, folder: Path, runtime: str, token: str) -> None:
        self.folder = folder
        self.pids = folder / "pids"
        self.pids.mkdir(exist_ok=True)
        (folder / "tmp").mkdir(exist_ok=True)
        (folder / "program.py").write_text(PROGRAM)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "program.py"), str(folder), runtime],
            env={**os.environ, MARK: token, "TMPDIR": str(folder / "tmp")},
            stdout=subprocess.PIPE,
            stderr=(folder / "errors").open("a"),
            text=True,
        )

    def workers(self) -> list[int]:
        """Those that have trained, and are still there."""
        return [pid for one in self.pids.iterdir() if is_alive(pid := int(one.name))]

    def ended(self) -> dict[str, Any]:
        """What it has printed, once it is over."""
        printed, _ = self.process.communicate(timeout=120)
        if self.process.returncode:
            raise RuntimeError((self.folder / "errors").read_text()[-3000:])
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found


def processes(token: str) -> list[int]:
    """All that a round has started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={token}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if is_alive(pid)]


def round_of(kind: str, runtime: str, draw: random.Random) -> dict[str, Any]:
    """One program, killed or bereaved; what came of it."""
    token, shared = secrets.token_hex(8), set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = Run(folder, runtime, token)
        found: dict[str, Any] = {"late": False}
        within(120, lambda: run.process.poll() is not None or len(run.workers()) == 2)
        time.sleep(draw.uniform(0, SPAN_S))
        workers = run.workers()
        if len(workers) < 2:
            found["late"] = True
        else:
            victim = run.process.pid if kind == "driver" else draw.choice(workers)
            started = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            if not are_gone(workers, 30):
                raise RuntimeError(f"workers are still there half a minute after the {kind} died")
            found["detected_s"] = time.monotonic() - started
        if kind == "driver" and not found["late"]:
            run.process.communicate()
            within(15, lambda: not processes(token))
            found["processes_left"] = len(processes(token))
            run = Run(folder, runtime, token)
        found.update(run.ended())
        within(15, lambda: not processes(token))
        found["processes_left"] = found.get("processes_left", 0) + len(processes(token))
        # torch makes an empty folder of its own for each user
        left = [one for one in (folder / "tmp").iterdir() if "torchinductor" not in one.name]
        found["files_left"] = len(left)
    within(15, lambda: not set(os.listdir("/dev/shm")) - shared)
    found["shared_memory_left"] = len(set(os.listdir("/dev/shm")) - shared)
    return found


def is_right(found: dict[str, Any], kind: str, wanted: dict[str, Any]) -> bool:
    """Whether weights and rows are those of the undisturbed run."""
    pairs = zip(found["weights"], wanted["weights"], strict=True)
    if any(abs(a - b) > 1e-6 + 1e-5 * abs(b) for a, b in pairs):
        return False
    # a program that was started again reports the epochs that it made itself
    whole = found["rows"] if kind == "worker" else found["rows"][1:]
    return all(rows == 401 for rows in whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--runtime", choices=["local", "spark"], default="local")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        wanted = Run(Path(name), asked.runtime, secrets.token_hex(8)).ended()
    draw = random.Random(asked.seed)
    rounds = []
    for number in range(asked.rounds):
        kind = ("worker", "driver")[number % 2]
        found = round_of(kind, asked.runtime, draw)
        found["is_right"] = is_right(found, kind, wanted)
        rounds.append(found)
        print(f"{number + 1}/{asked.rounds} {kind}", file=sys.stderr, flush=True)
    detected = [one["detected_s"] for one in rounds if "detected_s" in one]
    line = {
        "rounds": asked.rounds,
        "runtime": asked.runtime,
        "detected_s": {
            "most": round(max(detected), 2),
            "median": round(statistics.median(detected), 2),
        },
        "wrong": sum(not one["is_right"] for one in rounds),
        "late": sum(one["late"] for one in rounds),
    }
    for left in ("processes_left", "files_left", "shared_memory_left"):
        line[left] = sum(one[left] for one in rounds)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
