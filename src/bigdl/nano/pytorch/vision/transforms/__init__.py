"""torchvision's transforms (its first API) under its names, faster in a pipeline.

Whatever public name torchvision has beyond these is torchvision's own object.
"""

from __future__ import annotations

from typing import Any

from torchvision import transforms as _torchvision

from bigdl.nano.pytorch.vision.transforms import autoaugment, functional, transforms  # noqa: F401
from bigdl.nano.pytorch.vision.transforms.autoaugment import *  # noqa: F403
from bigdl.nano.pytorch.vision.transforms.transforms import *  # noqa: F403

__all__ = sorted(
    {*transforms.__all__, *autoaugment.__all__, "autoaugment", "functional", "transforms"}
)


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_torchvision, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torchvision)})
