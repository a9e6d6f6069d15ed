"""Training, evaluation and prediction: programs of any framework, on any engine and data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigdl.orca.learn.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bigdl.orca.learn.predictor import Predictor

    return Predictor


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
