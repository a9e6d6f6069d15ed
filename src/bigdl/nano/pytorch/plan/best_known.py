"""What experience says of each kind of model: what to try first, what together, for how long."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bigdl.nano.pytorch.plan.candidates import NAMES

__all__ = ["BestKnown", "best_known", "kind_of"]


@dataclass(frozen=True, kw_only=True)
class BestKnown:
    """What experience says of one kind of model.

    Args:
        order: Candidates, the most promising first; the others follow.
        together: Those that are known to help together: tried as one where the run is too
            short to try each.
        share: Share of the planned run that trying them may take.
    """

    order: tuple[str, ...]
    together: tuple[str, ...] = ()
    share: float = 0.1


_KINDS = {
    "convolution": BestKnown(
        order=("frozen_trunk", "channels_last", "bf16", "fused_optimizer", "allocator", "compile"),
        together=("channels_last", "bf16", "fused_optimizer"),
    ),
    "attention": BestKnown(
        order=("frozen_trunk", "bf16", "fused_optimizer", "allocator", "compile"),
        together=("bf16", "fused_optimizer"),
    ),
    "recurrent": BestKnown(
        order=("frozen_trunk", "fused_optimizer", "threads", "bf16", "allocator"), share=0.02
    ),
    # a small table's step is mostly bookkeeping: little to win, so little is spent
    "dense": BestKnown(order=("fused_optimizer", "threads", "allocator", "bf16"), share=0.01),
}
#: Dense models with at least so many weights are worth as much trying as the large kinds.
_LARGE_DENSE = 5_000_000


def kind_of(module: torch.nn.Module) -> str:
    """The kind of a model that decides what is tried first."""
    owners = list(module.modules())
    convolutions = (torch.nn.modules.conv._ConvNd,)
    if any(isinstance(one, convolutions) for one in owners):
        return "convolution"
    if any("attention" in type(one).__name__.lower() for one in owners):
        return "attention"
    if any(isinstance(one, torch.nn.RNNBase) for one in owners):
        return "recurrent"
    return "dense"


def best_known(module: torch.nn.Module) -> BestKnown:
    """What experience says of ``module``."""
    known = _KINDS[kind_of(module)]
    weights = sum(p.numel() for p in module.parameters() if not _is_lazy(p))
    if known is _KINDS["dense"] and weights >= _LARGE_DENSE:
        known = replace(known, share=0.05)
    rest = tuple(name for name in NAMES if name not in known.order)
    return replace(known, order=(*known.order, *rest))


def _is_lazy(parameter: torch.nn.Parameter) -> bool:
    return isinstance(parameter, torch.nn.parameter.UninitializedParameter)
