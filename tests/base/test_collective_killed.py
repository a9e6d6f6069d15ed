"""Workers killed at random moments, many times: always missed in time, and nothing is left."""

from __future__ import annotations

import os
import random
import sys

import pytest

from bigdl._base.collective import connect
from bigdl.testing.collective import GangContract

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes, /proc")

ROUNDS = 20
ROUNDS_SLOW = 100


class _Shared(GangContract):
    @staticmethod
    def connect(gang):
        return connect(gang)


class _Tcp(GangContract):
    @staticmethod
    def connect(gang):
        return connect(gang, kind="tcp")


class _Hierarchical(_Shared):
    def hosts(self, world):
        return ["one" if rank < 2 else "other" for rank in range(world)]


WAYS = (_Shared, _Tcp, _Hierarchical)


def _mine():
    """Open files and children of this process."""
    children = f"/proc/self/task/{os.getpid()}/children"
    with open(children) as file:
        return len(os.listdir("/proc/self/fd")), file.read().split()


def _kill(rounds, seed):
    """From before they are connected to deep in their work."""
    draw = random.Random(seed)
    WAYS[0]().kill_one(2, 100, 0.0)  # what is loaded once is loaded
    before = _mine()
    slowest = 0.0
    for number in range(rounds):
        way = WAYS[number % len(WAYS)]()
        world = draw.choice((2, 3, 4))
        n = draw.choice((1, 1000, 100_000, 3_000_000))
        slowest = max(slowest, way.kill_one(world, n, draw.random() ** 3 * 0.5))
    assert slowest < 10
    assert _mine() == before


def test_killed_at_random_moments():
    _kill(ROUNDS, seed=1)


@pytest.mark.slow
def test_killed_at_random_moments_many_times():
    _kill(ROUNDS_SLOW, seed=2)
