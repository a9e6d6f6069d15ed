"""The search behind ``optimize``: which method runs when, for how long, and what came of it.

Every method runs in a worker process of its own, so one that hangs, crashes or leaks costs a row
and nothing else. What was built is saved by the worker and loaded on demand.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import ConfigError, TimeLimitError, WorkerError, WorkerLostError
from bigdl._base.live import LiveLine
from bigdl._base.workers import Workers, dumps
from bigdl.nano.pytorch.inference.batches import as_batches, kept_randomness
from bigdl.nano.pytorch.inference.methods import METHODS
from bigdl.nano.pytorch.inference.trial import TASK_FILE, run
from bigdl.nano.selection import ORIGINAL, Report, Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigdl.nano.pytorch.inference.trial import Task, Trial


__all__ = ["Found", "search"]

log = logging.getLogger(__name__)

# Imported once for all workers; none of these starts a thread (a test looks). Exporting and
# compiling need the second part, which takes longer to import than the first.
_PRELOAD = ("bigdl.nano.pytorch.inference.trial",)
_PRELOAD_COMPILERS = ("torch._dynamo", "torch._inductor.compile_fx")
_COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# With less than this left, starting another method would only be cut short.
_LEAST_S = 1.0


@dataclass
class Found:
    """Rows so far, and the folder of the models that were saved on the way.

    The folder goes when this object does.
    """

    objective: Any
    threads: int
    rows: list[Row] = field(default_factory=list)
    metric: str = "accuracy"
    higher_is_better: bool = True
    sample: Any = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bigdl-optimize-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of whatever builds these models.

        What torch's compiler made in a worker is found again when the model is built here.
        """
        if _COMPILER_CACHE in os.environ:  # the user has a place for it
            return {}
        return {_COMPILER_CACHE: str(self.folder / "inductor")}

    def report(self) -> Report:
        """What is known now."""
        return Report(
            rows=tuple(self.rows),
            metric=self.metric,
            higher_is_better=self.higher_is_better,
            objective=self.objective,
            threads=self.threads,
            seconds=self.seconds,
        )


def search(
    found: Found,
    task: Task,
    names: Sequence[str],
    *,
    budget_s: float,
    method_timeout_s: float,
) -> None:
    """Try ``names`` in order and put a row for each into ``found``.

    Args:
        found: Is filled as rows come, so that it holds them after an interruption, too.
        task: What to try them on.
        names: Methods, the original first.
        budget_s: Seconds for all; what they leave out is a row that says so.
        method_timeout_s: Seconds for each.

    Raises:
        ConfigError: The model, the data or the metric cannot be sent to another process.
        TimeLimitError: The original alone takes too long.
        WorkerLostError: The original ended its process.
        Exception: What the user's own code raised for the original.
    """
    started = time.monotonic()
    (found.folder / TASK_FILE).write_bytes(_packed(task))
    progress = _Progress(len(names))
    reference = None
    try:
        with Workers(preload=preload(names), env=found.variables, output="capture") as workers:
            for name in names:
                left = budget_s - (time.monotonic() - started)
                if name != ORIGINAL and left < _LEAST_S:
                    found.rows.append(_left_out(name, budget_s))
                    continue
                limit = method_timeout_s if name == ORIGINAL else min(method_timeout_s, left)
                attempt = _Attempt(name, limit, ends_budget=limit < method_timeout_s)
                trial = attempt.run(workers, found.folder, reference, progress)
                if name == ORIGINAL:
                    assert trial is not None  # what it raised has been raised
                    reference, found.sample = trial.reference, trial.sample
                    found.metric, found.higher_is_better = trial.metric, trial.higher_is_better
                found.rows.append(trial.row if trial is not None else attempt.row(budget_s))
                progress.row(found.rows[-1])
    finally:
        found.seconds = time.monotonic() - started
        progress.end()
        (found.folder / TASK_FILE).unlink(missing_ok=True)


def preload(names: Sequence[str]) -> tuple[str, ...]:
    """What the workers for methods ``names`` have in common."""
    if all(METHODS[name].accelerator == "eager" for name in names):
        return _PRELOAD
    return _PRELOAD + _PRELOAD_COMPILERS


class _Attempt:
    """One method in one worker."""

    def __init__(self, name: str, limit_s: float, *, ends_budget: bool) -> None:
        self._name, self._limit_s, self._ends_budget = name, limit_s, ends_budget
        self._stage = "starting"
        self._error: BaseException | None = None

    def run(
        self, workers: Workers, folder: Path, reference: Any, progress: _Progress
    ) -> Trial | None:
        """What the worker brought back; None if there is only an error, which is kept.

        The original has no row for an error: without it nothing can be compared.
        """

        def on_event(stage: str) -> None:
            self._stage = stage
            progress.stage(self._name, stage)

        progress.stage(self._name, self._stage)
        try:
            worker = workers.start(run, folder, self._name, reference)
            trial: Trial = worker.result(timeout_s=self._limit_s, on_event=on_event)
        except Exception as exc:
            if self._name == ORIGINAL:
                if not _is_ours(exc):
                    raise
                raise TimeLimitError(
                    f"The original model took longer than method_timeout_s={self._limit_s:g}, "
                    f"while {self._stage}: without it nothing can be compared. Give more "
                    "method_timeout_s, or less data."
                ) from exc
            log.debug("%s failed while %s", self._name, self._stage, exc_info=True)
            self._error = exc
            return None
        return trial

    def row(self, budget_s: float) -> Row:
        """The error as a row."""
        error, where = self._error, f"while {self._stage}"
        if _is_ours(error):
            if self._ends_budget:
                reason = f"the budget of {budget_s:g} s ended {where}; give more budget_s"
                return Row(self._name, "skipped", reason=reason)
            reason = f"took longer than {self._limit_s:g} s, {where}; give more method_timeout_s"
            return Row(self._name, "timeout", reason=reason)
        lines = str(error).strip().splitlines() or [""]
        text = lines[0][:300]
        if not isinstance(error, WorkerLostError):
            text = f"{type(error).__name__}: {text}"
        return Row(self._name, "failed", reason=f"{text} ({where})")


def _is_ours(error: BaseException | None) -> bool:
    """Whether the limit of an attempt ended it, not a limit within the user's own code."""
    return isinstance(error, TimeLimitError) and not isinstance(error.__cause__, WorkerError)


def _left_out(name: str, budget_s: float) -> Row:
    return Row(
        name,
        "skipped",
        reason=f"the budget of {budget_s:g} s was used up before its turn; give more budget_s",
    )


def _packed(task: Task) -> bytes:
    """The task as bytes; data that cannot be sent is read here and its batches are sent.

    Raises:
        ConfigError: Something else cannot be sent.
    """
    for name in ("training_data", "validation_data"):
        data = getattr(task, name)
        if data is not None and _fault(data) is not None:
            log.info("%s cannot be pickled: its batches are read here and kept in memory", name)
            with kept_randomness(data):
                batches: Any = {name: list(as_batches(data, name))}
            task = replace(task, **batches)
    try:
        return dumps(task)
    except Exception as exc:
        for name in ("model", "metric", "training_data", "validation_data", "sample"):
            reason = _fault(getattr(task, name))
            if reason is not None:
                raise ConfigError(
                    f"{name} cannot be sent to another process, and each method is tried in a "
                    f"process of its own: {reason}. trace() and quantize() work in this one."
                ) from exc
        raise


def _fault(value: Any) -> str | None:
    """Why ``value`` cannot be pickled; None if it can."""
    try:
        dumps(value)
    except Exception as exc:  # noqa: BLE001  (user classes pickle as they like)
        return f"{type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc) else ''}"
    return None


class _Progress:
    """Lines on stderr: one a finished method, and on a terminal the present stage."""

    def __init__(self, count: int) -> None:
        self._count, self._done = count, 0
        self._line = LiveLine()
        self._since = time.monotonic()

    def stage(self, name: str, stage: str) -> None:
        self._line.show(f"[{self._done + 1}/{self._count}] {name}: {stage} …")

    def row(self, row: Row) -> None:
        self._done += 1
        now = time.monotonic()
        took, self._since = now - self._since, now
        numbers = (
            f"{row.latency_ms:.3g} ms, {row.speedup:.2f}x"
            if row.latency_ms is not None and row.speedup is not None
            else f"{row.status}: {row.reason[:60]}"
        )
        self._line.keep(f"[{self._done}/{self._count}] {row.name:<24} {numbers} ({took:.0f} s)")

    def end(self) -> None:
        self._line.close()
