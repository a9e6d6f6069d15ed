"""The step kernel of one worker: gradients stay where they are. NumPy only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bigdl._base.sync.clipping import check, clipping, finish, sum_of_squares
from bigdl._base.sync.kernel import Contribution, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = ["LoneKernel"]


class LoneKernel:
    """As ``StepKernel``, for one worker; its gradients are lent to it for each step.

    Args:
        averages: Whether the loss is a mean; False leaves sums as they are.
        clip_norm: Largest norm of the gradient, over all parameters.
        clip_value: Largest absolute value in it, after ``clip_norm``.

    Raises:
        ConfigError: A value is not allowed.
    """

    def __init__(
        self,
        *,
        averages: bool = True,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        check("allreduce", None, clip_norm, clip_value)
        self._averages = averages
        self._clip_norm = clip_norm
        self._clip_value = clip_value

    def reduce(
        self, mine: Contribution, gradients: Callable[[], Sequence[NDArray[Any]]]
    ) -> Outcome:
        """Make the gradients those of the whole batch, in place.

        Args:
            mine: As for ``StepKernel``.
            gradients: Gives the flat gradients of all used parameters; only asked if there is
                anything to be done to them.
        """
        factor = mine.unit / mine.weight if self._averages and mine.weight != 0 else 1.0
        norm = None
        is_touched = factor != 1.0 or self._clip_norm is not None or self._clip_value is not None
        if mine.rows > 0 and is_touched:
            arrays = gradients()
            if self._clip_norm is not None:
                norm = factor * math.sqrt(math.fsum(map(sum_of_squares, arrays)))
                factor *= clipping(norm, self._clip_norm)
            for array in arrays:
                finish(array, factor, self._clip_value)
        return Outcome(
            rows=mine.rows,
            weight=mine.weight,
            loss=mine.loss,
            used=tuple(mine.used),
            is_stopped=mine.stop,
            norm=norm,
        )
