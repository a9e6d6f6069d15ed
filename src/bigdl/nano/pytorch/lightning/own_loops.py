"""Takes a training loop of the user's own, on Fabric, to worker processes and back."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.errors import ConfigError
from bigdl.nano.pytorch.lightning.host import pl
from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.processes import belongings
from bigdl.nano.pytorch.processes.launch import launch
from bigdl.nano.pytorch.processes.own_loop import LoopLoader, OwnLoop
from bigdl.nano.pytorch.processes.parcel import pack, unpack
from bigdl.nano.pytorch.processes.place import flags, set_flags, taken, word_of
from bigdl.nano.pytorch.processes.telling import Telling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigdl._base.environment import ProcessSettings
    from bigdl._base.gang import Ticket
    from bigdl.nano.pytorch.processes.settings import Settings

__all__ = ["FABRIC", "LoopStrategy", "run_in_processes"]

#: The package of Lightning's Fabric that goes with the trainer's.
FABRIC = "lightning_fabric" if pl.__name__ == "pytorch_lightning" else "lightning.fabric"
_SingleDevice: Any = importlib.import_module(f"{FABRIC}.strategies").SingleDeviceStrategy
_PRELOAD = ("bigdl.nano.pytorch.torch_nano", __name__)
_SENT, _BACK = "sent", "back"
#: Attributes that are never taken over: a module's link to the one that runs it.
_KEPT = {"_trainer", "_fabric", "trainer"}


class LoopStrategy(Telling, _SingleDevice):  # type: ignore[misc]
    """Fabric's strategy in one CPU process of several.

    Args:
        loop: What the processes share.
    """

    def __init__(self, loop: OwnLoop) -> None:
        super().__init__("cpu")
        self._loop = loop
        self.collective = loop.collective
        self.global_rank = self.local_rank = loop.collective.rank
        self.world_size = loop.collective.world

    @property
    def is_global_zero(self) -> bool:
        return bool(self.global_rank == 0)

    def all_reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return self.reduce(tensor, *args, **kwargs)

    def process_dataloader(self, dataloader: Any) -> Any:
        return LoopLoader(dataloader, self._loop)

    def setup_module(self, module: torch.nn.Module) -> Any:
        self._loop.add_module(module)
        return super().setup_module(module)

    def setup_optimizer(self, optimizer: Any) -> Any:
        self._loop.add_optimizer(optimizer)
        return super().setup_optimizer(optimizer)


def run_in_processes(
    settings: Settings, fabric: Any, function: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Run ``function(fabric, *args, **kwargs)`` in each of several workers; rank 0's value.

    Modules and optimizers among the arguments, and in the attributes of ``fabric``, hold
    afterwards what they hold in rank 0.

    Args:
        settings: How the processes run.
        fabric: Travels; has ``attributes()``, and ``enter(loop)`` for a worker.
        function: Travels too.
        args: Its arguments.
        kwargs: Its arguments.

    Raises:
        ConfigError: Something cannot be sent there or back.
        WorkerLostError: A worker died.
        Exception: What the loop raised, as its own type.
    """
    given = [args, kwargs, fabric.attributes()]
    objects = _objects(fabric, given)
    drawn = belongings.generators(*given)
    sent: list[torch.Tensor] = []

    def write(folder: Path) -> None:
        call = {
            "objects": objects,
            "call": (function, args, kwargs),
            "generators": drawn,
            "streams": streams.read(),
            "flags": flags(),
        }
        sent.extend(pack(call, folder / _SENT))

    def read(folder: Path) -> Any:
        return belongings.put_back(folder / _BACK, objects, sent, drawn)

    content = launch(settings, _serve, write, read, preload=_PRELOAD)
    vars(fabric).update(content["attributes"])
    return content["result"]


def _objects(fabric: Any, given: list[Any]) -> list[Any]:
    """What both sides have, each once; ``fabric`` is the first."""
    found: dict[int, Any] = {id(fabric): fabric}
    for item in _flat(given):
        if isinstance(item, torch.nn.Module):
            parts = belongings.of_module(item)
        elif isinstance(item, torch.optim.Optimizer):
            groups = item.param_groups
            parts = iter([item, *(p for group in groups for p in group["params"])])
        elif belongings.is_trained_by(item):
            parts = iter([item])
        else:
            continue
        for one in parts:
            found.setdefault(id(one), one)
    return list(found.values())


def _flat(value: Any) -> Iterator[Any]:
    """What nests of lists, tuples and dicts hold."""
    if isinstance(value, (list, tuple, Mapping)):
        for item in belongings.items(value):
            yield from _flat(item)
    else:
        yield value


# --- in a worker ------------------------------------------------------------------------------


def _serve(ticket: Ticket, rank: int, process: ProcessSettings, scratch: str) -> None:
    """One worker's whole work."""
    folder = Path(scratch)
    with taken(ticket, rank, process) as collective:
        call, parcel = unpack(folder / _SENT)
        fabric = call["objects"][0]
        function, args, kwargs = call["call"]
        set_flags(call["flags"])
        streams.write(call["streams"])
        loop = OwnLoop(collective, word_of(call["streams"]))
        fabric.enter(loop)
        result = function(fabric, *args, **kwargs)
        loop.finish()
        if rank == 0:
            content = {"result": result, "attributes": fabric.attributes()}
            try:
                belongings.lay_down(
                    folder / _BACK,
                    call["objects"],
                    parcel,
                    content,
                    call["generators"],
                    stays=_KEPT,
                    skip=1,
                )
            except (TypeError, AttributeError, pickle.PicklingError) as exc:
                raise ConfigError(
                    f"What your loop gave back cannot be sent: {type(exc).__name__}: {exc}. "
                    "Give back numbers, texts, tensors and containers of them."
                ) from exc
        collective.barrier()  # nobody leaves while others still need the gang
