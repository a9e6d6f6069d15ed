"""The collectives of the ground floor keep the contract, each way of connecting."""

from __future__ import annotations

import sys

import pytest

from bigdl._base.collective import connect
from bigdl._base.collective.shared import SharedMemory
from bigdl.testing.collective import CheckedContract, CollectiveContract

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes, /proc")


class TestAlone(CollectiveContract):
    worlds = (1,)

    @staticmethod
    def connect(gang):
        return connect(gang)


class TestSharedMemory(CheckedContract):
    @staticmethod
    def connect(gang):
        return connect(gang, kind="shared")

    @staticmethod
    def connect_impatient(gang):
        return connect(gang, kind="shared", timeout_s=2)


class TestSharedMemoryByMessage(CheckedContract):
    @staticmethod
    def connect(gang):
        return SharedMemory(gang, by_message=True)

    @staticmethod
    def connect_impatient(gang):
        return SharedMemory(gang, by_message=True, timeout_s=2)


class TestTcp(CheckedContract):
    @staticmethod
    def connect(gang):
        return connect(gang, kind="tcp")

    @staticmethod
    def connect_impatient(gang):
        return connect(gang, kind="tcp", timeout_s=2)


class TestHierarchical(CheckedContract):
    """Two hosts on one machine; their workers are no neighbours."""

    def hosts(self, world):
        return ["one" if rank % 2 == 0 else "other" for rank in range(world)]

    @staticmethod
    def connect(gang):
        return connect(gang, kind="hierarchical")

    @staticmethod
    def connect_impatient(gang):
        return connect(gang, kind="hierarchical", timeout_s=2)
