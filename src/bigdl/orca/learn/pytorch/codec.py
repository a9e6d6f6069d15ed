"""Tensors of PyTorch as bytes and back, by safetensors: nothing is unpickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from bigdl._base.errors import StoredModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TorchCodec"]


class TorchCodec:
    """See ``bigdl.orca.learn.checkpoint.Codec``."""

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    def pack(self, tensors: Mapping[str, Any]) -> bytes:
        """One block of bytes; tensors that share memory are written one by one."""
        apart = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        packed: bytes = safetensors.torch.save(apart)
        return packed

    def unpack(self, content: bytes) -> dict[str, Any]:
        """What was packed.

        Raises:
            StoredModelError: The bytes are no block of tensors.
        """
        try:
            tensors: dict[str, Any] = safetensors.torch.load(content)
        except safetensors.SafetensorError as exc:
            raise StoredModelError(f"These bytes hold no tensors: {exc}") from exc
        return tensors
