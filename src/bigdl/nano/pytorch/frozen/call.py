"""What one call looks like: which kinds of call share a form, and which never may. Knows torch."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd import forward_ad

from bigdl.nano.pytorch.export.structure import flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigdl.nano.pytorch.export.structure import Structure

    Tensors = tuple[torch.Tensor, ...]

__all__ = ["Kind", "Streams", "as_now", "is_plain", "kind_of", "quiet"]

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)


def is_plain() -> bool:
    """Whether operations run as they do in an ordinary training step.

    Not so while torch traces, exports, transforms a function or lets a mode look on.
    """
    return (
        torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


@dataclass(frozen=True)
class Kind:
    """What a call is like.

    Args:
        tensors: Its tensors.
        arguments: How they are nested in (args, kwargs).
        key: What a form made for this call must find again in others.
    """

    tensors: Tensors
    arguments: Structure
    key: Any


#: Of the common call with one tensor.
_ONE = flatten(((torch.empty(0),), {}))[1]


def kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind | None:
    """What the call is like.

    Returns:
        None for a call that the user's own module must answer: one with a gradient to pass on,
        without rows, or with arguments that cannot be told apart by value.
    """
    tensors: Tensors
    types: tuple[type, ...] = ()
    if len(args) == 1 and not kwargs and type(args[0]) is torch.Tensor:
        tensors, arguments = args, _ONE
    else:
        found, arguments = flatten((args, kwargs))
        constants = [value for _, value in arguments.constants("")]
        if not found or not all(isinstance(value, _CONSTANTS) for value in constants):
            return None
        # equal values of different types (1, True) are different calls
        tensors, types = tuple(found), tuple(map(type, constants))
    grad = torch.is_grad_enabled()
    parts: list[Any] = [arguments, types, _autocast(tensors[0].device.type)]
    for tensor in tensors:
        if (
            type(tensor) is not torch.Tensor
            or (grad and tensor.requires_grad)
            or tensor.layout is not torch.strided
            or not tensor.numel()
        ):
            return None
        parts.append((tensor.dtype, tensor.shape[1:], tensor.dim(), tensor.device))
    return Kind(tensors, arguments, tuple(parts))


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def as_now(call: Callable[[Tensors], Tensors], device: str) -> Callable[[Tensors], Tensors]:
    """``call`` without gradients, under the autocast that is in force now."""
    dtype = _autocast(device)

    def run(inputs: Tensors) -> Tensors:
        # no autocast cache: it would hold on to casted weights of a copy
        with (
            torch.no_grad(),
            torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False),
        ):
            return call(inputs)

    return run


class Streams:
    """The global random streams at one moment."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._state = self._read()

    def _read(self) -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state(self._cuda) if self._cuda is not None else None
        return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        now = self._read()
        same = torch.equal(self._state[0], now[0]) and self._state[2] == now[2]
        if self._cuda is not None:
            same &= torch.equal(self._state[1], now[1])
        numbers, later = self._state[3], now[3]
        return not (same and numbers[2:] == later[2:] and np.array_equal(numbers[1], later[1]))

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self._state[0])
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._state[1], self._cuda)
        random.setstate(self._state[2])
        np.random.set_state(self._state[3])


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """For building: no gradient, no autocast, normal tensors; random streams put back after."""
    streams = Streams(device)
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        streams.restore()
