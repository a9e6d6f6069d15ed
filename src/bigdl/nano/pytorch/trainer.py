"""Lightning's Trainer that makes its own training step faster, and says how and why."""

from __future__ import annotations

import inspect
import logging
import warnings
from typing import TYPE_CHECKING, Any, Literal

from bigdl._base.calls import answers
from bigdl._base.errors import ArgumentError, ConfigError
from bigdl._base.registry import nearest
from bigdl.nano.pytorch import old_names
from bigdl.nano.pytorch.guard import Guard
from bigdl.nano.pytorch.inference.onnx_mode import add_onnx_mode
from bigdl.nano.pytorch.inference.optimizer import InferenceOptimizer
from bigdl.nano.pytorch.lightning.guests import at_home, receiving
from bigdl.nano.pytorch.lightning.host import part, pl
from bigdl.nano.pytorch.lightning.launcher import WorkersLauncher, in_processes
from bigdl.nano.pytorch.lightning.resume import install
from bigdl.nano.pytorch.lightning.session import Session
from bigdl.nano.pytorch.lightning.summed_loops import install_parts
from bigdl.nano.pytorch.lightning.summed_strategy import SummedStrategy
from bigdl.nano.pytorch.module import CompiledModule, compiled
from bigdl.nano.pytorch.plan.candidates import NAMES
from bigdl.nano.pytorch.plan.plan import Plan, Row
from bigdl.nano.pytorch.processes.settings import check_settings
from bigdl.nano.pytorch.trainer_names import COMPILE, TRAINER

if TYPE_CHECKING:
    import torch

    from bigdl.nano.pytorch.processes.settings import Settings

__all__ = ["Trainer"]

_log = logging.getLogger(__name__)

_StockTrainer: Any = pl.Trainer
_defaults_from_env_vars = part("utilities.argparse:_defaults_from_env_vars")


class Trainer(_StockTrainer):  # type: ignore[misc]
    """Lightning's Trainer: every argument of Lightning's, and some more.

    With ``acceleration="auto"`` the first steps of ``fit`` are timed, faster forms of the step
    are tried on copies of model and optimizers, and what is faster and close enough stays in
    force until the run ends. ``trainer.plan`` prints what was tried. The model's parameters,
    attributes, checkpoints, loggers and random streams are what stock Lightning makes them.

    With ``num_processes=N``, ``fit``, ``validate``, ``test`` and ``predict`` run in N worker
    processes of this machine, which share each of your batches; the numbers are those of one
    process, and your objects hold afterwards what they would hold then.

    Args:
        acceleration: "auto"; "off": stock Lightning; or a ``Plan`` to put in force as it is,
            without measuring anything.
        guard: How far a faster step may stray from your own.
        num_processes: Processes that share each batch.
        distributed_backend: "subprocess" forks workers from one fresh interpreter that has
            loaded the libraries; "spawn" starts an interpreter for each. Neither needs a guard
            of the main module.
        cpu_for_each_process: The cores of each process; by default equal parts of all.
        auto_lr: Raise learning rates to rate x processes over the first tenth of the run.
        sync: "allreduce"; or "sharded": each process holds a slice of the optimizer's state.
        **lightning: Lightning's own arguments.

    Raises:
        ArgumentError: An argument is unknown or of another kind; the text has the right name.
        ConfigError: A value cannot be, or contradicts another: ``num_processes=`` and
            Lightning's ``devices=``.
    """

    def __init__(
        self,
        *,
        acceleration: Literal["auto", "off"] | Plan = "auto",
        guard: Guard = Guard(),  # noqa: B008  (frozen)
        num_processes: int = 1,
        distributed_backend: Literal["subprocess", "spawn"] = "subprocess",
        cpu_for_each_process: list[list[int]] | None = None,
        auto_lr: bool = False,
        sync: Literal["allreduce", "sharded"] = "allreduce",
        **lightning: Any,
    ) -> None:
        _check_values(acceleration, guard)
        settings = check_settings(
            num_processes, distributed_backend, cpu_for_each_process, auto_lr, sync
        )
        if settings.world > 1:
            _check_shared(settings, acceleration)
            lightning |= _in_processes(settings, lightning)
        self._acceleration = acceleration
        self._guard = guard
        self._plan: Plan | None = None
        self._plan_key: str | None = None
        self._kept_plan: tuple[str, Plan] | None = None
        self._session: Session | None = None
        self._given_epochs: int | None = lightning.get("max_epochs")
        # the variables of the environment have been read: not once more, with our names
        callbacks = lightning.get("callbacks") or []
        with at_home(callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]):
            _StockTrainer.__init__.__wrapped__(self, **lightning)
        install(self)
        if settings.world > 1:
            install_parts(self)

    fit = receiving(in_processes(_StockTrainer.fit))
    validate = receiving(in_processes(_StockTrainer.validate))
    test = receiving(in_processes(_StockTrainer.test))
    predict = receiving(in_processes(_StockTrainer.predict))

    @property
    def plan(self) -> Plan | None:
        """What the last ``fit`` tried and chose; None before, and until it has decided."""
        return self._plan if self._session is None else self._session.plan

    def _run(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, CompiledModule):
            return super()._run(model, *args, **kwargs)
        with warnings.catch_warnings():
            # its steps are ours: nobody forgot a loader for one
            warnings.filterwarnings("ignore", "You defined a `validation_step` but have no")
            return super()._run(model, *args, **kwargs)

    def _run_stage(self) -> Any:
        if not self.training:
            return super()._run_stage()
        shared = isinstance(self.strategy, SummedStrategy)
        session = Session(
            self,
            "off" if shared else self._acceleration,
            self._guard,
            kept=self._kept_plan,
            epochs=self._given_epochs,
        )
        self._session = session
        try:
            session.begin()
            return super()._run_stage()
        finally:
            session.end()
            self._plan, self._plan_key = session.plan, session.key
            if shared and self._acceleration == "auto":
                self._plan = _nothing_tried(self.strategy.settings)
            self._session = self._kept_plan = None

    # --- in checkpoints ---

    def _plan_in_words(self) -> dict[str, str] | None:
        """The plan as plain values, if there is one that may serve again."""
        plan = self.plan
        key = self._plan_key if self._session is None else self._session.key
        return None if plan is None or key is None else {"key": key, "json": plan.to_json()}

    def _keep_plan(self, words: dict[str, str] | None) -> None:
        """Take a plan out of a checkpoint, for the run that begins; one of another version's
        form is no reason not to resume.
        """
        self._kept_plan = None
        if words is None or self._acceleration != "auto":
            return
        try:
            self._kept_plan = words["key"], Plan.from_json(words["json"])
        except (ArgumentError, ConfigError, KeyError, TypeError) as exc:
            _log.info("the checkpoint's plan cannot be read and is made anew: %s", exc)

    # --- to the inference side ---

    @staticmethod
    @answers(COMPILE)
    def compile(
        model: torch.nn.Module,
        loss: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        metrics: list[Any] | dict[str, Any] | None = None,
    ) -> Any:
        """A LightningModule that trains ``model`` on batches of ``(*inputs, target)``.

        It logs ``train_loss``, ``val_loss`` and ``val_<metric>``. The module and optimizer given
        are the ones trained.

        Args:
            model: A plain module; a LightningModule is given back as it is.
            loss: ``loss(output, target)``; needed to train and to validate.
            optimizer: An optimizer of the model's parameters; needed to train.
            scheduler: A scheduler of that optimizer; it steps after each epoch.
            metrics: torchmetrics' metrics or functions ``(output, target)``; a list is named by
                class or function, a dict by its keys.

        Raises:
            ArgumentError: An argument is of another kind.
            ConfigError: The optimizer holds none of the model's parameters, or the scheduler
                is not one of this optimizer.
        """
        return compiled(model, loss, optimizer, scheduler, metrics)

    trace = staticmethod(InferenceOptimizer.trace)
    save = staticmethod(InferenceOptimizer.save)
    load = staticmethod(InferenceOptimizer.load)

    @staticmethod
    @answers(old_names.QUANTIZE)
    def quantize(
        model: torch.nn.Module,
        precision: Literal["int8", "bf16"] = "int8",
        accelerator: str | None = None,
        *,
        calib_data: Any = None,
        validation_data: Any = None,
        metric: Any = None,
        accuracy_criterion: Any = None,
        direction: Literal["maximize", "minimize"] = "maximize",
        input_sample: Any = None,
        config: Any = None,
        onnx: bool = False,
    ) -> torch.nn.Module:
        """``InferenceOptimizer.quantize``; with ``onnx=True`` the paper's Fig. 3.

        All arguments but ``onnx`` are those of ``InferenceOptimizer.quantize``.

        Args:
            model: With ``onnx=True`` it is given back itself, with ``eval_onnx`` and
                ``exit_onnx`` added.
            onnx: An int8 session of ONNX Runtime that the model itself can run as.

        Raises:
            ConfigError: ``onnx=True`` beside another precision or accelerator.
        """
        if not isinstance(onnx, bool):
            raise ArgumentError(
                f"Trainer.quantize(onnx=…) takes True or False, not {type(onnx).__name__}."
            )
        quantizing: dict[str, Any] = {
            "calib_data": calib_data,
            "validation_data": validation_data,
            "metric": metric,
            "accuracy_criterion": accuracy_criterion,
            "direction": direction,
            "input_sample": input_sample,
            "config": config,
        }
        if not onnx:
            return InferenceOptimizer.quantize(model, precision, accelerator, **quantizing)
        if accelerator not in (None, "onnxruntime") or precision != "int8":
            raise ConfigError(
                "Trainer.quantize(onnx=True) makes an int8 session of ONNX Runtime; "
                f"precision={precision!r} with accelerator={accelerator!r} contradicts that."
            )
        return add_onnx_mode(model, **quantizing)


def _lightning_parameters() -> list[inspect.Parameter]:
    parameters = inspect.signature(_StockTrainer.__init__).parameters.values()
    return [one for one in parameters if one.name != "self"]


def _check_values(acceleration: Any, guard: Any) -> None:
    if isinstance(acceleration, str):
        if acceleration not in ("auto", "off"):
            raise ConfigError(
                f"Trainer(acceleration={acceleration!r}) cannot be used: have 'auto', 'off' or a "
                f"Plan.{nearest(acceleration, ('auto', 'off'))}"
            )
    elif not isinstance(acceleration, Plan):
        raise ArgumentError(
            "Trainer(acceleration=…) takes 'auto', 'off' or a Plan, not "
            f"{type(acceleration).__name__}."
        )
    if not isinstance(guard, Guard):
        raise ArgumentError(f"Trainer(guard=…) takes a Guard, not {type(guard).__name__}.")


def _check_shared(settings: Settings, acceleration: Any) -> None:
    """Refuse a plan where several processes would have to follow it alike."""
    if isinstance(acceleration, Plan) and acceleration.chosen:
        raise ConfigError(
            f"Trainer(num_processes={settings.world}, acceleration=Plan) cannot be: a plan is for "
            f"one process, and this one chooses {', '.join(acceleration.chosen)}. Leave out one "
            "of them."
        )


def _nothing_tried(settings: Settings) -> Plan:
    """The plan of a run in several processes: yours is kept."""
    reason = "a plan is made in one process, and num_processes= trains in several"
    rows = {name: Row(name=name, status="skipped", reason=reason) for name in NAMES}
    rows["processes"] = Row(
        name="processes",
        status="skipped",
        reason=f"yours are kept: num_processes={settings.world}",
    )
    return Plan((Row(name="original", status="chosen"), *rows.values()))


def _in_processes(settings: Settings, lightning: dict[str, Any]) -> dict[str, Any]:
    """Lightning's arguments for several processes of ours.

    Raises:
        ConfigError: The user's own contradict that.
    """
    defaults = {one.name: one.default for one in _lightning_parameters()}
    for name in ("devices", "strategy", "num_nodes"):
        value = lightning.get(name, defaults[name])
        if value not in ("auto", 1):
            raise ConfigError(
                f"Trainer(num_processes={settings.world}, {name}={value!r}) contradict each "
                "other: num_processes= divides each of your batches among processes of ours; "
                "devices= and strategy= start Lightning's, which each train on batches of their "
                "own. Give one of them."
            )
    accelerator = lightning.get("accelerator", "auto")
    if accelerator not in ("auto", "cpu"):
        raise ConfigError(
            f"Trainer(num_processes={settings.world}, accelerator={accelerator!r}) cannot be: "
            "num_processes= is for CPU cores. Use Lightning's devices= for several others."
        )
    strategy = SummedStrategy(settings)
    strategy._launcher = WorkersLauncher()
    return {"accelerator": "cpu", "devices": 1, "strategy": strategy}


def _full_signature() -> inspect.Signature:
    """Ours and Lightning's parameters, as command lines and editors should see them."""
    own = inspect.signature(Trainer.__init__)
    ours = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
    return own.replace(parameters=[*ours, *_lightning_parameters()])


_init: Any = Trainer.__init__
_init.__signature__ = _full_signature()
_init.__qualname__ = "Trainer"
_init = answers(TRAINER)(_defaults_from_env_vars(_init))
Trainer.__init__ = _init  # type: ignore[method-assign]
