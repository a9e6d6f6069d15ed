"""A LightningModule around a plain module: what ``Trainer.compile`` returns."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError, DataError, NotReadyError
from bigdl.nano.pytorch.lightning.host import pl

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["CompiledModule", "compiled"]

_Scheduler = torch.optim.lr_scheduler.LRScheduler
_Plateau = torch.optim.lr_scheduler.ReduceLROnPlateau


def compiled(
    model: nn.Module,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    metrics: list[Any] | dict[str, Any] | None = None,
) -> pl.LightningModule:
    """See ``Trainer.compile``."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"Trainer.compile(model=…) takes a torch.nn.Module, not {type(model).__name__}."
        )
    rest = {"loss": loss, "optimizer": optimizer, "scheduler": scheduler, "metrics": metrics}
    if isinstance(model, pl.LightningModule):
        given = [name for name, value in rest.items() if value is not None]
        if given:
            raise ConfigError(
                f"Trainer.compile got a LightningModule and {', '.join(given)}=: it brings its "
                "own steps and optimizers. Give a plain module, or the LightningModule alone."
            )
        return model
    if isinstance(loss, type):
        raise ArgumentError(
            f"Trainer.compile(loss=…) got the class {loss.__name__}; give {loss.__name__}()."
        )
    if loss is not None and not callable(loss):
        raise ArgumentError(
            f"Trainer.compile(loss=…) takes a function (output, target), not "
            f"{type(loss).__name__}."
        )
    _check_optimizer(model, optimizer, scheduler)
    return CompiledModule(model, loss, optimizer, scheduler, _named(metrics))


def _check_optimizer(model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(
            "Trainer.compile(optimizer=…) takes a torch.optim.Optimizer of the model's "
            f"parameters, not {shown(optimizer)}."
        )
    if scheduler is not None and not isinstance(scheduler, (_Scheduler, _Plateau)):
        raise ArgumentError(
            "Trainer.compile(scheduler=…) takes a scheduler of torch.optim.lr_scheduler, not "
            f"{type(scheduler).__name__}."
        )
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not held & {id(p) for p in model.parameters()}:
            raise ConfigError(
                "Trainer.compile: the optimizer holds none of the model's parameters. Make it "
                "from model.parameters()."
            )
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ConfigError(
            "Trainer.compile: the scheduler is not one of this optimizer. Give both, and make "
            "the scheduler from that optimizer."
        )


def _named(metrics: Any) -> dict[str, Any]:
    """Metrics by name; checked."""
    if metrics is None:
        return {}
    if isinstance(metrics, dict):
        named = dict(metrics)
    elif isinstance(metrics, (list, tuple)):
        named = {}
        for one in metrics:
            name = type(one).__name__ if isinstance(one, nn.Module) else _function_name(one)
            if name in named:
                raise ConfigError(
                    f"Trainer.compile: two metrics are called {name!r}. Give a dict with names "
                    "of your own."
                )
            named[name] = one
    else:
        raise ArgumentError(
            "Trainer.compile(metrics=…) takes a list or a dict of metrics, not "
            f"{type(metrics).__name__}."
        )
    for name, one in named.items():
        if not isinstance(name, str) or not callable(one) or isinstance(one, type):
            raise ArgumentError(
                f"Trainer.compile: the metric {name!r} is a {type(one).__name__}; need an object "
                "of a torchmetrics class or a function (output, target)."
            )
    return named


def _function_name(metric: Any) -> str:
    return getattr(metric, "__name__", type(metric).__name__)


class CompiledModule(pl.LightningModule):
    """Trains a plain module by a loss and an optimizer; batches are ``(*inputs, target)``.

    Attributes of the plain module can be reached here too. A metric of torchmetrics is computed
    over the whole set; a function's values are averaged over its rows.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], torch.Tensor] | None,
        optimizer: torch.optim.Optimizer | None,
        scheduler: Any,
        metrics: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._names = list(metrics)
        self._functions = {k: v for k, v in metrics.items() if not isinstance(v, nn.Module)}
        for stage in ("val", "test"):
            for name, metric in metrics.items():
                if isinstance(metric, nn.Module):
                    # the caller's own for validation, another for tests: sets do not mix
                    own = metric if stage == "val" else metric.clone()  # type: ignore[operator]
                    self.add_module(f"{stage}_{name}", own)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    # --- steps ---

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        _, _, loss, rows = self._scored(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=rows)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if not isinstance(batch, (tuple, list)):
            return self.model(batch)
        return self.model(*batch[: _required(self.model, len(batch))])

    def _scored(self, batch: Any) -> tuple[Any, Any, torch.Tensor, int]:
        """(output, target, loss, rows) of a batch."""
        if self.loss is None:
            raise NotReadyError(
                "This module has no loss. Make it with Trainer.compile(model, loss=…, "
                "optimizer=…)."
            )
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise DataError(
                "A batch for a module of Trainer.compile is (*inputs, target); this one is a "
                f"{type(batch).__name__}"
                + (f" of {len(batch)}." if isinstance(batch, (tuple, list)) else ".")
            )
        *inputs, target = batch
        output = self.model(*inputs)
        rows = len(target) if getattr(target, "ndim", 0) else 1
        return output, target, self.loss(output, target), rows

    def _evaluate(self, batch: Any, stage: str) -> None:
        output, target, loss, rows = self._scored(batch)
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=rows)
        for name in self._names:
            if name in self._functions:
                value = self._functions[name](output, target)
                self.log(f"{stage}_{name}", value, batch_size=rows)
            else:
                metric = getattr(self, f"{stage}_{name}")
                metric.update(output, target)
                self.log(f"{stage}_{name}", metric, batch_size=rows)

    # --- the optimizer ---

    def configure_optimizers(self) -> Any:
        if self._optimizer is None:
            raise NotReadyError(
                "This module has no optimizer. Make it with Trainer.compile(model, loss=…, "
                "optimizer=…)."
            )
        if self._scheduler is None:
            return self._optimizer
        config: dict[str, Any] = {"scheduler": self._scheduler, "interval": "epoch"}
        if isinstance(self._scheduler, _Plateau):
            config["monitor"] = "val_loss" if self.trainer.enable_validation else "train_loss"
        return {"optimizer": self._optimizer, "lr_scheduler": config}


def _required(model: nn.Module, most: int) -> int:
    """How many leading items of a batch are inputs: as many as ``forward`` needs."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return max(1, most - 1) if most > 1 else 1
    needed = sum(
        1
        for one in parameters
        if one.default is one.empty
        and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    )
    return max(1, min(most, needed))
