"""Cuts a partly frozen module in two: what can be computed ahead, and the rest.

Knows torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bigdl._base.errors import ConfigError
from bigdl.nano.pytorch.frozen.find import LEAST_SHARE, is_live, stirred_by, stirred_reason
from bigdl.nano.pytorch.frozen.steps import (
    ahead_of,
    border_of,
    follow,
    holders_of,
    live_nodes,
    reads_own,
    rest_of,
    twin,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from bigdl.nano.pytorch.export.structure import Structure

__all__ = ["Called", "Trunk", "make_trunk"]

_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """A frozen part as a module of its own.

    Args:
        ahead: Computes the frozen part from the call's tensors, in order. It shares parameters
            with the user's module, not modes, hooks or buffers.
        rest: Gets what ``ahead`` returned, then the call's tensors, and gives the call's result
            through the user's own submodules; None if ``ahead`` is everything.
        modules: The user's submodules whose modes, hooks and parts the cut relies on.
        frozen: Those of them whose weights are within ``ahead``.
        live: The user's submodules that the cut was made before.
    """

    ahead: nn.Module
    rest: Callable[..., Any] | None
    modules: tuple[nn.Module, ...]
    frozen: tuple[nn.Module, ...]
    live: tuple[nn.Module, ...] = ()


class Called(nn.Module):
    """A module called with the tensors of a call in their places."""

    def __init__(self, module: nn.Module, arguments: Structure) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.arguments = arguments

    def forward(self, *tensors: torch.Tensor) -> Any:
        args, kwargs = self.arguments.build(tensors)
        return self.module(*args, **kwargs)


def make_trunk(
    module: nn.Module, name: str, arguments: Structure, live: Collection[int] = ()
) -> Trunk:
    """The frozen part of ``module``: all of it, or the beginning of its forward.

    Args:
        module: Where to look.
        name: Its name, for texts.
        arguments: How tensors are nested in (args, kwargs) of the calls.
        live: Ids of submodules that count as trained, as they do in other modes of this module.

    Raises:
        ConfigError: There is none; the text says why.
    """
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ConfigError("it is TorchScript")
    for tensor in (*module.parameters(), *module.buffers()):
        if is_lazy(tensor) or tensor.is_inference() or type(tensor) not in _TENSORS:
            raise ConfigError(f"it holds a {type(tensor).__name__} of a special kind")
    parts = tuple(module.modules())
    if not is_live(module) and not any(id(part) in live for part in parts):
        ahead = Called(twin(module), arguments)
        return Trunk(ahead=ahead, rest=None, modules=parts, frozen=parts)
    stirred = _frozen_but_stirred(module)
    try:
        trunk = _cut(module, arguments, live)
    except ConfigError as exc:
        if stirred is None or any(p.requires_grad for p in module.parameters()):
            raise
        raise ConfigError(stirred_reason(name, stirred)) from exc
    if stirred is not None and _size(trunk.frozen) < LEAST_SHARE * _size(parts):
        raise ConfigError(stirred_reason(name, stirred))
    return trunk


def _frozen_but_stirred(module: nn.Module) -> str | None:
    """The name of a frozen layer that keeps statistics, or of one that draws in what is frozen."""
    for name, part in module.named_modules():
        own = list(part.parameters())
        if not own or any(p.requires_grad for p in own):
            continue
        inner = stirred_by(part)
        if inner is not None:
            return f"{name}.{inner}".strip(".")
    return None


def _size(modules: Iterable[nn.Module]) -> int:
    """Frozen weights that ``modules`` own themselves."""
    return sum(
        p.numel()
        for m in modules
        for p in m._parameters.values()
        if p is not None and not p.requires_grad
    )


def _cut(module: nn.Module, arguments: Structure, also_live: Collection[int]) -> Trunk:
    """The longest beginning of ``module.forward`` that nothing trainable touches.

    Raises:
        ConfigError: Its forward cannot be followed, or nothing comes before what trains.
    """

    def lives(part: nn.Module) -> bool:
        return is_live(part) or any(id(inner) in also_live for inner in part.modules())

    graph, copied = follow(module, arguments, lives)
    live = live_nodes(graph, module, copied, lives)
    steps = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    ahead = [n for n in steps if n not in live]
    called = [module.get_submodule(str(n.target)) for n in ahead if n.op == "call_module"]
    working = [m for m in called if any(True for _ in m.parameters())]
    border = border_of(graph, live)
    if not working or not border:
        raise ConfigError("nothing frozen comes before the first layer that trains")
    if len(working) == 1 and working[0]._compiled_call_impl is not None:
        raise ConfigError("the frozen part is one submodule, which has a trunk of its own")
    frozen = tuple({id(p): p for m in called for p in m.modules()}.values())
    holders = holders_of(module, frozen, lives)
    direct = tuple(h for h in holders if reads_own(h, module, ahead))
    return Trunk(
        ahead=ahead_of(copied, graph, live, border),
        rest=rest_of(module, copied, graph, live, border),
        modules=(*holders, *frozen),
        frozen=(*frozen, *direct),
        live=tuple(
            part
            for n in steps
            if n.op == "call_module" and lives(part := module.get_submodule(str(n.target)))
        ),
    )
