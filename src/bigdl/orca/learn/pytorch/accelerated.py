"""Prediction through one of Nano's accelerators, made from the first batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigdl.nano.pytorch import InferenceOptimizer
from bigdl.orca.learn.pytorch import calling

if TYPE_CHECKING:
    import torch

    from bigdl._base.trees import Tree

__all__ = ["Accelerated"]


class Accelerated:
    """A model as an accelerator runs it, called with features.

    Args:
        model: The module; it stays as it is, and what is done to it later is not seen.
        accelerator: A row of Nano's table.
        precision: "fp32" or "bf16".
    """

    def __init__(self, model: torch.nn.Module, accelerator: str, precision: str) -> None:
        self._source, self._accelerator, self._precision = model, accelerator, precision
        self._bind = calling.arguments(model)
        self._model: torch.nn.Module | None = None

    def __call__(self, features: Tree) -> Any:
        """The outputs of a batch."""
        positional, by_name = self._bind(calling.to_tensors(features))
        if self._model is None:
            self._model = self._made(positional, by_name)
        return self._model(*positional, **by_name)

    def _made(self, positional: tuple[Any, ...], by_name: dict[str, Any]) -> torch.nn.Module:
        sample: Any = positional or by_name
        if self._precision == "fp32":
            return InferenceOptimizer.trace(
                self._source, input_sample=sample, accelerator=self._accelerator
            )
        return InferenceOptimizer.quantize(
            self._source,
            "bf16",
            accelerator=self._accelerator,
            input_sample=sample,
        )
