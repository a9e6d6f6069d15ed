"""All-reduce between processes on one host: ours against gloo, in turns, as one JSON line.

    python benchmarks/allreduce.py [--processes 2 4] [--rounds 7]

For each size: median microseconds a call over all rounds, of gloo (``torch.distributed``), of
ours on an array of the caller's own, and of ours on a ``buffer``; and gloo's time divided by
each of ours, as the median over rounds of each round's ratio. ``copy_us`` is what the memory
allows: how long the same processes need, all at once, to copy an array of that size once, each
its own. An all-reduce of two in place reads and writes each array once, as such a copy does; on
an array of the caller's own it has to read and write each twice.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.collective import Collective, connect
from bigdl._base.rendezvous import Rendezvous, join
from bigdl._base.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigdl._base.rendezvous import Ticket

SIZES = {"64KB": 64 << 10, "4MB": 4 << 20, "32MB": 32 << 20}
#: Calls of one way before the next has its turn, by size.
CALLS = {"64KB": 200, "4MB": 20, "32MB": 4}
GOAL = 3.0


def timed(collective: Collective, calls: int, call: Callable[[], Any]) -> float:
    """Median microseconds a call on this rank."""
    call()
    times = []
    collective.barrier()
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def worker(
    ticket: Ticket, rank: int, store: str, rounds: int
) -> dict[str, dict[str, list[float]]]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ticket.world
    )
    found: dict[str, dict[str, list[float]]] = {}
    with join(ticket, rank) as gang, connect(gang) as collective:
        for name, size in SIZES.items():
            own = np.zeros(size // 4, np.float32)
            source = np.ones(size // 4, np.float32)
            tensor = torch.from_numpy(own)
            buffer = collective.buffer(size).view(np.float32)
            ways: dict[str, Callable[[], Any]] = {
                "gloo": lambda tensor=tensor: dist.all_reduce(tensor),
                "own": lambda own=own: collective.all_reduce(own),
                "buffer": lambda buffer=buffer: collective.all_reduce(buffer),
                "copy": lambda own=own, source=source: np.copyto(own, source),
            }
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, call in ways.items():
                    own.fill(0)
                    times[way].append(timed(collective, CALLS[name], call))
            check(collective, own, buffer)
            found[name] = times
    dist.destroy_process_group()
    return found


def check(collective: Collective, *arrays: np.ndarray) -> None:
    """What was timed is right."""
    for array in arrays:
        array.fill(collective.rank + 1)
        collective.all_reduce(array)
        assert (array == sum(range(1, collective.world + 1))).all()


def measure(world: int, rounds: int) -> dict[str, Any]:
    """The table of one number of processes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Rendezvous(world) as rendezvous,
        Workers(preload=("numpy",), env={"OMP_NUM_THREADS": "1"}) as workers,
    ):
        store = os.path.join(folder, "store")
        started = [
            workers.start(worker, rendezvous.ticket, rank, store, rounds) for rank in range(world)
        ]
        times = next(one.result(timeout_s=600) for one in started)
    table = {}
    for name, ways in times.items():
        row = {f"{way}_us": round(statistics.median(values), 1) for way, values in ways.items()}
        for way in ("own", "buffer"):
            ratios = [gloo / ours for gloo, ours in zip(ways["gloo"], ways[way], strict=True)]
            row[f"gloo_over_{way}"] = round(statistics.median(ratios), 2)
        table[name] = row
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    tables = {str(world): measure(world, options.rounds) for world in options.processes}
    first = tables[str(options.processes[0])]
    reached = {
        name: {way: row[f"gloo_over_{way}"] >= GOAL for way in ("own", "buffer")}
        for name, row in first.items()
    }
    print(
        json.dumps(
            {
                "benchmark": "allreduce",
                "cores": len(os.sched_getaffinity(0)),
                "goal": f">= {GOAL:g} x gloo with {options.processes[0]} processes",
                "reached": reached,
                "processes": tables,
            }
        )
    )


if __name__ == "__main__":
    main()
