"""The Spark engine on executors of their own: the contract, also where no file of ours is seen."""

from __future__ import annotations

import pytest

from bigdl.orca.engines import ENGINES
from bigdl.orca.engines import spark as engine_module
from bigdl.orca.engines.base import EngineSettings
from bigdl.testing.engine import EngineContract

pytestmark = pytest.mark.slow


def _open(**settings):
    return ENGINES.get("spark").open(EngineSettings(**settings))


@pytest.fixture(scope="module", autouse=True)
def session():
    """One session for all; engines join it."""
    engine = _open(cluster_mode="standalone", master="local-cluster[2,2,1024]")
    yield engine.spark
    engine.close()


class TestSparkCluster(EngineContract):
    @classmethod
    def open_engine(cls):
        return _open()


class TestFarWorkers(EngineContract):
    """As on other hosts: neither our files nor our package are there."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def far(cls):
        places = engine_module.SparkPlaces
        digest, zipped = engine_module.package()

        def far_places(seats, cores, run, folder, mark, package):
            return places(
                seats, cores, run, folder, f"{mark}-not", lambda: (f"{digest[::-1]}", zipped)
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "SparkPlaces", far_places)
            yield

    @classmethod
    def open_engine(cls):
        return _open()

    def test_the_package_travels(self, engine):
        import bigdl

        where = engine.submit(lambda: (bigdl.__file__, bigdl.orca.engines.base.__file__)).result()
        assert all(".zip/bigdl/" in path for path in where)
