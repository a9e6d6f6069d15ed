"""An optimizer of which each worker has the part for its slice of the parameters.

The optimizer object stays the same, since schedulers hold on to it; its groups get, in place of
parameters, the pieces of them that this worker owns. That is right for optimizers that treat
every element by itself, and refused for others.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.errors import ConfigError
from bigdl._base.sync import gather_bytes
from bigdl.nano.pytorch.processes.memory import flat, strided

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigdl._base.sync import StepKernel

__all__ = ["SlicedOptimizer", "check_sliceable"]

#: Of PyTorch's optimizers, those whose step treats every element by itself.
_ELEMENTWISE = {
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
}


def check_sliceable(optimizer: torch.optim.Optimizer) -> None:
    """Raise a ``ConfigError`` if the optimizer may need whole parameters."""
    if type(optimizer) not in _ELEMENTWISE:
        known = ", ".join(sorted(kind.__name__ for kind in _ELEMENTWISE))
        raise ConfigError(
            f'sync="sharded" cannot cut {type(optimizer).__name__} into slices: it is known '
            f'only of {known} that they treat each element by itself. Use sync="allreduce".'
        )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f'sync="sharded" cannot hold parameters of {parameter.dtype}: need float32 '
                    'or float64. Use sync="allreduce".'
                )


class SlicedOptimizer:
    """Makes ``optimizer`` this worker's part of itself, until ``join``; all workers make one.

    Args:
        optimizer: One that ``check_sliceable`` lets pass.
        parameters: Those of its parameters that the kernel knows, in its order.
        kernel: Has the pieces.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[torch.Tensor],
        kernel: StepKernel,
    ) -> None:
        self._optimizer = optimizer
        self._kernel = kernel
        self._parameters = parameters
        self._wholes = [list(group["params"]) for group in optimizer.param_groups]
        order = [parameter for whole in self._wholes for parameter in whole]
        places = {id(parameter): place for place, parameter in enumerate(order)}
        #: Of each of the kernel's parameters its number in the optimizer's own state.
        self._places = [places[id(parameter)] for parameter in parameters]
        whole_state = optimizer.state_dict()
        self._pieces = [torch.from_numpy(w).requires_grad_() for w in kernel.piece_weights]
        self._set_groups()
        self.load(whole_state)

    def _set_groups(self) -> None:
        numbers = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        for group, whole in zip(self._optimizer.param_groups, self._wholes, strict=True):
            here = {numbers[id(p)] for p in whole if id(p) in numbers}
            group["params"] = [
                tensor
                for piece, tensor in zip(self._kernel.pieces, self._pieces, strict=True)
                if piece.index in here
            ]

    def step(self, used: Sequence[bool]) -> None:
        """Update this worker's pieces, but those of parameters that nobody used."""
        kernel = self._kernel
        for piece, tensor, gradient in zip(
            kernel.pieces, self._pieces, kernel.piece_gradients, strict=True
        ):
            tensor.grad = torch.from_numpy(gradient) if used[piece.index] else None
        self._optimizer.step()

    # --- its state, whole ---

    def state(self) -> dict[str, Any]:
        """The state dict of the whole optimizer; all workers call it."""
        found: dict[int, dict[str, Any]] = {place: {} for place in self._places}
        names, singles = self._agree()
        for name in names:
            values = [
                value.detach().numpy()
                if self._is_sliced(value := self._value(i, name), i)
                else None
                for i in range(len(self._pieces))
            ]
            wholes = self._kernel.assemble(values)
            for index in names[name]:
                found[self._places[index]][name] = self._shaped(wholes[index], index)
        for index, name, kind, value in singles:
            dtype = getattr(torch, kind) if kind else None
            made = value if dtype is None else torch.tensor(value, dtype=dtype)
            found[self._places[index]][name] = made
        numbered = iter(range(sum(map(len, self._wholes))))
        groups = [
            {**_without_params(group), "params": [next(numbered) for _ in whole]}
            for group, whole in zip(self._optimizer.param_groups, self._wholes, strict=True)
        ]
        filled = {place: values for place, values in sorted(found.items()) if values}
        return {"state": filled, "param_groups": groups}

    def _value(self, number: int, name: str) -> Any:
        return self._optimizer.state.get(self._pieces[number], {}).get(name)

    def _is_sliced(self, value: Any, number: int) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == self._pieces[number].shape

    def _agree(self) -> tuple[dict[str, set[int]], list[tuple[int, str, str, Any]]]:
        """What there is on any worker: parameters by the name of a tensor; single values."""
        mine: list[tuple[int, str, str | None, Any]] = []
        for number, piece in enumerate(self._kernel.pieces):
            for name, value in self._optimizer.state.get(self._pieces[number], {}).items():
                if self._is_sliced(value, number):
                    mine.append((piece.index, name, None, None))
                elif isinstance(value, torch.Tensor):
                    kind = str(value.dtype).removeprefix("torch.")
                    mine.append((piece.index, name, kind, value.item()))
                else:
                    mine.append((piece.index, name, "", value))
        sliced: dict[str, set[int]] = {}
        singles: dict[tuple[int, str], tuple[int, str, str, Any]] = {}
        for text in gather_bytes(self._kernel.collective, json.dumps(mine).encode()):
            for index, name, kind, value in json.loads(text):
                if kind is None:
                    sliced.setdefault(name, set()).add(index)
                else:
                    singles.setdefault((index, name), (index, name, kind, value))
        return dict(sorted(sliced.items())), list(singles.values())

    def _shaped(self, elements: Any, index: int) -> torch.Tensor:
        return strided(torch.from_numpy(elements).clone(), self._parameters[index])

    def load(self, state: dict[str, Any]) -> None:
        """Take this worker's part of the whole optimizer's state."""
        for group, saved in zip(self._optimizer.param_groups, state["param_groups"], strict=True):
            group.update(_without_params(saved))
        self._optimizer.state.clear()
        for piece, tensor in zip(self._kernel.pieces, self._pieces, strict=True):
            saved = state["state"].get(self._places[piece.index])
            if saved:
                whole = self._parameters[piece.index]
                self._optimizer.state[tensor] = {
                    name: _part(value, whole, piece.start, piece.stop)
                    for name, value in saved.items()
                }

    def join(self) -> None:
        """Give the optimizer its whole parameters back; its state, if wanted, is taken before."""
        # groups that somebody has added since come last
        for group, whole in zip(self._optimizer.param_groups, self._wholes, strict=False):
            group["params"] = whole
        self._optimizer.state.clear()


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _part(value: Any, whole: torch.Tensor, start: int, stop: int) -> Any:
    """Elements of a whole parameter's state, in the order in which its values lie in memory."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape != whole.shape:  # a count of steps
        return value.detach().clone()
    like = strided(torch.empty(whole.numel(), dtype=value.dtype), whole).copy_(value)
    lain = flat(like)
    return (like.reshape(-1) if lain is None else lain)[start:stop].clone()
