"""A trained model, faster: one way, or the best of all ways; saved and loaded."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "InferenceOptimizer":  # where BigDL 2.x programs import it from
        from bigdl.nano.pytorch.inference.optimizer import InferenceOptimizer

        return InferenceOptimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
