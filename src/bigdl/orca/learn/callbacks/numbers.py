"""What of an epoch's record can be drawn as a line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["numbers_of"]


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The record's numbers but ``epoch``, which is where they are drawn at."""
    return {
        key: float(value)
        for key, value in row.items()
        if key != "epoch" and isinstance(value, (int, float))
    }
