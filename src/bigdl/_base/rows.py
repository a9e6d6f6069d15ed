"""Rows that workers share: who has which of them, and where to go on. Standard library only."""

from __future__ import annotations

from bigdl._base.errors import DataError

__all__ = ["check_start", "part"]


def part(total: int, rank: int, world: int) -> tuple[int, int]:
    """First and last-but-one row of one rank's part: contiguous parts, larger ones first."""
    least, larger = divmod(total, world)
    first = rank * least + min(rank, larger)
    return first, first + least + (rank < larger)


def check_start(start: int, rows: int) -> None:
    """Refuse to go on outside the epoch.

    Raises:
        DataError: ``start`` is not between 0 and ``rows``.
    """
    if not 0 <= start <= rows:
        raise DataError(f"Cannot go on at row {start}: an epoch of this data has {rows} rows.")
