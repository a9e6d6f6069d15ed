"""A compiled form against the original: the same results at every length that was tried."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigdl._base import machine
from bigdl._base.errors import BigDLError, ConfigError
from bigdl.nano.accelerators import ACCELERATORS
from bigdl.nano.accelerators.base import Spec
from bigdl.nano.pytorch.export.binding import to_array

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bigdl.nano.accelerators.base import Arrays, Compiled, TensorSpec
    from bigdl.nano.pytorch.export.axes import Run

__all__ = ["first_cause", "is_close", "run_onnx_file", "verify"]


def first_cause(exc: BaseException) -> str:
    """The innermost reason, in one line."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(exc).__name__}: {text[:300]}"


class _OnnxFile:
    """A source that is a file already."""

    native = None
    sample: Arrays = ()

    def __init__(self, path: Path) -> None:
        self._path = path

    def bind(self, arrays: Sequence[np.ndarray]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(arrays), {}

    def onnx(self) -> Path:
        return self._path


def run_onnx_file(
    path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> Compiled | None:
    """The file in the first runtime that can run it here; None if there is none."""
    for name in ("onnxruntime", "openvino"):
        accelerator = ACCELERATORS.get(name)()
        spec = Spec(
            precision="fp32",
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            threads=machine.cores(),
            config=accelerator.options(),
        )
        if accelerator.refuse(spec) is None:
            return accelerator.compile(_OnnxFile(path), spec, None)
    return None


def verify(call: Any, runs: Sequence[Run], outputs: Sequence[TensorSpec], who: str) -> None:
    """Compare a flat call with the original at every length that was tried.

    Args:
        call: Flat arrays in, a sequence of them out.
        runs: What the original gave.
        outputs: Its outputs, for their names.
        who: The subject of an error's sentence.

    Raises:
        ConfigError: It fails, or its results are not the original's.
    """
    for run in {_lengths(run): run for run in runs}.values():
        arrays = tuple(map(to_array, run.inputs))
        lengths = ", ".join(str(tuple(array.shape)) for array in arrays)
        try:
            found = call(*arrays)
        except BigDLError:
            raise
        except Exception as exc:
            raise ConfigError(f"{who} fails for inputs {lengths}: {first_cause(exc)}") from exc
        for spec, array, wanted in zip(outputs, found, run.outputs, strict=True):
            got = torch.from_numpy(np.ascontiguousarray(array))
            if tuple(got.shape) != tuple(wanted.shape):
                raise ConfigError(
                    f"{who} gives {spec.name!r} the shape {tuple(got.shape)} for inputs "
                    f"{lengths}; the original gives {tuple(wanted.shape)}."
                )
            if not is_close(wanted, got):
                raise ConfigError(
                    f"{who} gives other results for {spec.name!r} than the original for inputs "
                    f"{lengths}: they differ by up to {_distance(wanted, got):.3g}."
                )


def _lengths(run: Run) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in run.inputs)


# How far apart two computations of one thing may lie, as a share of its largest value.
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 6e-2}


def is_close(wanted: torch.Tensor, got: torch.Tensor) -> bool:
    if not (wanted.is_floating_point() or wanted.is_complex()):
        same = wanted == got.to(wanted.dtype)
        # a tie between two classes may fall either way, once in a while
        return same.numel() == 0 or bool(same.float().mean() >= 0.98)
    # where the original overflows or has no value, the other form must, too
    a, b = wanted.double(), got.double()
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    tolerance = _TOLERANCE.get(wanted.dtype, 1e-3)
    scale = a[finite].abs().max().item() if finite.any() else 0.0
    return _distance(a, b) <= tolerance * scale + 1e-6


def _distance(wanted: torch.Tensor, got: torch.Tensor) -> float:
    a, b = wanted.double(), got.double()
    finite = torch.isfinite(a) & torch.isfinite(b)
    return (a[finite] - b[finite]).abs().max().item() if finite.any() else 0.0
