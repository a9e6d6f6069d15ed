"""Pictures for training: torchvision's ``ImageFolder`` and transforms, faster end to end.

``datasets`` and ``transforms`` have torchvision's names, arguments and results, and mix freely
with torchvision's own. OpenCV (the extra ``vision``) makes them faster and is never required.
"""

from __future__ import annotations

import importlib
from typing import Any

from bigdl._base.optional import need

__all__ = ["datasets", "transforms"]

# Every module of this package builds on torchvision: say here, once, how to get it.
need("torchvision", extra="torch", purpose="bigdl.nano.pytorch.vision")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
