"""A call's state, from the worker of rank 0 back into the trainer and objects of the caller."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from bigdl.nano.pytorch.lightning.host import part
from bigdl.nano.pytorch.processes import belongings as holdings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from bigdl.nano.pytorch.processes.parcel import Parcel

__all__ = ["belongings", "lay_down", "put_back"]

_BaseProgress = part("loops.progress:_BaseProgress")

#: Of a loop, what it has counted and how far it is.
_COUNTS = (int, float, bool, str, type(None), enum.Enum, _BaseProgress)
#: Never taken over: the caller's own trainer stays.
_KEPT = {"_trainer", "_fabric", "trainer"}


def belongings(trainer: Any, module: Any) -> list[Any]:
    """The caller's objects whose state comes back, each once; the trainer is the first."""
    own = [trainer, *trainer.callbacks, *trainer.loggers, trainer.profiler]
    if module is not None:
        own += holdings.of_module(module)
    return list({id(one): one for one in own}.values())


def lay_down(
    folder: Path, objects: list[Any], parcel: Parcel, result: Any, drawn: list[Any]
) -> None:
    """Write what the caller is to have.

    Args:
        folder: A new one.
        objects: ``belongings``, as they came here.
        parcel: What came with them.
        result: The call's own value.
        drawn: Generators of loaders, as they came here.
    """
    content = {"result": result, "trainer": _trainer_state(objects[0])}
    holdings.lay_down(folder, objects, parcel, content, drawn, stays=_KEPT, skip=1)


def put_back(
    folder: Path, objects: list[Any], tensors: list[torch.Tensor], drawn: list[Any]
) -> Any:
    """Take over what ``lay_down`` wrote; gives the call's own value.

    Args:
        folder: Where it lies.
        objects: ``belongings``.
        tensors: As they were sent.
        drawn: Generators of loaders.
    """
    content = holdings.put_back(folder, objects, tensors, drawn)
    _take_trainer_state(objects[0], content["trainer"])
    return content["result"]


def _trainer_state(trainer: Any) -> dict[str, Any]:
    logs = trainer._logger_connector
    return {
        "loops": {path: _counts(loop) for path, loop in _loops(trainer)},
        "metrics": {name: dict(getattr(logs, name)) for name in _METRICS},
        "callbacks": list(trainer.callbacks),
        "optimizers": list(trainer.strategy.optimizers),
        "lr_scheduler_configs": list(trainer.strategy.lr_scheduler_configs),
        "values": {name: getattr(trainer, name) for name in _VALUES if hasattr(trainer, name)},
        "plan": (trainer._plan, trainer._plan_key),
    }


_METRICS = ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics")
_VALUES = ("state", "should_stop", "val_check_batch")


def _loops(trainer: Any) -> Iterator[tuple[str, Any]]:
    epoch_loop = trainer.fit_loop.epoch_loop
    yield "fit", trainer.fit_loop
    yield "fit.epoch", epoch_loop
    yield "fit.epoch.val", epoch_loop.val_loop
    yield "fit.epoch.automatic", epoch_loop.automatic_optimization
    yield "fit.epoch.manual", epoch_loop.manual_optimization
    yield "validate", trainer.validate_loop
    yield "test", trainer.test_loop
    yield "predict", trainer.predict_loop


def _counts(loop: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(loop).items() if isinstance(value, _COUNTS)}


def _take_trainer_state(trainer: Any, state: dict[str, Any]) -> None:
    for path, loop in _loops(trainer):
        vars(loop).update(state["loops"][path])
    for name, metrics in state["metrics"].items():
        setattr(trainer._logger_connector, name, metrics)
    trainer.callbacks = state["callbacks"]
    trainer.strategy.optimizers = state["optimizers"]
    trainer.strategy.lr_scheduler_configs = state["lr_scheduler_configs"]
    for name, value in state["values"].items():
        setattr(trainer, name, value)
    trainer._plan, trainer._plan_key = state["plan"]
