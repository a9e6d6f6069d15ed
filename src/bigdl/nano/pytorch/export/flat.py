"""Modules around a model: flat tensors in and out, inputs kept; and the model in a wrapper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigdl._base.errors import ArgumentError
from bigdl.nano.pytorch.export.structure import flatten, map_tensors

if TYPE_CHECKING:
    from bigdl.nano.pytorch.export.binding import Interface

__all__ = ["Flat", "InputsKept", "as_module"]


class Flat(nn.Module):
    """A model as flat tensors in, a tuple of flat tensors out."""

    def __init__(self, model: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self._interface = interface

    def train(self, mode: bool = True) -> Flat:
        self.training = False  # the model inside has its modes already
        return self

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dtypes = [check.dtype for check in self._interface.checks]
        # what NumPy lacks travels as float32
        inputs = [leaf.to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
        args, kwargs = self._interface.call_form(inputs)
        outputs, _ = flatten(self.model(*args, **kwargs))
        seen: set[int] = {id(leaf) for leaf in (*leaves, *inputs)}
        apart = []
        for output in outputs:
            if output.dtype is torch.bfloat16:
                output = output.float()
            # an output that is an input, or another output, needs a place of its own
            apart.append(output.clone() if id(output) in seen else output)
            seen.add(id(output))
        return tuple(apart)


class InputsKept(nn.Module):
    """A model that writes to its inputs, given copies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors(torch.clone, (args, kwargs))
        return self.model(*args, **kwargs)


def as_module(model: Any) -> nn.Module:
    """The module behind what was given.

    Raises:
        ArgumentError: There is none.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    for name in ("_orig_mod", "module"):  # torch.compile, DataParallel and the like
        wrapped = type(model).__name__ in ("OptimizedModule", *_WRAPPERS)
        inner = getattr(model, name, None) if wrapped else None
        if isinstance(inner, nn.Module):
            return as_module(inner)
    if isinstance(model, nn.Module):
        return model
    raise ArgumentError(f"model is a {type(model).__name__}; need a torch.nn.Module.")


_WRAPPERS = ("DataParallel", "DistributedDataParallel")
