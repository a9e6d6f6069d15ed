"""Collectives between network namespaces: hosts of their own, joined by a virtual cable."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from bigdl._base.collective import connect
from bigdl._base.nursery import emit
from bigdl._base.rendezvous import Rendezvous, join
from bigdl._base.workers import Workers
from bigdl.errors import WorkerLostError
from bigdl.testing.collective import _all_checks

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


def _ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


@contextmanager
def two_hosts():
    """((namespace, address), (namespace, address)) with a cable between them."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("needs Linux and the command ip (Debian: iproute2)")
    stem = f"bigdl{os.getpid() % 100_000}"
    spaces = (f"{stem}a", f"{stem}b")
    block = os.getpid() % 250
    hosts = tuple((space, f"10.213.{block}.{number}") for number, space in enumerate(spaces, 1))
    try:
        made = _ip("netns", "add", spaces[0])
        if made.returncode:
            pytest.skip(f"this machine allows no network namespaces: {made.stderr.strip()}")
        made = _ip("netns", "add", spaces[1])
        assert made.returncode == 0, made.stderr
        cable = ("link", "add", "eth0", "netns", spaces[0], "type", "veth", "peer", "name", "eth0")
        made = _ip(*cable, "netns", spaces[1])
        if made.returncode:
            pytest.skip(f"this machine allows no virtual cables: {made.stderr.strip()}")
        for space, address in hosts:
            for command in (
                ("addr", "add", f"{address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                made = _ip("-n", space, *command)
                assert made.returncode == 0, made.stderr
        yield hosts
    finally:
        for space in spaces:
            _ip("netns", "del", space)


def _move_to(space):
    """Make ``space`` the network of this process, which has one thread."""
    with open(f"/run/netns/{space}") as file:
        library = ctypes.CDLL(None, use_errno=True)
        if library.setns(file.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "setns")


def _hold(space, address, world, work):
    """Rank 0: it also holds the rendezvous."""
    _move_to(space)
    with Rendezvous(world, address=address, timeout_s=60, owner=0) as rendezvous:
        emit(rendezvous.ticket)
        return _come(None, rendezvous.ticket, 0, work)


def _come(space, ticket, rank, work):
    if space is not None:
        _move_to(space)
    with join(ticket, rank) as gang, connect(gang) as collective:
        return collective.kind, collective.order, work(collective)


def between(hosts, placed, work, *, meanwhile=None):
    """Run ``work`` with a worker for each of ``placed``, by the number of its host."""
    with Workers(preload=("numpy", "bigdl.testing.collective")) as workers:
        space, address = hosts[placed[0]]
        first = workers.start(_hold, space, address, len(placed), work)
        tickets = []
        with Workers(preload=("numpy", "bigdl.testing.collective")) as others:

            def wait_for_first():
                return first.result(timeout_s=120, on_event=tickets.append)

            with ThreadPoolExecutor(1) as pool:
                outcome = pool.submit(wait_for_first)
                while not tickets and not outcome.done():
                    time.sleep(0.01)
                started = [
                    others.start(_come, hosts[host][0], tickets[0], rank, work)
                    for rank, host in enumerate(placed[1:], 1)
                ]
                if meanwhile is not None:
                    meanwhile()
                results = []
                for one in (outcome, *started):
                    try:
                        results.append(
                            one.result(120) if one is outcome else one.result(timeout_s=120)
                        )
                    except Exception as exc:  # noqa: BLE001  (it is what was asked for)
                        results.append(exc)
        return results


@pytest.mark.parametrize(
    ("placed", "kind", "order"),
    [
        ((0, 1), "tcp", ((0,), (1,))),
        ((0, 1, 0, 1), "hierarchical", ((0, 2), (1, 3))),
        ((0, 0, 1), "hierarchical", ((0, 1), (2,))),
    ],
)
def test_two_namespaces_are_two_hosts(placed, kind, order):
    with two_hosts() as hosts:
        results = between(hosts, placed, _all_checks)
        for result in results:
            if isinstance(result, Exception):
                raise result
            assert result[:2] == (kind, order)
            failed = {name: text for name, text in result[2].items() if text}
            assert not failed, "\n".join(failed.values())


def _sum_for_ever(collective):
    array = np.ones(1000)
    while True:
        collective.all_reduce(array)


@pytest.mark.slow
def test_a_cable_that_is_cut_is_noticed():
    """A host that is gone sends no word: its silence has to do."""
    with two_hosts() as hosts:
        cut = []

        def meanwhile():
            time.sleep(2)
            assert _ip("-n", hosts[1][0], "link", "set", "eth0", "down").returncode == 0
            cut.append(time.monotonic())

        one, other = between(hosts, (0, 1), _sum_for_ever, meanwhile=meanwhile)
        assert time.monotonic() - cut[0] < 15
        assert isinstance(one, WorkerLostError)
        assert one.rank == 1
        assert isinstance(other, WorkerLostError)
        assert other.rank == 0
