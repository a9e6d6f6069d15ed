"""Training steps tried on copies, so that the run itself never hears of them.

Knows torch; imports no Lightning. A host (a trainer, a hand-written loop) brings a
``Rehearsal``: it can copy module and optimizers as they stand, and perform one whole step of
the user's own on such a copy.
"""

from __future__ import annotations

import copy
import functools
import io
import time
import warnings
from contextlib import contextmanager, redirect_stdout
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from bigdl._base.errors import BigDLError
from bigdl.nano.pytorch.guard import Seen, with_noise
from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.plan.plan import InForce

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bigdl.nano.pytorch.guard import Vectors
    from bigdl.nano.pytorch.plan.candidates import Candidate, Scene

__all__ = [
    "Cast",
    "PlainCast",
    "PlainRehearsal",
    "Rehearsal",
    "Stage",
    "StageError",
    "copy_optimizer",
    "dtypes",
    "parameters_of",
    "strip_hooks",
    "untouched",
]


class StageError(BigDLError, RuntimeError):
    """A step could not be rehearsed; the text says why."""


class Cast:
    """A copy of module and optimizers that can take one whole step of the user's own."""

    module: torch.nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]

    def perform(self, batch: Any, force: InForce) -> float | None:
        """One step on ``batch`` with ``force`` in force; gives the loss, if there is one."""
        raise NotImplementedError


class Rehearsal:
    """What a host offers: batches of the run, and copies of what is trained.

    Args:
        batches: Copies of batches that the run has met, at least one, as the step gets them.
        scene: The run as candidates may look at it.
    """

    def __init__(self, batches: Sequence[Any], scene: Scene) -> None:
        self.batches = tuple(batches)
        self.scene = scene

    def cast(self) -> Cast:
        """A fresh copy of module and optimizers as they stand now.

        Raises:
            StageError: They cannot be copied.
        """
        raise NotImplementedError

    def noisy(self, batch: Any) -> Any | None:
        """``batch`` with relative noise of 2⁻⁹, None if it holds no floating numbers."""
        found, spec = pytree.tree_flatten(batch)
        places = [
            index
            for index, leaf in enumerate(found)
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel()
        ]
        if not places:
            return None
        for place, noisy in zip(places, with_noise([found[i] for i in places]), strict=True):
            found[place] = noisy
        return pytree.tree_unflatten(found, spec)


class Stage:
    """A cast with candidates in force, looked at and timed."""

    def __init__(self, rehearsal: Rehearsal, candidates: Sequence[Candidate]) -> None:
        self._rehearsal = rehearsal
        with _quiet("copied"):
            self.cast = rehearsal.cast()
        self.force = InForce.start(
            candidates, self.cast.module, self.cast.optimizers, rehearsal.scene
        )

    def look(self, batch: Any, start: streams.State | None = None) -> Seen:
        """Take one step on a copy of ``batch`` and see what it did.

        Args:
            batch: The batch.
            start: Where the random streams stand when the step begins; None is where they are.

        Raises:
            StageError: The step failed.
        """
        with streams.kept(), _watched(self.cast.optimizers) as calls:
            if start is not None:
                streams.write(start)
            loss = self._perform(copy.deepcopy(batch))
            draws = streams.read()
        return Seen(
            loss=loss,
            vectors=tuple(gradients for _, gradients in calls),
            callers=tuple(caller for caller, _ in calls),
            draws=draws,
        )

    def settle(self) -> str | None:
        """Let the candidates settle after their first step; why one did not, if so."""
        self.force.settle()
        return "; ".join(self.force.lost.values()) or None

    def update(self, gradients: Sequence[Vectors]) -> Seen:
        """The update that the optimizers make of gradients given to them.

        Args:
            gradients: One tuple an optimizer, in order of its parameters.
        """
        with streams.kept(), _quiet("updated"):
            before = _weights(self.cast)
            for optimizer, given in zip(self.cast.optimizers, gradients, strict=True):
                for parameter, gradient in zip(parameters_of(optimizer), given, strict=True):
                    parameter.grad = None if gradient is None else gradient.clone()
                optimizer.step()
        return Seen(loss=None, vectors=(_moved(self.cast, before),), what="update")

    def seconds(self, batches: Sequence[Any]) -> float:
        """Seconds that a step on each of ``batches`` takes, on average; they may be changed."""
        device = self._rehearsal.scene.device
        with streams.kept():
            _wait_for(device)
            start = time.perf_counter()
            for batch in batches:
                self._perform(batch)
            _wait_for(device)
            return (time.perf_counter() - start) / len(batches)

    def _perform(self, batch: Any) -> float | None:
        with _quiet("rehearsed"):
            return self.cast.perform(batch, self.force)

    def close(self) -> None:
        """Undo what is in force."""
        self.force.undo()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- what a step did --------------------------------------------------------------------------


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer updates, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


@contextmanager
def _watched(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[list[tuple[int, Vectors]]]:
    """Collects, call by call, which optimizer stepped and the gradients that it used."""
    calls: list[tuple[int, Vectors]] = []
    places = {id(optimizer): place for place, optimizer in enumerate(optimizers)}

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = tuple(
            None if p.grad is None else p.grad.detach().clone() for p in parameters_of(optimizer)
        )
        calls.append((places[id(optimizer)], gradients))

    handles = [optimizer.register_step_post_hook(after_step) for optimizer in optimizers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _weights(cast: Cast) -> tuple[torch.Tensor, ...]:
    return tuple(
        p.detach().clone() for optimizer in cast.optimizers for p in parameters_of(optimizer)
    )


def _moved(cast: Cast, before: Sequence[torch.Tensor]) -> Vectors:
    after = (p for optimizer in cast.optimizers for p in parameters_of(optimizer))
    return tuple(p.detach() - old for p, old in zip(after, before, strict=True))


def dtypes(module: torch.nn.Module) -> dict[str, torch.dtype]:
    """The types of all tensors that a module and its submodules hold, in lists too."""
    found = {}
    for prefix, owner in module.named_modules():
        for name, value in vars(owner).items():
            if name == "_modules":
                continue
            for place, leaf in enumerate(pytree.tree_leaves(value)):
                if isinstance(leaf, torch.Tensor):
                    found[f"{prefix}.{name}[{place}]".removeprefix(".")] = leaf.dtype
    return found


# --- apart from the run -----------------------------------------------------------------------


@contextmanager
def untouched(module: torch.nn.Module) -> Iterator[None]:
    """The block works on copies of ``module``; this sees to it that the module is not reached.

    A step may reach around its own module (a function that caught the original). Gradients are
    set aside and buffers put back, so that such a step leaves no trace.

    Raises:
        StageError: A parameter of the module itself was written.
    """
    parameters = list(module.parameters())
    gradients = [p.grad for p in parameters]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    versions = [p._version for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    is_reached = False
    try:
        with streams.kept():
            yield
    finally:
        is_reached = any(p.grad is not None for p in parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:  # kernels write some without a new version
                if not _is_same(buffer, value):
                    is_reached = True
                    buffer.copy_(value)
    is_reached |= any(p._version != v for p, v in zip(parameters, versions, strict=True))
    if is_reached:
        raise StageError("the step reaches around its own module, so a copy cannot stand for it")


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return torch.equal(one, other)


@contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Without prints and warnings of the user's own code; its errors become a StageError."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        except StageError:
            raise
        except Exception as exc:
            # the user's own step on a copy and under a change: anything may come
            text = " ".join(str(exc).split())[:160]
            raise StageError(f"it cannot be {what}: {type(exc).__name__}: {text}") from exc


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_optimizer(optimizer: Any, memo: dict[int, Any]) -> Any:
    """A copy over the parameters that ``memo`` has copies of.

    Torch copies groups and state; what a kind of optimizer keeps beside them comes too.
    """
    twin = copy.deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():
        if name not in vars(twin) and not callable(value):
            setattr(twin, name, copy.deepcopy(value, memo))
    return twin


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def strip_hooks(module: torch.nn.Module) -> None:
    """Take hooks that are plain functions off a copy: what they write to was not copied.

    Hooks that are objects (weight norm, pruning) were copied with the module and stay.
    """
    for owner in module.modules():
        for kind in _HOOKS:
            hooks = getattr(owner, kind)
            for key, hook in list(hooks.items()):
                if isinstance(hook, (FunctionType, functools.partial)):
                    del hooks[key]


# --- a hand-written loop ----------------------------------------------------------------------


class PlainCast(Cast):
    """A copy of a plain module with a loss function."""

    def __init__(self, module: Any, optimizers: Any, loss: Any) -> None:
        memo: dict[int, Any] = {}
        self.module = copy.deepcopy(module, memo)
        self.optimizers = tuple(copy_optimizer(one, memo) for one in optimizers)
        strip_hooks(self.module)
        self._loss = loss

    def perform(self, batch: Any, force: InForce) -> float | None:
        with force.whole():
            with force.step():
                loss = self._loss(self.module, force.batch(batch))
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
        return float(loss.detach())


class PlainRehearsal(Rehearsal):
    """A hand-written loop: ``loss(module, batch)`` gives the loss."""

    def __init__(self, loss: Any, batches: Sequence[Any], scene: Scene) -> None:
        super().__init__(batches, scene)
        self._loss = loss

    def cast(self) -> Cast:
        return PlainCast(self.scene.module, self.scene.optimizers, self._loss)
