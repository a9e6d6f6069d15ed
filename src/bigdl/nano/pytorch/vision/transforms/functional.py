"""torchvision's functional transforms: the very functions, but for a faster resize.

``resize`` and ``resized_crop`` of RGB PIL images run on torch's kernels; single values may differ
from Pillow's in their last bit. All other names are torchvision's own objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from torchvision.transforms import functional as _torchvision
from torchvision.transforms.functional import InterpolationMode

from bigdl.nano.pytorch.vision.picture import Picture

if TYPE_CHECKING:
    from bigdl.nano.pytorch.vision.resampling import Filter

__all__ = ["InterpolationMode", "resize", "resized_crop"]

# The filters that there are kernels for; the rest is Pillow's.
_KINDS: dict[InterpolationMode, Filter] = {
    InterpolationMode.BILINEAR: "bilinear",
    InterpolationMode.BICUBIC: "bicubic",
}


def resize(
    img: Any,
    size: int | Sequence[int],
    interpolation: Any = InterpolationMode.BILINEAR,
    max_size: int | None = None,
    antialias: bool | None = True,
) -> Any:
    """Resize a PIL image or a tensor (..., height, width), as torchvision does."""
    if isinstance(img, Image.Image) and img.mode == "RGB":
        done = resize_picture(Picture.of(img), size, interpolation, max_size, antialias)
        return done if isinstance(done, Image.Image) else done.image()
    return _torchvision.resize(img, size, interpolation, max_size, antialias)


def resized_crop(
    img: Any,
    top: int,
    left: int,
    height: int,
    width: int,
    size: int | Sequence[int],
    interpolation: Any = InterpolationMode.BILINEAR,
    antialias: bool | None = True,
) -> Any:
    """Crop a PIL image or a tensor (..., height, width) and resize the crop to ``size``."""
    cropped = _torchvision.crop(img, top, left, height, width)
    return resize(cropped, size, interpolation, antialias=antialias)


def resize_picture(
    picture: Picture,
    size: int | Sequence[int],
    interpolation: Any,
    max_size: int | None,
    antialias: bool | None,
) -> Any:
    """Resize a picture; a PIL image comes back where only Pillow has what is asked for.

    torchvision's function also answers what is wrong, or only warned about: a kernel is used for
    what is right alone.
    """
    kind = _KINDS.get(interpolation) if isinstance(interpolation, InterpolationMode) else None
    target = output_size((picture.height, picture.width), size, max_size)
    if kind is None or target is None or antialias is False:
        return _torchvision.resize(picture.image(), size, interpolation, max_size, antialias)
    return picture.resize(*target, kind)


def output_size(
    current: tuple[int, int], size: int | Sequence[int], max_size: int | None
) -> tuple[int, int] | None:
    """Height and width after a resize; None if that cannot be."""
    sides = list(size) if isinstance(size, Sequence) else [size]
    if not all(isinstance(side, int) for side in sides):
        return None
    if len(sides) == 2 and max_size is None:
        target: tuple[int, int] = (sides[0], sides[1])
    elif len(sides) == 1 and (max_size is None or max_size > sides[0]):
        short, long = min(current), max(current)
        new_short, new_long = sides[0], int(sides[0] * long / short)
        if max_size is not None and new_long > max_size:
            new_short, new_long = int(max_size * new_short / new_long), max_size
        # as in torchvision, a square counts as upright
        target = (new_long, new_short) if current[1] <= current[0] else (new_short, new_long)
    else:
        return None
    return target if min(target) > 0 else None


def __getattr__(name: str) -> Any:
    return getattr(_torchvision, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torchvision)})
