"""Models that Nano has saved, as an estimator's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from bigdl.nano.pytorch import InferenceOptimizer
from bigdl.orca.learn.pytorch.estimator import Estimator

if TYPE_CHECKING:
    import torch

__all__ = ["estimator_of"]


def estimator_of(path: str) -> Estimator:
    """An estimator whose workers load the model for themselves.

    Raises:
        FileNotFoundError: There is no saved model.
        StoredModelError: It is damaged.
    """
    InferenceOptimizer.load(path)  # what is wrong with it is said here
    return Estimator.from_torch(partial(_loaded, path))


def _loaded(path: str, config: dict[str, Any]) -> torch.nn.Module:
    return InferenceOptimizer.load(path)
