"""Copies of a model in worker processes, each on cores of its own, that share the batches."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigdl._base.environment import ProcessSettings, find_allocator
from bigdl._base.errors import ArgumentError, NotReadyError
from bigdl.nano.cores import divided
from bigdl.nano.pipeline.stages import Stage, Stages
from bigdl.nano.pytorch.export.splitting import split_batch
from bigdl.nano.pytorch.inference import instance_worker, storage
from bigdl.nano.pytorch.inference.accelerated import AcceleratedModule
from bigdl.nano.pytorch.inference.instance_worker import FromFolder, FromMemory, Parts
from bigdl.nano.pytorch.inference.shared_model import SharedModel
from bigdl.nano.pytorch.inference.trial import Shipped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bigdl._base.workers import Workers
    from bigdl.nano.pipeline.worker import Facts

__all__ = ["MultiInstance"]

_COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"


class MultiInstance:
    """Copies of a model in worker processes; made by ``InferenceOptimizer.to_multi_instance``.

    Called with batches, it gives their outputs in order: each batch goes to a copy that is free.
    The copies live until ``close``, the end of a ``with`` block or of this process.

    Args:
        model: A module or an accelerated model. It is not touched, and what is done to it later
            does not reach the copies.
        num_processes: How many copies.
        cores_per_process: Cores for each; None is an equal part of all.
        cpu_for_each_process: The very cores of each, instead.
    """

    def __init__(
        self,
        model: nn.Module,
        num_processes: int,
        cores_per_process: int | None = None,
        cpu_for_each_process: Sequence[Sequence[int]] | None = None,
    ) -> None:
        settings = divided(num_processes, cores_per_process, cpu_for_each_process)
        self._name = getattr(model, "name", None) or type(model).__name__
        self._split = _Split(model)
        source = _Source(model)
        allocator = ProcessSettings(allocator=find_allocator())
        self._stages = Stages(
            [
                Stage(
                    name="the model",
                    open_for=source.open_for,
                    settings=settings,
                    fds=source.fds,
                )
            ],
            whole="multi-instance model",
            advice="It can be called again: a new process takes its place.",
            preload=("torch", instance_worker.__name__),
            env={**allocator.variables(), **_compiler_cache()},
        )
        self.num_processes = num_processes
        self._end = weakref.finalize(self, _end, self._stages, source)

    def __call__(self, batches: Iterable[Any]) -> list[Any]:
        """The outputs for ``batches``, in order, as the model gives them, without gradients.

        Args:
            batches: A list of batches, or a loader. A batch is a tensor, a tuple or list of
                which as many leading items are inputs as the model has, or a dict by keyword.

        Raises:
            Exception: What the model raised, as its own type; the text of its cause names the
                batch. The copies can be called again.
            WorkerLostError: A copy's process died. Called again, a new one takes its place.
            NotReadyError: It is closed.
        """
        _check_batches(batches)
        return self._stages.run(self._inputs(batches))

    def _inputs(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            yield self._split(batch)

    def processes(self) -> list[Facts]:
        """The processes as they have found themselves: number, cores, threads, allocator."""
        return self._stages.facts()[0]

    def close(self) -> None:
        """End the processes; calling it twice is harmless."""
        self._end()

    def __enter__(self) -> MultiInstance:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._end.alive else ", closed"
        return f"MultiInstance({self._name!r}, num_processes={self.num_processes}{state})"


def _end(stages: Stages, source: _Source) -> None:
    stages.close()
    source.close()


def _compiler_cache() -> dict[str, str]:
    """What torch's compiler has made for this process is found by the others."""
    if _COMPILER_CACHE in os.environ or "torch._inductor" not in sys.modules:
        return {}
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return {_COMPILER_CACHE: default_cache_dir()}


class _Source:
    """How the model gets to a worker: in shared memory, or as a runtime's own files."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._shared: SharedModel | None = None
        if not isinstance(model, AcceleratedModule) or model._compiled.native:
            self._shared = _shared(model)

    @property
    def fds(self) -> tuple[int, ...]:
        return () if self._shared is None else (self._shared.fd,)

    def open_for(self, workers: Workers) -> Callable[[], Callable[[Any], Any]]:
        if self._shared is not None:
            return FromMemory(self._shared.opened)
        folder = workers.scratch() / "model"
        storage.save(self._model, folder)
        return FromFolder(folder)

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()


def _shared(model: Any) -> SharedModel:
    value = Shipped.of(model)
    if isinstance(model, AcceleratedModule):
        value = Parts(
            model._compiled, model._interface, model._spec, model.name, model.accelerator
        )
    try:
        return SharedModel(value)
    except NotReadyError:
        raise
    except Exception as exc:
        raise ArgumentError(
            f"The model, a {type(model).__name__}, cannot be sent to worker processes: {exc}. "
            "Take what cannot be pickled out of it."
        ) from exc


class _Split:
    """The inputs of a batch, apart from its labels."""

    def __init__(self, model: Any) -> None:
        is_program = isinstance(model, torch.export.ExportedProgram)
        self._model = model.module() if is_program else model
        self._names: list[str] | None = None
        if isinstance(model, AcceleratedModule):
            self._names = list(model._interface.arguments.keys)

    def __call__(self, batch: Any) -> Any:
        return split_batch(batch, self._model, self._sample(batch))[0]

    def _sample(self, batch: Any) -> Any:
        """What an accelerated model was made with, in the form that the batch has."""
        if self._names is None:
            return None
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(first, Mapping) and set(self._names) <= first.keys():
            return dict.fromkeys(self._names)
        return tuple(self._names)


def _check_batches(batches: Any) -> None:
    if isinstance(batches, (torch.Tensor, tuple, Mapping)):
        raise ArgumentError(
            f"A multi-instance model takes a list of batches or a loader, and this is one "
            f"{type(batches).__name__}: give [batch]."
        )
    is_rows = isinstance(batches, torch.utils.data.Dataset) and not isinstance(
        batches, torch.utils.data.IterableDataset
    )
    if is_rows:
        raise ArgumentError(
            "A multi-instance model takes batches, and a data set gives single rows: give "
            "DataLoader(dataset, batch_size=…)."
        )
    if isinstance(batches, (str, bytes)) or not isinstance(batches, Iterable):
        raise ArgumentError(
            f"A multi-instance model takes a list of batches or a loader, not a "
            f"{type(batches).__name__}."
        )
