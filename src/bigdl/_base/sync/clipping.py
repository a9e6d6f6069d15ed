"""What is done to a gradient once it is summed: divided, clipped. NumPy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from bigdl._base.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Sync", "check", "clipping", "finish", "sum_of_squares"]

Sync = Literal["allreduce", "sharded"]

#: Numbers squared at a time: they stay in the cache, and their sum is made in float64.
_BLOCK = 1 << 14


def check(sync: str, compress: object, clip_norm: float | None, clip_value: float | None) -> None:
    """Raise a ``ConfigError`` that names every value that cannot be."""
    wrong = []
    if sync not in get_args(Sync):
        wrong.append(f'sync={sync!r} (need "allreduce" or "sharded")')
    if compress not in (None, "bf16"):
        wrong.append(f'compress={compress!r} (need None or "bf16")')
    for name, value in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if value is not None and not value > 0:
            wrong.append(f"{name}={value} (need more than 0, or None)")
    if wrong:
        raise ConfigError(f"Gradients cannot be combined so: {', '.join(wrong)}.")


def clipping(norm: float, limit: float) -> float:
    """The factor that keeps a gradient of ``norm`` within ``limit``, as PyTorch computes it."""
    factor = limit / (norm + 1e-6)
    return factor if not factor > 1.0 else 1.0  # NaN stays NaN


def sum_of_squares(array: NDArray[Any]) -> float:
    """Of a flat array."""
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # a gradient may have diverged
        for start in range(0, array.size, _BLOCK):
            block = array[start : start + _BLOCK]
            total += float(np.dot(block, block))
    return total


def finish(array: NDArray[Any], factor: float, clip_value: float | None) -> None:
    """Multiply ``array``, then clip its values, in place."""
    if factor != 1.0:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.multiply(array, array.dtype.type(factor), out=array)
    if clip_value is not None:
        np.clip(array, -clip_value, clip_value, out=array)
