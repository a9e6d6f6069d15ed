"""Nano for PyTorch. Names are imported when asked for, so inference needs no Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bigdl._base import optional as _optional

if TYPE_CHECKING:
    from bigdl.nano.pipeline import Pipeline
    from bigdl.nano.pytorch.guard import Guard
    from bigdl.nano.pytorch.inference.optimizer import InferenceOptimizer
    from bigdl.nano.pytorch.plan.plan import Plan
    from bigdl.nano.pytorch.torch_nano import TorchNano, nano
    from bigdl.nano.pytorch.trainer import Trainer

__all__ = ["Guard", "InferenceOptimizer", "Pipeline", "Plan", "TorchNano", "Trainer", "nano"]

_HOMES = {
    "Guard": "bigdl.nano.pytorch.guard",
    "InferenceOptimizer": "bigdl.nano.pytorch.inference.optimizer",
    "Pipeline": "bigdl.nano.pipeline",
    "Plan": "bigdl.nano.pytorch.plan.plan",
    "TorchNano": "bigdl.nano.pytorch.torch_nano",
    "Trainer": "bigdl.nano.pytorch.trainer",
    "nano": "bigdl.nano.pytorch.torch_nano",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _optional.need("torch", extra="torch", purpose=f"{__name__}.{name}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
