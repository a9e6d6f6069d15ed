"""Which submodules could be a frozen trunk, read from their flags. Knows torch; runs nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["Place", "find_places", "is_live", "stirred_by", "why_none"]

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
    """The places in ``root``, outer ones before those within them; each module once."""
    places: list[Place] = []
    seen: set[int] = set()

    def look(module: nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        parameters = list(module.parameters())
        if not parameters or all(p.requires_grad for p in parameters):
            return
        whole = not is_live(module)
        if _can_be_called(module):
            places.append(Place(name=name, module=module, whole=whole))
        if not whole or not _can_be_called(module):
            for child_name, child in module.named_children():
                look(child, f"{name}.{child_name}" if name else child_name)

    look(root, root_name)
    return places


def _can_be_called(module: nn.Module) -> bool:
    """Containers such as ModuleList have no forward; a compiled call is the user's own choice."""
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
    stirred = [
        (place.name, part)
        for place in places
        if not any(p.requires_grad for p in place.module.parameters())
        and (part := stirred_by(place.module)) is not None
    ]
    if stirred and all(_begins_stirred(place.module) for place in places):
        name, part = stirred[0]
        return stirred_reason(name, part)
    return None


def stirred_reason(name: str, part: str) -> str:
    """What the user may do about a frozen part in train mode."""
    shown = f"self.{name}" if name else "the module"
    return (
        f"{shown} is frozen but in train mode, so {part!r} uses batch statistics or draws random "
        f"numbers; if that is not meant, call {shown}.eval() (after every .train())"
    )


def _begins_stirred(module: nn.Module) -> bool:
    """Whether the first layer with parameters that has children beside it is live already."""
    return is_live(next(module.children(), module))
