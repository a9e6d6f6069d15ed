"""What a user of PyTorch trains: model, optimizer, loss, scheduler; instances or creators."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError, NotReadyError
from bigdl.nano.pytorch.processes.streams import Streams
from bigdl.orca.learn.pytorch.lightning import (
    LightningWork,
    check_accelerator,
    check_training,
    is_lightning,
    package_of,
)
from bigdl.orca.learn.pytorch.losses import LossReduction, read_loss
from bigdl.orca.learn.pytorch.metrics import read_metrics
from bigdl.orca.learn.pytorch.schedules import Schedule, is_scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bigdl.orca.learn.checkpoint import Codec
    from bigdl.orca.learn.program import ReplicaContext, State
    from bigdl.orca.learn.pytorch.replica import TorchReplica

__all__ = ["TorchProgram"]


@dataclass(frozen=True, kw_only=True)
class TorchProgram:
    """A model and what trains it. Only training needs optimizer and loss.

    Args:
        model: A module, or ``model(config)``. A LightningModule with steps of its own brings
            optimizer, loss, scheduler and metrics.
        optimizer: One over the model's parameters, or ``optimizer(model, config)``.
        loss: ``loss(output, labels)``; a module of ``torch.nn`` or a function.
        scheduler: One over the optimizer, or ``scheduler(optimizer, config)``.
        scheduler_interval: When it steps: after whole epochs, or after each update.
        loss_reduction: "sum" if the loss is a sum over rows; None = as the loss says, else a mean.
        metrics: One, a list, or a dict with keys of the user's own.
        config: Given to creators.

    Raises:
        ArgumentError: A part is of the wrong kind.
        ConfigError: Parts do not go together.
    """

    model: torch.nn.Module | Callable[[dict[str, Any]], torch.nn.Module]
    optimizer: Any = None
    loss: Any = None
    scheduler: Any = None
    scheduler_interval: Literal["epoch", "step"] = "epoch"
    loss_reduction: LossReduction = None
    metrics: Any = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_kind("model", self.model, torch.nn.Module, "(config)")
        if self.optimizer is not None:
            _check_kind("optimizer", self.optimizer, torch.optim.Optimizer, "(model, config)")
        if isinstance(self.optimizer, torch.optim.Optimizer):
            if not isinstance(self.model, torch.nn.Module):
                raise ConfigError(
                    "The optimizer is an instance but the model a function, so it holds other "
                    "parameters. Give a function of (model, config) as the optimizer."
                )
            check_optimizer(self.optimizer, self.model)
        if self.scheduler is not None and not is_scheduler(self.scheduler):
            if not callable(self.scheduler):
                raise ArgumentError(
                    "scheduler has to be one of torch.optim.lr_scheduler or a function of "
                    f"(optimizer, config), not {shown(self.scheduler)}."
                )
        elif self.scheduler is not None and self.scheduler.optimizer is not self.optimizer:
            raise ConfigError("The scheduler is of another optimizer than the one given.")
        if self.scheduler_interval not in ("epoch", "step"):
            raise ConfigError(
                f'scheduler_interval={self.scheduler_interval!r}: need "epoch" or "step".'
            )
        if self.loss is not None:
            read_loss(self.loss, self.loss_reduction)
        read_metrics(self.metrics)
        if is_lightning(self.model):
            self._check_alone()

    def _check_alone(self) -> None:
        """A LightningModule comes without parts that are its own work."""
        names = ("optimizer", "loss", "scheduler", "metrics")
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            raise ConfigError(
                f"{', '.join(f'{name}=' for name in given)} beside a LightningModule, which "
                "brings its own steps: configure_optimizers(), the losses that its steps return, "
                "and what they self.log(). Give the module alone."
            )

    @property
    def preload(self) -> tuple[str, ...]:
        """What a worker has loaded before the program arrives."""
        lightning = [package_of(self.model)] if is_lightning(self.model) else []
        return ("torch", "bigdl.orca.learn.pytorch.replica", *lightning)

    def check_training(self) -> None:
        """Refuse here what training would refuse; see ``Program.check_training``."""
        if is_lightning(self.model):
            check_training(self.model)
            return
        lacking = [name for name in ("optimizer", "loss") if getattr(self, name) is None]
        if lacking and isinstance(self.model, torch.nn.Module):
            raise NotReadyError(
                f"Training needs {' and '.join(lacking)}: give "
                f"{' and '.join(f'{name}=' for name in lacking)} where the model is given."
            )

    def check_acceleration(self, asked: Any) -> str:
        """As ``Program.check_acceleration``: "off", "auto" or a plan."""
        if isinstance(asked, str) and asked == "off":
            return asked
        from bigdl.orca.learn.pytorch.acceleration import check_acceleration

        return check_acceleration(asked, is_lightning=is_lightning(self.model))

    def check_accelerator(self) -> None:
        """Refuse a model that no accelerator can stand for."""
        check_accelerator(self.model)

    @property
    def codec(self) -> Codec:
        """Safetensors."""
        from bigdl.orca.learn.pytorch.codec import TorchCodec

        return TorchCodec()

    def build(self, ctx: ReplicaContext) -> TorchReplica:
        """Make this worker's replica; all workers do it at the same time.

        What creators make is made from the same random streams on every worker, and the
        weights are rank 0's.
        """
        with Streams(ctx.seed).drawn():
            model = self.model
            if not isinstance(model, torch.nn.Module):
                model = _made("model", model(dict(self.config)), torch.nn.Module)
            replica = (self._lightning if is_lightning(model) else self._plain)(ctx, model)
        if model is not self.model:
            replica.equalize()
        return replica

    def _plain(self, ctx: ReplicaContext, model: torch.nn.Module) -> TorchReplica:
        from bigdl.orca.learn.pytorch.replica import TorchReplica
        from bigdl.orca.learn.pytorch.work import PlainWork

        config, optimizer, scheduler = dict(self.config), self.optimizer, self.scheduler
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = _made("optimizer", optimizer(model, config), torch.optim.Optimizer)
            check_optimizer(optimizer, model)
        if scheduler is not None and not is_scheduler(scheduler):
            scheduler = scheduler(optimizer, config)
            if not is_scheduler(scheduler):
                raise ConfigError(f"The scheduler's function gave {shown(scheduler)}.")
        return TorchReplica(
            ctx=ctx,
            model=model,
            optimizer=optimizer,
            schedule=None if scheduler is None else Schedule(scheduler, self.scheduler_interval),
            work=PlainWork(
                model,
                None if self.loss is None else read_loss(self.loss, self.loss_reduction),
                read_metrics(self.metrics),
                ctx.options.precision,
            ),
        )

    def _lightning(self, ctx: ReplicaContext, model: Any) -> TorchReplica:
        from bigdl.orca.learn.pytorch.replica import TorchReplica

        self._check_alone()
        work = LightningWork(
            model,
            rank=ctx.rank,
            world=ctx.world,
            averages=self.loss_reduction != "sum",
            precision=ctx.options.precision,
        )
        optimizer = schedule = None
        if ctx.trains:
            check_training(model)
            work.set_up("fit")
            optimizer, schedule = work.configure()
            check_optimizer(optimizer, model)
        return TorchReplica(
            ctx=ctx, model=model, optimizer=optimizer, schedule=schedule, work=work
        )

    def model_of(self, state: State | None) -> torch.nn.Module:
        """The trained model: the user's own instance, or a new one of the user's function.

        Args:
            state: What the new one gets, if there is one; an instance has it from ``take``.
        """
        if isinstance(self.model, torch.nn.Module):
            return self.model
        return self._new_model() if state is None else self.take(state)

    def _new_model(self) -> torch.nn.Module:
        assert not isinstance(self.model, torch.nn.Module)
        with Streams(0).drawn():
            made: torch.nn.Module = _made("model", self.model(dict(self.config)), torch.nn.Module)
        return made

    def refreshed(self, state: State) -> State:
        """``state`` with what the user's own objects hold now: they may have been changed."""
        now = dict(state)
        if isinstance(self.model, torch.nn.Module):
            now["model"] = dict(self.model.state_dict())
        if isinstance(self.optimizer, torch.optim.Optimizer):
            now["optimizer"] = self.optimizer.state_dict()
        return now

    def take(self, state: State) -> torch.nn.Module:
        """Put a replica's state into the user's own objects, as far as they are instances.

        Returns:
            The model; where the user gave a function, a new one that it made.

        Raises:
            StoredModelError: The state is of another model; nothing has changed.
        """
        from bigdl.orca.learn.pytorch.storing import load_parts

        model = self.model_of(None)
        is_built = isinstance(self.optimizer, torch.optim.Optimizer)
        load_parts(
            state,
            model=model,
            optimizer=self.optimizer if is_built else None,
            scheduler=self.scheduler if is_scheduler(self.scheduler) else None,
        )
        return model


def _check_kind(name: str, value: Any, kind: type, arguments: str) -> None:
    if isinstance(value, kind):
        return
    if not callable(value):
        raise ArgumentError(
            f"{name} has to be a {kind.__name__} or a function of {arguments}, not {shown(value)}."
        )
    wanted = arguments.count(",") + 1
    try:
        inspect.signature(value).bind(*range(wanted))
    except TypeError as exc:
        raise ArgumentError(
            f"{name} is a function that cannot be called with {arguments}: {exc}. Give an "
            f"instance, or a function of {arguments}."
        ) from None
    except ValueError:
        return  # built in: nobody knows its parameters


def _made(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(
            f"The function given as {name} returned {shown(value)}: need a {kind.__name__}."
        )
    return value


def check_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS evaluates the model many times in a step, which workers cannot do together. "
            "Use an optimizer that needs no closure."
        )
    known = {id(parameter) for parameter in model.parameters()}
    foreign = sum(
        id(parameter) not in known
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    if foreign:
        raise ConfigError(
            f"The optimizer holds {foreign} parameters that are not the model's. Make it from "
            "model.parameters() of this very model."
        )
