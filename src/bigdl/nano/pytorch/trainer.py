"""Lightning's Trainer that makes its own training step faster, and says how and why."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

from bigdl._base.errors import ArgumentError, ConfigError
from bigdl._base.registry import nearest
from bigdl.nano.pytorch.guard import Guard
from bigdl.nano.pytorch.lightning_host import part, pl
from bigdl.nano.pytorch.lightning_resume import install
from bigdl.nano.pytorch.lightning_session import Session
from bigdl.nano.pytorch.plan import Plan

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["Trainer"]

_StockTrainer = pl.Trainer
_defaults_from_env_vars = part("utilities.argparse:_defaults_from_env_vars")

_SEVERAL = "Training in several processes comes with a later version; Lightning's devices= and "
_SEVERAL += "strategy= keep Lightning's meaning."
_AUTOMATIC = "Trainer tries it by itself and keeps it if it is faster: acceleration='auto'."
# Words of earlier versions of BigDL and of Lightning, and of versions to come.
_ELSEWHERE = {
    "num_processes": _SEVERAL,
    "distributed_backend": _SEVERAL,
    "cpu_for_each_process": _SEVERAL,
    "sync": _SEVERAL,
    "auto_lr": _SEVERAL,
    "use_ipex": _AUTOMATIC,
    "enable_bf16": _AUTOMATIC,
    "channels_last": _AUTOMATIC,
    "use_hpo": "Hyperparameter search comes with a later version.",
    "algorithms": "Pass callbacks=[…].",
    "auto_lr_find": "Use Lightning's Tuner(trainer).lr_find(model), or LearningRateFinder.",
    "auto_scale_batch_size": "Use Lightning's Tuner, or the callback BatchSizeFinder.",
    "checkpoint_callback": "It is enable_checkpointing= now.",
    "flush_logs_every_n_steps": "Configure the logger itself.",
    "gpus": "Use accelerator='gpu', devices=….",
    "tpu_cores": "Use accelerator='tpu', devices=….",
    "ipus": "Use accelerator= and devices=.",
    "progress_bar_refresh_rate": "Pass callbacks=[TQDMProgressBar(refresh_rate=…)].",
    "process_position": "Pass callbacks=[TQDMProgressBar(process_position=…)].",
    "resume_from_checkpoint": "It is an argument of fit now: fit(…, ckpt_path=…).",
    "stochastic_weight_avg": "Pass callbacks=[StochasticWeightAveraging(…)].",
    "terminate_on_nan": "Use detect_anomaly=True.",
    "track_grad_norm": "Log it in on_before_optimizer_step.",
    "weights_save_path": "Use default_root_dir=.",
    "weights_summary": "It is enable_model_summary= now.",
    "multiple_trainloader_mode": "Pass fit a CombinedLoader(loaders, mode).",
    "replace_sampler_ddp": "It is use_distributed_sampler= now.",
    "truncated_bptt_steps": "Use manual optimization.",
}


class Trainer(_StockTrainer):  # type: ignore[misc,valid-type]
    """Lightning's Trainer: every argument of Lightning's, and two more.

    With ``acceleration="auto"`` the first steps of ``fit`` are timed, faster forms of the step
    are tried on copies of model and optimizers, and what is faster and close enough stays in
    force until the run ends. ``trainer.plan`` prints what was tried. The model's parameters,
    attributes, checkpoints, loggers and random streams are what stock Lightning makes them.

    Args:
        acceleration: "auto"; "off": stock Lightning; or a ``Plan`` to put in force as it is,
            without measuring anything.
        guard: How far a faster step may stray from your own.
        **lightning: Lightning's own arguments.

    Raises:
        ArgumentError: An argument is unknown or of another kind; the text has the right name.
        ConfigError: ``acceleration`` is another word.
    """

    @_defaults_from_env_vars
    def __init__(
        self,
        *,
        acceleration: Literal["auto", "off"] | Plan = "auto",
        guard: Guard = Guard(),  # noqa: B008  (frozen)
        **lightning: Any,
    ) -> None:
        _check_names(lightning)
        _check_values(acceleration, guard)
        self._acceleration = acceleration
        self._guard = guard
        self._plan: Plan | None = None
        self._plan_key: str | None = None
        self._kept_plan: tuple[str, Plan] | None = None
        self._session: Session | None = None
        self._given_epochs: int | None = lightning.get("max_epochs")
        # the variables of the environment have been read: not once more, with our names
        _StockTrainer.__init__.__wrapped__(self, **lightning)
        install(self)

    @property
    def plan(self) -> Plan | None:
        """What the last ``fit`` tried and chose; None before, and until it has decided."""
        return self._plan if self._session is None else self._session.plan

    def _run_stage(self) -> Any:
        if not self.training:
            return super()._run_stage()
        session = Session(
            self,
            self._acceleration,
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
            self._session = self._kept_plan = None

    # --- in checkpoints ---

    def _plan_in_words(self) -> dict[str, str] | None:
        """The plan as plain values, if there is one that may serve again."""
        plan = self.plan
        key = self._plan_key if self._session is None else self._session.key
        return None if plan is None or key is None else {"key": key, "json": plan.to_json()}

    def _keep_plan(self, words: dict[str, str] | None) -> None:
        """Take a plan out of a checkpoint, for the run that begins."""
        self._kept_plan = None if words is None else (words["key"], Plan.from_json(words["json"]))

    # --- to the inference side ---

    @staticmethod
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
        from bigdl.nano.pytorch.module import compiled

        return compiled(model, loss, optimizer, scheduler, metrics)

    @staticmethod
    def trace(
        model: torch.nn.Module,
        input_sample: Any = None,
        accelerator: str | None = None,
        *,
        dynamic_axes: Any = True,
        config: Any = None,
    ) -> torch.nn.Module:
        """``InferenceOptimizer.trace``."""
        from bigdl.nano.pytorch.inference import InferenceOptimizer

        return InferenceOptimizer.trace(
            model, input_sample, accelerator, dynamic_axes=dynamic_axes, config=config
        )

    @staticmethod
    def quantize(
        model: torch.nn.Module,
        precision: str = "int8",
        accelerator: str | None = None,
        *,
        calib_data: Any = None,
        validation_data: Any = None,
        metric: Any = None,
        accuracy_criterion: Any = None,
        direction: str = "maximize",
        input_sample: Any = None,
        config: Any = None,
        onnx: bool = False,
    ) -> torch.nn.Module:
        """``InferenceOptimizer.quantize``; with ``onnx=True`` the paper's Fig. 3.

        Args:
            model: The model; with ``onnx=True`` it is given back itself, with ``eval_onnx`` and
                ``exit_onnx`` added.
            onnx: See above. All else: as for ``InferenceOptimizer.quantize``.
        """
        asked = {
            "calib_data": calib_data,
            "validation_data": validation_data,
            "metric": metric,
            "accuracy_criterion": accuracy_criterion,
            "direction": direction,
            "input_sample": input_sample,
            "config": config,
        }
        if not onnx:
            from bigdl.nano.pytorch.inference import InferenceOptimizer

            return InferenceOptimizer.quantize(model, precision, accelerator, **asked)
        if accelerator not in (None, "onnxruntime") or precision != "int8":
            raise ConfigError(
                f"Trainer.quantize(onnx=True) makes an int8 model for ONNX Runtime; "
                f"precision={precision!r} with accelerator={accelerator!r} contradicts that."
            )
        from bigdl.nano.pytorch.onnx_mode import add_onnx_mode

        return add_onnx_mode(model, **asked)

    @staticmethod
    def save(model: torch.nn.Module, path: str | Path) -> None:
        """``InferenceOptimizer.save``."""
        from bigdl.nano.pytorch.inference import InferenceOptimizer

        InferenceOptimizer.save(model, path)

    @staticmethod
    def load(path: str | Path, model: torch.nn.Module | None = None) -> torch.nn.Module:
        """``InferenceOptimizer.load``."""
        from bigdl.nano.pytorch.inference import InferenceOptimizer

        return InferenceOptimizer.load(path, model)


def _lightning_parameters() -> list[inspect.Parameter]:
    parameters = inspect.signature(_StockTrainer.__init__).parameters.values()
    return [one for one in parameters if one.name != "self"]


def _check_names(lightning: dict[str, Any]) -> None:
    known = ["acceleration", "guard", *(one.name for one in _lightning_parameters())]
    for name in lightning:
        if name not in known:
            hint = " " + _ELSEWHERE[name] if name in _ELSEWHERE else nearest(name, known)
            raise ArgumentError(f"Trainer has no argument {name!r}.{hint}")


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


def _full_signature() -> inspect.Signature:
    """Ours and Lightning's parameters, as command lines and editors should see them."""
    own = inspect.signature(Trainer.__init__)
    ours = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
    return own.replace(parameters=[*ours, *_lightning_parameters()])


Trainer.__init__.__signature__ = _full_signature()  # type: ignore[attr-defined]
