"""torchvision's transforms, which hand pictures to one another without leaving uint8 pixels.

Each class is torchvision's own with its arguments checked; called by itself it acts as there
(PIL image in and out, tensor in and out). How ``Compose`` and ``ImageFolder`` let one act on a
picture stands right below it. What has no such function gets a PIL image.
"""

# mypy: allow-subclassing-any
# torchvision has no types of its own.

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision import transforms as _torchvision
from torchvision.transforms import InterpolationMode

from bigdl._base.errors import ConfigError
from bigdl.nano.pytorch.vision import checks
from bigdl.nano.pytorch.vision.checks import checked
from bigdl.nano.pytorch.vision.picture import Floats, Picture
from bigdl.nano.pytorch.vision.pipeline import acts_on, run, run_to_end
from bigdl.nano.pytorch.vision.transforms import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "CenterCrop",
    "ColorJitter",
    "Compose",
    "ConvertImageDtype",
    "ElasticTransform",
    "FiveCrop",
    "GaussianBlur",
    "Grayscale",
    "InterpolationMode",
    "Lambda",
    "LinearTransformation",
    "Normalize",
    "PILToTensor",
    "Pad",
    "RandomAdjustSharpness",
    "RandomAffine",
    "RandomApply",
    "RandomAutocontrast",
    "RandomChoice",
    "RandomCrop",
    "RandomEqualize",
    "RandomErasing",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomInvert",
    "RandomOrder",
    "RandomPerspective",
    "RandomPosterize",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomSolarize",
    "RandomVerticalFlip",
    "Resize",
    "TenCrop",
    "ToPILImage",
    "ToTensor",
]


def _happens(probability: float) -> bool:
    """Draw as torchvision does, ``torch.rand(1) < p``: it compares in float32."""
    return bool(torch.rand(1).item() < np.float32(probability))


# --- several transforms ---------------------------------------------------------------------


@checked(transforms=checks.transforms)
class Compose(_torchvision.Compose):
    """Apply transforms one after another, ours and any others."""

    def __call__(self, img: Any) -> Any:
        return run_to_end(self.transforms, img)


@acts_on(Picture, Compose)
def _compose(transform: Compose, picture: Picture) -> Any:
    return run(transform.transforms, picture)


@checked(transforms=checks.transforms, p=checks.probability)
class RandomApply(_torchvision.RandomApply):
    """Apply all of some transforms with probability ``p``, else none."""


@acts_on(Picture, RandomApply)
def _random_apply(transform: RandomApply, picture: Picture) -> Any:
    if transform.p < torch.rand(1):
        return picture
    return run(transform.transforms, picture)


@checked(transforms=checks.transforms)
class RandomOrder(_torchvision.RandomOrder):
    """Apply transforms in a random order."""


@acts_on(Picture, RandomOrder)
def _random_order(transform: RandomOrder, picture: Picture) -> Any:
    order = list(range(len(transform.transforms)))
    random.shuffle(order)
    return run([transform.transforms[at] for at in order], picture)


@checked(transforms=checks.transforms)
class RandomChoice(_torchvision.RandomChoice):
    """Apply one transform picked at random, with weights ``p``."""


@acts_on(Picture, RandomChoice)
def _random_choice(transform: RandomChoice, picture: Picture) -> Any:
    return run(random.choices(transform.transforms, weights=transform.p), picture)


@checked()
class Lambda(_torchvision.Lambda):
    """Apply a function of the user's own."""


# --- size and place -------------------------------------------------------------------------


@checked(size=checks.size, interpolation=checks.interpolation, max_size=checks.side)
class Resize(_torchvision.Resize):
    """Resize to ``size``: the shorter side where it is one number."""

    def __init__(
        self,
        size: int | Sequence[int],
        interpolation: InterpolationMode | int = InterpolationMode.BILINEAR,
        max_size: int | None = None,
        antialias: bool | None = True,
    ) -> None:
        sides = [size] if isinstance(size, int) else list(size)
        if max_size is not None and (len(sides) != 1 or max_size <= sides[0]):
            raise ConfigError(
                f"Resize: max_size={max_size} limits the longer side where size is the shorter "
                f"one. It must be larger than size={size!r}, and size one number."
            )
        super().__init__(size, interpolation, max_size, antialias)

    def forward(self, img: Any) -> Any:
        return functional.resize(img, self.size, self.interpolation, self.max_size, self.antialias)


@acts_on(Picture, Resize)
def _resize(transform: Resize, picture: Picture) -> Any:
    return functional.resize_picture(
        picture, transform.size, transform.interpolation, transform.max_size, transform.antialias
    )


@checked(size=checks.size)
class CenterCrop(_torchvision.CenterCrop):
    """Crop the middle; what is too small is padded with zeros."""


@acts_on(Picture, CenterCrop)
def _center_crop(transform: CenterCrop, picture: Picture) -> Any:
    height, width = transform.size
    if height > picture.height or width > picture.width:
        return transform(picture.image())
    top = round((picture.height - height) / 2.0)
    left = round((picture.width - width) / 2.0)
    return picture.crop(top, left, height, width)


@checked(size=checks.size)
class RandomCrop(_torchvision.RandomCrop):
    """Crop at a random place."""


@acts_on(Picture, RandomCrop)
def _random_crop(transform: RandomCrop, picture: Picture) -> Any:
    height, width = transform.size
    down, right = picture.height - height, picture.width - width
    if transform.padding is not None or down < 0 or right < 0:
        return transform(picture.image())
    if down == 0 and right == 0:  # nothing is drawn, as in torchvision
        return picture
    top = torch.randint(0, down + 1, size=(1,)).item()
    left = torch.randint(0, right + 1, size=(1,)).item()
    return picture.crop(int(top), int(left), height, width)


@checked(size=checks.size, interpolation=checks.interpolation)
class RandomResizedCrop(_torchvision.RandomResizedCrop):
    """Crop a random part of random size and shape, and resize it."""

    def forward(self, img: Any) -> Any:
        place = self.get_params(img, self.scale, self.ratio)
        return functional.resize(
            functional.crop(img, *place), self.size, self.interpolation, antialias=self.antialias
        )


@acts_on(Picture, RandomResizedCrop)
def _random_resized_crop(transform: RandomResizedCrop, picture: Picture) -> Any:
    # torchvision asks the image for nothing but its size
    shape = torch.empty((3, picture.height, picture.width), device="meta")
    place = transform.get_params(shape, transform.scale, transform.ratio)
    return functional.resize_picture(
        picture.crop(*place),
        transform.size,
        transform.interpolation,
        None,
        transform.antialias,
    )


@checked(p=checks.probability)
class RandomHorizontalFlip(_torchvision.RandomHorizontalFlip):
    """Swap left and right with probability ``p``."""


@acts_on(Picture, RandomHorizontalFlip)
def _random_horizontal_flip(transform: RandomHorizontalFlip, picture: Picture) -> Any:
    return picture.flip(mirrored=True) if _happens(transform.p) else picture


@checked(p=checks.probability)
class RandomVerticalFlip(_torchvision.RandomVerticalFlip):
    """Swap top and bottom with probability ``p``."""


@acts_on(Picture, RandomVerticalFlip)
def _random_vertical_flip(transform: RandomVerticalFlip, picture: Picture) -> Any:
    return picture.flip(upside_down=True) if _happens(transform.p) else picture


@checked()
class Pad(_torchvision.Pad):
    """Add a border."""


@checked(size=checks.size)
class FiveCrop(_torchvision.FiveCrop):
    """Crop the four corners and the middle."""


@checked(size=checks.size)
class TenCrop(_torchvision.TenCrop):
    """Crop the four corners and the middle, and the same of the flipped picture."""


@checked(interpolation=checks.interpolation)
class RandomRotation(_torchvision.RandomRotation):
    """Rotate by a random angle."""


@checked(interpolation=checks.interpolation)
class RandomAffine(_torchvision.RandomAffine):
    """Rotate, shift, scale and shear at random."""


@checked(p=checks.probability, interpolation=checks.interpolation)
class RandomPerspective(_torchvision.RandomPerspective):
    """Look from a random point, with probability ``p``."""


@checked(interpolation=checks.interpolation)
class ElasticTransform(_torchvision.ElasticTransform):
    """Distort as if seen through moving water."""


# --- colour ---------------------------------------------------------------------------------


@checked()
class ColorJitter(_torchvision.ColorJitter):
    """Change brightness, contrast, saturation and hue by random factors, in a random order."""


_ADJUSTMENTS: tuple[Callable[[Any, float], Any], ...] = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


@acts_on(Picture, ColorJitter)
def _color_jitter(transform: ColorJitter, picture: Picture) -> Any:
    ranges = (transform.brightness, transform.contrast, transform.saturation, transform.hue)
    # An order is drawn even if nothing is to be changed, as torchvision does.
    order, *factors = transform.get_params(*ranges)
    if factors == [None] * 4:
        return picture
    image = picture.image()
    for at in order.tolist():
        if factors[at] is not None:
            image = _ADJUSTMENTS[at](image, factors[at])
    return Picture.of(image)


@checked()
class Grayscale(_torchvision.Grayscale):
    """Turn grey."""


@checked(p=checks.probability)
class RandomGrayscale(_torchvision.RandomGrayscale):
    """Turn grey with probability ``p``, with as many channels as before."""


@acts_on(Picture, RandomGrayscale)
def _random_grayscale(transform: RandomGrayscale, picture: Picture) -> Any:
    if torch.rand(1) < transform.p:
        return functional.rgb_to_grayscale(picture.image(), num_output_channels=3)
    return picture


@checked()
class GaussianBlur(_torchvision.GaussianBlur):
    """Blur with a Gaussian of random width."""


@checked(p=checks.probability)
class RandomInvert(_torchvision.RandomInvert):
    """Invert the colours with probability ``p``."""


@checked(p=checks.probability)
class RandomPosterize(_torchvision.RandomPosterize):
    """Keep ``bits`` bits a channel, with probability ``p``."""


@checked(p=checks.probability)
class RandomSolarize(_torchvision.RandomSolarize):
    """Invert what is above ``threshold``, with probability ``p``."""


@checked(p=checks.probability)
class RandomAdjustSharpness(_torchvision.RandomAdjustSharpness):
    """Change the sharpness with probability ``p``."""


@checked(p=checks.probability)
class RandomAutocontrast(_torchvision.RandomAutocontrast):
    """Stretch the contrast with probability ``p``."""


@checked(p=checks.probability)
class RandomEqualize(_torchvision.RandomEqualize):
    """Equalize the histogram with probability ``p``."""


# --- tensors --------------------------------------------------------------------------------


@checked()
class ToTensor(_torchvision.ToTensor):
    """Turn an image into a tensor (channels, height, width) of floats from 0 to 1."""


@acts_on(Picture, ToTensor)
def _to_tensor(transform: ToTensor, picture: Picture) -> Floats | torch.Tensor:
    dtype = torch.get_default_dtype()
    if dtype not in (torch.float32, torch.float64):  # NumPy and OpenCV have no others
        return picture.tensor().to(dtype).div_(255)
    return Floats(picture, dtype)


@checked()
class PILToTensor(_torchvision.PILToTensor):
    """Turn an image into a tensor (channels, height, width) of its own values."""


@acts_on(Picture, PILToTensor)
def _pil_to_tensor(transform: PILToTensor, picture: Picture) -> torch.Tensor:
    return picture.tensor()


@checked()
class ToPILImage(_torchvision.ToPILImage):
    """Turn a tensor or an array into an image."""


@checked()
class ConvertImageDtype(_torchvision.ConvertImageDtype):
    """Convert a tensor to ``dtype`` and scale the values to its range."""


@checked(mean=checks.values, std=checks.values)
class Normalize(_torchvision.Normalize):
    """Subtract ``mean`` and divide by ``std``, for each channel of a tensor."""


@acts_on(Floats, Normalize)
def _normalize(transform: Normalize, floats: Floats) -> Floats:
    return floats.normalize(transform.mean, transform.std)


@checked(p=checks.probability)
class RandomErasing(_torchvision.RandomErasing):
    """Erase a random rectangle of a tensor, with probability ``p``."""


@checked()
class LinearTransformation(_torchvision.LinearTransformation):
    """Multiply a flattened tensor by a square matrix, after subtracting ``mean_vector``."""
