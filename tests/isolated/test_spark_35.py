"""Spark 3.5: what it does otherwise than Spark 4, and one program from a DataFrame to predictions.

Needs an environment of its own: ``scripts/test-isolated spark-3.5``, which also runs there what
is tested with Spark 4.
"""

from __future__ import annotations

import shutil

import pytest

pyspark = pytest.importorskip("pyspark", reason="needs the [spark] extra")
if not pyspark.__version__.startswith("3.5."):
    pytest.skip("an environment with Spark 3.5", allow_module_level=True)
if shutil.which("java") is None:
    pytest.skip("Spark needs Java 17", allow_module_level=True)

import torch  # noqa: E402
from torch import nn  # noqa: E402

from bigdl.orca import OrcaContext, init_orca_context, stop_orca_context  # noqa: E402
from bigdl.orca.learn.pytorch import Estimator  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # py4j's sockets


@pytest.fixture(scope="module", autouse=True)
def spark():
    init_orca_context(runtime="spark", cores=2)
    yield OrcaContext.get_spark_session()
    stop_orca_context()


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.net.weight)

    def forward(self, x):
        return self.net(x[:, None].float())[:, 0]


def test_a_known_weight_and_each_prediction_beside_its_row(spark):
    # x = 0, 0, 1, 1 and y = 0: each epoch of two steps halves w in its second one
    frame = spark.createDataFrame(
        [(0.0, 0.0), (0.0, 0.0), (1.0, 0.0), (1.0, 0.0)], "x float, y float"
    )
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    estimator = Estimator.from_torch(model, optimizer, nn.MSELoss(), workers=2)
    try:
        estimator.fit(
            frame.coalesce(1), epochs=2, batch_size=2, shuffle=False,
            feature_cols="x", label_cols="y",
        )  # fmt: skip
        assert estimator.get_model().net.weight.item() == 0.25
        numbers = spark.range(401).selectExpr("id", "cast(id as float) as x").repartition(7)
        found = estimator.predict(numbers, feature_cols="x").filter("id % 2 = 1").collect()
    finally:
        estimator.shutdown()
    assert sorted(row.id for row in found) == list(range(1, 401, 2))
    assert all(row.prediction == row.id * 0.25 for row in found)
