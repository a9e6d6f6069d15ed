"""How candidates in force reach a Lightning step, and the tripwire beside them.

One place for the run and for its rehearsals: a strategy's ``training_step`` and
``optimizer_step`` pass through here while a wiring is on, and not at all when it is off.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from bigdl.nano.pytorch.plan.rehearsal import parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl.nano.pytorch.plan.plan import InForce

__all__ = ["Wiring"]


class _TrippedError(Exception):
    """A step's loss or gradient is not finite; ends the optimizer's step before it updates."""


class Wiring:
    """Leads a strategy's steps through candidates in force.

    Args:
        strategy: Lightning's strategy.
        loops: Its two optimization loops, whose ``run`` is one whole step.
        force: What is in force.
        on_trip: Called with "loss" or "gradient" when a step under a number-changing choice
            gives one that is not finite; that step's update is left out. None: not watched.
    """

    def __init__(
        self,
        strategy: Any,
        loops: Sequence[Any],
        force: InForce,
        on_trip: Callable[[str], None] | None = None,
    ) -> None:
        self._strategy = strategy
        self._loops = tuple(loops)
        self._force = force
        self._on_trip = on_trip if force.changes_numbers else None
        self._wired: list[tuple[Any, str]] = []

    def on(self) -> None:
        """Lead steps through what is in force; parts that nothing needs stay stock."""
        if not self._force.names:
            return
        if self._force.wraps_step:
            self._wire(self._strategy, "training_step", self._training_step)
        if self._force.wraps_whole:
            for loop in self._loops:
                self._wire(loop, "run", self._whole(loop.run))
        if self._on_trip is not None and self._strategy.precision_plugin.precision != "16-mixed":
            self._wire(self._strategy, "optimizer_step", self._optimizer_step)

    def off(self) -> None:
        """Back to stock; calling it twice is harmless."""
        wired, self._wired = self._wired, []
        for owner, name in wired:
            vars(owner).pop(name, None)

    def _wire(self, owner: Any, name: str, fn: Callable[..., Any]) -> None:
        vars(owner)[name] = fn
        self._wired.append((owner, name))

    def _training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        stock = type(self._strategy).training_step
        force = self._force
        with force.step():
            output = stock(self._strategy, force.batch(batch), *args, **kwargs)
        return force.output(output)

    def _whole(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._force.whole():
                return stock(*args, **kwargs)

        return run

    # --- the tripwire ---

    def _optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        is_first = True

        def watched() -> Any:
            nonlocal is_first
            loss = closure()
            if is_first:  # a line search may try points where the loss is not finite
                is_first = False
                what = self._not_finite(loss, optimizer)
                if what is not None:
                    raise _TrippedError(what, loss)
            return loss

        try:
            return type(self._strategy).optimizer_step(
                self._strategy, optimizer, watched, model, **kwargs
            )
        except _TrippedError as trip:
            what, loss = trip.args
            optimizer.zero_grad(set_to_none=True)
            if self._on_trip is not None:
                self._on_trip(what)
            return loss

    def _not_finite(self, loss: Any, optimizer: torch.optim.Optimizer) -> str | None:
        module = self._strategy.lightning_module
        if loss is None and module is not None and module.automatic_optimization:
            return None  # the step was left out by the user's own code
        if isinstance(loss, torch.Tensor) and not math.isfinite(loss.item()):
            return "loss"
        return None if _are_finite(optimizer) else "gradient"


def _are_finite(optimizer: torch.optim.Optimizer) -> bool:
    gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    flat = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    if not flat:
        return True
    # one number for all: it is finite unless one of them is not (or their squares overflow)
    if bool(torch.isfinite(torch.nn.utils.get_total_norm(flat))):
        return True
    return all(bool(torch.isfinite(one).all()) for one in flat)
