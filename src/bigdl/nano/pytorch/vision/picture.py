"""A picture on its way through a pipeline: uint8 RGB pixels, and geometry not yet carried out."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision.transforms.functional import normalize

from bigdl.nano.pytorch.vision.decoding import Box, ImageSource, as_image, opencv
from bigdl.nano.pytorch.vision.resampling import Axis, flip, render

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from bigdl.nano.pytorch.vision.decoding import Source
    from bigdl.nano.pytorch.vision.resampling import Filter

__all__ = ["Floats", "Picture"]

Normalization = tuple[tuple[float, ...], tuple[float, ...]]

# From this many pixels on OpenCV looks up in threads of its own.
_OPENCV_STARTS_THREADS = 1 << 18


class Picture:
    """What our transforms hand to one another instead of a PIL image.

    Crops, flips and resizes are only noted down: pixels that a later crop would throw away are
    never made, and what is decoded, and how small, is known when it is. Pictures are values:
    every operation gives a new one, and neither source nor pixels are ever written.
    """

    __slots__ = ("_columns", "_mirrored", "_rows", "_source", "_upside_down")

    def __init__(
        self,
        source: Source,
        rows: Axis | None = None,
        columns: Axis | None = None,
        *,
        mirrored: bool = False,
        upside_down: bool = False,
    ) -> None:
        """What ``rows`` and ``columns`` make of ``source`` (None: all of it), flipped last."""
        self._source = source
        self._rows = rows or Axis(0, source.height)
        self._columns = columns or Axis(0, source.width)
        self._mirrored = mirrored
        self._upside_down = upside_down

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """The picture in an RGB image."""
        return cls(ImageSource(image))

    @property
    def height(self) -> int:
        return self._rows.length

    @property
    def width(self) -> int:
        return self._columns.length

    def resize(self, height: int, width: int, kind: Filter) -> Picture:
        if (height, width) == (self.height, self.width):
            return self
        # Flips commute with a resize, so they stay noted and are done on the smaller picture.
        return self._with(self._rows.resize(height, kind), self._columns.resize(width, kind))

    def crop(self, top: int, left: int, height: int, width: int) -> Picture:
        """A part that lies inside of the picture."""
        if self._mirrored:
            left = self.width - left - width
        if self._upside_down:
            top = self.height - top - height
        return self._with(self._rows.part(top, height), self._columns.part(left, width))

    def flip(self, *, mirrored: bool = False, upside_down: bool = False) -> Picture:
        return Picture(
            self._source,
            self._rows,
            self._columns,
            mirrored=self._mirrored ^ mirrored,
            upside_down=self._upside_down ^ upside_down,
        )

    def image(self) -> Image.Image:
        """The picture as a PIL image; the very image it was made of if nothing happened to it."""
        rows, columns = self._rows, self._columns
        turned = self._mirrored or self._upside_down
        if not (rows.resizes or turned):
            window = Box(rows.start, columns.start, rows.length, columns.length)
            return self._source.image(window)
        return as_image(self.pixels(), self._source.info())

    def tensor(self) -> torch.Tensor:
        """The picture as a new uint8 tensor (3, height, width)."""
        return torch.from_numpy(self.pixels().transpose(2, 0, 1)).clone()

    def pixels(self) -> NDArray[np.uint8]:
        """The picture as an array (height, width, 3), not to be written."""
        pixels = render(self._source, self._rows, self._columns)
        return flip(pixels, mirrored=self._mirrored, upside_down=self._upside_down)

    def _with(self, rows: Axis, columns: Axis) -> Picture:
        return Picture(
            self._source,
            rows,
            columns,
            mirrored=self._mirrored,
            upside_down=self._upside_down,
        )


class Floats:
    """A picture whose values are looked up: what each of the 256 becomes in each channel.

    Whatever is done to every value of a channel alike is done to the table, by torch's own
    functions; so looking up gives the very numbers they give, in one pass over the picture.
    """

    __slots__ = ("_dtype", "_normalized", "_picture")

    def __init__(
        self, picture: Picture, dtype: torch.dtype, normalized: tuple[Normalization, ...] = ()
    ) -> None:
        """``picture`` as shares of 255 and then normalized, maybe several times."""
        self._picture = picture
        self._dtype = dtype
        self._normalized = normalized

    def normalize(self, mean: Any, std: Any) -> Floats:
        """Subtract ``mean`` and divide by ``std``: a number, or one a channel."""
        done = (*self._normalized, (_numbers(mean), _numbers(std)))
        _table(self._dtype, done)  # what is wrong with the numbers is said now
        return Floats(self._picture, self._dtype, done)

    def tensor(self) -> torch.Tensor:
        """The values as a new tensor (3, height, width)."""
        pixels, table = self._picture.pixels(), _table(self._dtype, self._normalized)
        height, width = pixels.shape[:2]
        made = np.empty((3, height, width), table.dtype)
        cv2 = opencv()
        if cv2 is not None and height * width < _OPENCV_STARTS_THREADS:
            for plane, row, out in zip(cv2.split(pixels), table, made, strict=True):
                cv2.LUT(plane, row, out)
        else:
            for channel in range(3):
                # "clip" lets NumPy write into ``out`` at once; there is nothing to clip
                np.take(table[channel, 0], pixels[..., channel], out=made[channel], mode="clip")
        return torch.from_numpy(made)


@lru_cache(maxsize=32)
def _table(dtype: torch.dtype, normalized: tuple[Normalization, ...]) -> NDArray[np.floating]:
    """What becomes of each value: (3, 1, 256), like a picture that has each of them once."""
    table = torch.arange(256, device="cpu").to(dtype).div(255).expand(3, 1, 256)
    for mean, std in normalized:
        table = normalize(table, [*mean], [*std])
    made: NDArray[np.floating] = table.numpy().copy()
    return made


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values) if np.ndim(values) else (float(values),)
