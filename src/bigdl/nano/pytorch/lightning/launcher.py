"""Takes a call of the trainer (fit, validate, test, predict) to worker processes and back."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigdl.nano.pytorch.lightning import transplant
from bigdl.nano.pytorch.lightning.guests import at_home
from bigdl.nano.pytorch.lightning.host import part, pl
from bigdl.nano.pytorch.lightning.predictions import Predicted, joined
from bigdl.nano.pytorch.lightning.summed_logs import unfollow_metrics
from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.processes import belongings
from bigdl.nano.pytorch.processes.launch import launch
from bigdl.nano.pytorch.processes.parcel import pack, unpack
from bigdl.nano.pytorch.processes.place import flags, set_flags, taken, word_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from bigdl._base.environment import ProcessSettings
    from bigdl._base.gang import Ticket
    from bigdl.nano.pytorch.lightning.summed_strategy import SummedStrategy

__all__ = ["WorkersLauncher", "in_processes"]

_StockLauncher = part("strategies.launchers.launcher:_Launcher")
_call_and_handle_interrupt = part("trainer.call:_call_and_handle_interrupt")
_TrainerStatus = part("trainer.states:TrainerStatus")

_PRELOAD = ("bigdl.nano.pytorch.trainer", __name__)
_SENT, _BACK = "sent", "back"


def in_processes(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the trainer that raises what went wrong in the workers, and as it was there.

    Lightning would otherwise take a failure for one of this process, where nothing has begun:
    it would tell the callbacks once more, and tear down what was never set up.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launcher = self.strategy.launcher
        if not isinstance(launcher, WorkersLauncher):
            return method(self, *args, **kwargs)
        result = method(self, *args, **kwargs)
        failure, launcher.failure = launcher.failure, None
        if failure is not None:
            self.state.status = _TrainerStatus.INTERRUPTED
            self.state.stage = None
            raise failure
        return result

    return call


class WorkersLauncher(_StockLauncher):  # type: ignore[misc,valid-type]
    """Runs what Lightning hands it in workers; the caller's objects change when all is done."""

    is_interactive_compatible = True

    def __init__(self) -> None:
        #: What ended the last call, if something did.
        self.failure: BaseException | None = None

    def kill(self, signum: Any) -> None:
        """The workers end with the call that started them."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any, **kwargs: Any) -> Any:
        """Run ``function``, a bound method of ``trainer``, in every worker."""
        try:
            return self._launch(function, args, trainer, kwargs)
        except (Exception, KeyboardInterrupt) as exc:  # noqa: BLE001  (raised by in_processes)
            self.failure = exc
            return [] if trainer.state.fn in ("validate", "test") else None

    def _launch(self, function: Any, args: Any, trainer: Any, kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        module = next((one for one in given if isinstance(one, pl.LightningModule)), None)
        module = trainer.lightning_module if module is None else module
        objects = transplant.belongings(trainer, module)
        drawn = belongings.generators(*given)
        sent: list[torch.Tensor] = []

        def write(folder: Path) -> None:
            call = {
                "objects": objects,
                "call": (function.__name__, args, kwargs),
                "module": module,
                "generators": drawn,
                "streams": streams.read(),
                "flags": flags(),
            }
            sent.extend(pack(call, folder / _SENT))

        def read(folder: Path) -> Any:
            result = transplant.put_back(folder / f"{_BACK}0", objects, sent, drawn)
            if trainer.state.fn == "predict":
                result = joined([result, *_others(folder, trainer.strategy.world_size)])
            return result

        result = launch(trainer.strategy.settings, _serve, write, read, preload=_PRELOAD)
        if module is not None:
            module.trainer = trainer
        return result


def _others(folder: Path, world: int) -> list[Any]:
    return [unpack(folder / f"{_BACK}{rank}")[0] for rank in range(1, world)]


# --- in a worker ------------------------------------------------------------------------------


def _serve(ticket: Ticket, rank: int, process: ProcessSettings, scratch: str) -> None:
    """One worker's whole work."""
    folder = Path(scratch)
    with taken(ticket, rank, process) as collective:
        call, parcel = unpack(folder / _SENT)
        trainer, module = call["objects"][0], call["module"]
        name, args, kwargs = call["call"]
        set_flags(call["flags"])
        streams.write(call["streams"])
        strategy: SummedStrategy = trainer.strategy
        strategy.take(collective, word_of(call["streams"]))
        with at_home([*args, *kwargs.values(), *trainer.callbacks]):
            result = _call_and_handle_interrupt(trainer, getattr(trainer, name), *args, **kwargs)
        if module is not None:
            unfollow_metrics(module)
        if trainer.state.fn == "predict":
            loaders = trainer.predict_loop.num_dataloaders if result else 1
            result = Predicted(loaders=loaders, rows=strategy.predicted, batches=result)
        if rank == 0:
            strategy.leave()
            transplant.lay_down(
                folder / f"{_BACK}0", call["objects"], parcel, result, call["generators"]
            )
        elif trainer.state.fn == "predict":
            pack(result, folder / f"{_BACK}{rank}")
        collective.barrier()  # nobody leaves while others still need the gang
