"""Builds forms of one trunk, checks each against the user's own and keeps the fastest."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bigdl._base.errors import BigDLError, ConfigError
from bigdl.nano.pytorch.frozen.forms import drift

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl.nano.pytorch.frozen.forms import Form, Runner, Subject, Tensors

__all__ = ["Budget", "Chosen", "choose"]

_log = logging.getLogger(__name__)

# A form must be so much faster than the user's own trunk.
_LEAST_GAIN = 1.05
# Forms this quick to build are measured even when a faster one has been found already: on a
# small trunk the way into another runtime can cost more than the trunk.
_CHEAP_S = 1.0
_TIMED_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long building may take.

    Args:
        steps: Calls still planned, None if unknown.
        share: Of what those calls would take in the user's own form, so much may be spent.
        unknown_s: The limit where the calls are unknown.
    """

    steps: int | None
    share: float = 0.1
    unknown_s: float = 15.0

    def seconds(self, own_s: float) -> float:
        """The limit for a trunk that takes ``own_s`` a call."""
        return self.unknown_s if self.steps is None else self.share * self.steps * own_s


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A form in working order.

    Args:
        form: Which.
        run: Runs it.
        own_s: What the user's own trunk took for the same inputs.
        form_s: What the form took. Both are 0 if nothing was timed.
        build_s: What building and checking took.
        by_rows: Row i of the outputs depends on row i of the inputs only.
    """

    form: Form
    run: Runner
    own_s: float
    form_s: float
    build_s: float
    by_rows: bool


def choose(
    subject: Subject,
    own: Callable[[], Tensors],
    forms: Sequence[Form],
    budget: Budget | None,
) -> Chosen:
    """The fastest of ``forms`` that gives what the user's own trunk gives.

    Args:
        subject: The trunk, inputs and wanted outputs.
        own: Runs the user's own trunk on the subject's inputs.
        forms: Best known first.
        budget: None: the first form that works is taken, untimed (a plan is replayed).

    Raises:
        ConfigError: None works, or none is faster; the text has a reason for each.
    """
    started = time.perf_counter()
    by_rows = _depends_on_own_rows(subject)
    own_s = _seconds(own) if budget is not None else 0.0
    left_s = budget.seconds(own_s) if budget is not None else float("inf")
    reasons: list[str] = []
    best: Chosen | None = None
    for form in forms:
        needed_s = form.build_s + form.build_runs * own_s
        if best is not None and needed_s > _CHEAP_S + own_s:
            continue
        if form.build_s > _CHEAP_S and needed_s > left_s:
            reasons.append(f"{form.name}: the run is too short to repay building it")
            continue
        begun = time.perf_counter()
        made = _try(form, subject, own, timed=budget is not None, by_rows=by_rows)
        left_s -= time.perf_counter() - begun
        if isinstance(made, str):
            reasons.append(f"{form.name}: {made}")
            _log.debug("Frozen trunk as %s: %s", form.name, made)
            continue
        if budget is None:
            return made
        if best is None or made.form_s < best.form_s:
            best = made
    if best is None:
        raise ConfigError("; ".join(reasons) or "no form is left to try")
    build_s = time.perf_counter() - started
    return Chosen(**{**vars(best), "build_s": build_s})


def _try(
    form: Form, subject: Subject, own: Callable[[], Tensors], *, timed: bool, by_rows: bool
) -> Chosen | str:
    """``form`` in working order, or why not."""
    reason = form.refuse(subject)
    if reason is not None:
        return reason
    begun = time.perf_counter()
    try:
        run = form.build(subject)
        outputs = run(subject.inputs)
    except BigDLError as exc:
        return str(exc)
    except Exception as exc:  # noqa: BLE001
        # a user's module in another type or layout, or a runtime that cannot take it: whatever
        # they raise, training goes on without this form
        return f"{type(exc).__name__}: {str(exc).partition(chr(10))[0]}"
    if [t.shape for t in outputs] != [t.shape for t in subject.outputs]:
        return "its outputs have other shapes"
    far = drift(outputs, subject.outputs).exceeds(form.precision)
    if far is not None:
        return far
    own_s, form_s = _in_turns(own, lambda: run(subject.inputs)) if timed else (0.0, 0.0)
    if timed and form_s * _LEAST_GAIN > own_s:
        return f"no faster: {form_s * 1e3:.3g} ms against {own_s * 1e3:.3g} ms"
    return Chosen(
        form=form,
        run=run,
        own_s=own_s,
        form_s=form_s,
        build_s=time.perf_counter() - begun,
        by_rows=by_rows,
    )


def _depends_on_own_rows(subject: Subject) -> bool:
    """Whether the first rows give the same when the others are not there."""
    if not subject.rows or subject.rows < 2:
        return False
    part = subject.rows // 2
    try:
        with torch.no_grad():
            alone = subject.module(*(t[:part].contiguous() for t in subject.inputs))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    wanted = tuple(t[:part] for t in subject.outputs)
    if [t.shape for t in alone] != [t.shape for t in wanted]:
        return False
    # kernels for other row counts round otherwise; under autocast in bf16
    precision = "fp32" if all(t.dtype is torch.float32 for t in wanted) else "bf16"
    return drift(alone, wanted).exceeds(precision) is None  # type: ignore[arg-type]


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _in_turns(one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """The least seconds of each, called alternately so that a busy moment hits both."""
    best_one = best_other = float("inf")
    begun = time.perf_counter()
    for _ in range(20):
        best_other = min(best_other, _seconds(other))
        best_one = min(best_one, _seconds(one))
        best_other = min(best_other, _seconds(other))
        clear = not 0.7 < best_other / best_one < 1.5
        if time.perf_counter() - begun > (_TIMED_S if clear else 3 * _TIMED_S):
            break
    return best_one, best_other
