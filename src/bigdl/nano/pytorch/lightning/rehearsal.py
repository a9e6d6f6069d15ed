"""Lightning's own training step on a copy: its loops and hooks, with another trainer behind.

The copy runs through the very classes that the run uses (optimization loops, strategy,
precision), so hooks, closures, clipping and manual optimization are what they are in the run.
Only the trainer is a stand-in: it answers reads with the run's values, and keeps to itself what
is written, logged or counted.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from bigdl._base import machine
from bigdl.nano.pytorch.lightning.host import part, pl
from bigdl.nano.pytorch.lightning.wiring import Wiring
from bigdl.nano.pytorch.plan.plan import device_of
from bigdl.nano.pytorch.plan.rehearsal import (
    Cast,
    Rehearsal,
    StageError,
    copy_optimizer,
    strip_hooks,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigdl.nano.pytorch.plan.candidates import Scene
    from bigdl.nano.pytorch.plan.plan import InForce

__all__ = ["LightningRehearsal", "no_room_for_copies", "why_not_rehearsed"]

_AutomaticOptimization = part("loops.optimization.automatic:_AutomaticOptimization")
_ManualOptimization = part("loops.optimization.manual:_ManualOptimization")
_SingleDeviceStrategy = part("strategies:SingleDeviceStrategy")
_PassThroughProfiler = part("profilers:PassThroughProfiler")
_DummyLogger = part("loggers.logger:DummyLogger")


def why_not_rehearsed(trainer: Any) -> str | None:
    """Why a run's steps cannot be rehearsed at all, in one sentence; None if they may be."""
    if trainer.world_size > 1 or not isinstance(trainer.strategy, _SingleDeviceStrategy):
        return (
            f"the run goes over {type(trainer.strategy).__name__}; "
            "a plan is made for one device in one process"
        )
    if getattr(trainer.lightning_module, "_compiler_ctx", None):
        return "your model is compiled already"
    return None


def no_room_for_copies(trainer: Any) -> str | None:
    """Why copies would not fit beside the run, in one sentence; None if they do.

    A trial holds two copies of module and optimizer state, and gradients on both.
    """
    module = trainer.lightning_module
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [p for p in module.parameters() if p.requires_grad]  # a gradient each
    for optimizer in trainer.optimizers:
        states = pytree.tree_leaves([dict(state) for state in optimizer.state.values()])
        tensors += [leaf for leaf in states if isinstance(leaf, torch.Tensor)]
    needed = 2 * sum(one.numel() * one.element_size() for one in tensors)
    device = device_of(module)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = machine.available_memory_bytes()
    if free and needed > 0.8 * free:
        return (
            f"two copies of model and optimizer take {needed / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} GiB are free"
        )
    return None


class LightningRehearsal(Rehearsal):
    """Steps of a run, on copies of its module, optimizers and schedulers.

    Args:
        trainer: The run's trainer, inside ``fit``.
        batches: (batch, its index) of steps that the run has taken, copied.
        scene: The run as candidates may look at it.
    """

    def __init__(self, trainer: Any, batches: Sequence[tuple[Any, int]], scene: Scene) -> None:
        super().__init__(batches, scene)
        self._trainer = trainer

    def cast(self) -> Cast:
        return _LightningCast(self._trainer)


class _LightningCast(Cast):
    def __init__(self, trainer: Any) -> None:
        self._stand_in = _StandIn(trainer)
        # whoever keeps the trainer finds the stand-in in its copy
        memo: dict[int, Any] = {id(trainer): self._stand_in}
        module = copy.deepcopy(trainer.lightning_module, memo)
        optimizers = [copy_optimizer(one, memo) for one in trainer.optimizers]
        schedulers = copy.deepcopy(list(trainer.lr_scheduler_configs), memo)
        precision = copy.deepcopy(trainer.precision_plugin, memo)
        strip_hooks(module)
        self.module = module
        self.optimizers = tuple(optimizers)
        self._stand_in._take(module, optimizers, schedulers, precision)
        for one in module.modules():
            if isinstance(one, pl.LightningModule):
                one.log = one.log_dict = _log_nothing  # type: ignore[method-assign]
        module.trainer = self._stand_in
        is_automatic = module.automatic_optimization
        self._loop = (_AutomaticOptimization if is_automatic else _ManualOptimization)(
            self._stand_in
        )
        self._is_automatic = is_automatic
        self._wired: tuple[InForce, Wiring] | None = None

    def perform(self, batch: Any, force: InForce) -> float | None:
        self._wire(force)
        data, index = batch
        kwargs = part("loops.training_epoch_loop:OrderedDict")(batch=data)
        if self._takes_index():
            kwargs["batch_idx"] = index
        if self._is_automatic:
            output = self._loop.run(self._stand_in.optimizers[0], index, kwargs)
        else:
            output = self._loop.run(kwargs)
        loss = output.get("loss")
        return None if loss is None else float(loss)

    def _wire(self, force: InForce) -> None:
        """As in the run, tripwire and all: what it costs is timed."""
        if self._wired is None or self._wired[0] is not force:
            if self._wired is not None:
                self._wired[1].off()
            wiring = Wiring(self._stand_in.strategy, [self._loop], force, _trip)
            wiring.on()
            self._wired = force, wiring

    def _takes_index(self) -> bool:
        return bool(
            part("utilities.signature_utils:is_param_in_hook_signature")(
                self.module.training_step, "batch_idx", min_args=2
            )
        )


def _trip(what: str) -> None:
    raise StageError(f"the {what} is not finite")


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """In a rehearsal nothing is logged."""


class _StandIn:
    """What a copied module finds as its trainer.

    Reads go to the run's trainer unless the copy has its own; writes stay here.
    """

    def __init__(self, trainer: Any) -> None:
        vars(self)["_run"] = trainer

    def _take(
        self, module: Any, optimizers: list[Any], schedulers: list[Any], precision: Any
    ) -> None:
        """Stand before this copy."""
        trainer = vars(self)["_run"]
        strategy = copy.copy(trainer.strategy)
        strategy._lightning_module = module
        strategy._model = module
        strategy._precision_plugin = precision
        strategy.optimizers = optimizers
        strategy.lr_scheduler_configs = schedulers
        loggers = [_DummyLogger() for _ in trainer.loggers]
        vars(self).update(
            strategy=strategy,
            lightning_module=module,
            model=module,
            optimizers=optimizers,
            lr_scheduler_configs=schedulers,
            precision_plugin=precision,
            callbacks=[],
            loggers=loggers,
            logger=loggers[0] if loggers else None,
            profiler=_PassThroughProfiler(),
            should_stop=trainer.should_stop,
            callback_metrics=dict(trainer.callback_metrics),
            logged_metrics=dict(trainer.logged_metrics),
            progress_bar_metrics=dict(trainer.progress_bar_metrics),
            fit_loop=_StandInLoop(trainer.fit_loop),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_run"], name)

    @property
    def __class__(self) -> Any:
        """To ``isinstance`` this is a trainer of the run's kind."""
        return type(vars(self)["_run"])

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("a stand-in keeps its class")


class _StandInLoop:
    """A fit loop in which every step is a whole one: gradients are never only gathered."""

    def __init__(self, loop: Any) -> None:
        self._run = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_run"], name)

    def _should_accumulate(self) -> bool:
        return False
