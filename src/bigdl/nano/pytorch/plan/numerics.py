"""Candidates that compute the same step in other arithmetic: layout, precision, optimizer.

Knows torch; imports no Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bigdl.nano.accelerators.here import no_bf16
from bigdl.nano.pytorch.plan.candidates import Applied, Candidate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from bigdl.nano.pytorch.plan.candidates import Scene

__all__ = ["Bf16", "ChannelsLast", "FusedOptimizer"]

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def map_tensors(fn: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """``tree`` with ``fn`` applied to each tensor; what is no known nest stays as it is."""
    return pytree.tree_map_only(torch.Tensor, fn, tree)


# --- channels last ----------------------------------------------------------------------------


class ChannelsLast(Candidate):
    """Pictures in channels-last layout, so that convolutions need no reordering.

    Only the batch is laid out anew: convolutions follow the layout of their input, and the
    user's parameters, optimizer state and checkpoints stay as they are.
    """

    name = "channels_last"
    hope = 1.5

    def refuse(self, scene: Scene) -> str | None:
        if not any(isinstance(one, _CONVOLUTIONS) for one in scene.module.modules()):
            return "the model has no 2-D or 3-D convolution"
        if scene.batch is None:  # a plan for any loop: nothing to look at yet
            return None
        pictures = [
            leaf
            for leaf in pytree.tree_leaves(scene.batch)
            if isinstance(leaf, torch.Tensor) and leaf.dim() in _FORMATS
        ]
        if not pictures:
            return "no tensor of the batch has four or five axes"
        if all(leaf.is_contiguous(memory_format=_FORMATS[leaf.dim()]) for leaf in pictures):
            return "the batch is in channels-last layout already"
        return None

    def apply(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scene: Scene,
    ) -> Applied:
        return _ChannelsLast()


class _ChannelsLast(Applied):
    def batch(self, batch: Any) -> Any:
        return map_tensors(_channels_last, batch)

    def output(self, output: Any) -> Any:
        # callbacks may flatten by view(), which needs the layout they know
        return map_tensors(_contiguous, output)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() not in _FORMATS or tensor.layout is not torch.strided:
        return tensor
    return tensor.contiguous(memory_format=_FORMATS[tensor.dim()])


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() not in _FORMATS or tensor.layout is not torch.strided:
        return tensor
    return tensor.contiguous()


# --- bfloat16 ---------------------------------------------------------------------------------


class Bf16(Candidate):
    """Forward and loss under bfloat16 autocast; weights, gradients and updates stay float32."""

    name = "bf16"
    hope = 2.5

    def refuse(self, scene: Scene) -> str | None:
        if "mixed" in scene.precision or torch.is_autocast_enabled(scene.device.type):
            return f"your own precision is {scene.precision} already"
        dtypes = {p.dtype for p in scene.module.parameters() if p.is_floating_point()}
        if not dtypes:
            return "the model has no floating-point parameters"
        if dtypes != {torch.float32}:
            words = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            return f"your parameters are {words}, and your own precision is never lowered"
        if any(parameter.is_complex() for parameter in scene.module.parameters()):
            return "the model has complex parameters"
        return _no_bf16(scene.device)

    def apply(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scene: Scene,
    ) -> Applied:
        return _Bf16(scene.device.type)


class _Bf16(Applied):
    def __init__(self, device: str) -> None:
        self._device = device

    def step(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device, torch.bfloat16)

    def output(self, output: Any) -> Any:
        # NumPy, for one, has no bfloat16: what leaves the step is what callbacks know
        return map_tensors(
            lambda tensor: tensor.float() if tensor.dtype is torch.bfloat16 else tensor, output
        )


def _no_bf16(device: torch.device) -> str | None:
    if device.type == "cpu":
        return no_bf16()
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return f"this {device.type} device has no bf16 arithmetic"


# --- fused optimizer --------------------------------------------------------------------------

#: Optimizers of torch whose step has a fused form behind the flag of a parameter group.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


class FusedOptimizer(Candidate):
    """The optimizer's update in one kernel, by the flag that torch's own optimizers have."""

    name = "fused_optimizer"
    changes_optimizer_only = True
    hope = 1.3

    def refuse(self, scene: Scene) -> str | None:
        if not scene.optimizers:
            return "there is no optimizer"
        if scene.precision == "16-mixed":
            return "the loss scaler of 16-mixed works on the optimizer's own step"
        reasons = [_why_not_fused(optimizer) for optimizer in scene.optimizers]
        return reasons[0] if all(reasons) else None

    def apply(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scene: Scene,
    ) -> Applied:
        return _FusedOptimizer(optimizers)


def _why_not_fused(optimizer: torch.optim.Optimizer) -> str | None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, _FUSED) or not any(
        type(optimizer).step is one.step for one in _FUSED
    ):
        return f"{name} has no fused form"
    groups = optimizer.param_groups
    if all(group.get("fused") for group in groups):
        return f"{name} is fused already"
    if any(group.get("differentiable") for group in groups):
        return f"{name} is differentiable"
    if any(group.get("capturable") for group in groups):
        return f"{name} is capturable"
    parameters = [p for group in groups for p in group["params"] if p.requires_grad]
    if any(not p.is_floating_point() or p.device.type not in ("cpu", "cuda") for p in parameters):
        return f"{name} holds parameters of a kind or on a device without a fused form"
    if any(p.grad is not None and p.grad.is_sparse for p in parameters):
        return f"{name} gets sparse gradients"
    if isinstance(optimizer, torch.optim.Adagrad) and any(p.is_cuda for p in parameters):
        return "Adagrad has no fused form on this device"
    return None


class _FusedOptimizer(Applied):
    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._flipped: list[tuple[torch.optim.Optimizer, dict[str, Any], Any]] = []
        for optimizer in optimizers:
            if _why_not_fused(optimizer) is None:
                for group in optimizer.param_groups:
                    if not group.get("fused"):
                        self._flipped.append((optimizer, group, group.get("fused")))
                        group["fused"] = True
                        _host_steps(optimizer, group, on_device=True)

    def as_users(self, checkpoint: dict[str, Any]) -> None:
        users = {id(group): fused for _, group, fused in self._flipped}
        states = checkpoint.get("optimizer_states", [])
        for optimizer, state in zip(self._optimizers, states, strict=False):
            for group, stored in zip(
                optimizer.param_groups, state.get("param_groups", []), strict=False
            ):
                if id(group) in users:
                    stored["fused"] = users[id(group)]

    def undo(self) -> None:
        flipped, self._flipped = self._flipped, []
        for optimizer, group, fused in flipped:
            group["fused"] = fused
            _host_steps(optimizer, group, on_device=False)


def _host_steps(optimizer: torch.optim.Optimizer, group: dict[str, Any], on_device: bool) -> None:
    """Fused forms count their steps on the parameters' device, the others on the CPU."""
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        step = state.get("step")
        if isinstance(step, torch.Tensor) and parameter.device.type != "cpu":
            state["step"] = step.to(parameter.device if on_device else "cpu")
