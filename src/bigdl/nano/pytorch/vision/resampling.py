"""Resampling of uint8 pictures, where often only a part of the result is wanted.

torch's antialiased kernels are Pillow's filters on AVX2: equal to Pillow but for single roundings.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from bigdl.nano.pytorch.vision.decoding import Box, opencv

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bigdl.nano.pytorch.vision.decoding import Source

__all__ = ["Filter", "flip", "resample"]

Filter = Literal["bilinear", "bicubic"]

_REACH = {
    "bilinear": 1.0,
    "bicubic": 2.0,
}  # half the filter's width, in pixels of the coarser grid
_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Nudges a scale so that size * scale never ends just below the whole number it stands for.
_NUDGE = 1 + 1e-9


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


def resample(
    source: Source, window: Box, grid: tuple[int, int], kind: Filter, box: Box
) -> NDArray[np.uint8]:
    """Resample ``window`` of ``source`` to ``grid``, and give the part ``box`` of that.

    A source that can decode at a smaller scale does, at the smallest that leaves at least twice
    the grid; sizes and positions follow the true size of the source.

    Args:
        source: Where the pixels come from.
        window: The part of the source that is resampled. Nothing outside of it counts.
        grid: Height and width of the result as a whole.
        kind: The filter.
        box: What of the result is wanted.
    """
    whole = window == Box(0, 0, source.height, source.width)
    scale = _decode_scale(source, window, grid)
    if scale == 1:
        return _resize(source.pixels(window), (window.height, window.width), grid, kind, box)
    if whole:
        size = (window.height / scale, window.width / scale)
        return _resize(source.reduced(scale), size, grid, kind, box)
    # The window's edges lie between decoded pixels, which only Pillow's resize knows.
    return _resize_between(source.reduced(scale), window, scale, grid, kind, box)


def _decode_scale(source: Source, window: Box, grid: tuple[int, int]) -> int:
    for scale in source.scales():
        if -(-window.height // scale) >= 2 * grid[0] and -(-window.width // scale) >= 2 * grid[1]:
            return scale
    return 1


def _resize(
    pixels: NDArray[np.uint8],
    size: tuple[float, float],
    grid: tuple[int, int],
    kind: Filter,
    box: Box,
) -> NDArray[np.uint8]:
    """Resample ``pixels``, which are ``size`` large (a fraction where decoding rounded up)."""
    if box == Box(0, 0, *grid):
        if size == pixels.shape[:2]:
            return _interpolate(pixels, kind, target=grid)
        return _interpolate(pixels, kind, scale=(grid[0] / size[0], grid[1] / size[1]))
    # Of a part, one axis is made at a time. Rows are cheap to make and columns are not, so where
    # both shrink, the columns are made of the few rows that are left.
    if grid[0] <= size[0]:
        return _columns(_rows(pixels, size[0], grid[0], kind, box), size[1], grid[1], kind, box)
    return _rows(_columns(pixels, size[1], grid[1], kind, box), size[0], grid[0], kind, box)


def _rows(
    pixels: NDArray[np.uint8], size: float, grid: int, kind: Filter, box: Box
) -> NDArray[np.uint8]:
    """The rows of ``box``, of all columns."""
    if grid != size:
        height, width = pixels.shape[:2]
        needed = _needed(box.top + box.height, size, grid, kind, height)
        if needed == size:
            pixels = _interpolate(pixels, kind, target=(grid, width))
        else:
            pixels = _interpolate(pixels[:needed], kind, scale=(grid / size, 1.0))
    return pixels[box.top : box.top + box.height]


def _columns(
    pixels: NDArray[np.uint8], size: float, grid: int, kind: Filter, box: Box
) -> NDArray[np.uint8]:
    """The columns of ``box``, of all rows."""
    # Leaving some out on the right would cost a copy, which takes as long as making them.
    if grid != size:
        height, width = pixels.shape[:2]
        if size == width:
            pixels = _interpolate(pixels, kind, target=(height, grid))
        else:
            pixels = _interpolate(pixels, kind, scale=(1.0, grid / size))
    return pixels[:, box.left : box.left + box.width]


def _needed(end: int, size: float, grid: int, kind: Filter, present: int) -> int:
    """How many pixels the first ``end`` of ``grid`` are made from, and a few more.

    They start where the whole does and the kernel is told the scale, so what it makes of them is
    the same as of the whole.
    """
    if grid >= size:  # nothing to gain, and the kernel takes equal sizes for "nothing to do"
        return present
    return min(present, math.ceil((end + _REACH[kind]) * size / grid) + 2)


def _interpolate(
    pixels: NDArray[np.uint8],
    kind: Filter,
    *,
    target: tuple[int, int] | None = None,
    scale: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """Resample to ``target``, or by ``scale`` to as many whole pixels as that gives."""
    # torch takes (1, 3, height, width) in this order of memory, its channels_last, without
    # repacking, but only if the stride of the first axis is that of a whole picture.
    pictures = np.ascontiguousarray(pixels).reshape(1, *pixels.shape).transpose(0, 3, 1, 2)
    if scale is not None:
        scale = (scale[0] * _NUDGE, scale[1] * _NUDGE)
    done = interpolate(
        torch.from_numpy(pictures), size=target, scale_factor=scale, mode=kind, antialias=True
    )
    resampled: NDArray[np.uint8] = done.numpy()[0].transpose(1, 2, 0)
    return resampled


def _resize_between(
    pixels: NDArray[np.uint8],
    window: Box,
    scale: int,
    grid: tuple[int, int],
    kind: Filter,
    box: Box,
) -> NDArray[np.uint8]:
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
    return box.of(np.array(part.resize((grid[1], grid[0]), _PILLOW[kind], box=edges)))
