"""A Spark DataFrame into shuffled batches, against Spark's own ways, in turns, as one JSON line.

    python benchmarks/spark_spool.py [--rows 5000000] [--wide-rows 1000000] [--rounds 3]

Two tables on ``local[2]``, read from Parquet: *narrow* has 11 numbers a row, *wide* an array of
128 floats. Medians over rounds, and ratios as the median of each round's ratio:

- ``spool_vs_arrow``: rows/s of our spool ÷ of what Spark hands to Python by Arrow, nothing kept
- ``read_vs_torch_distributor``: rows a CPU second of our shuffled batches, in an epoch of its own
  after the first, ÷ of the loader that Spark's TorchDistributor gives to its workers (not
  shuffled), on the same rows
- ``spool_and_epoch_vs_rows``: rows/s of spool and first epoch ÷ of a row-by-row path,
  ``rdd.map`` to NumPy, pickled to Python
- ``first_batch_s``: from the call to the first batch
- ``peak_extra_mb``: most memory of all our processes (PSS, and files in /dev/shm) less that before
  the call; ``data_mb`` is what was spooled

Not yet measured on a quiet machine with the default sizes: figures of a small run, on a machine
with other work, say only that everything runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 1024
ROW_PATH_ROWS = 100_000
LOADER_ROWS = 100_000
GOALS = {"spool_vs_arrow": 0.8, "read_vs_torch_distributor": 20, "spool_and_epoch_vs_rows": 10}


def session(folder: str) -> Any:
    """Two threads, all on loopback."""
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    os.environ["PYSPARK_PYTHON"] = sys.executable
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[2]")
    for name, value in {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.memory": "2g",
        "spark.local.dir": folder,
    }.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


def tables(spark: Any, folder: str, rows: int, wide_rows: int) -> dict[str, tuple[Any, list[str]]]:
    """Name → table and its feature columns; the label is "y"."""
    floats = [f"rand({i}) x{i}" for i in range(8)]
    narrow = spark.range(0, rows, 1, 8).selectExpr("id", "id % 7 k", *floats, "rand(9) y")
    array = "transform(sequence(1, 128), i -> float(id * i)) x"
    wide = spark.range(0, wide_rows, 1, 8).selectExpr("id", array, "rand(9) y")
    found = {}
    for name, table in {"narrow": narrow, "wide": wide}.items():
        if not {"narrow": rows, "wide": wide_rows}[name]:
            continue
        table.write.parquet(f"{folder}/{name}")
        features = [column for column in table.columns if column != "y"]
        found[name] = (spark.read.parquet(f"{folder}/{name}"), features)
    return found


class Memory:
    """Most memory of this process and all below it, while it runs."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self.before = held()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.peak = max(self.peak, held())


def held() -> int:
    """Bytes: PSS of our processes, and our files in /dev/shm."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    ours, found = {os.getpid()}, True
    while found:
        found = {pid for pid, parent in parents.items() if parent in ours} - ours
        ours |= found
    total = 0
    for pid in ours:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line[:4] == "Pss:")
    files = [path.stat().st_size for path in Path("/dev/shm").glob("bigdl-spool-*/*.arrow")]
    return total * 1024 + sum(files)


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def handed_over(table: Any) -> float:
    """Seconds in which Spark hands all rows to Python."""

    def count(batches: Any) -> Any:
        import pyarrow as pa

        rows = sum(batch.num_rows for batch in batches)
        yield pa.RecordBatch.from_pydict({"rows": [rows]})

    return seconds(table.mapInArrow(count, "rows long").collect)


def by_rows(table: Any) -> float:
    """Rows/s of the row-by-row path, on some of the rows."""
    import numpy as np

    some = table.limit(ROW_PATH_ROWS)
    rows = some.count()

    def arrays(row: Any) -> Any:
        return [np.asarray(value) for value in row]

    return rows / seconds(lambda: some.rdd.map(arrays).collect())


def by_torch_distributor(table: Any, folder: str) -> float:
    """Rows a CPU second of the loader that TorchDistributor's workers have."""
    import pyarrow as pa
    from pyspark.ml.torch.data import _SparkPartitionTorchDataset
    from torch.utils.data import DataLoader

    rows = table.limit(LOADER_ROWS).toArrow()
    path = f"{folder}/partition.arrow"
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=10_000)
    loader = DataLoader(_SparkPartitionTorchDataset(path, table.schema, rows.num_rows), BATCH)
    started = time.process_time()
    for _ in loader:
        pass
    return rows.num_rows / (time.process_time() - started)


def round_of(table: Any, features: list[str], folder: str) -> dict[str, float]:
    """One turn of every way."""
    from bigdl.orca.data.adapters import adapt
    from bigdl.orca.data.contract import Request

    rows = table.count()
    arrow_s = handed_over(table)
    with Memory() as memory:
        started = time.perf_counter()
        sharded: Any = adapt(table, Request(feature_cols=features, label_cols=["y"]))
        spool_s = time.perf_counter() - started
        batches = sharded.open(0, 1).batches(BATCH, seed=1)
        next(batches)
        first_s = time.perf_counter() - started
        read = BATCH + sum(batch.rows for batch in batches)
        epoch_s = time.perf_counter() - started
    assert read >= rows, (read, rows)
    cpu = time.process_time()  # of all threads, so no one watches
    read = sum(batch.rows for batch in sharded.open(0, 1).batches(BATCH, seed=1, epoch=1))
    cpu_s = time.process_time() - cpu
    assert read >= rows, (read, rows)
    data = sum(shard.bytes for shard in sharded.shards.shards)
    peak = memory.peak - memory.before
    sharded.let_go()
    return {
        "arrow_rows_s": rows / arrow_s,
        "spool_rows_s": rows / spool_s,
        "spool_vs_arrow": arrow_s / spool_s,
        "read_rows_cpu_s": rows / cpu_s,
        "read_vs_torch_distributor": rows / cpu_s / by_torch_distributor(table, folder),
        "spool_and_epoch_vs_rows": rows / epoch_s / by_rows(table),
        "first_batch_s": first_s,
        "data_mb": data / 2**20,
        "peak_extra_mb": peak / 2**20,
        "peak_vs_limit": peak / (1.3 * data + (700 << 20)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--wide-rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, Any] = {"rows": asked.rows, "wide_rows": asked.wide_rows, "goals": GOALS}
    with tempfile.TemporaryDirectory() as folder:
        spark = session(folder)
        for name, (table, features) in tables(spark, folder, asked.rows, asked.wide_rows).items():
            handed_over(table)  # the first pass of a session starts its workers
            rounds = [round_of(table, features, folder) for _ in range(asked.rounds)]
            found[name] = {
                key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]
            }
        spark.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
