"""Workers on several hosts, several on some: shared memory on each, TCP between them.

NumPy only. A host's workers add up their numbers in memory first, so that a number crosses the
network once a host and not once a worker; and each of them carries its own *lane*, a part of
the array, to the workers of the other hosts that carry the same lane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigdl._base.collective.arithmetic import split
from bigdl._base.collective.base import Collective, Compress
from bigdl._base.collective.shared import SharedMemory
from bigdl._base.collective.tcp import Tcp

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bigdl._base.gang import Gang

__all__ = ["Hierarchical"]


class Hierarchical(Collective):
    """The collective of workers on several hosts.

    There are as many lanes as the smallest host has workers; on a larger host some workers
    carry none, and own no part.

    Args:
        gang: The gang; all its workers have to make one of these.
        timeout_s: How long to wait for workers that live but do not come.
    """

    kind = "hierarchical"

    def __init__(self, gang: Gang, *, timeout_s: float | None = 600.0) -> None:
        super().__init__(gang, tuple(range(gang.world)), timeout_s=timeout_s)
        self._hosts = gang.hosts
        self._lanes = min(map(len, self._hosts))
        mine = next(host for host in self._hosts if gang.rank in host)
        self._lane = mine.index(gang.rank)
        has_lane = self._lane < self._lanes
        self._local = SharedMemory(gang, mine, owners=self._lanes, timeout_s=timeout_s)
        try:
            # a lane's workers in the order of hosts, in which their sums are added
            lane = tuple(host[self._lane] for host in self._hosts) if has_lane else ()
            self._across = Tcp(gang, lane, timeout_s=timeout_s)
        except BaseException:
            self._local.close()
            raise
        self._has_lane = has_lane

    @property
    def order(self) -> tuple[tuple[int, ...], ...]:
        return self._hosts

    def parts(self, n: int) -> list[slice]:
        parts = [slice(n, n)] * self.world
        for lane, part in enumerate(split(n, self._lanes)):
            size = part.stop - part.start
            for host, own in zip(
                self._hosts, split(size, len(self._hosts), start=part.start), strict=True
            ):
                parts[host[lane]] = own
        return parts

    def close(self) -> None:
        super().close()
        self._local.close()
        self._across.close()

    def _carried(self, flat: NDArray[Any]) -> NDArray[Any]:
        """This worker's lane."""
        return flat[self._local.part(flat.size)]

    def _all_reduce(self, flat: NDArray[Any], compress: Compress) -> None:
        self._local.reduce_scatter(flat)
        if self._has_lane:
            self._across.all_reduce(self._carried(flat), compress=compress)
        self._local.all_gather(flat)

    def _reduce_scatter(self, flat: NDArray[Any], compress: Compress) -> None:
        self._local.reduce_scatter(flat)
        if self._has_lane:
            self._across.reduce_scatter(self._carried(flat), compress=compress)

    def _all_gather(self, flat: NDArray[Any]) -> None:
        if self._has_lane:
            self._across.all_gather(self._carried(flat))
        self._local.all_gather(flat)

    def _broadcast(self, flat: NDArray[Any], root: int) -> None:
        home = next(at for at, host in enumerate(self._hosts) if root in host)
        if self.rank in self._hosts[home]:
            self._local.broadcast(flat, self._hosts[home].index(root))
        if self._has_lane:
            self._across.broadcast(self._carried(flat), home)
        if self.rank not in self._hosts[home]:
            self._local.all_gather(flat)

    def _barrier(self) -> None:
        self._local.barrier()
        if self._has_lane:
            self._across.barrier()
        self._local.barrier()

    def _buffer(self, nbytes: int) -> NDArray[np.uint8]:
        return self._local.buffer(nbytes)
