"""One worker: nothing to combine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigdl._base.collective.base import Collective, Compress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bigdl._base.gang import Gang

__all__ = ["Alone"]


class Alone(Collective):
    """The collective of one worker: every sum is what it brought."""

    kind = "alone"

    def __init__(self, gang: Gang | None = None, *, timeout_s: float | None = None) -> None:
        super().__init__(gang, (gang.rank if gang is not None else 0,), timeout_s=timeout_s)

    def _all_reduce(self, flat: NDArray[Any], compress: Compress) -> None:
        """The sum of one is there already."""

    def _reduce_scatter(self, flat: NDArray[Any], compress: Compress) -> None:
        """The sum of one is there already."""

    def _all_gather(self, flat: NDArray[Any]) -> None:
        """Its part is all."""

    def _broadcast(self, flat: NDArray[Any], root: int) -> None:
        """Everybody has it already."""

    def _barrier(self) -> None:
        """All are here."""
