"""Workers on different hosts combine arrays over TCP, each with each directly.

Standard library and NumPy only. Every rank sends its numbers for a part to the rank that owns
it, which adds them in the order of ranks and sends the sum to all: each number crosses the
network twice at most, in two rounds however many ranks there are, and sums begin to leave while
numbers still come in.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bigdl._base.collective.base import Collective, Compress
from bigdl._base.collective.links import mesh
from bigdl._base.collective.reduction import Reduction, Scratch
from bigdl._base.collective.streams import CARD_BYTES, Streams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bigdl._base.gang import Gang

__all__ = ["Tcp"]

#: Below this a broadcast goes straight from its root; above, by parts that all hand on.
_SMALL_BYTES = 1 << 16


class Tcp(Collective):
    """The collective of workers that reach each other by TCP.

    Args:
        gang: The gang; all its workers have to make one of these.
        group: The ranks to connect; None = all. A worker outside of it gives an empty one.
        timeout_s: How long to wait for workers that live but do not come.
    """

    kind = "tcp"

    def __init__(
        self,
        gang: Gang,
        group: tuple[int, ...] | None = None,
        *,
        timeout_s: float | None = 600.0,
    ) -> None:
        group = tuple(range(gang.world)) if group is None else group
        super().__init__(gang, group or (gang.rank,), timeout_s=timeout_s)
        self._gang: Gang = gang
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        links = mesh(gang, group, deadline)
        self._streams = Streams(
            gang,
            {index: (at, links[at]) for index, at in enumerate(self._group) if at in links},
            timeout_s,
        )
        self._scratch = Scratch()

    @property
    def order(self) -> tuple[tuple[int, ...], ...]:
        return tuple((rank,) for rank in range(self.world))

    def close(self) -> None:
        super().close()
        self._streams.close()

    # --- calls ---

    def _all_reduce(self, flat: NDArray[Any], compress: Compress) -> None:
        self._reduce("all_reduce", flat, compress, is_for_all=True)

    def _reduce_scatter(self, flat: NDArray[Any], compress: Compress) -> None:
        self._reduce("reduce_scatter", flat, compress, is_for_all=False)

    def _reduce(
        self, call: str, flat: NDArray[Any], compress: Compress, *, is_for_all: bool
    ) -> None:
        """Send numbers to the owners of their parts, add up the own part, and send it to all."""
        if self.world == 1:
            return
        streams = self._streams
        reduction = Reduction(
            flat,
            self.parts(flat.size),
            self.rank,
            self._scratch,
            is_compressed=compress is not None,
        )
        streams.begin(call, flat, is_compressed=compress is not None)
        for rank, stream in streams.of.items():
            stream.will_send(reduction.numbers_for(rank))
            stream.will_receive(reduction.numbers_from(rank))
            if is_for_all:
                stream.will_receive(reduction.sums_from(rank))

        def advance() -> bool:
            for block in reduction.add_up(streams.received - CARD_BYTES):
                if is_for_all:
                    for stream in streams.of.values():
                        stream.will_send(block)
            return reduction.is_done

        streams.run(self._doing, advance)
        if is_for_all:
            reduction.open_sums()

    def _all_gather(self, flat: NDArray[Any]) -> None:
        self._streams.begin("all_gather", flat)
        parts = self.parts(flat.size)
        for rank, stream in self._streams.of.items():
            stream.will_send(flat[parts[self.rank]])
            stream.will_receive(flat[parts[rank]])
        self._streams.run(self._doing)

    def _broadcast(self, flat: NDArray[Any], root: int) -> None:
        self._streams.begin("broadcast", flat, root=root)
        if flat.nbytes <= _SMALL_BYTES:
            for rank, stream in self._streams.of.items():
                if self.rank == root:
                    stream.will_send(flat)
                elif rank == root:
                    stream.will_receive(flat)
            self._streams.run(self._doing)
        else:
            self._broadcast_by_parts(flat, root)

    def _broadcast_by_parts(self, flat: NDArray[Any], root: int) -> None:
        """Each gets its own part first and hands it on, so that the root sends all but twice."""
        streams, parts = self._streams, self.parts(flat.size)
        mine = flat[parts[self.rank]]
        for rank, stream in streams.of.items():
            if self.rank == root:
                stream.will_send(flat[parts[rank]])
                stream.will_send(mine)
            else:
                if rank == root:
                    stream.will_receive(mine)
                stream.will_receive(flat[parts[rank]])
        is_handed_on = self.rank == root

        def advance() -> bool:
            nonlocal is_handed_on
            if not is_handed_on and streams.of[root].received >= CARD_BYTES + mine.nbytes:
                is_handed_on = True
                for rank, stream in streams.of.items():
                    if rank != root:
                        stream.will_send(mine)
            return is_handed_on

        streams.run(self._doing, advance)

    def _buffer(self, nbytes: int) -> NDArray[np.uint8]:
        self._streams.begin("buffer", None, root=nbytes)
        self._streams.run(self._doing)
        return super()._buffer(nbytes)

    def _barrier(self) -> None:
        self._streams.begin("barrier", None)
        self._streams.run(self._doing)
