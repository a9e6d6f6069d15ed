"""What ``quantize`` does, step by step: sample, calibration, the model, its accuracy."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.errors import AccuracyError, ConfigError
from bigdl.nano.accelerators.torch_modules import frozen_copy
from bigdl.nano.pytorch.export.source import split_batch
from bigdl.nano.pytorch.inference.accelerated import build
from bigdl.nano.pytorch.inference.batches import as_batches, first_batch
from bigdl.nano.pytorch.inference.calibrate import calibration, predictions
from bigdl.nano.pytorch.inference.metrics import Agreement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bigdl.nano.pytorch.inference.accelerated import AcceleratedModule
    from bigdl.nano.pytorch.inference.methods import Method
    from bigdl.nano.pytorch.inference.metrics import Metric
    from bigdl.nano.selection import Criterion

__all__ = ["Quantization"]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The arguments of ``quantize``, checked one by one before."""

    model: torch.nn.Module
    method: Method
    calib_data: Any
    validation_data: Any
    metric: Metric | None
    criterion: Criterion | None
    sample: Any
    config: Any

    def run(self) -> AcceleratedModule:
        """The quantized model, or the reason why there is none."""
        calib = None if self.calib_data is None else as_batches(self.calib_data, "calib_data")
        validation = (
            calib
            if self.validation_data is None
            else as_batches(self.validation_data, "validation_data")
        )
        needs_data = self.method.precision == "int8" and not _is_dynamic(self.config)
        if calib is None and needs_data:
            raise ConfigError(
                "int8 needs calibration data: give calib_data, batches like the real ones."
            )
        if self.criterion is not None and validation is None:
            raise ConfigError(
                "accuracy_criterion needs data to measure on: give validation_data or calib_data."
            )
        sample = self._sample(calib if calib is not None else validation)
        if self.criterion is None:
            data = None if calib is None else calibration(calib, self._still, sample)
            return self._build(sample, data)
        assert validation is not None
        return self._within(self.criterion, sample, calib, validation)

    @property
    def _still(self) -> torch.nn.Module:
        """A copy of the model in eval mode."""
        return frozen_copy(self.model)

    def _sample(self, data: Iterable[Any] | None) -> Any:
        if self.sample is not None:
            return self.sample
        if data is None:
            raise ConfigError(
                f"{self.method.name} needs an input_sample (or calib_data to take one from)."
            )
        return split_batch(first_batch(data, "calib_data"), self.model)[0]

    def _build(self, sample: Any, data: Any) -> AcceleratedModule:
        return build(
            self.model,
            name=self.method.name,
            accelerator=self.method.accelerator,
            precision=self.method.precision,
            sample=sample,
            config=self.config if self.config is not None else self.method.config(),
            calibration=data,
            threads=torch.get_num_threads(),
        )

    def _within(
        self,
        criterion: Criterion,
        sample: Any,
        calib: Iterable[Any] | None,
        validation: Iterable[Any],
    ) -> AcceleratedModule:
        """Quantize, measure on the whole set, and hold the result to the criterion."""
        metric = self.metric or Agreement()
        still = self._still

        def original(*args: Any, **kwargs: Any) -> Any:
            with torch.inference_mode():
                return still(*args, **kwargs)

        def measured(call: Callable[..., Any]) -> float:
            def pairs() -> Iterator[tuple[Any, Any]]:
                return predictions(call, validation, still, self.sample)

            return metric.measure(call, pairs, validation)

        before = measured(original)
        data = None
        if calib is not None:
            data = calibration(
                calib,
                still,
                sample,
                metric=metric,
                validation=validation,
                criterion=criterion,
                baseline=before,
            )
        try:
            model = self._build(sample, data)
        except AccuracyError as exc:  # of an accelerator, which does not know the metric's name
            raise AccuracyError(f"{metric.name}: {exc}") from exc
        with contextlib.ExitStack() as stack:
            stack.callback(model.close)
            after = measured(model)
            higher = metric.higher_is_better
            if not criterion.keeps(after, before, higher_is_better=higher):
                bound = criterion.bound(before, higher_is_better=higher)
                raise AccuracyError(
                    f"{self.method.name} has {metric.name} {after:.6g}; the original has "
                    f"{before:.6g}, and accuracy_criterion {criterion} allows "
                    f"{bound:.6g} at the {'lowest' if higher else 'highest'}."
                )
            stack.pop_all()
        return model


def _is_dynamic(config: Any) -> bool:
    """Whether an accelerator's options ask for ranges that are found at each call."""
    if isinstance(config, dict):
        return config.get("quantization") == "dynamic"
    return getattr(config, "is_dynamic", False) is True
