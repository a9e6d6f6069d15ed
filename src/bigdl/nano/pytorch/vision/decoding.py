"""From a file to pixels: the fast JPEG decoder where it gives what Pillow gives, else Pillow.

OpenCV is used when it is installed, for plain, complete JPEGs alone. It never hears of a thread
count: the calls used here (``imdecode``, ``flip``, ``transpose``) start no threads of their own,
so they are safe in forked loader workers.
"""

from __future__ import annotations

import io
import struct
import zlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from bigdl._base.errors import ImageError
from bigdl.nano.pytorch.vision.jpeg import JpegHeader, read_header

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

__all__ = [
    "Box",
    "FileSource",
    "ImageSource",
    "Source",
    "as_image",
    "decode",
    "open_source",
    "opencv",
]

# What Pillow's readers raise on damaged files: most raise OSError, many let the exceptions of
# their own parsing through.
_REFUSALS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_SCALES = (8, 4, 2)  # what libjpeg can leave out while decoding


@lru_cache(maxsize=1)
def opencv() -> ModuleType | None:
    """OpenCV, or None where it is absent or older than 4.11 (no RGB decoding)."""
    try:
        import cv2
    except ModuleNotFoundError:
        return None
    return cv2 if hasattr(cv2, "IMREAD_COLOR_RGB") else None


class Box(NamedTuple):
    """A part of a grid of pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """This part of ``pixels``, as a view."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


class Source(Protocol):
    """Where the pixels of a picture come from. Nobody writes to what it hands out."""

    height: int
    width: int

    def pixels(self, part: Box) -> NDArray[np.uint8]:
        """The pixels in ``part``, RGB, (height, width, 3)."""

    def scales(self) -> tuple[int, ...]:
        """The scales that ``reduced`` offers, largest first."""

    def reduced(self, scale: int) -> NDArray[np.uint8]:
        """All pixels, at one ``scale``-th of the size rounded up."""

    def image(self, part: Box) -> Image.Image:
        """``part`` as a PIL image, with what the file says beside the pixels."""

    def info(self) -> dict[Any, Any]:
        """What the file says beside the pixels, as Pillow names it."""


class ImageSource:
    """An RGB PIL image, which stays as it is."""

    def __init__(self, image: Image.Image) -> None:
        self.width, self.height = image.size
        self._image = image

    def pixels(self, part: Box) -> NDArray[np.uint8]:
        return np.array(self.image(part))

    def scales(self) -> tuple[int, ...]:
        return ()

    def reduced(self, scale: int) -> NDArray[np.uint8]:
        raise NotImplementedError(f"a PIL image has no form at scale {scale}")

    def image(self, part: Box) -> Image.Image:
        if part == Box(0, 0, self.height, self.width):
            return self._image
        return self._image.crop(
            (part.left, part.top, part.left + part.width, part.top + part.height)
        )

    def info(self) -> dict[Any, Any]:
        return dict(self._image.info)


class FileSource:
    """A plain, complete JPEG, decoded when and as small as somebody needs it."""

    def __init__(self, path: str, data: bytes, header: JpegHeader) -> None:
        self.height, self.width = header.height, header.width
        self._path = path
        self._data = data
        self._decoded: tuple[int, NDArray[np.uint8]] | None = None

    def pixels(self, part: Box) -> NDArray[np.uint8]:
        return part.of(self.reduced(1))

    def scales(self) -> tuple[int, ...]:
        return _SCALES

    def reduced(self, scale: int) -> NDArray[np.uint8]:
        if self._decoded is None or self._decoded[0] != scale:
            self._decoded = scale, self._decode(scale)
        return self._decoded[1]

    def image(self, part: Box) -> Image.Image:
        if part == Box(0, 0, self.height, self.width):
            return decode(self._path, self._data)
        return as_image(self.pixels(part), self.info())

    def info(self) -> dict[Any, Any]:
        with Image.open(io.BytesIO(self._data)) as image:
            return dict(image.info)

    def _decode(self, scale: int) -> NDArray[np.uint8]:
        shape = (-(-self.height // scale), -(-self.width // scale), 3)
        pixels = _decode_opencv(self._data, scale)
        if pixels is None or pixels.shape != shape:
            # Tables that libjpeg cannot use, or no OpenCV: Pillow decodes, or says what is wrong.
            pixels = np.array(decode(self._path, self._data, scale))
        return pixels


def as_image(pixels: NDArray[np.uint8], info: dict[Any, Any]) -> Image.Image:
    """A PIL image of ``pixels`` that says ``info`` beside them."""
    image = Image.fromarray(pixels)
    image.info = info
    return image


def open_source(path: str) -> Source:
    """Read the file at ``path``.

    Raises:
        ImageError: Pillow refuses the file. For a plain JPEG a refusal may come later, when
            its pixels are asked for.
        OSError: The file itself cannot be read; missing is ``FileNotFoundError``.
    """
    with open(path, "rb", buffering=0) as file:
        data = file.readall()
    header = read_header(data)
    limit = Image.MAX_IMAGE_PIXELS
    if header is None or (limit is not None and header.height * header.width > limit):
        return ImageSource(decode(path, data))
    return FileSource(path, data, header)


def decode(path: str, data: bytes, scale: int = 1) -> Image.Image:
    """Decode with Pillow, as RGB; a JPEG at one ``scale``-th of its size, rounded up.

    Raises:
        ImageError: Pillow refuses the file.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if scale > 1:
            # Pillow takes the largest scale that keeps this size.
            image.draft("RGB", (max(1, image.width // scale), max(1, image.height // scale)))
        return image.convert("RGB")
    except _REFUSALS as exc:
        raise ImageError(
            f"Cannot read the picture {path}: {exc} ({type(exc).__name__}). "
            "Replace or remove the file, or leave such files out with "
            "ImageFolder(..., on_error='skip')."
        ) from exc


def _decode_opencv(data: bytes, scale: int) -> NDArray[np.uint8] | None:
    cv2 = opencv()
    if cv2 is None:
        return None
    size = {1: 0, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}
    flags = size.get(scale, cv2.IMREAD_REDUCED_COLOR_8)
    try:
        pixels: NDArray[np.uint8] | None = cv2.imdecode(
            np.frombuffer(data, np.uint8),
            flags | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
        )
    except cv2.error:  # larger than OpenCV's own limits
        return None
    return pixels
