"""A picture on its way through a pipeline: uint8 RGB pixels, and geometry not yet carried out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bigdl.nano.pytorch.vision.decoding import ArraySource, Box, ImageSource, as_image
from bigdl.nano.pytorch.vision.resampling import flip, resample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from bigdl.nano.pytorch.vision.decoding import Source
    from bigdl.nano.pytorch.vision.resampling import Filter

__all__ = ["Picture"]


class Picture:
    """What our transforms hand to one another instead of a PIL image.

    Crops, flips and one resize are only noted down: pixels that a later crop would throw away are
    never made, and what is decoded, and how small, is known when it is. Pictures are values:
    every operation gives a new one, and neither source nor pixels are ever written.
    """

    __slots__ = ("_box", "_grid", "_kind", "_mirrored", "_source", "_upside_down", "_window")

    def __init__(
        self,
        source: Source,
        window: Box | None = None,
        grid: tuple[int, int] | None = None,
        kind: Filter = "bilinear",
        box: Box | None = None,
        mirrored: bool = False,
        upside_down: bool = False,
    ) -> None:
        """A part ``box`` of what becomes of a part ``window`` of ``source`` resized to ``grid``.

        Flips come last; without ``grid`` there is no resize and no ``box``.
        """
        self._source = source
        self._window = window or Box(0, 0, source.height, source.width)
        self._grid = grid
        self._kind: Filter = kind
        self._box = box or Box(0, 0, *(grid or (0, 0)))
        self._mirrored = mirrored
        self._upside_down = upside_down

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """The picture in an RGB image."""
        return cls(ImageSource(image))

    @property
    def height(self) -> int:
        return self._window.height if self._grid is None else self._box.height

    @property
    def width(self) -> int:
        return self._window.width if self._grid is None else self._box.width

    def resize(self, height: int, width: int, kind: Filter) -> Picture:
        if (height, width) == (self.height, self.width):
            return self
        source, window = self._source, self._window
        if self._grid is not None:
            source, window = ArraySource(self._unturned(), source), Box(0, 0, *self._box[2:])
        # Flips commute with a resize, so they stay noted and are done on the smaller picture.
        return Picture(
            source, window, (height, width), kind, None, self._mirrored, self._upside_down
        )

    def crop(self, top: int, left: int, height: int, width: int) -> Picture:
        """A part that lies inside of the picture."""
        if self._mirrored:
            left = self.width - left - width
        if self._upside_down:
            top = self.height - top - height
        inner = Box(top, left, height, width)
        window, box = self._window, None
        if self._grid is None:
            window = window.part(inner)
        else:
            box = self._box.part(inner)
        return Picture(
            self._source, window, self._grid, self._kind, box, self._mirrored, self._upside_down
        )

    def flip(self, *, mirrored: bool = False, upside_down: bool = False) -> Picture:
        return Picture(
            self._source,
            self._window,
            self._grid,
            self._kind,
            None if self._grid is None else self._box,
            self._mirrored ^ mirrored,
            self._upside_down ^ upside_down,
        )

    def image(self) -> Image.Image:
        """The picture as a PIL image; the very image it was made of if nothing happened to it."""
        if self._grid is None and not self._mirrored and not self._upside_down:
            return self._source.image(self._window)
        return as_image(self._turned(), self._source.info())

    def tensor(self) -> torch.Tensor:
        """The picture as a tensor (3, height, width), not contiguous, not to be written."""
        return torch.from_numpy(self._turned().transpose(2, 0, 1))

    def _turned(self) -> NDArray[np.uint8]:
        return flip(self._unturned(), mirrored=self._mirrored, upside_down=self._upside_down)

    def _unturned(self) -> NDArray[np.uint8]:
        if self._grid is None:
            return self._source.pixels(self._window)
        return resample(self._source, self._window, self._grid, self._kind, self._box)
