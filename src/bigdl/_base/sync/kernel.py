"""The step kernel: what turns every worker's gradients into those of the global batch.

NumPy only. A step is one call of ``reduce`` on every worker. Gradients come multiplied with
their weight (rows, or whatever the loss is a mean over), so their sum over workers, divided by
the sum of weights, is the gradient of the mean over the global batch. Row count, weight, loss,
a stop flag, and for each parameter how many workers used it lie in front of the gradients and
are added in the same pass.

Communication does not run beside the backward pass: workers of one host share its cores, which
are all busy with that pass, so there is nobody to do it meanwhile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.errors import ConfigError
from bigdl._base.sync.clipping import Sync, check, clipping, finish, sum_of_squares
from bigdl._base.sync.layout import FIELDS, Layout, Memory, Piece

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike, NDArray

    from bigdl._base.collective import Collective, Compress

__all__ = ["Contribution", "Outcome", "StepKernel"]

#: Counts of rows travel as two digits: each sum is exact in float32 for up to 256 workers.
_DIGIT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one worker brings to a step besides gradients; the defaults are those without rows.

    Args:
        used: For each parameter, whether it has a gradient here.
        rows: Rows of this worker.
        weight: What this worker's mean is over: rows, tokens, the sum of class weights.
        loss: Sum of losses, that is the mean times weight.
        unit: Gradients were multiplied with weight ÷ unit. The same on all workers with rows;
            the number of global rows is best, as then nothing is left to be divided.
        stop: Whether this worker asks for the end of training.
    """

    used: Sequence[bool]
    rows: int = 0
    weight: float = 0.0
    loss: float = 0.0
    unit: float = 1.0
    stop: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What all workers brought, the same on each of them.

    Args:
        rows: Rows of the global batch; 0 means that nobody had any: training has ended.
        weight: Sum of weights.
        loss: Sum of losses; the step's loss is ``loss / weight``.
        used: For each parameter, whether anybody has a gradient for it.
        is_stopped: Whether anybody asked for the end.
        norm: Norm of the gradient before clipping; None unless clipped by norm.
    """

    rows: int
    weight: float
    loss: float
    used: tuple[bool, ...]
    is_stopped: bool
    norm: float | None


class StepKernel:
    """Gradients of several workers, added up. All workers make it, and call it, alike.

    Args:
        collective: How the workers are connected.
        sizes: Elements of each parameter.
        dtypes: float32 or float64, of each parameter; sums are made in it.
        sync: "allreduce" gives every worker the whole gradient. "sharded" gives each its own
            pieces of it, and of ``weights``; it updates those and calls ``gather_weights``.
        compress: "bf16" rounds float32 gradients where they travel between hosts.
        averages: Whether the loss is a mean; False leaves sums as they are.
        clip_norm: Largest norm of the global gradient, over all parameters.
        clip_value: Largest absolute value in it, after ``clip_norm``.

    Raises:
        ConfigError: A value is not allowed.
    """

    def __init__(
        self,
        collective: Collective,
        sizes: Sequence[int],
        dtypes: Sequence[DTypeLike],
        *,
        sync: Sync = "allreduce",
        compress: Compress = None,
        averages: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        check(sync, compress, clip_norm, clip_value)
        self.collective = collective
        self.layout = Layout(sizes, dtypes)
        self.sync = sync
        self._compress = compress
        self._averages = averages
        self._clip_norm = clip_norm
        self._clip_value = clip_value
        self._memory = Memory(collective, self.layout, has_head=True)
        #: Each parameter's gradient, flat: views of the memory that is added up.
        self.gradients: list[NDArray[Any]] = self._memory.views()
        owned = {dtype: collective.part(n) for dtype, n in self.layout.lengths.items()}
        self._owned = owned
        self._weights: Memory | None = None
        #: Each parameter's values, flat, for ``gather_weights``; only if sharded.
        self.weights: list[NDArray[Any]] = []
        if sync == "sharded":
            self._weights = Memory(collective, self.layout, has_head=False)
            self.weights = self._weights.views()
        #: What this worker updates if sharded.
        self.pieces: list[Piece] = self.layout.pieces(owned)

    # --- the step ---

    def reduce(self, mine: Contribution) -> Outcome:
        """Add up all workers' gradients, in place, and make them those of the global batch.

        Afterwards ``gradients`` (if sharded: ``piece_gradients``) hold the result; those of
        parameters that nobody used are zero.

        Raises:
            ConfigError: Workers brought different arrays.
            WorkerError, TimeLimitError: As the collective's calls.
        """
        for gradient, is_used in zip(self.gradients, mine.used, strict=True):
            if not is_used:
                gradient.fill(0)
        self._write(mine)
        self._add_up()
        total = self._read()
        if total["rows"] == 0:
            return self._outcome(total, None)
        factor = self._factor(total)
        norm = None
        if self._clip_norm is not None:
            norm = factor * self._norm()
            factor *= clipping(norm, self._clip_norm)
        self._finish(factor)
        return self._outcome(total, norm)

    def _write(self, mine: Contribution) -> None:
        head = self._memory.head
        head.fill(0)
        high, low = divmod(mine.rows, _DIGIT)
        brings = mine.rows > 0
        fields = {
            "rows_high": high,
            "rows_low": low,
            "weight": mine.weight,
            "loss": mine.loss,
            "unit": mine.unit if brings else 0.0,
            "bringers": brings,
            "stop": mine.stop,
        }
        with np.errstate(over="ignore"):  # a loss beyond float32 is infinite there
            head[: len(FIELDS)] = [fields[name] for name in FIELDS]
        head[len(FIELDS) : self.layout.head] = mine.used

    def _add_up(self) -> None:
        is_sharded = self.sync == "sharded"
        # the head is for all, and is never rounded: by itself where the rest is not so
        by_itself = is_sharded or self._compress is not None
        if by_itself:
            self.collective.all_reduce(self._memory.head)
        arrays = self._memory.bodies if by_itself else self._memory.whole
        for dtype, array in arrays.items():
            compress = self._compress if dtype == np.float32 else None
            if is_sharded:
                self.collective.reduce_scatter(array, compress=compress)
            else:
                self.collective.all_reduce(array, compress=compress)

    def _read(self) -> dict[str, float]:
        values = self._memory.head[: len(FIELDS)].tolist()
        total = dict(zip(FIELDS, values, strict=True))
        total["rows"] = round(total["rows_high"]) * _DIGIT + round(total["rows_low"])
        return total

    def _factor(self, total: dict[str, float]) -> float:
        """What sums are multiplied with to be means; 1 where that is done already."""
        if not self._averages or total["weight"] == 0:
            return 1.0
        return total["unit"] / total["bringers"] / total["weight"]

    def _outcome(self, total: dict[str, float], norm: float | None) -> Outcome:
        counts = self._memory.head[len(FIELDS) : self.layout.head]
        return Outcome(
            rows=int(total["rows"]),
            weight=total["weight"],
            loss=total["loss"],
            used=tuple((counts > 0).tolist()),
            is_stopped=total["stop"] > 0,
            norm=norm,
        )

    def _norm(self) -> float:
        """Norm of the sums: each worker squares its own part, so that all get the same bits."""
        squares = np.zeros(1)
        for dtype, body in self._memory.bodies.items():
            squares[0] += sum_of_squares(body[self._owned[dtype]])
        self.collective.all_reduce(squares)
        return math.sqrt(squares[0]) if squares[0] >= 0 else math.nan

    def _finish(self, factor: float) -> None:
        for dtype, body in self._memory.bodies.items():
            array = body[self._owned[dtype]] if self.sync == "sharded" else body
            finish(array, factor, self._clip_value)

    # --- slices ---

    @property
    def piece_gradients(self) -> list[NDArray[Any]]:
        """The gradient of each of ``pieces``, flat."""
        return [self._memory.bodies[piece.dtype][piece.at] for piece in self.pieces]

    @property
    def piece_weights(self) -> list[NDArray[Any]]:
        """The values of each of ``pieces``, flat: views of ``weights``."""
        if self._weights is None:
            raise ConfigError('Only sync="sharded" has pieces of weights.')
        return [self._weights.bodies[piece.dtype][piece.at] for piece in self.pieces]

    def gather_weights(self) -> None:
        """Give every worker what the others have made of their pieces of ``weights``."""
        if self._weights is not None:
            for body in self._weights.bodies.values():
                self.collective.all_gather(body)

    def assemble(self, values: Sequence[NDArray[Any] | None]) -> list[NDArray[Any]]:
        """Put together, for every worker, numbers of which each has those of its own pieces.

        Args:
            values: For each of ``pieces``, a flat array of its length and dtype; None = zeros.

        Returns:
            For each parameter a flat array of its size.
        """
        bodies = {dtype: np.zeros(n, dtype) for dtype, n in self.layout.lengths.items()}
        for piece, value in zip(self.pieces, values, strict=True):
            if value is not None:
                bodies[piece.dtype][piece.at] = value
        for body in bodies.values():
            self.collective.all_gather(body)
        layout = self.layout
        return [bodies[dtype][layout.where(index)] for index, dtype in enumerate(layout.dtypes)]
