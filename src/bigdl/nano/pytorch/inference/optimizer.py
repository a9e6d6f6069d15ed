"""The public face of accelerated inference: one call for one way, ``optimize`` for all of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from bigdl._base.calls import answers, shown
from bigdl._base.environment import environment
from bigdl._base.errors import ArgumentError, ConfigError, NotReadyError
from bigdl.nano.accelerators import ACCELERATORS
from bigdl.nano.pytorch import old_names
from bigdl.nano.pytorch.inference.accelerated import AcceleratedModule, build
from bigdl.nano.pytorch.inference.batches import as_batches, check_sample
from bigdl.nano.pytorch.inference.context import InferenceContext
from bigdl.nano.pytorch.inference.methods import METHODS, known_name, matching, method_of, select
from bigdl.nano.pytorch.inference.metrics import read_metric
from bigdl.nano.pytorch.inference.onnx_mode import in_onnx_mode
from bigdl.nano.pytorch.inference.optimizing import Found, search
from bigdl.nano.pytorch.inference.quantizing import Quantization
from bigdl.nano.pytorch.inference.trial import Randomness, Shipped, Task
from bigdl.nano.selection import ORIGINAL, Criterion, Report

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from os import PathLike
    from typing import IO

    from bigdl.nano.accelerators.base import Config
    from bigdl.nano.pytorch.export.binding import Sample
    from bigdl.nano.pytorch.inference.multi_instance import MultiInstance

__all__ = ["InferenceOptimizer"]


class InferenceOptimizer:
    """Make a model's inference faster, and see why.

    ``trace`` and ``quantize`` make one accelerated model. ``optimize`` tries every method that
    can work here, each in a process of its own, and keeps the report; ``get_best_model`` gives
    the fastest one that keeps the accuracy, or your own model if nothing is worth it.

    The model that is handed over stays as it is: weights, mode, attributes, random streams.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._found: Found | None = None
        self.last_report: Report | None = None

    # --- one way ---

    @staticmethod
    @answers(old_names.TRACE)
    def trace(
        model: nn.Module,
        input_sample: Sample | None = None,
        accelerator: str = "compile",
        *,
        dynamic_axes: bool | Mapping[str, Sequence[int]] = True,
        config: Config | Mapping[str, Any] | None = None,
    ) -> AcceleratedModule:
        """A new module that runs ``model`` in full precision through an accelerator.

        Args:
            model: Any module, in any mode. It is copied.
            input_sample: Example inputs: a tensor, a tuple (by position) or a dict (by keyword).
                None takes a Lightning module's ``example_input_array``.
            accelerator: "compile" (torch's own), "onnxruntime" or "openvino".
            dynamic_axes: True: the first axis of each input may have any length.
                ``{forward's parameter: [axes]}``: these axes may. False: none.
            config: Options of the accelerator, an object of its config class.

        Raises:
            ArgumentError: Something of the wrong type.
            ConfigError: It cannot be done here, or not with this model.
            MissingDependencyError: The accelerator is not installed.
        """
        _check_model(model)
        _check_accelerator(accelerator, optional=False)
        sample = _sample(model, input_sample)
        return build(
            model,
            name=_name(accelerator, "fp32"),
            accelerator=accelerator,
            precision="fp32",
            sample=sample,
            dynamic_axes=dynamic_axes,
            config=config,
            threads=torch.get_num_threads(),
        )

    @staticmethod
    @answers(old_names.QUANTIZE)
    def quantize(
        model: nn.Module,
        precision: Literal["int8", "bf16"] = "int8",
        accelerator: str | None = None,
        *,
        calib_data: Any = None,
        validation_data: Any = None,
        metric: Any = None,
        accuracy_criterion: Any = None,
        direction: Literal["maximize", "minimize"] = "maximize",
        input_sample: Sample | None = None,
        config: Config | Mapping[str, Any] | None = None,
    ) -> AcceleratedModule:
        """A new module that runs ``model`` in a lower precision.

        Args:
            model: Any module, in any mode. It is copied.
            precision: "int8" or "bf16".
            accelerator: None is torch itself; else "openvino" or "onnxruntime".
            calib_data: Batches like the real ones, which int8 takes its ranges from: a loader, a
                list of batches, or one batch (a tensor, a tuple or a dict).
            validation_data: What accuracy is measured on; None is ``calib_data``.
            metric: A torchmetrics metric, ``fn(pred, target)``, ``fn(model, loader)``, or None:
                agreement with the original.
            accuracy_criterion: How much may be lost against the original: ``{"relative": 0.01}``,
                ``{"absolute": 0.01}``, or a number, which is relative. None: no limit.
            direction: Whether more of ``metric`` is better.
            input_sample: Example inputs; None is a batch of the data.
            config: Options of the accelerator, an object of its config class.

        Raises:
            AccuracyError: The criterion cannot be kept; nothing is returned.
            ArgumentError: Something of the wrong type.
            ConfigError: It cannot be done here, or not with this model.
            DataError: The data cannot be used as asked.
        """
        _check_model(model)
        _check_precision(precision)
        _check_accelerator(accelerator, optional=True)
        return Quantization(
            model=model.module() if isinstance(model, torch.export.ExportedProgram) else model,
            method=method_of(
                accelerator or {"int8": "torch_int8", "bf16": "eager"}[precision], precision
            ),
            calib_data=calib_data,
            validation_data=validation_data,
            metric=read_metric(metric, direction),
            criterion=Criterion.of(accuracy_criterion),
            sample=_sample(model, input_sample),
            config=config,
        ).run()

    # --- kept and loaded ---

    @staticmethod
    @answers(old_names.SAVE)
    def save(model: nn.Module, path: str | PathLike[str] | IO[bytes]) -> None:
        """Write a model to a folder, or into an open file.

        Args:
            model: What ``trace``, ``quantize`` or ``get_model`` gave; of a plain module, its
                weights are written.
            path: A folder, which is made, or a file opened for writing bytes.

        Raises:
            ArgumentError: ``model`` is no module.
            ConfigError: It holds something that cannot be stored without pickling.
        """
        from bigdl.nano.pytorch.inference import storage

        if isinstance(model, torch.export.ExportedProgram):
            raise ArgumentError(
                "model is an ExportedProgram, which stores itself: torch.export.save(model, "
                "path). save() takes what trace, quantize or get_model gave, or a module."
            )
        _check_path(path, "write")
        storage.save(model, path)

    @staticmethod
    @answers(old_names.LOAD)
    def load(path: str | PathLike[str] | IO[bytes], model: nn.Module | None = None) -> nn.Module:
        """Read what ``save`` wrote; nothing in it is unpickled.

        Args:
            path: The folder, or a file opened for reading bytes.
            model: The original, for forms that run its code (eager, bf16, compile). ONNX and
                OpenVINO forms load without it, and then lack its attributes.

        Raises:
            FileNotFoundError: There is no such folder.
            StoredModelError: It is damaged, was changed, or is of an unknown form.
        """
        from bigdl.nano.pytorch.inference import storage

        _check_path(path, "read")
        if model is not None:
            _check_model(model)
        return storage.load(path, model)

    @staticmethod
    def get_context(*models: nn.Module) -> InferenceContext:
        """A context for calls of ``models``: no gradients, their threads; all put back at its end.

        Args:
            models: Accelerated or plain modules; the most threads among them are used.
        """
        for model in models:
            _check_model(model, accelerated=True)
        return InferenceContext(models)

    @staticmethod
    @answers(old_names.MULTI_INSTANCE)
    def to_multi_instance(
        model: nn.Module,
        num_processes: int = 2,
        cores_per_process: int | None = None,
        cpu_for_each_process: Sequence[Sequence[int]] | None = None,
    ) -> MultiInstance:
        """Copies of a model in worker processes, each on cores of its own.

        The result is called with a list of batches, or a loader, and gives the list of their
        outputs, in order. Weights of plain, bf16 and channels_last models lie in memory once.

        Args:
            model: Any module, or an accelerated one. Copies have eval semantics.
            num_processes: How many copies.
            cores_per_process: Cores for each, with as many threads; None is an equal part of all.
            cpu_for_each_process: The very cores of each, instead: ``[[0, 1], [2, 3]]``.

        Raises:
            ArgumentError: Something of the wrong type, or a model that cannot be sent.
            ConfigError: There are too few cores, or a core is not usable here.
        """
        from bigdl.nano.pytorch.inference.multi_instance import MultiInstance

        _check_model(model, accelerated=True)
        if in_onnx_mode(model):
            raise ConfigError("This model is in ONNX mode: call model.exit_onnx() first.")
        return MultiInstance(model, num_processes, cores_per_process, cpu_for_each_process)

    # --- all ways ---

    @answers(old_names.OPTIMIZE)
    def optimize(
        self,
        model: nn.Module,
        training_data: Any,
        validation_data: Any = None,
        metric: Any = None,
        *,
        direction: Literal["maximize", "minimize"] = "maximize",
        input_sample: Sample | None = None,
        includes: Iterable[str] | None = None,
        excludes: Iterable[str] | None = None,
        accelerator: str | list[str] | None = None,
        precision: str | list[str] | None = None,
        objective: Literal["latency", "throughput"] = "latency",
        budget_s: float = 180.0,
        method_timeout_s: float = 120.0,
    ) -> Report:
        """Try every method that can work here, and report time and accuracy of each.

        Each method is built and timed in a process of its own, in turns with the original and
        with the same threads. Best-known methods come first; what the budget leaves out is a
        row that says so. Ctrl-C ends it at once; ``last_report`` then has the rows so far.

        Args:
            model: Any module, in any mode; it stays as it is.
            training_data: What int8 takes its ranges from, and whose first batch is timed: a
                loader, a list of batches, or one batch (a tensor, a tuple or a dict).
            validation_data: What accuracy is measured on, all of it; None is ``training_data``.
            metric: A torchmetrics metric, ``fn(pred, target)``, ``fn(model, loader)``, or None:
                agreement with the original.
            direction: Whether more of ``metric`` is better.
            input_sample: Inputs to time a call on; None is the first batch of the data.
            includes: Try exactly these methods, and the original.
            excludes: Leave these out.
            accelerator: Only methods of this accelerator, or of one in this list.
            precision: Only methods of this precision, or of one in this list.
            objective: What counts as faster: "latency" is a call on the sample, "throughput" is
                rows a second on a batch of the data.
            budget_s: Seconds for all of it.
            method_timeout_s: Seconds for one method, after which its process is killed.

        Returns:
            The report, which is also kept as ``last_report``.

        Raises:
            ArgumentError: Something of the wrong type.
            ConfigError: A value or a combination that makes no sense.
            DataError: The data cannot be used as asked.
            Exception: What the model or the metric raised for the original.
        """
        _check_model(model)
        read_metric(metric, direction)
        names = select(includes, excludes, accelerator, precision)
        if objective not in ("latency", "throughput"):
            raise ConfigError(f"objective={objective!r} is not 'latency' or 'throughput'.")
        for name, value in {"budget_s": budget_s, "method_timeout_s": method_timeout_s}.items():
            _check_seconds(name, value)
        task = Task(
            model=Shipped.of(model),
            training_data=as_batches(training_data, "training_data"),
            validation_data=None
            if validation_data is None
            else as_batches(validation_data, "validation_data"),
            metric=metric,
            direction=direction,
            sample=check_sample(input_sample),
            objective=objective,
            threads=torch.get_num_threads(),
            randomness=Randomness.now(),
        )
        found = Found(objective=objective, threads=task.threads)
        # an exported program cannot be called itself
        own = model.module() if isinstance(model, torch.export.ExportedProgram) else model
        self._model, self._found, self.last_report = own, found, None
        try:
            search(found, task, names, budget_s=budget_s, method_timeout_s=method_timeout_s)
        finally:
            if found.rows:
                self.last_report = found.report()
        return self._report()

    @answers(old_names.BEST_MODEL)
    def get_best_model(
        self,
        *,
        accelerator: str | list[str] | None = None,
        precision: str | list[str] | None = None,
        accuracy_criterion: Any = None,
    ) -> tuple[nn.Module, str]:
        """The fastest model that keeps the accuracy, and its method's name.

        Without a filter it must also be 5 % faster than the original; else the answer is your
        own model and "original".

        Args:
            accelerator: Only methods of this accelerator, or of one in this list.
            precision: Only methods of this precision, or of one in this list.
            accuracy_criterion: How much may be lost against the original: ``{"relative": 0.01}``,
                ``{"absolute": 0.01}``, or a number, which is relative. None is 5 % relative.

        Raises:
            NotReadyError: ``optimize`` was not called.
            ConfigError: No method that fits the filter ran.
            AccuracyError: None of those that fit keeps the criterion.
        """
        report = self._report()
        fits = matching(accelerator, precision)
        best = report.best(
            Criterion.of(accuracy_criterion),
            among=None if fits is None else lambda row: fits(row.name),
        )
        return self._built(best.name), best.name

    @answers(old_names.GET_MODEL)
    def get_model(self, name: str) -> nn.Module:
        """The model of one method that ran.

        Raises:
            NotReadyError: ``optimize`` was not called.
            ConfigError: No such method, or it did not run; the text says why.
        """
        report = self._report()
        row = report.row(known_name(name, "get_model"))
        if row.status != "ok":
            raise ConfigError(f"There is no model {row.name!r}: {row.status}, {row.reason}")
        return self._built(row.name)

    def summary(self) -> None:
        """Print the report.

        Raises:
            NotReadyError: ``optimize`` was not called.
        """
        print(self._report())  # noqa: T201  (its work)

    def _report(self) -> Report:
        if self.last_report is None:
            raise NotReadyError("There is no report yet: call optimize(model, data) first.")
        return self.last_report

    def _built(self, name: str) -> nn.Module:
        model, found = self._model, self._found
        assert model is not None  # there is a report
        assert found is not None
        if name == ORIGINAL:
            return model
        method = METHODS[name]
        if not method.needs_model:
            from bigdl.nano.pytorch.inference import storage

            loaded = storage.load(found.folder / name)
            loaded.__dict__["_original"] = model  # whose attributes it has, as if built here
            return loaded
        with environment(**found.variables):
            return build(
                model,
                name=name,
                accelerator=method.accelerator,
                precision=method.precision,
                sample=found.sample,
                config=method.config(),
                threads=found.threads,
            )


def _check_model(model: Any, *, accelerated: bool = False) -> None:
    if isinstance(model, AcceleratedModule) and not accelerated:
        raise ArgumentError(
            f"This model is accelerated already ({model.name}); give the original."
        )
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ArgumentError(f"model is the class {model.__name__}; give {model.__name__}(…).")
    if not isinstance(model, (nn.Module, torch.export.ExportedProgram)):
        raise ArgumentError(f"model is a {type(model).__name__}; need a torch.nn.Module.")
    if in_onnx_mode(model) and not accelerated:
        raise ConfigError("This model is in ONNX mode: call model.exit_onnx() first.")


def _check_path(path: Any, method: str) -> None:
    if not isinstance(path, (str, os.PathLike)) and not hasattr(path, method):
        raise ArgumentError(f"path takes a folder or an open file, not {shown(path)}.")


def _check_precision(precision: Any) -> None:
    if not isinstance(precision, str):
        raise ArgumentError(f"precision takes 'int8' or 'bf16', not {shown(precision)}.")
    if precision not in ("int8", "bf16"):
        hint = " trace() makes models in full precision." if precision == "fp32" else ""
        raise ConfigError(f"precision={precision!r} is not 'int8' or 'bf16'.{hint}")


def _check_accelerator(accelerator: Any, *, optional: bool) -> None:
    if accelerator is None and optional:
        return
    if not isinstance(accelerator, str):
        raise ArgumentError(f"accelerator takes a name, not {shown(accelerator)}.")
    if accelerator == "jit":
        raise ConfigError("accelerator='jit' (TorchScript) is gone: use accelerator='compile'.")
    ACCELERATORS.get(accelerator)  # an unknown one is answered there


def _check_seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentError(f"{name} takes seconds, a number, not {shown(value)}.")
    if not value > 0:
        raise ConfigError(f"{name}={value!r}: need more than 0 seconds.")


def _sample(model: nn.Module, sample: Any) -> Sample | None:
    """The example inputs that were given, or a Lightning module's own."""
    own = getattr(model, "example_input_array", None) if sample is None else sample
    return check_sample(own)


def _name(accelerator: str, precision: Literal["fp32", "bf16", "int8"]) -> str:
    return method_of(accelerator, precision).name
