"""Gradients of a replica's parameters, summed as its options say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigdl.nano.pytorch.processes import gradients
from bigdl.nano.pytorch.processes.gradients import Gradients, Summing

if TYPE_CHECKING:
    import torch

    from bigdl.orca.learn.program import ReplicaContext

__all__ = ["Gradients", "connect_gradients"]


def connect_gradients(
    ctx: ReplicaContext, optimizer: torch.optim.Optimizer, *, averages: bool
) -> Gradients:
    """As ``gradients.connect_gradients``, for the workers and options of ``ctx``."""
    options = ctx.options
    summing = Summing(
        sync=options.sync,
        compress=options.compress,
        averages=averages,
        clip_norm=options.clip_norm,
        clip_value=options.clip_value,
    )
    return gradients.connect_gradients(ctx.collective, optimizer, summing)
