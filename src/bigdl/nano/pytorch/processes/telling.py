"""What the processes of a program tell each other, in the words of Lightning's strategies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.errors import ConfigError
from bigdl.nano.pytorch.processes.exchange import broadcast_value, gather_values
from bigdl.nano.pytorch.processes.memory import broadcast

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bigdl._base.collective import Collective

__all__ = ["Telling"]


class Telling:
    """A strategy's calls on all processes; alone where ``collective`` is None."""

    collective: Collective | None = None

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self.collective is not None:
            self.collective.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self.collective is None else broadcast_value(self.collective, obj, src)

    def reduce(
        self, tensor: Any, group: Any = None, reduce_op: Any = "mean", **kwargs: Any
    ) -> Any:
        """All processes' numbers in one: "mean", "sum", "max" or "min"."""
        if self.collective is None or not isinstance(tensor, torch.Tensor):
            return tensor
        stacked = torch.stack(gather_values(self.collective, tensor.detach()))
        name = str(getattr(reduce_op, "name", reduce_op) or "mean").lower()
        if name in ("mean", "avg"):
            return (stacked if stacked.is_floating_point() else stacked.float()).mean(0)
        made: Any = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}.get(name)
        if made is None:
            raise ConfigError(f"Cannot reduce by {reduce_op!r}: have mean, sum, max, min.")
        return made(stacked, 0)

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> Any:
        if self.collective is None or self.collective.world == 1:
            return tensor
        if sync_grads:
            raise ConfigError(
                "all_gather(sync_grads=True) is not there with num_processes=: gradients do not "
                "travel between processes inside a step. Gather without gradients."
            )
        return torch.stack(gather_values(self.collective, tensor.detach()))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self.collective is None:
            return decision
        agreeing = sum(map(bool, gather_values(self.collective, bool(decision))))
        return agreeing == self.collective.world if all else agreeing > 0

    def share_values(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process what rank 0 has."""
        assert self.collective is not None
        for tensor in tensors:
            broadcast(self.collective, tensor.detach())
