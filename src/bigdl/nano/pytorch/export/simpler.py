"""Operators that an exporter or a runtime lacks, in terms of slices, joins and reductions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["simpler_operators"]


def simpler_operators() -> dict[Any, Callable[..., Any]]:
    """For ``ExportedProgram.run_decompositions``: adaptive pools of any size over fixed axes, and
    padding with what lies at the other end."""
    aten = torch.ops.aten
    return {
        aten.adaptive_avg_pool2d.default: _average,
        aten.adaptive_avg_pool3d.default: _average,
        aten._adaptive_avg_pool2d.default: _average,
        aten._adaptive_avg_pool3d.default: _average,
        aten.adaptive_max_pool2d.default: _largest,
        aten.adaptive_max_pool3d.default: _largest,
        aten.pad.default: _circular,
    }


def _average(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return _by_axis(x, size, lambda part, axis: part.mean(axis, keepdim=True))


def _largest(x: torch.Tensor, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    found = _by_axis(x, size, lambda part, axis: part.amax(axis, keepdim=True))
    # where they were found is hardly ever asked for; if it is, the export differs from the
    # original and is refused
    return found, torch.zeros_like(found, dtype=torch.int64)


def _by_axis(
    x: torch.Tensor, size: Sequence[int], reduce: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """One axis after the other: the cells of such a pool are products of ranges."""
    for axis, cells in enumerate(size, start=x.dim() - len(size)):
        length = int(x.shape[axis])
        # torch's own ranges: from the floor to the ceiling
        ranges = [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]
        x = torch.cat([reduce(x.narrow(axis, a, b - a), axis) for a, b in ranges], axis)
    return x


def _circular(
    x: torch.Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Any:
    """``pad`` begins with the last axis, a length before and one behind for each."""
    if mode != "circular" or min(pad) < 0:
        return NotImplemented
    for number, (before, behind) in enumerate(zip(pad[::2], pad[1::2], strict=True), start=1):
        axis = x.dim() - number
        parts = (x.narrow(axis, x.shape[axis] - before, before), x, x.narrow(axis, 0, behind))
        x = torch.cat(parts, axis)
    return x
