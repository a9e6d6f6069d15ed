"""Parts and resizes of uint8 pictures, one axis after the other.

torch's antialiased kernels are Pillow's filters on AVX2: equal to Pillow but for single roundings.
Resizes and crops do not mix rows with columns, so all that happens to the rows can happen first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from bigdl.nano.pytorch.vision.decoding import Box, opencv

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bigdl.nano.pytorch.vision.decoding import Source

__all__ = ["Axis", "Filter", "flip", "render"]

Filter = Literal["bilinear", "bicubic"]

# Half the filter's width, in pixels of the coarser grid.
_REACH = {"bilinear": 1.0, "bicubic": 2.0}
_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Nudges a scale so that size * scale never ends just below the whole number it stands for.
_NUDGE = 1 + 1e-9


class Resize(NamedTuple):
    """A resize along one axis, and the part of its result that is wanted."""

    size: float
    grid: int
    kind: Filter
    start: int
    stop: int


class Axis(NamedTuple):
    """What becomes of one axis of a source: a part of it, then resizes and parts of those."""

    start: int
    stop: int
    resizes: tuple[Resize, ...] = ()

    @property
    def length(self) -> int:
        last = self.resizes[-1] if self.resizes else self
        return last.stop - last.start

    def part(self, start: int, length: int) -> Axis:
        if not self.resizes:
            return Axis(self.start + start, self.start + start + length)
        *before, (size, grid, kind, first, _) = self.resizes
        first += start
        return Axis(
            self.start, self.stop, (*before, Resize(size, grid, kind, first, first + length))
        )

    def resize(self, length: int, kind: Filter) -> Axis:
        done = Resize(self.length, length, kind, 0, length)
        return Axis(self.start, self.stop, (*self.resizes, done))


def flip(pixels: NDArray[np.uint8], *, mirrored: bool, upside_down: bool) -> NDArray[np.uint8]:
    """Swap left and right, top and bottom, or both; ``pixels`` itself if neither."""
    if not mirrored and not upside_down:
        return pixels
    cv2 = opencv()
    if cv2 is not None:
        turned: NDArray[np.uint8] = cv2.flip(pixels, 0 if not mirrored else -int(upside_down) or 1)
        return turned
    axes = [axis for axis, wanted in enumerate((upside_down, mirrored)) if wanted]
    return torch.flip(torch.from_numpy(pixels), axes).numpy()


def render(source: Source, rows: Axis, columns: Axis) -> NDArray[np.uint8]:
    """Make the pixels of ``rows`` and ``columns``, (rows, columns, 3).

    A source that can decode at a smaller scale does, at the smallest that leaves at least twice
    what the first resize makes of it; sizes and positions follow the true size of the source.
    """
    window = Box(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
    vertical, horizontal = rows.resizes, columns.resizes
    scale = _decode_scale(source, window, vertical[0], horizontal[0]) if vertical else 1
    if scale == 1:
        pixels = source.pixels(window)
    elif window == Box(0, 0, source.height, source.width):
        pixels = source.reduced(scale)
        # What was decoded is rounded up to whole pixels, what it stands for is not.
        vertical = (vertical[0]._replace(size=window.height / scale), *vertical[1:])
        horizontal = (horizontal[0]._replace(size=window.width / scale), *horizontal[1:])
    else:
        pixels = _resize_between(source, window, scale, vertical[0], horizontal[0])
        vertical, horizontal = vertical[1:], horizontal[1:]
    # Rows that are gone need no columns, and columns that are not there yet need no rows.
    if rows.length <= window.height:
        return _resize_columns(_resize_axis(pixels, vertical, axis=0), horizontal)
    return _resize_axis(_resize_columns(pixels, horizontal), vertical, axis=0)


def _decode_scale(source: Source, window: Box, vertical: Resize, horizontal: Resize) -> int:
    for scale in source.scales():
        rows, columns = -(-window.height // scale), -(-window.width // scale)
        if rows >= 2 * vertical.grid and columns >= 2 * horizontal.grid:
            return scale
    return 1


def _resize_columns(pixels: NDArray[np.uint8], resizes: tuple[Resize, ...]) -> NDArray[np.uint8]:
    cv2 = opencv()
    if not resizes:
        return pixels
    if cv2 is None:
        return _resize_axis(pixels, resizes, axis=1)
    # torch makes rows several times faster than columns: turning the picture twice is cheaper.
    turned: NDArray[np.uint8] = cv2.transpose(_resize_axis(cv2.transpose(pixels), resizes, axis=0))
    return turned


def _resize_axis(
    pixels: NDArray[np.uint8], resizes: tuple[Resize, ...], *, axis: int
) -> NDArray[np.uint8]:
    for size, grid, kind, start, stop in resizes:
        if grid == size:  # only the other axis changes
            pixels = pixels[:, start:stop] if axis else pixels[start:stop]
            continue
        # Only rows can be left out at the end without a copy.
        present = pixels.shape[axis]
        needed = present if axis else _needed(stop, size, grid, kind, present)
        if needed == size:
            sides = [*pixels.shape[:2]]
            sides[axis] = grid
            pixels = _interpolate(pixels, kind, size=sides)
        else:
            scales = [1.0, 1.0]
            scales[axis] = grid / size * _NUDGE
            pixels = _interpolate(pixels if axis else pixels[:needed], kind, scales=scales)
        pixels = pixels[:, start:stop] if axis else pixels[start:stop]
    return pixels


def _needed(stop: int, size: float, grid: int, kind: Filter, present: int) -> int:
    """How many pixels the first ``stop`` of ``grid`` are made from, and a few more.

    They start where the whole does and the kernel is told the scale, so what it makes of them is
    the same as of the whole.
    """
    if grid >= size:  # nothing to gain, and the kernel takes equal sizes for "nothing to do"
        return present
    return min(present, math.ceil((stop + _REACH[kind]) * size / grid) + 2)


def _interpolate(
    pixels: NDArray[np.uint8],
    kind: Filter,
    *,
    size: list[int] | None = None,
    scales: list[float] | None = None,
) -> NDArray[np.uint8]:
    """Resample to ``size``, or by ``scales`` to as many whole pixels as that gives."""
    # torch takes (1, 3, height, width) in this order of memory, its channels_last, without
    # repacking, but only if the stride of the first axis is that of a whole picture.
    pictures = np.ascontiguousarray(pixels).reshape(1, *pixels.shape).transpose(0, 3, 1, 2)
    made = interpolate(
        torch.from_numpy(pictures),
        size=size,
        scale_factor=scales,
        mode=kind,
        antialias=True,
    )
    resampled: NDArray[np.uint8] = made.numpy()[0].transpose(1, 2, 0)
    return resampled


def _resize_between(
    source: Source, window: Box, scale: int, vertical: Resize, horizontal: Resize
) -> NDArray[np.uint8]:
    """Resize a window whose edges lie between decoded pixels, which only Pillow's resize knows."""
    pixels = source.reduced(scale)
    top, left = window.top // scale, window.left // scale
    bottom = min(pixels.shape[0], -(-(window.top + window.height) // scale))
    right = min(pixels.shape[1], -(-(window.left + window.width) // scale))
    edges = (
        window.left / scale - left,
        window.top / scale - top,
        min(right, (window.left + window.width) / scale) - left,
        min(bottom, (window.top + window.height) / scale) - top,
    )
    part = Image.fromarray(pixels[top:bottom, left:right])
    resized = part.resize((horizontal.grid, vertical.grid), _PILLOW[vertical.kind], box=edges)
    return np.array(resized)[vertical.start : vertical.stop, horizontal.start : horizontal.stop]
