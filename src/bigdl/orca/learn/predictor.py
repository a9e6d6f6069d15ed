"""Predictions alone: a trained estimator, or a model that Nano has saved, on many workers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError
from bigdl.orca.learn.estimator import BaseEstimator
from bigdl.orca.learn.program import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

__all__ = ["Predictor"]


class Predictor:
    """Predicts as asked once, for any data and as often as wanted.

    Args:
        source: An estimator, whose present weights each call uses; or the folder of a model that
            ``InferenceOptimizer.save`` has written, which the workers can read.
        workers: How many predict at the same time; None = as many as there are slots.
        accelerator: One of Nano's; a saved model has its own.
        precision: "fp32" or "bf16"; a saved model has its own.

    Raises:
        ArgumentError: Something of the wrong type.
        ConfigError: A value is not allowed, or does not go with a saved model.
        FileNotFoundError: There is no saved model.
        StoredModelError: It is damaged.
    """

    def __init__(
        self,
        source: BaseEstimator | str | PathLike[str],
        *,
        workers: int | None = None,
        accelerator: str | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int)):
            raise ArgumentError(f"workers={shown(workers)}: need a number, or None.")
        if workers is not None and workers < 1:
            raise ConfigError(f"workers={workers}: need 1 or more.")
        Options(accelerator=accelerator, precision=precision)  # refuses what is not allowed
        if isinstance(source, (str, os.PathLike)):
            if accelerator is not None or precision != "fp32":
                raise ConfigError(
                    "accelerator= and precision= beside a saved model, which has its own: leave "
                    "them away, or give an estimator."
                )
            source = _saved(os.fspath(source))
        if not isinstance(source, BaseEstimator):
            raise ArgumentError(
                "Predictor takes an estimator or the folder of a saved model, not "
                f"{shown(source)}."
            )
        self._estimator, self._workers = source, workers
        self._accelerator, self._precision = accelerator, precision

    def predict(
        self,
        data: Any,
        batch_size: int | None = None,
        *,
        feature_cols: str | Sequence[str] | None = None,
        output_cols: str | Sequence[str] = "prediction",
        fill: Any = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Outputs for every row; see ``Estimator.predict``."""
        return self._estimator._predicting(self._workers).predict(
            data,
            batch_size,
            feature_cols=feature_cols,
            output_cols=output_cols,
            accelerator=self._accelerator,
            precision=self._precision,
            fill=fill,
            transform=transform,
        )


def _saved(path: str) -> BaseEstimator:
    """An estimator of a saved model, which each worker loads for itself."""
    if os.path.exists(os.path.join(path, "model.json")):
        raise ConfigError(
            f"{path} is of Estimator.save(), which keeps weights but no model: make the "
            "estimator, load() the folder into it, and give Predictor the estimator."
        )
    from bigdl.orca.learn.pytorch.saved import estimator_of

    return estimator_of(os.path.abspath(path))
