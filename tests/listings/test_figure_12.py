"""Figure 12: ordinary Ray code beside Spark, on the same executors and on Spark's data."""

from __future__ import annotations

from pathlib import Path

import pytest


def _ray_processes() -> set[int]:
    """Ray's own processes on this machine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")[0]
        except OSError:  # it has just ended
            continue
        if Path(command.decode(errors="replace")).name in {"raylet", "gcs_server"}:
            found.add(int(path.parent.name))
    return found


@pytest.mark.xfail(raises=ModuleNotFoundError, strict=True, reason="bigdl.orca to come")
def test_figure_12(ratings):
    from bigdl.orca import init_orca_context, stop_orca_context
    from bigdl.orca.ray import spark_df_to_ray_dataset

    ray = pytest.importorskip("ray", reason="needs the [ray] extra")
    pyspark = pytest.importorskip("pyspark", reason="needs the [spark] extra")

    before = _ray_processes()
    context = init_orca_context(
        cluster_mode="local", runtime="spark", cores=2, init_ray_on_spark=True
    )
    try:
        df = context.spark.createDataFrame(ratings).filter("label = 1")
        dataset = spark_df_to_ray_dataset(df)

        @ray.remote
        def liked(batch):
            return int(batch["label"].sum())

        @ray.remote
        class Sum:
            def __init__(self):
                self.value = 0

            def add(self, number):
                self.value += number
                return self.value

        total = Sum.remote()
        parts = [liked.remote(batch) for batch in dataset.iter_batches(batch_size=500)]
        ray.get([total.add.remote(part) for part in parts])
        assert ray.get(total.add.remote(0)) == int(ratings.label.sum())
    finally:
        stop_orca_context()

    assert not ray.is_initialized()
    assert pyspark.SparkContext._active_spark_context is None
    assert _ray_processes() <= before
