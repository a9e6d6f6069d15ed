"""Plain tensors on their way between processes: their memory beside the pickle, not in it."""

from __future__ import annotations

import pickle
from typing import Any

import torch

__all__ = ["is_plain", "reduced"]


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is nothing but numbers in this machine's memory."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def reduced(item: Any) -> Any:
    """How pickle takes ``item`` apart; ``NotImplemented`` leaves it to torch."""
    if not is_plain(item) or item.requires_grad or vars(item):
        return NotImplemented
    if item.numel() == 0:
        return _empty, (item.dtype, item.shape, item.stride())
    if not torch.ops.aten.is_non_overlapping_and_dense(item):
        item = item.contiguous()
    memory = item.as_strided((item.numel(),), (1,)).view(torch.uint8).numpy()
    return _rebuilt, (pickle.PickleBuffer(memory), item.dtype, item.shape, item.stride())


def _rebuilt(memory: Any, dtype: torch.dtype, shape: Any, stride: Any) -> torch.Tensor:
    if memoryview(memory).readonly:  # it lay in the pickle
        memory = bytearray(memory)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).as_strided(shape, stride)


def _empty(dtype: torch.dtype, shape: Any, stride: Any) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype)
