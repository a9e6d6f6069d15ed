"""The candidate that compiles the model's forward. Knows torch; imports no Lightning."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

import torch
from torch import nn

from bigdl.nano.pytorch.plan.candidates import Applied, Candidate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bigdl.nano.pytorch.plan.candidates import Scene

__all__ = ["Compile"]


class Compile(Candidate):
    """``torch.compile`` on the modules that the step calls, in place.

    Each gets its compiled call where ``nn.Module`` keeps one, so class, attributes and state
    dict stay, and taking it away is all there is to undo.
    """

    name = "compile"
    hope = 1.3

    def hope_for(self, scene: Scene) -> float:
        # compiled training of convolutions was measured to be no faster: they have kernels of
        # their own, and what compilation fuses around them is little
        convolves = any(isinstance(one, nn.modules.conv._ConvNd) for one in scene.module.modules())
        return 1.05 if convolves else self.hope

    def setup_s(self, scene: Scene) -> float:
        # on two cores; it cannot be broken off, so this is rather too much than too little
        leaves = sum(1 for one in scene.module.modules() if not list(one.children()))
        return 15.0 + 1.5 * leaves

    def refuse(self, scene: Scene) -> str | None:
        if "tensorflow" in sys.modules and "triton" not in sys.modules:
            return "tensorflow is loaded, and loading torch's compiler after it ends the process"
        if scene.device.type == "cpu" and _compiler() is None:
            return "there is no C++ compiler on this machine"
        if sys.platform not in ("linux", "darwin"):
            return f"torch.compile is not used on {sys.platform}"
        if any(one._compiled_call_impl is not None for one in scene.module.modules()) or getattr(
            scene.module, "_compiler_ctx", None
        ):
            return "your model is compiled already"
        if not list(_targets(scene.module)):
            return "the model has no module with parameters to compile"
        if any(isinstance(one, nn.RNNBase) for one in scene.module.modules()):
            return "recurrent layers have their own kernels, which compilation does not better"
        if any(p.is_sparse for p in scene.module.parameters()):
            return "the model has sparse parameters"
        return None

    def apply(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scene: Scene,
    ) -> Applied:
        return _Compiled(list(_targets(module)))


class _Compiled(Applied):
    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        for module in modules:
            # random numbers as in eager mode: the global stream must move as it would
            module._compiled_call_impl = torch.compile(
                module._call_impl, options={"fallback_random": True}
            )

    def undo(self) -> None:
        modules, self._modules = self._modules, []
        for module in modules:
            module.__dict__.pop("_compiled_call_impl", None)


def _targets(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that a step may call and that hold parameters.

    A module with a step of its own is seldom called itself: its children are, and its own
    ``forward`` where it has one.
    """
    if not hasattr(module, "training_step"):
        if next(module.parameters(), None) is not None:
            yield module
        return
    if _has_forward(module):
        yield module
    for child in module.children():
        yield from _called(child)


def _called(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # never called themselves
        for child in module.children():
            yield from _called(child)
    elif next(module.parameters(), None) is not None:
        yield module


def _has_forward(module: nn.Module) -> bool:
    """Whether the user wrote a ``forward`` (a framework's base class may have a dummy)."""
    owner = next(one for one in type(module).__mro__ if "forward" in vars(one))
    return owner is not nn.Module and owner.__module__.split(".")[0] not in (
        "pytorch_lightning",
        "lightning",
    )


def _compiler() -> str | None:
    """The C++ compiler that torch would use."""
    named = os.environ.get("CXX")
    for name in (named, "g++", "clang++", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    return None
