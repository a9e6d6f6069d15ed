"""The local engine: the contract, and what only worker processes on this machine have."""

from __future__ import annotations

from bigdl.orca.engines import ENGINES
from bigdl.orca.engines.base import EngineSettings
from bigdl.testing.engine import EngineContract


class TestLocal(EngineContract):
    @classmethod
    def open_engine(cls):
        return ENGINES.get("local").open(EngineSettings(cores=4))
