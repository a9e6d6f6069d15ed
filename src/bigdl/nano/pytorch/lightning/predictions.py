"""Predictions of one process, of what several have made of their parts of each batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigdl._base.errors import DataError
from bigdl._base.trees import concat, leaves
from bigdl.nano.pytorch.lightning.summed_strategy import NO_ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Predicted", "joined"]


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What one process has made.

    Args:
        loaders: Number of loaders.
        rows: Of this process in each batch, one loader after the other.
        batches: What ``predict`` gave there: a list of batches, or of such lists.
    """

    loaders: int
    rows: list[int]
    batches: list[Any] | None


def joined(every: Sequence[Predicted]) -> list[Any] | None:
    """The predictions of all, by rank, as one process would have given them.

    Raises:
        DataError: What a step gave does not have the batch's rows.
    """
    if any(one.batches is None for one in every):
        return None
    if every[0].loaders == 1:
        return [
            _batch(list(zip(parts, rows, strict=True)), f"predictions[{number}]")
            for number, (parts, rows) in enumerate(
                zip(
                    zip(*(one.batches or [] for one in every), strict=True),
                    zip(*(one.rows for one in every), strict=True),
                    strict=True,
                )
            )
        ]
    found, start = [], 0
    for number in range(every[0].loaders):
        size = len((every[0].batches or [])[number])
        of_loader = [
            Predicted(
                loaders=1,
                rows=one.rows[start : start + size],
                batches=(one.batches or [])[number],
            )
            for one in every
        ]
        found.append(joined(of_loader))
        start += size
    return found


def _batch(parts: list[tuple[Any, int]], name: str) -> Any:
    """One batch, of (what a process made, its rows)."""
    parts = [(made, rows) for made, rows in parts if made is not NO_ROWS]
    made = [one for one, _ in parts]
    if len(made) == 1 or all(one is None for one in made):
        return made[0]
    if all(_is_of_rows(one, rows) for one, rows in parts):
        return concat(made, join=_cat, name=name)
    if all(isinstance(one, list) and len(one) == rows for one, rows in parts):
        return [item for one in made for item in one]
    raise DataError(
        f"{name} cannot be put together from the parts of {len(made)} processes: what "
        f"predict_step gives has to be arrays whose first axis is the batch's rows, or a list of "
        f"one item a row; it gave a {type(made[0]).__name__}"
        f"{_shapes(made[0])} for {parts[0][1]} rows. Predict with num_processes=1."
    )


def _is_of_rows(made: Any, rows: int) -> bool:
    found = leaves(made)
    return bool(found) and all(tuple(getattr(one, "shape", ()))[:1] == (rows,) for one in found)


def _shapes(made: Any) -> str:
    shapes = [str(tuple(one.shape)) for one in leaves(made)[:3] if hasattr(one, "shape")]
    return f" of shape {', '.join(shapes)}" if shapes else ""


def _cat(items: Sequence[Any]) -> Any:
    if isinstance(items[0], torch.Tensor):
        return torch.cat(list(items))
    return np.concatenate(items)
