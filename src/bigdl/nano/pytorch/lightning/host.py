"""The installed Lightning, under one name: ``pytorch_lightning``, or ``lightning`` instead.

The two are separate packages with separate classes; where both are installed the first is used.
Its parts that have no public name are looked up here and nowhere else.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from bigdl._base.optional import need

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    pl = need(
        "pytorch_lightning" if find_spec("pytorch_lightning") or not find_spec("lightning")
        else "lightning.pytorch",
        extra="torch",
        purpose="bigdl.nano.pytorch.Trainer",
    )  # fmt: skip

__all__ = ["part", "pl"]


def part(path: str) -> Any:
    """What stands under ``"module:attribute"`` inside the installed Lightning."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(f"{pl.__name__}.{module}"), attribute)
