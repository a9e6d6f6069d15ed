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
from bigdl.nano.pytorch.lightning.own_loops import FABRIC, LoopStrategy, run_in_processes
from bigdl.nano.pytorch.processes.settings import check_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigdl.nano.pytorch.processes.own_loop import OwnLoop
    from bigdl.nano.pytorch.processes.settings import Settings

__all__ = ["TorchNano", "nano"]

Backend = Literal["subprocess", "spawn"]

_Fabric: Any = importlib.import_module(FABRIC).Fabric
_precisions: Any = importlib.import_module(f"{FABRIC}.plugins.precision")
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

    With ``num_processes=N``, ``train`` runs in N worker processes of this machine. Loaders that
    went through ``setup`` give each process its rows of each batch, and a backward pass leaves
    the whole batch's gradients: the weights are those of one process. What is drawn from them
    without gradients, or in ``eval()`` mode, is whole in every process. A loss that the loop
    prints is that of its own rows; ``self.all_reduce(loss)`` is the mean over processes. The
    value of ``train`` is rank 0's; modules and optimizers among its arguments, and in attributes
    of yours, hold afterwards what they would hold after one process.

    Args:
        num_processes: Processes that share each batch.
        distributed_backend: "subprocess" forks workers from one fresh interpreter that has
            loaded the libraries; "spawn" starts an interpreter for each.
        cpu_for_each_process: The cores that each of several has; None divides all.
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
        settings = _check(num_processes, distributed_backend, cpu_for_each_process, fabric)
        self._connect(settings, precision, fabric)

    def _connect(
        self, settings: Settings, precision: Any, given: dict[str, Any], **more: Any
    ) -> None:
        """Be a Fabric, in the caller's process or in a worker."""
        before = set(vars(self))
        fabric: dict[str, Any] = {"devices": 1, **given, **more}
        plugin = _plugin(precision, fabric.get("accelerator", "auto"))
        if plugin is not None:
            plugins = fabric.pop("plugins", None) or []
            fabric["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), plugin]
        super().__init__(precision=precision if plugin is None else None, **fabric)
        self._settings, self._is_worker = settings, False
        self._made_of = precision, given
        self._own_names = {"_own_names", *vars(self)} - before

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "train" in vars(cls):
            cls.train = _everywhere(vars(cls)["train"])  # type: ignore[method-assign]

    # --- in several processes ---

    def attributes(self) -> dict[str, Any]:
        """What a class derived from this one has added to the object."""
        own = self._own_names
        return {name: value for name, value in vars(self).items() if name not in own}

    def enter(self, loop: OwnLoop) -> None:
        """Be one of several processes."""
        own, settings, (precision, given) = self.attributes(), self._settings, self._made_of
        self.__dict__ = {}
        self._connect(settings, precision, given, strategy=LoopStrategy(loop), accelerator="cpu")
        self._is_worker = True
        self.__dict__.update(own)

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), self._settings, *self._made_of), self.attributes()

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
    settings = _check(num_processes, distributed_backend, cpu_for_each_process, fabric)
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
            call = _Standing(fn)
            if settings.world > 1:
                return run_in_processes(settings, make(), call, args, kwargs)
            return call(make(), *args, **kwargs)

        return run

    return decorate


def _everywhere(train: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs in as many processes as its object was made for."""

    @functools.wraps(train)
    def run(self: TorchNano, *args: Any, **kwargs: Any) -> Any:
        if self._settings.world > 1 and not self._is_worker:
            method = _Method(train.__name__)
            return run_in_processes(self._settings, self, method, args, kwargs)
        return train(self, *args, **kwargs)

    return run


def _made_again(kind: Any, settings: Settings, precision: Any, given: dict[str, Any]) -> TorchNano:
    """What travelled; its attributes are put in by who reads it."""
    made: TorchNano = object.__new__(kind)
    made._connect(settings, precision, given)
    return made


class _Method:
    """A method by its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, fabric: TorchNano, *args: Any, **kwargs: Any) -> Any:
        return getattr(fabric, self._name)(*args, **kwargs)


class _Standing:
    """A function that gets stand-ins for its arguments."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    def __call__(self, fabric: TorchNano, *args: Any, **kwargs: Any) -> Any:
        stand_ins = _StandIns(fabric)
        ready = {name: stand_ins.of(value) for name, value in kwargs.items()}
        return stand_ins.back(self._fn(*map(stand_ins.of, args), **ready))


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


def _check(processes: Any, backend: Any, cores: Any, fabric: dict[str, Any]) -> Settings:
    known = [name for name in inspect.signature(_Fabric.__init__).parameters if name != "self"]
    for name in fabric:
        if name not in known:
            near = nearest(name, [*known, *_OWN])
            raise ArgumentError(f"TorchNano has no argument {name!r}.{near}")
    settings = check_settings(processes, backend, cores, auto_lr=False, sync="allreduce")
    if settings.world > 1:
        for name, fine in (("accelerator", ("auto", "cpu")), ("strategy", ("auto",))):
            if fabric.get(name, "auto") not in fine:
                raise ConfigError(
                    f"num_processes={settings.world} shares batches among processes on the CPU, "
                    f"and cannot go with {name}={shown(fabric[name])}."
                )
    return settings


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
