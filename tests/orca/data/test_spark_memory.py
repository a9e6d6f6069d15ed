"""Data of four times what a worker may use: trains, is scored and predicts within that."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the [torch] extra")
pytest.importorskip("pyspark")

from bigdl.orca import init_orca_context, stop_orca_context  # noqa: E402
from bigdl.orca.learn.pytorch import Estimator  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # py4j's sockets
]

LIMIT = 512 << 20
WIDTH = 128
ROWS = 4 * LIMIT // (4 * WIDTH) + 1


class Group:
    """A control group whose processes together may use ``LIMIT`` bytes."""

    def __init__(self, parent: Path, limit: str, peak: str) -> None:
        self.parent = parent
        self.folder = parent / f"bigdl-test-{secrets.token_hex(4)}"
        self._peak = peak
        self.folder.mkdir()
        (self.folder / limit).write_text(str(LIMIT))

    @property
    def peak(self) -> int:
        return int((self.folder / self._peak).read_text())

    def close(self) -> None:
        for pid in (self.folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                (self.parent / "cgroup.procs").write_text(pid)
        self.folder.rmdir()


@pytest.fixture
def group():
    ways = [
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
    ]
    for way in ways:
        if (way[0] / "cgroup.procs").exists():
            try:
                made = Group(*way)
            except OSError:
                continue
            yield made
            made.close()
            return
    pytest.skip("no control group for memory can be made here")


def wide(batches):
    """A row for each id: small whole numbers, whose sum is exact, and that sum."""
    import pyarrow as pa

    for batch in batches:
        ids = batch.column(0).to_numpy()
        x = (ids[:, None] % np.arange(2, WIDTH + 2)).astype(np.float32)
        column = pa.ListArray.from_arrays(
            pa.array(np.arange(len(ids) + 1, dtype=np.int32) * WIDTH), pa.array(x.ravel())
        )
        yield pa.RecordBatch.from_arrays([column, pa.array(x.sum(1))], names=["x", "y"])


def summing(config):
    """A model that is right already; whoever makes it is in the group from then on."""
    Path(config["group"], "cgroup.procs").write_text(str(os.getpid()))
    model = torch.nn.Linear(WIDTH, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    return torch.nn.Sequential(model, torch.nn.Flatten(0))


def sgd(model, config):
    return torch.optim.SGD(model.parameters(), lr=1e-9)


def peak_of_this_process() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the system does not say")


def test_data_of_four_times_the_limit(spark, group):
    frame = spark.range(0, ROWS, 1, 16).mapInArrow(wide, "x array<float>, y float")
    with contextlib.closing(_Context()):
        est = Estimator.from_torch(
            summing, sgd, torch.nn.MSELoss(), workers=1, config={"group": str(group.folder)}
        )
        asked = {"feature_cols": "x", "batch_size": 4096}
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = peak_of_this_process()
        (row,) = est.fit(frame, label_cols="y", **asked)
        assert row["rows"] == ROWS
        assert 0 < group.peak <= LIMIT
        found = est.evaluate(frame, label_cols="y", **asked)
        assert found["rows"] == ROWS
        assert found["loss"] < 1e-3
        predicted = est.predict(frame, **asked)
        ((count, wrong),) = predicted.selectExpr(
            "count(*)", "count_if(abs(prediction - y) > 0.01)"
        ).collect()
        assert (count, wrong) == (ROWS, 0)
        assert group.peak <= LIMIT
        assert peak_of_this_process() - before < LIMIT


class _Context:
    """An Orca context on the session that runs."""

    def __init__(self) -> None:
        init_orca_context(runtime="spark")

    def close(self) -> None:
        stop_orca_context()
