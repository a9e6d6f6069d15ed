"""Which submodules could be a frozen trunk, read from their flags. Knows torch; runs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

__all__ = [
    "LEAST_SHARE",
    "Place",
    "find_places",
    "is_live",
    "stirred_by",
    "stirred_reason",
    "why_none",
]

_RECURRENT = (nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A submodule whose call, or the beginning of it, a trunk may stand in for.

    Args:
        name: Its dotted name, "" for the whole module.
        module: The submodule.
        whole: All of it is frozen; else it begins with a frozen part, if its forward allows.
    """

    name: str
    module: nn.Module
    whole: bool


def is_live(module: nn.Module) -> bool:
    """Whether its outputs cannot be computed ahead: it trains, or its mode stirs them."""
    return any(p.requires_grad for p in module.parameters()) or stirred_by(module) is not None


def stirred_by(module: nn.Module) -> str | None:
    """The name of a submodule whose present mode keeps statistics or draws random numbers."""
    for name, part in module.named_modules():
        if _stirs(part):
            return name or type(module).__name__
    return None


def _stirs(module: nn.Module) -> bool:
    if isinstance(module, _NormBase):
        # instance norm without statistics normalises each row by itself in either mode
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            return module.training and module.track_running_stats
        return module.training or module.running_mean is None
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, _RECURRENT):
        return float(module.dropout) > 0
    # torchvision's, by name: not everybody has torchvision
    return isinstance(module, nn.RReLU) or type(module).__name__ in ("StochasticDepth", "DropPath")


def find_places(root: nn.Module, root_name: str = "") -> list[Place]:
    """The places in ``root``, outer ones before those within them; each module once.

    Small parts are left out, and single layers of what is only kept back by its mode.
    """
    places: list[Place] = []
    seen: set[int] = set()
    least = _LEAST_PART * _frozen_size(root)

    def look(module: nn.Module, name: str, *, layers: bool) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        frozen = _frozen_size(module)
        if not frozen or frozen < least:
            return
        children = list(module.named_children())
        whole = not is_live(module)
        can_be_called = _can_be_called(module)
        if can_be_called and (children or layers):
            places.append(Place(name=name, module=module, whole=whole))
        if whole and can_be_called:
            return
        trains = any(p.requires_grad for p in module.parameters())
        for child_name, child in children:
            look(child, f"{name}.{child_name}" if name else child_name, layers=layers and trains)

    look(root, root_name, layers=True)
    return places


# Of all that is frozen, so much must be in a place (convolutions have few weights).
_LEAST_PART = 0.01


def _frozen_size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not p.requires_grad and not is_lazy(p))


def _can_be_called(module: nn.Module) -> bool:
    """Containers such as ModuleList have no forward; a compiled call is the user's own choice."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    forward = type(module).forward
    return forward is not nn.Module.forward and module._compiled_call_impl is None


def why_none(root: nn.Module) -> str | None:
    """Why nothing in ``root`` can be a frozen trunk, in one sentence; None if something may."""
    parameters = list(root.parameters())
    if not any(not p.requires_grad for p in parameters):
        return "no parameter is frozen (requires_grad=False)"
    if not any(p.requires_grad for p in parameters):
        return "every parameter is frozen: nothing trains"
    places = find_places(root)
    if not places:
        return "no submodule that is called as a whole has frozen parameters"
    if any(place.whole for place in places):
        return None
    for place in places:
        stirred = stirred_by(place.module)
        if stirred is not None and not any(p.requires_grad for p in place.module.parameters()):
            least = LEAST_SHARE * _frozen_size(root)
            hopeless = all(_size_before_live(each.module) < least for each in places)
            return stirred_reason(place.name, stirred) if hopeless else None
    return None


def stirred_reason(name: str, part: str) -> str:
    """What the user may do about a frozen part in train mode."""
    shown = f"self.{name}" if name else "the module"
    return (
        f"{shown} is frozen but in train mode, so {part!r} uses batch statistics or draws random "
        f"numbers; if that is not meant, call {shown}.eval() (after every .train())"
    )


#: A trunk that ends before the first layer in train mode must have this share of the weights.
LEAST_SHARE = 0.25


def _size_before_live(module: nn.Module) -> int:
    """The weights in layers that were registered before the first live one."""
    before = 0
    for part in module.modules():
        own = [p for p in part._parameters.values() if p is not None and not is_lazy(p)]
        if _stirs(part) or any(p.requires_grad for p in own):
            break
        before += sum(p.numel() for p in own)
    return before
