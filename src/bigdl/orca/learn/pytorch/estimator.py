"""The estimator for models of PyTorch."""

from __future__ import annotations

import hashlib
import json
import posixpath
from typing import TYPE_CHECKING, Any, Literal

import fsspec

from bigdl._base.errors import StoredModelError
from bigdl.orca.learn import checkpoint
from bigdl.orca.learn.checks import known_config
from bigdl.orca.learn.estimator import BaseEstimator
from bigdl.orca.learn.pytorch.codec import TorchCodec
from bigdl.orca.learn.pytorch.program import TorchProgram

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    import torch

    from bigdl.nano.pytorch.plan.plan import Plan

__all__ = ["Estimator"]

_SCHEMA_VERSION = 1
_WEIGHTS, _FACTS = "model.safetensors", "model.json"


class Estimator(BaseEstimator):
    """Trains a model of PyTorch on the workers of the current Orca context."""

    _program: TorchProgram

    @staticmethod
    def from_torch(
        model: torch.nn.Module | Callable[[dict[str, Any]], torch.nn.Module],
        optimizer: Any = None,
        loss: Any = None,
        *,
        metrics: Any = None,
        scheduler: Any = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        loss_reduction: Literal["mean", "sum"] | None = None,
        config: Mapping[str, Any] | None = None,
        workers: int | tuple[int, int] | None = None,
    ) -> Estimator:
        """An estimator of a model, or of functions that make its parts.

        Args:
            model: A module, or ``model(config)``.
            optimizer: One over the model's parameters, or ``optimizer(model, config)``; only
                ``fit`` needs it.
            loss: ``loss(output, labels)``, a mean over rows; only ``fit`` needs it.
            metrics: One, a list, or a dict by the user's own keys: of torchmetrics, or
                functions ``(prediction, target)`` that are means over rows.
            scheduler: One over the optimizer, or ``scheduler(optimizer, config)``.
            scheduler_interval: Whether it steps after epochs or after updates.
            loss_reduction: "sum" if the loss is a sum over rows.
            config: Given to the functions.
            workers: How many train; (fewest, most); None = one a node, with all its cores.

        Raises:
            ArgumentError: A part is of the wrong kind.
            ConfigError: Parts do not go together.
        """
        program = TorchProgram(
            model=model,
            optimizer=optimizer,
            loss=loss,
            metrics=metrics,
            scheduler=scheduler,
            scheduler_interval=scheduler_interval,
            loss_reduction=loss_reduction,
            config=known_config(config),
        )
        return Estimator(program, workers)

    @property
    def plan(self) -> Plan | None:
        """What ``fit(acceleration=…)`` found; None before, and where nothing was asked."""
        if self._settled is None:
            return None
        from bigdl.nano.pytorch.plan.plan import Plan

        return Plan.from_json(self._settled)

    def get_model(self) -> torch.nn.Module:
        """The trained model: the caller's own instance, or a new one of the function's."""
        self._open()
        return self._program.model_of(self._state)

    def save(self, path: str | PathLike[str]) -> str:
        """Write the model's weights: a folder with a safetensors file and JSON.

        Returns:
            The path.
        """
        self._open()
        files, root = fsspec.core.url_to_fs(str(path))
        model = self.get_model()
        content = TorchCodec().pack(model.state_dict())
        facts = {
            "schema_version": _SCHEMA_VERSION,
            "class": type(model).__name__,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        files.makedirs(root, exist_ok=True)
        files.pipe_file(posixpath.join(root, _WEIGHTS), content)
        files.pipe_file(posixpath.join(root, _FACTS), json.dumps(facts).encode())
        return str(path)

    def load(self, path: str | PathLike[str]) -> None:
        """Take the weights that ``save`` wrote into the model.

        Raises:
            FileNotFoundError: There are none.
            StoredModelError: They are damaged, or of another model; nothing has changed.
        """
        self._open()
        files, root = fsspec.core.url_to_fs(str(path))
        try:
            facts = json.loads(files.cat_file(posixpath.join(root, _FACTS)))
            content = files.cat_file(posixpath.join(root, _WEIGHTS))
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no saved model in {path}.") from None
        except ValueError as exc:
            raise StoredModelError(f"The model in {path} is damaged: {exc}") from exc
        found = facts.get("schema_version") if isinstance(facts, dict) else None
        if found != _SCHEMA_VERSION:
            raise StoredModelError(
                f"The model in {path} has schema version {found!r}; this version reads "
                f"{_SCHEMA_VERSION}."
            )
        if hashlib.sha256(content).hexdigest() != facts.get("sha256"):
            raise StoredModelError(f"The model in {path} is damaged: {_WEIGHTS} has changed.")
        state = {**(self._state or {}), "model": TorchCodec().unpack(content)}
        self._program.take(state)
        self._state = state

    @staticmethod
    def latest_checkpoint(directory: str | PathLike[str]) -> str:
        """Path of the last whole checkpoint in a folder; a damaged one is passed over, and named.

        Raises:
            FileNotFoundError: There is none.
        """
        return checkpoint.latest(directory, TorchCodec())
