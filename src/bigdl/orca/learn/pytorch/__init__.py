"""Estimators of PyTorch's models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigdl._base import optional as _optional

if TYPE_CHECKING:
    from bigdl.orca.learn.pytorch.estimator import Estimator

__all__ = ["Estimator"]


def __getattr__(name: str) -> Any:
    if name != "Estimator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _optional.need("torch", extra="torch", purpose=f"{__name__}.Estimator")
    from bigdl.orca.learn.pytorch.estimator import Estimator

    return Estimator


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
