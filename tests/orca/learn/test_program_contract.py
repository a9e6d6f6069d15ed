"""The contract of programs on the engine of this machine."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("torch", reason="needs the [torch] extra")

from bigdl.orca.engines import ENGINES
from bigdl.orca.engines.base import EngineSettings
from bigdl.testing.program import ProgramContract


@pytest.mark.skipif(sys.platform != "linux", reason="worker processes")
class TestLocal(ProgramContract):
    @classmethod
    def open_engine(cls):
        return ENGINES.get("local").open(EngineSettings(cores=4))
