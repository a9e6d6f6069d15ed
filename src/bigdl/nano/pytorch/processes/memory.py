"""Tensors as they lie in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from bigdl._base.collective import Collective

__all__ = ["broadcast", "copied", "flat", "strided"]


def broadcast(collective: Collective, tensor: torch.Tensor) -> None:
    """Give every worker what ``tensor``, of any dtype, holds on rank 0, in place."""
    if collective.world > 1 and tensor.numel() > 0:
        data = tensor.contiguous()
        collective.broadcast(data.view(-1).view(torch.uint8).numpy())
        if data is not tensor:
            tensor.copy_(data)


def flat(tensor: torch.Tensor) -> torch.Tensor | None:
    """The elements in the order of memory, as a view; None if they have gaps or overlap."""
    if tensor.numel() == 0:
        return tensor.reshape(-1)
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return None
    return tensor.as_strided((tensor.numel(),), (1,))


def strided(elements: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Flat ``elements``, seen with the shape, and order in memory, of ``like``."""
    if flat(like) is None or like.numel() == 0:
        return elements.view(like.shape)
    return elements.as_strided(like.size(), like.stride(), elements.storage_offset())


def copied(state: Any) -> Any:
    """A nest of plain containers with tensors copied."""
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copied(value) for value in state)
    return state.detach().clone() if isinstance(state, torch.Tensor) else state
