"""torchvision's automatic augmentations, with their arguments checked."""

# mypy: allow-subclassing-any
# torchvision has no types of its own.

from __future__ import annotations

from torchvision.transforms import autoaugment as _torchvision
from torchvision.transforms.autoaugment import AutoAugmentPolicy

from bigdl.nano.pytorch.vision import checks
from bigdl.nano.pytorch.vision.checks import checked

__all__ = ["AugMix", "AutoAugment", "AutoAugmentPolicy", "RandAugment", "TrivialAugmentWide"]


@checked(interpolation=checks.interpolation)
class AutoAugment(_torchvision.AutoAugment):
    """Augment as was found best for ImageNet, CIFAR10 or SVHN."""


@checked(interpolation=checks.interpolation)
class RandAugment(_torchvision.RandAugment):
    """Apply ``num_ops`` random changes of strength ``magnitude``."""


@checked(interpolation=checks.interpolation)
class TrivialAugmentWide(_torchvision.TrivialAugmentWide):
    """Apply one random change of random strength."""


@checked(interpolation=checks.interpolation)
class AugMix(_torchvision.AugMix):
    """Mix chains of random changes with the original."""
