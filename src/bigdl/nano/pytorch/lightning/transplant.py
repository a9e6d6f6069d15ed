"""A call's state, from the worker of rank 0 back into the objects of the caller.

What both sides have (modules, parameters, callbacks, optimizers) travels as a number, so that
the caller's objects stay the same and only what they hold changes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.workers import dumps
from bigdl.nano.pytorch.lightning.host import part
from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.processes.parcel import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bigdl.nano.pytorch.processes.parcel import Parcel

__all__ = ["belongings", "generators", "lay_down", "put_back"]

_BaseProgress = part("loops.progress:_BaseProgress")
_CombinedLoader = part("utilities.combined_loader:CombinedLoader")

#: Of a loop, what it has counted and how far it is.
_COUNTS = (int, float, bool, str, type(None), enum.Enum, _BaseProgress)
#: Never taken over: the caller's own trainer stays.
_KEPT = {"_trainer", "_fabric", "trainer"}
_Scheduler = torch.optim.lr_scheduler.LRScheduler


# --- what both sides have ---------------------------------------------------------------------


def belongings(trainer: Any, module: Any) -> list[Any]:
    """The caller's objects whose state comes back, each once; the trainer is the first."""
    found: dict[int, Any] = {id(trainer): trainer}

    def add(*items: Any) -> None:
        for item in items:
            found.setdefault(id(item), item)

    add(*trainer.callbacks, *trainer.loggers, trainer.profiler)
    if module is not None:
        for one in module.modules():
            add(one)
            for value in vars(one).values():
                add(*(item for item in _items(value) if _is_trained_by(item)))
        add(*module.parameters(), *module.buffers())
    return list(found.values())


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, Mapping):
        yield from value.values()
    else:
        yield value


def _is_trained_by(item: Any) -> bool:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    return isinstance(item, (torch.optim.Optimizer, _Scheduler, plateau))


def generators(*loaders: Any) -> list[Any]:
    """Random generators of loaders, datasets and samplers among a call's arguments."""
    owners: list[Any] = []
    queue = list(loaders)
    while queue:
        one = queue.pop(0)
        if isinstance(one, _CombinedLoader):
            queue.append(one.iterables)
        elif isinstance(one, (list, tuple, Mapping)):
            queue.extend(_items(one))
        elif hasattr(one, "__iter__") and not isinstance(one, (str, torch.Tensor)):
            owners += [one, getattr(one, "dataset", None)]
    return streams.generators(*owners)


# --- in the worker ----------------------------------------------------------------------------


def lay_down(
    folder: Path, objects: list[Any], parcel: Parcel, result: Any, drawn: list[Any]
) -> None:
    """Write what the caller is to have.

    Args:
        folder: A new one.
        objects: ``belongings``, as they came here.
        parcel: What came with them.
        result: The call's own value.
        drawn: ``generators``, as they came here.
    """
    numbers = {id(one): number for number, one in enumerate(objects)}

    def known(item: Any) -> Any:
        number = numbers.get(id(item))
        if number is not None:
            return "object", number
        number = parcel.number(item) if type(item) is torch.Tensor else None
        return None if number is None else ("tensor", number)

    trainer = objects[0]
    states = {
        number: state
        for number, one in enumerate(objects)
        if number and (state := _state(one)) is not None
    }
    _drop_what_stays(states, known)
    tensors = {
        number: one.detach() for number, one in enumerate(objects) if isinstance(one, torch.Tensor)
    }
    content = {
        "result": result,
        "tensors": tensors,
        "requires_grad": {number: objects[number].requires_grad for number in tensors},
        "states": states,
        "trainer": _trainer_state(trainer),
        "streams": streams.read(),
        "generators": [streams.read_generator(one) for one in drawn],
    }
    pack(content, folder, known=known)


def _state(item: Any) -> dict[str, Any] | None:
    """What an object holds, as it would be pickled; None if that is no matter of attributes."""
    if isinstance(item, torch.Tensor):
        return None
    try:
        state = item.__getstate__()
    except Exception:  # noqa: BLE001  (the user's own; what came here without it went the same way)
        state = vars(item)
    if not isinstance(state, dict):
        return None
    return {key: value for key, value in state.items() if key not in _KEPT}


def _drop_what_stays(states: dict[int, dict[str, Any]], known: Any) -> None:
    """Leave out attributes that cannot travel: the caller's stay as they are."""
    if _can_travel(states, known):
        return
    for state in states.values():
        if not _can_travel(state, known):
            for name in [name for name, value in state.items() if not _can_travel(value, known)]:
                del state[name]


def _can_travel(value: Any, known: Any) -> bool:
    def outside(item: Any) -> Any:
        # what tensors hold is none of the question
        return known(item) or ("tensor" if type(item) is torch.Tensor else None)

    try:
        dumps(value, outside=outside)
    except Exception:  # noqa: BLE001  (the user's objects: anything may come)
        return False
    return True


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


# --- in the caller ----------------------------------------------------------------------------


def put_back(
    folder: Path, objects: list[Any], tensors: list[torch.Tensor], drawn: list[Any]
) -> Any:
    """Take over what ``lay_down`` wrote; gives the call's own value.

    Args:
        folder: Where it lies.
        objects: ``belongings``.
        tensors: As they were sent.
        drawn: ``generators``.
    """

    def named(name: Any) -> Any:
        kind, number = name
        return objects[number] if kind == "object" else tensors[number]

    content, _ = unpack(folder, named=named)
    with torch.no_grad():
        for number, value in content["tensors"].items():
            mine = objects[number]
            if mine.shape == value.shape and mine.dtype == value.dtype:
                mine.copy_(value)
            else:
                mine.data = value.clone()
            if mine.is_leaf:
                mine.requires_grad_(content["requires_grad"][number])
    for number, state in content["states"].items():
        vars(objects[number]).update(state)
    _take_trainer_state(objects[0], content["trainer"])
    streams.write(content["streams"])
    for generator, state in zip(drawn, content["generators"], strict=True):
        streams.write_generator(generator, state)
    return content["result"]


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
