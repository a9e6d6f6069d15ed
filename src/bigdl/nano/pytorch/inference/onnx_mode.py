"""Fig. 3's mode of a model: ``eval_onnx`` and ``exit_onnx`` on the caller's own object.

The one place where an inference call changes the caller's model, as the paper prints it. In ONNX
mode ``model(x)`` is an ONNX Runtime session; ``exit_onnx()`` or ``train()`` gives the model back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigdl._base.errors import ArgumentError, NotReadyError
from bigdl.nano.pytorch.export.source import split_batch
from bigdl.nano.pytorch.inference.batches import as_batches, check_sample, first_batch

if TYPE_CHECKING:
    from torch import nn

    from bigdl.nano.pytorch.export.binding import Sample
    from bigdl.nano.pytorch.inference.accelerated import AcceleratedModule

__all__ = ["add_onnx_mode", "in_onnx_mode"]

_METHODS = ("eval_onnx", "exit_onnx")


def add_onnx_mode(model: nn.Module, **quantizing: Any) -> nn.Module:
    """Quantize ``model`` for ONNX Runtime, and give it ``eval_onnx`` and ``exit_onnx``.

    Args:
        model: The caller's own object.
        quantizing: Arguments of ``InferenceOptimizer.quantize`` but for precision and
            accelerator.

    Returns:
        ``model``, which runs as before until ``eval_onnx`` is called.

    Raises:
        As ``InferenceOptimizer.quantize``; the model is then as it was.
    """
    from bigdl.nano.pytorch.inference.optimizer import InferenceOptimizer

    was = _mode_of(model)
    if was is not None:
        was.exit_onnx()
    if quantizing.get("calib_data") is not None:
        quantizing["calib_data"] = as_batches(quantizing["calib_data"], "calib_data")
    quantized = InferenceOptimizer.quantize(model, "int8", "onnxruntime", **quantizing)
    mode = _OnnxMode(model, quantized, _example(model, **quantizing))
    for name in _METHODS:  # on the object, past nn.Module's own registers
        model.__dict__[name] = getattr(mode, name)
    return model


def _example(
    model: nn.Module, *, input_sample: Any = None, calib_data: Any = None, **_: Any
) -> Any:
    """Inputs to export with, for a later ``eval_onnx()`` without a sample."""
    if input_sample is not None or calib_data is None:
        return input_sample
    return split_batch(first_batch(calib_data, "calib_data"), model)[0]


def in_onnx_mode(model: Any) -> bool:
    """Whether ``model(x)`` is an ONNX Runtime session now."""
    mode = _mode_of(model)
    return mode is not None and mode.session is not None


def _mode_of(model: Any) -> _OnnxMode | None:
    bound = getattr(model, "__dict__", {}).get("exit_onnx")
    mode = getattr(bound, "__self__", None)
    return mode if isinstance(mode, _OnnxMode) else None


class _OnnxMode:
    """What ``add_onnx_mode`` keeps beside a model."""

    def __init__(
        self, model: nn.Module, quantized: AcceleratedModule, example: Sample | None
    ) -> None:
        self._model = model
        self._quantized: AcceleratedModule | None = quantized
        self._example = example
        self._weights = _versions(model)
        self._exported: tuple[Any, AcceleratedModule] | None = None
        self.session: AcceleratedModule | None = None

    def eval_onnx(self, input_sample: Sample | None = None, quantize: bool = False) -> nn.Module:
        """Run this model by ONNX Runtime until ``exit_onnx()`` or ``train()``.

        Args:
            input_sample: An example of the inputs; None is one of the calibration data.
            quantize: Use the int8 form that ``quantize`` made.

        Returns:
            The model.

        Raises:
            NotReadyError: The weights have changed since the int8 form was made.
        """
        if not isinstance(quantize, bool):
            raise ArgumentError(f"quantize takes True or False, not {type(quantize).__name__}.")
        check_sample(input_sample)
        self.exit_onnx()
        session = self._int8() if quantize else self._fp32(input_sample)
        self._model.eval()
        self.session = session
        self._model.__dict__["forward"] = self.forward
        self._model.__dict__["train"] = self.train
        return self._model

    def exit_onnx(self) -> nn.Module:
        """Run this model by PyTorch again."""
        self.session = None
        for name in ("forward", "train"):
            self._model.__dict__.pop(name, None)
        return self._model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model(x)`` runs in ONNX mode."""
        if self.session is None:  # a copy that was unpickled
            return type(self._model).forward(self._model, *args, **kwargs)
        return self.session(*args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        """Leave ONNX mode, if this is to train."""
        if mode:
            self.exit_onnx()
        return type(self._model).train(self._model, mode)

    def _int8(self) -> AcceleratedModule:
        if self._quantized is None:
            raise NotReadyError(
                "There is no int8 form of this model here: call "
                "trainer.quantize(model, calib_data=…, onnx=True) first."
            )
        if self._weights != _versions(self._model):
            raise NotReadyError(
                "The model's weights have changed since it was quantized: call "
                "trainer.quantize(model, calib_data=…, onnx=True) again."
            )
        return self._quantized

    def _fp32(self, input_sample: Sample | None) -> AcceleratedModule:
        from bigdl.nano.pytorch.inference.optimizer import InferenceOptimizer

        key = _versions(self._model)
        if input_sample is None and self._exported is not None and self._exported[0] == key:
            return self._exported[1]
        sample = self._example if input_sample is None else input_sample
        session = InferenceOptimizer.trace(self._model, sample, accelerator="onnxruntime")
        self._exported = key, session
        return session

    def __getstate__(self) -> dict[str, Any]:
        """Sessions live in this process only."""
        return self.__dict__ | {"session": None, "_quantized": None, "_exported": None}


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """A value that changes when an optimizer, or anything in place, changes the weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return [
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors
    ]
