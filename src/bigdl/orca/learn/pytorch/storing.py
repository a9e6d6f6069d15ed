"""A replica's state as tensors and plain values, and back."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigdl._base.errors import StoredModelError
from bigdl._base.sync import gather_bytes
from bigdl.nano.pytorch.processes.memory import copied

if TYPE_CHECKING:
    from bigdl._base.collective import Collective
    from bigdl.nano.pytorch.processes.streams import Streams
    from bigdl.orca.learn.program import ReplicaContext, State
    from bigdl.orca.learn.pytorch.gradients import Gradients
    from bigdl.orca.learn.pytorch.replica import TorchReplica

__all__ = ["load_into", "load_parts", "state_of"]


def state_of(
    replica: TorchReplica, gradients: Gradients | None, streams: Streams, collective: Collective
) -> State:
    """``model``, ``optimizer``, ``scheduler`` (None if there is none), ``streams`` by rank, and
    the number of ``batches`` of the present epoch.

    Tensors are copies. All workers call it, and all get the same.
    """
    optimizer = None
    if replica.optimizer is not None:
        if gradients is not None:
            streams.keep()  # inside training the process's streams are the replica's
            optimizer = gradients.optimizer_state(replica.optimizer)
        else:
            optimizer = copied(replica.optimizer.state_dict())
    every = gather_bytes(collective, streams.to_bytes())
    return {
        "model": copied(dict(replica.model.state_dict())),
        "optimizer": optimizer,
        "scheduler": None if replica.scheduler is None else _scheduler_state(replica.scheduler),
        "streams": [torch.from_numpy(np.frombuffer(one, np.uint8).copy()) for one in every],
        "batches": replica.batches,
    }


def load_into(
    replica: TorchReplica,
    state: State,
    gradients: Gradients | None,
    streams: Streams,
    ctx: ReplicaContext,
) -> None:
    """Take a state; see ``Replica.load``. A rank that the state does not know starts anew."""
    load_parts(
        state,
        model=replica.model,
        optimizer=replica.optimizer,
        scheduler=replica.scheduler,
        gradients=gradients,
    )
    replica.batches = state.get("batches", 0)
    saved = state.get("streams", [])
    if ctx.rank < len(saved):
        streams.from_bytes(saved[ctx.rank].numpy().tobytes())


def load_parts(
    state: State,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    gradients: Gradients | None = None,
) -> None:
    """Put a state into a model, and what there is of optimizer and scheduler on both sides.

    Raises:
        StoredModelError: It is of another model or optimizer; nothing has changed.
    """
    saved = state.get("optimizer")
    _check_model(model, state["model"])
    if optimizer is not None and saved is not None:
        _check_optimizer(optimizer, saved)
    model.load_state_dict(state["model"])
    if optimizer is not None and saved is not None:
        if gradients is not None:
            gradients.load_optimizer_state(optimizer, saved)
        else:
            optimizer.load_state_dict(copied(saved))
    if scheduler is not None and state.get("scheduler") is not None:
        _load_scheduler(scheduler, state["scheduler"])


def _check_model(model: torch.nn.Module, saved: dict[str, Any]) -> None:
    own = model.state_dict()
    for name in [*own, *saved]:
        if name not in saved or name not in own:
            where, other = (
                ("the model", "the state") if name in own else ("the state", "the model")
            )
            raise StoredModelError(f"{name!r} is in {where} and not in {other}.")
        mine, theirs = own[name], saved[name]
        if isinstance(mine, torch.Tensor) and mine.shape != theirs.shape:
            raise StoredModelError(
                f"{name!r} has shape {tuple(theirs.shape)} in the state and "
                f"{tuple(mine.shape)} in the model."
            )


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    mine = [len(group["params"]) for group in optimizer.state_dict()["param_groups"]]
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    if mine != theirs:
        raise StoredModelError(
            f"The optimizer has groups of {mine} parameters, that of the state of {theirs}."
        )


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    """Its state in plain containers; a Counter becomes a dict."""
    state: dict[str, Any] = _plain(scheduler.state_dict())
    return state


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.generic):
        return value.item()
    return value


def _load_scheduler(scheduler: Any, saved: dict[str, Any]) -> None:
    """Load what was made plain, each value in the kind that the scheduler has now."""
    own = scheduler.state_dict()
    scheduler.load_state_dict({key: _as(own.get(key), value) for key, value in saved.items()})


def _as(own: Any, value: Any) -> Any:
    if isinstance(own, collections.Counter):
        return collections.Counter({int(key): count for key, count in value.items()})
    if isinstance(own, tuple) and isinstance(value, list):
        return tuple(value)
    return _plain(value)
