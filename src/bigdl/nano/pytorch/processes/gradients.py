"""Gradients of PyTorch's parameters, in the step kernel's memory.

A gradient that the backward pass makes is copied into the memory that workers add up, as soon as
it is made, and from then on the parameter's ``grad`` *is* that memory: the sum appears in it
without another copy. A parameter that nobody used keeps ``grad`` None, so that no optimizer
moves it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bigdl._base.errors import ConfigError
from bigdl._base.sync import Contribution, LoneKernel, Outcome, StepKernel
from bigdl.nano.pytorch.processes.memory import copied, flat, strided
from bigdl.nano.pytorch.processes.slices import SlicedOptimizer, check_sliceable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bigdl._base.collective import Collective, Compress
    from bigdl._base.sync import Sync

__all__ = ["Gradients", "Summing", "Weighted", "connect_gradients"]

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Summing:
    """How gradients of several workers become one; the arguments of ``StepKernel``."""

    sync: Sync = "allreduce"
    compress: Compress = None
    averages: bool = True
    clip_norm: float | None = None
    clip_value: float | None = None


class Weighted(Protocol):
    """A loss that knows what its mean is over."""

    @property
    def weight(self) -> float: ...


class Gradients(Protocol):
    """Between the backward pass and the optimizer's step."""

    def unit(self, term: Weighted, global_rows: int) -> float:
        """What the weights of an update's losses are divided by, from its first batch."""

    def reduce(self, *, rows: int, weight: float, loss: float, unit: float, stop: bool) -> Outcome:
        """Make every ``grad`` that of the global batch."""

    def update(self, optimizer: torch.optim.Optimizer, outcome: Outcome) -> None:
        """Let the optimizer make its step."""

    def clear(self) -> None:
        """Set every ``grad`` to None."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """As ``optimizer.state_dict()``, whole on every worker, in memory of its own."""

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Take a whole state."""

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the optimizer whole on every worker; all workers call it."""

    def close(self) -> None:
        """Let go of the gang's memory, whatever has happened. A second call does nothing."""


def connect_gradients(
    collective: Collective, optimizer: torch.optim.Optimizer, summing: Summing
) -> Gradients:
    """The way of these workers for the parameters that ``optimizer`` moves; all call it.

    Raises:
        ConfigError: A parameter's dtype cannot be added up, or ``sync="sharded"`` is asked of
            an optimizer that needs whole parameters.
    """
    parameters = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
    if collective.world == 1:
        return _Lone(parameters, summing)
    if summing.sync == "sharded":
        check_sliceable(optimizer)
        return _Sharded(parameters, collective, summing, optimizer)
    return _Shared(parameters, collective, summing)


class _Whole:
    """The optimizer's part where each worker has all of it."""

    parameters: Sequence[torch.Tensor]

    def update(self, optimizer: torch.optim.Optimizer, outcome: Outcome) -> None:
        optimizer.step()

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = copied(optimizer.state_dict())
        return state

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        optimizer.load_state_dict(copied(state))

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        """It is whole already."""

    def close(self) -> None:
        self.clear()


class _Lone(_Whole):
    """One worker: gradients stay as the backward pass makes them."""

    def __init__(self, parameters: Sequence[torch.Tensor], summing: Summing) -> None:
        self.parameters = parameters
        self._kernel = LoneKernel(
            averages=summing.averages,
            clip_norm=summing.clip_norm,
            clip_value=summing.clip_value,
        )

    def unit(self, term: Weighted, global_rows: int) -> float:
        return term.weight or 1.0

    def reduce(self, *, rows: int, weight: float, loss: float, unit: float, stop: bool) -> Outcome:
        used = [parameter.grad is not None for parameter in self.parameters]
        mine = Contribution(used=used, rows=rows, weight=weight, loss=loss, unit=unit, stop=stop)
        put_back: list[tuple[torch.Tensor, torch.Tensor]] = []
        outcome = self._kernel.reduce(mine, lambda: self._arrays(put_back))
        for gradient, changed in put_back:
            gradient.copy_(changed.view_as(gradient))
        return outcome

    def _arrays(self, put_back: list[tuple[torch.Tensor, torch.Tensor]]) -> list[NDArray[Any]]:
        """Every gradient as a flat array; of its memory, or of a copy that is put back."""
        arrays = []
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
            gradient = parameter.grad.detach()
            values = gradient._values() if gradient.is_sparse else gradient
            lain = flat(values) if values.dtype not in _HALVES else None
            if lain is None:
                dtype = torch.float32 if values.dtype in _HALVES else values.dtype
                lain = values.to(dtype, copy=True).contiguous().view(-1)
                put_back.append((values, lain))
            arrays.append(lain.numpy())
        return arrays


class _Shared(_Whole):
    """Several workers, each with the whole gradient after the step."""

    def __init__(
        self, parameters: Sequence[torch.Tensor], collective: Collective, summing: Summing
    ) -> None:
        self.parameters = parameters
        self._kernel = StepKernel(
            collective,
            [parameter.numel() for parameter in parameters],
            [_summed_in(parameter.dtype) for parameter in parameters],
            **asdict(summing),
        )
        self._views = [
            strided(torch.from_numpy(array), parameter)
            for array, parameter in zip(self._kernel.gradients, parameters, strict=True)
        ]
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(_landing(view))  # type: ignore[no-untyped-call]
            for parameter, view in zip(parameters, self._views, strict=True)
        ]

    def unit(self, term: Weighted, global_rows: int) -> float:
        return float(global_rows)

    def reduce(self, *, rows: int, weight: float, loss: float, unit: float, stop: bool) -> Outcome:
        used = [parameter.grad is not None for parameter in self.parameters]
        for parameter, view in zip(self.parameters, self._views, strict=True):
            made = parameter.grad
            # of another dtype; or put there by somebody else than the backward pass
            if made is not None and (made.is_sparse or made.data_ptr() != view.data_ptr()):
                view.copy_(made.to_dense() if made.is_sparse else made)
        outcome = self._kernel.reduce(
            Contribution(used=used, rows=rows, weight=weight, loss=loss, unit=unit, stop=stop)
        )
        for parameter, view, is_used in zip(
            self.parameters, self._views, outcome.used, strict=True
        ):
            parameter.grad = view.to(parameter.dtype) if is_used else None
        return outcome

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.clear()


class _Sharded(_Shared):
    """Several workers, each with its slice of gradient, weights and optimizer."""

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        collective: Collective,
        summing: Summing,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        super().__init__(parameters, collective, summing)
        kernel = self._kernel
        for parameter, array in zip(parameters, kernel.weights, strict=True):
            view = strided(torch.from_numpy(array), parameter)
            view.copy_(parameter.detach())
            parameter.data = view
        self._sliced = SlicedOptimizer(optimizer, parameters, kernel)
        self._is_closed = False

    def update(self, optimizer: torch.optim.Optimizer, outcome: Outcome) -> None:
        self.clear()  # of whole parameters there is no gradient here
        self._sliced.step(outcome.used)
        self._kernel.gather_weights()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return self._sliced.state()

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        self._sliced.load(state)

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        whole = self._sliced.state()
        self.close()
        optimizer.load_state_dict(whole)

    def close(self) -> None:
        super().close()
        if self._is_closed:
            return
        self._is_closed = True
        self._sliced.join()
        for parameter in self.parameters:
            parameter.data = parameter.detach().clone(memory_format=torch.preserve_format)


def _landing(view: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Moves a gradient that was just made to ``view``."""

    def land(parameter: torch.Tensor) -> None:
        made = parameter.grad
        if made is None or made.dtype != view.dtype:
            return
        if made.is_sparse:
            made = made.to_dense()
        if made.data_ptr() != view.data_ptr():
            view.copy_(made)
            parameter.grad = view

    return land


def _summed_in(dtype: torch.dtype) -> str:
    if dtype in _HALVES:
        return "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "float64"):
        raise ConfigError(
            f"Gradients of {dtype} cannot be added up among workers: need float32, float64 or "
            "half precision."
        )
    return name
