"""Tensors as they lie in memory."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["copied", "flat", "strided"]


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
