"""XShards on the Spark engine: the same contract as on local processes."""

from __future__ import annotations

import pytest

from bigdl.orca import init_orca_context, stop_orca_context
from bigdl.orca.engines import ENGINES
from bigdl.orca.engines.base import EngineSettings
from bigdl.testing.xshards import XShardsContract


@pytest.fixture(scope="module", autouse=True)
def session():
    """One session for all; contexts join it."""
    engine = ENGINES.get("spark").open(EngineSettings(cores=2))
    yield
    stop_orca_context()
    engine.close()


class TestSparkShards(XShardsContract):
    @classmethod
    def open_context(cls):
        return init_orca_context(runtime="spark")
