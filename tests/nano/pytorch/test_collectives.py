"""PyTorch's own backends keep the contract of the ground floor's collectives."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from bigdl.errors import ArgumentError, ConfigError
from bigdl.nano.pytorch.collectives import connect_torch
from bigdl.testing.collective import CollectiveContract, GangContract, in_gang

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes, /proc")


class TestGloo(GangContract):
    """Not ``CheckedContract``: gloo cannot tell workers whose calls differ."""

    worlds = (1, 2, 3, 4)
    failing_world = 2
    preload = ("numpy", "torch")

    @staticmethod
    def connect(gang):
        return connect_torch(gang)

    @staticmethod
    def connect_impatient(gang):
        return connect_torch(gang, timeout_s=2)


def _with_tensors(collective):
    rank, world = collective.rank, collective.world
    summed = torch.full((3, 5), float(rank + 1))
    assert collective.all_reduce(summed) is summed
    assert (summed == world * (world + 1) / 2).all()
    scattered = torch.arange(7, dtype=torch.float64)
    own = collective.reduce_scatter(scattered)
    assert torch.equal(own, torch.arange(7, dtype=torch.float64)[collective.part(7)] * world)
    assert own.data_ptr() == scattered[collective.part(7)].data_ptr()
    gathered = torch.zeros(7, dtype=torch.bfloat16)
    gathered[collective.part(7)] = rank
    collective.all_gather(gathered)
    assert [int(gathered[part][0]) for part in collective.parts(7)] == list(range(world))
    told = torch.tensor([rank], dtype=torch.int16)
    collective.broadcast(told, 1)
    assert told.item() == 1
    rounded = torch.full((1000,), 1 + 2.0**-10)
    collective.all_reduce(rounded, compress="bf16")
    assert (rounded == world).all()
    return True


def test_tensors_are_combined_in_place():
    assert in_gang(2, _with_tensors, connect=connect_torch, preload=("torch",)) == [True, True]


def _misuse(collective):
    graph = torch.ones(3, requires_grad=True)
    for kind, call in (
        (ArgumentError, lambda: collective.all_reduce("x")),
        (ConfigError, lambda: collective.all_reduce(torch.ones(3, dtype=torch.float16))),
        (ConfigError, lambda: collective.all_reduce(torch.ones(4, 4)[:, ::2])),
        (ConfigError, lambda: collective.all_reduce(graph)),
        (ConfigError, lambda: collective.all_reduce(torch.ones(3).double(), compress="bf16")),
        (ConfigError, lambda: collective.all_reduce(torch.ones(3), compress="fp8")),
    ):
        with pytest.raises(kind):
            call()
    return collective.all_reduce(np.ones(1)).tolist()


def test_misuse_of_tensors_harms_nothing():
    assert in_gang(1, _misuse, connect=connect_torch, preload=("torch",)) == [[1.0]]


def _listening(collective):
    """Addresses, as the kernel writes them, of this process's listening sockets."""
    import os

    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{fd}").partition("[")[2].rstrip("]"))
        except FileNotFoundError:
            continue
    found = []
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with open(table) as file:
            rows = [line.split() for line in file][1:]
        found += [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]
    return found


def test_it_listens_on_the_loopback_only():
    for found in in_gang(2, _listening, connect=connect_torch, preload=("torch",)):
        assert set(found) <= {"0100007F"}


def _connect_unknown(gang):
    return connect_torch(gang, backend="mpi")


def _connect_nccl(gang):
    return connect_torch(gang, backend="nccl")


def test_an_unknown_backend():
    (result,) = in_gang(1, _with_tensors, connect=_connect_unknown, preload=("torch",))
    assert isinstance(result, ConfigError)
    assert "have gloo, nccl" in str(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it is used")
def test_nccl_says_why_not_here():
    (result,) = in_gang(1, _with_tensors, connect=_connect_nccl, preload=("torch",))
    assert isinstance(result, ConfigError)
    assert "nccl" in str(result)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
class TestNccl(CollectiveContract):
    """One worker a GPU."""

    worlds = tuple(range(1, max(1, torch.cuda.device_count()) + 1))[:4]
    preload = ("numpy", "torch")

    @staticmethod
    def connect(gang):
        torch.cuda.set_device(gang.rank)
        return _connect_nccl(gang)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
class TestNcclFates(GangContract):
    worlds = (2,)
    failing_world = 2
    preload = ("numpy", "torch")
    connect = staticmethod(TestNccl.connect)

    @staticmethod
    def connect_impatient(gang):
        torch.cuda.set_device(gang.rank)
        return connect_torch(gang, backend="nccl", timeout_s=2)
