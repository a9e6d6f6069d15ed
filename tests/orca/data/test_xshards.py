"""Shards on local worker processes: the contract, misuse, interruption, others' libraries."""

from __future__ import annotations

import pytest

from bigdl.orca import init_orca_context
from bigdl.testing.xshards import XShardsContract

pd = pytest.importorskip("pandas")


class TestLocal(XShardsContract):
    @classmethod
    def open_context(cls):
        return init_orca_context(cores=2)
