"""The Spark engine: the contract on one JVM, and what only Spark has."""

from __future__ import annotations

import pytest

pytest.importorskip("pyspark", reason="needs pyspark")

from bigdl.orca.engines import ENGINES
from bigdl.orca.engines.base import EngineSettings
from bigdl.testing.engine import EngineContract


def _open(**settings):
    return ENGINES.get("spark").open(EngineSettings(**settings))


@pytest.fixture(scope="module", autouse=True)
def session():
    """One session for all; engines join it."""
    engine = _open(cores=4)
    yield engine.spark
    engine.close()


class TestSpark(EngineContract):
    @classmethod
    def open_engine(cls):
        return _open()
