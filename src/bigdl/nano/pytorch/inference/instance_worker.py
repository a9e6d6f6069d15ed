"""Inside a worker process of ``to_multi_instance``: the model as it is opened and called there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigdl.nano.accelerators.torch_modules import freeze
from bigdl.nano.pytorch.export.binding import as_call
from bigdl.nano.pytorch.inference import storage
from bigdl.nano.pytorch.inference.accelerated import AcceleratedModule
from bigdl.nano.pytorch.inference.trial import Shipped

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bigdl.nano.accelerators.base import Compiled, Spec
    from bigdl.nano.pytorch.export.binding import Interface
    from bigdl.nano.pytorch.inference.shared_model import SharedObject

__all__ = ["FromFolder", "FromMemory", "Parts"]


@dataclass(frozen=True)
class Parts:
    """An accelerated model that runs the user's own code, taken apart so that it can travel."""

    compiled: Compiled
    interface: Interface
    spec: Spec
    name: str
    accelerator: str

    def together(self) -> nn.Module:
        return AcceleratedModule(
            self.compiled, self.interface, self.spec, name=self.name, accelerator=self.accelerator
        )


@dataclass(frozen=True)
class FromMemory:
    """Opens a model that lies in memory that all instances share.

    Args:
        shared: A module, ``Parts`` of one, or a compiled program's file.
    """

    shared: SharedObject

    def __call__(self) -> Callable[[Any], Any]:
        _use_all_cores()
        found = self.shared()
        if isinstance(found, Parts):
            return _Call(found.together())
        return _Call(freeze(found.open() if isinstance(found, Shipped) else found))


@dataclass(frozen=True)
class FromFolder:
    """Opens a model that was saved in a runtime's own form.

    Args:
        folder: Where it lies.
    """

    folder: Path

    def __call__(self) -> Callable[[Any], Any]:
        _use_all_cores()
        return _Call(storage.load(self.folder, threads=torch.get_num_threads()))


def _use_all_cores() -> None:
    """Give torch, which was loaded before this process was made, the threads that are its own."""
    import os

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


class _Call:
    """A model, called with inputs as they travel."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, inputs: Any) -> Any:
        args, kwargs = as_call(inputs)
        with torch.no_grad():
            return self._model(*args, **kwargs)
