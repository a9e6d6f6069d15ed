"""One method tried in a worker process: built, saved, timed, and its accuracy measured.

A worker holds the original and one candidate, both on the same threads, and times them in turns.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import pickle
import random
import sys
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from bigdl._base.errors import ConfigError, DataError, MissingDependencyError
from bigdl._base.nursery import emit
from bigdl.nano import bench
from bigdl.nano.pytorch.export.binding import as_call
from bigdl.nano.pytorch.export.source import split_batch
from bigdl.nano.pytorch.inference.accelerated import build
from bigdl.nano.pytorch.inference.batches import as_batches, first_batch
from bigdl.nano.pytorch.inference.calibrate import calibration, predictions, rows_of
from bigdl.nano.pytorch.inference.methods import METHODS
from bigdl.nano.pytorch.inference.metrics import Agreement, read_metric
from bigdl.nano.pytorch.inference.storage import save
from bigdl.nano.selection import ORIGINAL, Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bigdl.nano.pytorch.inference.metrics import Metric
    from bigdl.nano.selection import Objective

__all__ = ["Randomness", "Shipped", "Task", "Trial", "run"]

TASK_FILE = "task.pkl"
# Seconds of timing a method; enough for hundreds of fast calls and a few very slow ones.
_TIMING_S = 3.0
_TURNS = 40


@dataclass(frozen=True)
class Randomness:
    """The state of the process-wide random streams."""

    python: Any
    torch: torch.Tensor
    numpy: Any

    @classmethod
    def now(cls) -> Randomness:
        """This process's."""
        numpy = sys.modules.get("numpy")
        state = numpy.random.get_state() if numpy is not None else None
        return cls(random.getstate(), torch.get_rng_state(), state)

    def restore(self) -> None:
        """Make it this process's."""
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        numpy = sys.modules.get("numpy")
        if numpy is not None and self.numpy is not None:
            numpy.random.set_state(self.numpy)


@dataclass(frozen=True)
class Shipped:
    """A compiled program, which pickle cannot send, in its own form of a file."""

    kind: Literal["script", "export"]
    content: bytes

    @classmethod
    def of(cls, model: Any) -> Any:
        """``model`` in the form in which it travels: itself, unless it is such a program."""
        buffer = io.BytesIO()
        if isinstance(model, torch.jit.ScriptModule):
            torch.jit.save(model, buffer)
            return cls("script", buffer.getvalue())
        if isinstance(model, torch.export.ExportedProgram):
            torch.export.save(model, buffer)
            return cls("export", buffer.getvalue())
        return model

    def open(self) -> torch.nn.Module:
        """The module."""
        buffer = io.BytesIO(self.content)
        module: torch.nn.Module
        if self.kind == "script":
            with warnings.catch_warnings():  # that TorchScript has no future is not our news
                warnings.simplefilter("ignore", FutureWarning)
                module = torch.jit.load(buffer)  # type: ignore[no-untyped-call]
        else:
            module = torch.export.load(buffer).module()
        return module


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all methods have in common; written once, read by each worker.

    Args:
        model: The original, or the form in which it travels.
        training_data: As the user gave it: calibration, and what is timed.
        validation_data: As the user gave it, or None for the training data.
        metric: As the user gave it.
        direction: "maximize" or "minimize".
        sample: The user's ``input_sample``, or None.
        objective: What the speedup is measured for.
        threads: Threads of every model.
        randomness: The caller's, so that shuffles and augmentations are the same in each worker.
    """

    model: Any
    training_data: Any
    validation_data: Any
    metric: Any
    direction: str
    sample: Any
    objective: Objective
    threads: int
    randomness: Randomness


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a worker brings back.

    Args:
        row: The method's row.
        metric: What its accuracy is called.
        reference: The original's outputs, where methods are compared with them.
        sample: The inputs that it was timed on.
    """

    row: Row
    metric: str
    higher_is_better: bool
    reference: Any = None
    sample: Any = None


def run(folder: Path, name: str, reference: Any) -> Trial:
    """Try method ``name`` of the task in ``folder``. Runs in a worker.

    Emits the stage it has reached, as the subject of "while …".

    Args:
        folder: Holds the task; a model that can be loaded is saved there, under its name.
        name: A method.
        reference: What the original's trial brought back.
    """
    emit("reading the model and the data")
    task = _read_task(folder)
    torch.set_num_threads(task.threads)
    work = _Work(task)
    metric: Metric = read_metric(task.metric, task.direction) or Agreement(reference)
    if name == ORIGINAL:
        row = _measure(work, name, work.original, _bytes_of(task.model), metric)
    else:
        row = _try(work, name, folder, metric)
    kept = metric.reference if isinstance(metric, Agreement) and name == ORIGINAL else None
    return Trial(
        row=row,
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        reference=kept,
        sample=work.sample if name == ORIGINAL else None,
    )


def _read_task(folder: Path) -> Task:
    try:
        with (folder / TASK_FILE).open("rb") as file:
            task: Task = pickle.load(file)
    except Exception as exc:
        raise ConfigError(
            "The model, the data or the metric cannot be read in another process, and each method "
            f"is tried in a process of its own: {type(exc).__name__}: {_sentence(exc)}. "
            "trace() and quantize() work in this one."
        ) from exc
    if isinstance(task.model, Shipped):
        return replace(task, model=task.model.open())
    return task


class _Work:
    """The task's parts in the forms that measuring needs."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = task.model
        self.training = as_batches(task.training_data, "training_data")
        self.validation = (
            self.training
            if task.validation_data is None
            else as_batches(task.validation_data, "validation_data")
        )
        task.randomness.restore()
        batch, _ = split_batch(
            first_batch(self.training, "training_data"), self.model, task.sample
        )
        self.batch = batch
        self.sample = batch if task.sample is None else task.sample
        with contextlib.suppress(NotImplementedError):  # a graph of torch.export has no modes
            self.model.eval()

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The caller's model as a careful caller would run it."""
        with torch.inference_mode():
            return self.model(*args, **kwargs)

    def accuracy(self, metric: Metric, model: Callable[..., Any]) -> float:
        """The metric of ``model`` on the validation set: the same batches in each worker."""
        self.task.randomness.restore()
        return metric.measure(
            model,
            lambda: predictions(model, self.validation, self.model, self.task.sample),
            self.validation,
        )


def _try(work: _Work, name: str, folder: Path, metric: Metric) -> Row:
    method = METHODS[name]
    emit("building it")
    work.task.randomness.restore()
    try:
        candidate = build(
            work.model,
            name=name,
            accelerator=method.accelerator,
            precision=method.precision,
            sample=work.sample,
            config=method.config(),
            calibration=calibration(work.training, work.model, work.sample)
            if method.precision == "int8"
            else None,
            threads=work.task.threads,
        )
    except (ConfigError, MissingDependencyError) as exc:
        return Row(name, "refused", reason=_sentence(exc))
    if method.needs_model:
        size = _bytes_of(work.model)
    else:
        emit("saving it")
        path = folder / name
        save(candidate, path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return _measure(work, name, candidate, size, metric)


def _measure(
    work: _Work, name: str, candidate: Callable[..., Any], size: int, metric: Metric
) -> Row:
    emit("timing it")
    args, kwargs = as_call(work.sample)
    latency, speedup = _time(work, candidate, args, kwargs)
    throughput, faster = _throughput(work, candidate, latency, speedup)
    emit("measuring its accuracy")
    try:
        accuracy = work.accuracy(metric, candidate)
    except DataError as exc:
        if name == ORIGINAL:
            raise
        return Row(name, "failed", reason=_sentence(exc))
    return Row(
        name,
        "ok",
        latency_ms=latency.median_ms,
        p90_ms=latency.p90_ms,
        throughput=throughput,
        size_mb=size / 1e6,
        accuracy=accuracy,
        speedup=faster if work.task.objective == "throughput" else speedup,
    )


def _time(
    work: _Work, candidate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bench.Timing, float]:
    """Milliseconds of the candidate's calls, and how many times as fast as the original it is."""
    calls: dict[str, Callable[[], object]] = {"candidate": lambda: candidate(*args, **kwargs)}
    if candidate != work.original:
        calls["original"] = lambda: work.original(*args, **kwargs)
    timed = bench.compare(calls, turns=_TURNS, budget_s=_TIMING_S)
    speedup = bench.speedup(timed["original"], timed["candidate"]) if len(timed) > 1 else 1.0
    return timed["candidate"], speedup


def _throughput(
    work: _Work, candidate: Callable[..., Any], latency: bench.Timing, speedup: float
) -> tuple[float, float]:
    """Rows a second on a batch as the data gives it, and the speedup there."""
    args, kwargs = as_call(work.batch)
    rows = rows_of((args, kwargs))
    if work.sample is not work.batch and rows != rows_of(as_call(work.sample)):
        latency, speedup = _time(work, candidate, args, kwargs)
    return rows / latency.median_ms * 1e3, speedup


def _bytes_of(model: torch.nn.Module) -> int:
    """Memory of a model's weights and buffers, tied ones once."""
    tensors = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for tensor in itertools.chain(model.parameters(), model.buffers())
    }
    return sum(tensors.values())


def _sentence(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    return lines[0][:300]
