"""A loop of one's own on Lightning's Fabric: ``TorchNano``, and ``nano`` for functions."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError
from bigdl._base.registry import nearest
from bigdl.nano.cores import check_count
from bigdl.nano.pytorch.lightning.host import pl

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TorchNano", "nano"]

Backend = Literal["subprocess", "spawn"]

_FABRIC = "lightning_fabric" if pl.__name__ == "pytorch_lightning" else "lightning.fabric"
_Fabric: Any = importlib.import_module(_FABRIC).Fabric
_precisions: Any = importlib.import_module(f"{_FABRIC}.plugins.precision")
_Precision: Any = _precisions.Precision
_Mixed: Any = _precisions.MixedPrecision
_OWN = ("num_processes", "distributed_backend", "cpu_for_each_process")


class _AsItIs(_Precision):  # type: ignore[misc]
    """Nothing is cast: a float64 model gets its float64 inputs."""

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_output(self, data: Any) -> Any:
        return data


class _Bf16Mixed(_Mixed):  # type: ignore[misc]
    """bf16 needs no scaled loss, so ``loss.backward()`` may stay what it is."""

    pre_backward = _Precision.pre_backward
    backward = _Precision.backward
    post_backward = _Precision.post_backward


class TorchNano(_Fabric):  # type: ignore[misc]
    """Lightning's Fabric for a loop of your own: derive from it and write ``train``.

    Args:
        num_processes: 1; this version does not divide a loop of yours among several.
        distributed_backend: How several would be started.
        cpu_for_each_process: The cores that each of several would have.
        precision: Fabric's words; None casts nothing.
        **fabric: Fabric's other arguments.

    Raises:
        ArgumentError: An argument is unknown or of another kind.
        ConfigError: It is not possible here.
    """

    def __init__(
        self,
        num_processes: int = 1,
        distributed_backend: Backend = "subprocess",
        cpu_for_each_process: list[list[int]] | None = None,
        precision: Any = None,
        **fabric: Any,
    ) -> None:
        _check(num_processes, distributed_backend, cpu_for_each_process, fabric)
        fabric.setdefault("devices", 1)
        plugin = _plugin(precision, fabric.get("accelerator", "auto"))
        if plugin is not None:
            precision = None
            given = fabric.pop("plugins", None) or []
            fabric["plugins"] = [*(given if isinstance(given, list) else [given]), plugin]
        super().__init__(precision=precision, **fabric)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The loop; yours."""
        raise NotImplementedError(f"{type(self).__name__} needs a method train(…) with the loop.")

    def setup(self, model: nn.Module, optimizer: Any, *loaders: DataLoader[Any]) -> Any:
        """Make a model, its optimizers and loaders ready.

        Args:
            model: Its parameters stay the very objects that they are.
            optimizer: One, or a list of them.
            *loaders: The data.

        Returns:
            The same kinds in the same order: ``model, optimizer, *loaders``, a list of optimizers
            for a list. The model has your attributes, methods and ``state_dict``.

        Raises:
            ArgumentError: One is of another kind.
        """
        several = isinstance(optimizer, (list, tuple))
        optimizers = list(optimizer) if several else [optimizer]
        _check_kind("model", model, nn.Module)
        for one in optimizers:
            _check_kind("optimizer", one, Optimizer)
        for loader in loaders:
            _check_kind("each loader", loader, DataLoader)
        ready_model, *ready = (
            super().setup(model, *optimizers) if optimizers else (super().setup(model),)
        )
        return (
            ready_model,
            type(optimizer)(ready) if several else ready[0],
            *(self.setup_dataloaders(loader) for loader in loaders),
        )


def nano(
    num_processes: int = 1,
    distributed_backend: Backend = "subprocess",
    cpu_for_each_process: list[list[int]] | None = None,
    precision: Any = None,
    **fabric: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run a training function as a ``TorchNano`` would, without a change in it: ``@nano()``.

    Modules, optimizers and loaders are found among its arguments by type, in lists and tuples
    too; ``loss.backward()`` stays. Arguments are ``TorchNano``'s.

    Raises:
        ArgumentError: Written without parentheses, or an argument that ``TorchNano`` refuses.
        ConfigError: It is not possible here.
    """
    if callable(num_processes):
        raise ArgumentError("nano is written with parentheses: @nano().")
    if precision in ("16-mixed", 16, "16"):
        raise ConfigError(
            f"nano(precision={precision!r}) needs a scaled loss, and the function calls "
            "loss.backward(): use 'bf16-mixed', or TorchNano with self.backward(loss)."
        )
    _check(num_processes, distributed_backend, cpu_for_each_process, fabric)
    make = functools.partial(
        TorchNano,
        num_processes,
        distributed_backend,
        cpu_for_each_process,
        precision,
        **fabric,
    )

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def run(*args: Any, **kwargs: Any) -> Any:
            stand_ins = _StandIns(make())
            ready = {name: stand_ins.of(value) for name, value in kwargs.items()}
            return stand_ins.back(fn(*map(stand_ins.of, args), **ready))

        return run

    return decorate


class _StandIns:
    """What a function gets in place of its arguments, one for each object."""

    def __init__(self, fabric: TorchNano) -> None:
        self._fabric = fabric
        self._made: dict[int, tuple[Any, Any]] = {}  # also keeps both alive: ids are theirs

    def of(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self.of, value))
        if id(value) not in self._made:
            made = self._ready(value)
            if made is value:
                return value
            self._made[id(value)] = (value, made)
        return self._made[id(value)][1]

    def back(self, value: Any) -> Any:
        """A result with the caller's own objects in it."""
        if type(value) in (list, tuple):
            return type(value)(map(self.back, value))
        return next((own for own, made in self._made.values() if made is value), value)

    def _ready(self, value: Any) -> Any:
        if isinstance(value, nn.Module):  # a loss has no parameters, and stays as it is
            has_any = next(value.parameters(), None) is not None
            return super(TorchNano, self._fabric).setup(value) if has_any else value
        if isinstance(value, Optimizer):
            return self._fabric.setup_optimizers(value)
        if isinstance(value, DataLoader):
            return self._fabric.setup_dataloaders(value)
        return value


# --- what the user wrote ----------------------------------------------------------------------


def _check(processes: Any, backend: Any, cores: Any, fabric: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(_Fabric.__init__).parameters if name != "self"]
    for name in fabric:
        if name not in known:
            near = nearest(name, [*known, *_OWN])
            raise ArgumentError(f"TorchNano has no argument {name!r}.{near}")
    check_count("num_processes", processes)
    if backend not in ("subprocess", "spawn"):
        raise ConfigError(f"distributed_backend={shown(backend)}: 'subprocess' or 'spawn'.")
    if processes > 1:
        raise ConfigError(
            f"num_processes={processes}: this version runs a loop of yours in one process; "
            "'bigdl launch -n N script.py' starts a script in several."
        )
    if cores is not None:
        raise ConfigError("cpu_for_each_process= belongs to num_processes of more than 1.")


def _check_kind(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ArgumentError(f"setup: {name} must be a {kind.__name__}, not {shown(value)}.")


def _plugin(precision: Any, accelerator: Any) -> Any:
    """How to compute, where Fabric's own way would not keep a promise of ours; else None."""
    if precision is None:
        return _AsItIs()
    if precision not in ("bf16", "bf16-mixed"):
        return None
    cuda = importlib.import_module("torch").cuda.is_available()
    device = (
        "cuda" if accelerator in ("gpu", "cuda") or (accelerator == "auto" and cuda) else "cpu"
    )
    return _Bf16Mixed("bf16-mixed", device)
