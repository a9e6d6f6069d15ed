"""Where the numbers of a step lie in memory that all workers can add up. NumPy only.

Parameters of one dtype lie one behind the other in one array, since a sum is made of one dtype.
The *head*, the few numbers about the step itself, lies in front of the widest dtype's array, so
that it travels with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike, NDArray

    from bigdl._base.collective import Collective

__all__ = ["FIELDS", "Layout", "Memory", "Piece"]

#: The head's numbers; one more for each parameter follows: how many workers used it.
FIELDS = ("rows_high", "rows_low", "weight", "loss", "unit", "bringers", "stop")
#: Every parameter begins at a multiple of so many bytes, as vector instructions like it.
_ALIGN = 64
_SUMMED = (np.dtype(np.float64), np.dtype(np.float32))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a parameter that this worker owns under ``sync="sharded"``.

    Args:
        index: Number of the parameter.
        start: First of its elements, in the flat parameter.
        stop: One past the last.
        dtype: Their dtype.
        at: Where they lie in the array of all parameters of that dtype.
    """

    index: int
    start: int
    stop: int
    dtype: np.dtype[Any]
    at: slice


class Layout:
    """Offsets of parameters, in elements, by dtype.

    Args:
        sizes: Elements of each parameter.
        dtypes: float32 or float64, of each parameter.

    Raises:
        ConfigError: A dtype is another one.
    """

    def __init__(self, sizes: Sequence[int], dtypes: Sequence[DTypeLike]) -> None:
        self.sizes = tuple(int(size) for size in sizes)
        self.dtypes = tuple(np.dtype(dtype) for dtype in dtypes)
        for index, dtype in enumerate(self.dtypes):
            if dtype not in _SUMMED:
                raise ConfigError(
                    f"Cannot add gradients of {dtype} (parameter {index}): need float32 or "
                    "float64."
                )
        self.offsets = [0] * len(self.sizes)
        self.lengths: dict[np.dtype[Any], int] = {}
        for wanted in _SUMMED:
            end = 0
            for index, (size, dtype) in enumerate(zip(self.sizes, self.dtypes, strict=True)):
                if dtype == wanted:
                    self.offsets[index] = end
                    end += _aligned(size, wanted)
            if end:
                self.lengths[wanted] = end
        #: The dtype whose array carries the head.
        self.head_dtype = next(iter(self.lengths), _SUMMED[0])
        self.lengths.setdefault(self.head_dtype, 0)
        self.head = len(FIELDS) + len(self.sizes)
        self.head_length = _aligned(self.head, self.head_dtype)

    def where(self, index: int) -> slice:
        """Where parameter ``index`` lies in its dtype's array."""
        return slice(self.offsets[index], self.offsets[index] + self.sizes[index])

    def pieces(self, owned: dict[np.dtype[Any], slice]) -> list[Piece]:
        """What lies in the owned part of each dtype's array, in the order of parameters."""
        found = []
        for index, dtype in enumerate(self.dtypes):
            whole, own = self.where(index), owned[dtype]
            start, stop = max(whole.start, own.start), min(whole.stop, own.stop)
            if start < stop:
                found.append(
                    Piece(
                        index=index,
                        start=start - whole.start,
                        stop=stop - whole.start,
                        dtype=dtype,
                        at=slice(start, stop),
                    )
                )
        return found


class Memory:
    """One array a dtype, in a collective's own memory; all workers make it at the same time.

    Args:
        collective: Gives the memory.
        layout: What lies where.
        has_head: Whether the head lies in front.
    """

    def __init__(self, collective: Collective, layout: Layout, *, has_head: bool) -> None:
        self._layout = layout
        front = layout.head_length if has_head else 0
        nbytes = sum(dtype.itemsize * n for dtype, n in layout.lengths.items())
        nbytes += layout.head_dtype.itemsize * front
        memory = collective.buffer(nbytes)
        at = 0
        #: Each dtype's array with what lies in front of it.
        self.whole: dict[np.dtype[Any], NDArray[Any]] = {}
        #: Each dtype's array of parameters.
        self.bodies: dict[np.dtype[Any], NDArray[Any]] = {}
        for dtype, n in layout.lengths.items():
            before = front if dtype == layout.head_dtype else 0
            end = at + dtype.itemsize * (before + n)
            self.whole[dtype] = memory[at:end].view(dtype)
            self.bodies[dtype] = self.whole[dtype][before:]
            at = end

    @property
    def head(self) -> NDArray[Any]:
        """The head's numbers, with the empty ones that fill it up."""
        return self.whole[self._layout.head_dtype][: self._layout.head_length]

    def views(self) -> list[NDArray[Any]]:
        """Each parameter's elements, as a flat view."""
        layout = self._layout
        return [
            self.bodies[dtype][layout.where(index)] for index, dtype in enumerate(layout.dtypes)
        ]


def _aligned(size: int, dtype: np.dtype[Any]) -> int:
    many = _ALIGN // dtype.itemsize
    return -(-size // many) * many
