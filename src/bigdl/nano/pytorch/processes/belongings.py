"""What a call's objects hold, from the worker of rank 0 back into the objects of the caller.

What both sides have (modules, parameters, optimizers) travels as a number, so that the caller's
objects stay the same and only what they hold changes. Knows torch; imports no Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.workers import dumps
from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.processes.parcel import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from bigdl.nano.pytorch.processes.parcel import Parcel

__all__ = ["generators", "is_trained_by", "items", "lay_down", "of_module", "put_back"]

_Scheduler = torch.optim.lr_scheduler.LRScheduler


# --- what both sides have ---------------------------------------------------------------------


def of_module(module: torch.nn.Module) -> Iterator[Any]:
    """Its submodules, parameters and buffers, and the optimizers and schedulers they hold."""
    for one in module.modules():
        yield one
        for value in vars(one).values():
            yield from (item for item in items(value) if is_trained_by(item))
    yield from module.parameters()
    yield from module.buffers()


def items(value: Any) -> Iterator[Any]:
    """What a container holds; what is none, itself."""
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, Mapping):
        yield from value.values()
    else:
        yield value


def is_trained_by(item: Any) -> bool:
    """Whether it is an optimizer or a scheduler."""
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    return isinstance(item, (torch.optim.Optimizer, _Scheduler, plateau))


def generators(*loaders: Any) -> list[Any]:
    """Random generators of loaders, datasets and samplers among a call's arguments."""
    owners: list[Any] = []
    queue = list(loaders)
    while queue:
        one = queue.pop(0)
        if hasattr(one, "iterables"):  # Lightning's loader of loaders
            queue.append(one.iterables)
        elif isinstance(one, (list, tuple, Mapping)):
            queue.extend(items(one))
        elif hasattr(one, "__iter__") and not isinstance(one, (str, torch.Tensor)):
            owners += [one, getattr(one, "dataset", None)]
    return streams.generators(*owners)


# --- in the worker ----------------------------------------------------------------------------


def lay_down(
    folder: Path,
    objects: list[Any],
    parcel: Parcel,
    content: dict[str, Any],
    drawn: list[Any],
    *,
    stays: Collection[str] = (),
    skip: int = 0,
) -> None:
    """Write what the caller is to have.

    Args:
        folder: A new one.
        objects: What both sides have, as it came here.
        parcel: What came with them.
        content: The call's own: its result, say.
        drawn: ``generators``, as they came here.
        stays: Attributes that are never taken over.
        skip: So many of the first objects keep all of theirs.
    """
    numbers = {id(one): number for number, one in enumerate(objects)}

    def known(item: Any) -> Any:
        number = numbers.get(id(item))
        if number is not None:
            return "object", number
        number = parcel.number(item) if type(item) is torch.Tensor else None
        return None if number is None else ("tensor", number)

    states = {
        number: state
        for number, one in enumerate(objects)
        if number >= skip and (state := _state(one, stays)) is not None
    }
    _drop_what_stays(states, known)
    tensors = {
        number: one.detach() for number, one in enumerate(objects) if isinstance(one, torch.Tensor)
    }
    whole = {
        "content": content,
        "tensors": tensors,
        "requires_grad": {number: objects[number].requires_grad for number in tensors},
        "states": states,
        "streams": streams.read(),
        "generators": [streams.read_generator(one) for one in drawn],
    }
    pack(whole, folder, known=known)


def _state(item: Any, stays: Collection[str]) -> dict[str, Any] | None:
    """What an object holds, as it would be pickled; None if that is no matter of attributes."""
    if isinstance(item, torch.Tensor):
        return None
    try:
        state = item.__getstate__()
    except Exception:  # noqa: BLE001  (the user's own; what came here without it went the same way)
        state = vars(item)
    if not isinstance(state, dict):
        return None
    return {key: value for key, value in state.items() if key not in stays}


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


# --- in the caller ----------------------------------------------------------------------------


def put_back(
    folder: Path, objects: list[Any], tensors: list[torch.Tensor], drawn: list[Any]
) -> Any:
    """Take over what ``lay_down`` wrote; gives the call's own content.

    Args:
        folder: Where it lies.
        objects: What both sides have.
        tensors: As they were sent.
        drawn: ``generators``.
    """

    def named(name: Any) -> Any:
        kind, number = name
        return objects[number] if kind == "object" else tensors[number]

    whole, _ = unpack(folder, named=named)
    with torch.no_grad():
        for number, value in whole["tensors"].items():
            mine = objects[number]
            if mine.shape == value.shape and mine.dtype == value.dtype:
                mine.copy_(value)
            else:
                mine.data = value.clone()
            if mine.is_leaf:
                mine.requires_grad_(whole["requires_grad"][number])
    for number, state in whole["states"].items():
        vars(objects[number]).update(state)
    streams.write(whole["streams"])
    for generator, state in zip(drawn, whole["generators"], strict=True):
        streams.write_generator(generator, state)
    return whole["content"]
