"""Small real data for the paper's listings."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest


def _shared(name: str) -> Path | None:
    """A file of the shared test data, where there is one."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("BIGDL_TEST_DATA", beside)) / name
    return path if path.exists() else None


@pytest.fixture
def digits():
    """Handwritten digits as grey pictures: x (rows, 8, 8) float32 in [0, 1], y (rows,) int64."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the data are bundled there")
    found = datasets.load_digits()
    return found.images.astype("float32") / 16, found.target.astype("int64")


@pytest.fixture
def ratings():
    """Who liked what: a frame with columns user, item (both from 0) and label (1 = liked)."""
    pd = pytest.importorskip("pandas", reason="the listing's data are a frame")
    path = _shared("ml-100k/u.data.gz")
    if path is not None:
        names = ["user", "item", "stars", "when"]
        table = pd.read_csv(path, sep="\t", names=names).head(5000)
        return pd.DataFrame(
            {
                "user": table.user - 1,
                "item": table.item - 1,
                "label": (table.stars > 3).astype("int64"),
            }
        )
    # the same kind of table: a liking that hangs on hidden tastes
    draw = np.random.default_rng(0)
    tastes, traits = draw.normal(size=(200, 3)), draw.normal(size=(300, 3))
    user, item = draw.integers(0, 200, 5000), draw.integers(0, 300, 5000)
    liked = (tastes[user] * traits[item]).sum(1) > 0
    return pd.DataFrame({"user": user, "item": item, "label": liked.astype("int64")})


@pytest.fixture
def readings(tmp_path) -> Path:
    """A folder of CSV files with a column "value"."""
    pd = pytest.importorskip("pandas", reason="the listing's data are a frame")
    path = _shared("timeseries/nyc_taxi.csv.gz")
    if path is not None:
        table = pd.read_csv(path)
    else:
        datasets = pytest.importorskip("sklearn.datasets", reason="the data are bundled there")
        table = pd.DataFrame({"timestamp": range(442), "value": datasets.load_diabetes().target})
    half = len(table) // 2
    table[:half].to_csv(tmp_path / "part-0.csv", index=False)
    table[half:].to_csv(tmp_path / "part-1.csv", index=False)
    return tmp_path
