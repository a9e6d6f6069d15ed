"""A PyTorch module as a ``Source``: bound to a sample, exported to ONNX, checked."""

from __future__ import annotations

import inspect
import logging
import random
import re
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bigdl._base import machine
from bigdl._base.errors import ArgumentError, BigDLError, ConfigError, DataError
from bigdl._base.optional import need
from bigdl.nano.accelerators import ACCELERATORS
from bigdl.nano.accelerators.base import Spec, TensorSpec
from bigdl.nano.accelerators.here import missing, triton_hazard
from bigdl.nano.accelerators.scratch import Scratch
from bigdl.nano.accelerators.torch_modules import frozen_copy
from bigdl.nano.pytorch.axes import Probe, Run, declared_axes, probe_axes, resize
from bigdl.nano.pytorch.binding import (
    Interface,
    as_call,
    bind_sample,
    forward_signature,
    spec_dtype,
    to_array,
    to_tensor,
)
from bigdl.nano.pytorch.pooling import pooling_table
from bigdl.nano.pytorch.structure import Structure, Unknown, flatten, map_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from bigdl.nano.accelerators.base import Arrays
    from bigdl.nano.pytorch.binding import Sample

__all__ = ["TorchSource", "split_batch", "verify"]

log = logging.getLogger(__name__)

# A file in ONNX's own format ends at 2 GB; a little less, as the graph needs room, too.
_ONE_FILE_BYTES = 1_900_000_000
# Rows of the example that is exported: a number that other axes seldom have, so that the
# exporter does not take the batch for one of them.
_EXPORT_ROWS = 5


class TorchSource:
    """A module with one example of its inputs, offered to any accelerator.

    Works on a copy made at the start, in eval mode: the caller's module is never run, changed or
    put into another mode, and training it later does not change what was made from it.

    Args:
        model: A module; ``torch.compile``'d ones, exported programs, fx graphs, TorchScript too.
        sample: A tensor, a tuple (by position) or a dict (by keyword). Arguments that are no
            tensors are constants.
        dynamic_axes: True: axis 0 of every input varies where the model can do it. False: none.
            ``{forward's parameter: [axes]}``: these, and an error where the model cannot.

    Raises:
        ArgumentError: The sample does not fit forward.
        ConfigError: The model cannot run the sample, or an axis cannot vary.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Sample,
        dynamic_axes: bool | Mapping[str, Sequence[int]] = True,
    ) -> None:
        module = _as_module(model)
        self._name = type(module).__name__
        signature = forward_signature(module)
        bound, _ = bind_sample(signature, sample)
        tensors, arguments = flatten(bound)
        if not tensors:
            raise ArgumentError("input_sample holds no tensor; need at least one.")
        for path, value in arguments.constants("input_sample"):
            if isinstance(value, np.ndarray):
                raise ArgumentError(f"{path} is a NumPy array; give torch.from_numpy(it).")
        self._signature, self._arguments = signature, arguments
        axes = declared_axes(dynamic_axes, arguments, tensors)
        self._writes = False
        self._onnx: Path | None = None
        paths = [path for path, _ in _argument_paths(arguments)]
        with quiet_run(module):
            self._module = frozen_copy(module)
            self._given = tensors = [tensor.detach().clone() for tensor in tensors]
            probe = probe_axes(
                self._run, tensors, axes, must=not isinstance(dynamic_axes, bool), paths=paths
            )
            self._check_steady(probe.runs[-1])
        self._probe = probe
        self.interface = self._describe(tensors, probe)

    # --- what the seam asks for ------------------------------------------------------------

    @property
    def native(self) -> nn.Module:
        """The copy, in eval mode; it never writes to its inputs."""
        return _InputsKept(self._module) if self._writes else self._module

    @property
    def sample(self) -> Arrays:
        """Flat inputs of the example call that was given."""
        return tuple(to_array(tensor.cpu()) for tensor in self._given)

    def bind(self, arrays: Sequence[np.ndarray]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward's (args, kwargs) for flat arrays."""
        return self.interface.call_form(self.tensors(arrays))

    def onnx(self) -> Path:
        """Path of the model as an ONNX file; it lives as long as this object.

        Raises:
            ConfigError: It cannot be exported, or the exported model gives other results.
            MissingDependencyError: The exporter's packages are not installed.
        """
        if self._onnx is None:
            self._onnx = self._export()
        return self._onnx

    # --- for those who know torch ----------------------------------------------------------

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The flat inputs."""
        return self.interface.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The flat outputs."""
        return self.interface.outputs

    @property
    def device(self) -> torch.device:
        """Where the model's weights are; the CPU if it has none."""
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            return tensor.device
        return torch.device("cpu")

    def tensors(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Flat arrays as tensors of the inputs' own types."""
        dtypes = [check.dtype for check in self.interface.checks]
        return [
            to_tensor(array, dtype).to(self.device)
            for array, dtype in zip(arrays, dtypes, strict=True)
        ]

    def flatten(self, inputs: Sample) -> Arrays:
        """A batch's inputs, in one of the sample's forms, as flat arrays.

        Raises:
            ArgumentError: They do not fit forward.
            DataError: Their types or shapes are not the sample's.
        """
        args, kwargs = as_call(inputs)
        tensors = self.interface.tensors(args, kwargs)
        self.interface.check(tensors)
        return tuple(to_array(tensor.cpu()) for tensor in tensors)

    def unflatten(self, arrays: Sequence[np.ndarray]) -> Any:
        """Flat outputs as the original returns them."""
        pairs = zip(arrays, self.interface.output_dtypes, strict=True)
        return self.interface.result.build([to_tensor(array, dtype) for array, dtype in pairs])

    def reference(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """The original itself, as a flat call."""
        with torch.no_grad():
            args, kwargs = self.bind(arrays)
            tensors, _ = flatten(self.native(*args, **kwargs))
        return [to_array(tensor.cpu()) for tensor in tensors]

    @property
    def flat(self) -> nn.Module:
        """The model as a module of flat tensors: tensors in, a tuple of tensors out.

        Raises:
            ConfigError: Its result holds an object that is no tensor and no container.
        """
        for path, value in self.interface.result.constants("result"):
            if isinstance(value, Unknown):
                raise ConfigError(
                    f"{self._name} returns a {value.type_name} ({path}), which only Python can "
                    "hold; have it return tensors (Hugging Face models: give use_cache=False in "
                    "the input_sample)."
                )
        if any(isinstance(part, torch.jit.ScriptModule) for part in self._module.modules()):
            raise ConfigError(
                f"{self._name} is TorchScript, which cannot be exported. Give the torch.nn.Module "
                "that it was made from."
            )
        return _Flat(self._module, self.interface)

    def dynamic_shapes(self) -> list[dict[int, Any] | None]:
        """For each flat input, what torch.export is told of its axes."""
        varying: list[dict[int, Any]] = [{} for _ in self.inputs]
        for tie in self.interface.ties:
            for i, axis in tie.members:
                varying[i][axis] = torch.export.Dim.DYNAMIC
        return [axes or None for axes in varying]

    def example(self) -> tuple[torch.Tensor, ...]:
        """Flat inputs to export with."""
        example = list(self._probe.base)
        for tie in self.interface.ties:
            for i, axis in tie.members:
                if axis == 0:
                    example[i] = resize(example[i], axis, _EXPORT_ROWS)
        return tuple(tensor.cpu() for tensor in example)

    @property
    def runs(self) -> tuple[Run, ...]:
        """What the original gave at several lengths."""
        return self._probe.runs

    # --- inside ----------------------------------------------------------------------------

    def _run(self, tensors: Sequence[torch.Tensor]) -> Run:
        """Run the copy on ``tensors``, which are kept as they are."""
        inputs = [tensor.clone() for tensor in tensors]
        versions = [tensor._version for tensor in inputs]
        arguments = self._arguments.build(inputs)
        call = inspect.BoundArguments(self._signature, arguments)
        outputs, result = flatten(self._module(*call.args, **call.kwargs))
        self._writes |= versions != [tensor._version for tensor in inputs]
        kept = tuple(output.detach().clone() for output in outputs)
        return Run(tuple(tensors), kept, result.masked())

    def _check_steady(self, run: Run) -> None:
        """Refuse a model that draws random numbers or counts its calls."""
        if not run.outputs:
            raise ConfigError(f"{self._name} returns no tensor; nothing can be compiled.")
        again = self._run(run.inputs)
        for first, second in zip(run.outputs, again.outputs, strict=True):
            if not _close(first, second):
                raise ConfigError(
                    f"{self._name} gives another result when called again with the same input, in "
                    "eval mode: a compiled form of it could not be checked. Look for dropout that "
                    "is always on, random numbers or state that forward changes."
                )

    def _describe(self, tensors: Sequence[torch.Tensor], probe: Probe) -> Interface:
        free = {member for tie in probe.ties for member in tie.members}
        run = next(run for run in probe.runs if run.inputs is probe.base)
        names = _unique_names(self._arguments, run.result)
        inputs = [
            TensorSpec(
                name=names[i],
                dtype=spec_dtype(tensor.dtype),
                shape=tuple(None if (i, a) in free else n for a, n in enumerate(tensor.shape)),
            )
            for i, tensor in enumerate(tensors)
        ]
        outputs = [
            TensorSpec(
                name=names[len(inputs) + i],
                dtype=spec_dtype(output.dtype),
                shape=tuple(
                    None if axis in probe.varying[i] else n for axis, n in enumerate(output.shape)
                ),
            )
            for i, output in enumerate(run.outputs)
        ]
        return Interface(
            signature=self._signature,
            arguments=self._arguments,
            inputs=inputs,
            outputs=outputs,
            result=run.result,
            ties=probe.ties,
        )

    def _export(self) -> Path:
        """Export, write, and compare with the original."""
        reason = missing("onnx", "onnxscript", extra="inference")
        if reason:
            for package in ("onnx", "onnxscript"):
                need(package, extra="inference", purpose="Exporting to ONNX")
        hazard = triton_hazard()
        if hazard:
            raise ConfigError(f"{self._name} cannot be exported here: {hazard}.")
        self._scratch = Scratch()
        path = self._scratch.path / "model.onnx"
        program = self._program()
        size = sum(t.numel() * t.element_size() for t in self._module.state_dict().values())
        program.save(path, external_data=size > _ONE_FILE_BYTES)
        del program
        self._compare(path)
        return path

    def _program(self) -> Any:
        model = frozen_copy(self.flat).cpu() if self.device.type != "cpu" else self.flat
        with quiet_run(self._module):
            try:
                return self._to_onnx(model)
            except BigDLError:
                raise
            except Exception as exc:
                if "adaptive_" not in _first_cause(exc):
                    raise ConfigError(self._export_fault(exc)) from exc
            try:  # ONNX has no such pooling, but it can be said in other operators
                return self._to_onnx(self.exported(model).run_decompositions(pooling_table()))
            except Exception as exc:
                raise ConfigError(self._export_fault(exc)) from exc

    def _to_onnx(self, model: Any) -> Any:
        shapes = self.dynamic_shapes()
        with _own_kernels_of_rnns():
            return torch.onnx.export(
                model,
                self.example(),
                dynamo=True,
                input_names=[spec.name for spec in self.inputs],
                output_names=[spec.name for spec in self.outputs],
                dynamic_shapes={"leaves": tuple(shapes)} if any(shapes) else None,
                verbose=False,
            )

    def exported(self, flat: nn.Module) -> torch.export.ExportedProgram:
        """``flat``, or a changed copy of it, as one graph of operators."""
        shapes = self.dynamic_shapes()
        return torch.export.export(
            flat,
            self.example(),
            dynamic_shapes={"leaves": tuple(shapes)} if any(shapes) else None,
        )

    def _export_fault(self, exc: Exception) -> str:
        return f"{self._name} cannot be exported to ONNX: {_first_cause(exc)}" + (
            " (dynamic_axes=False fixes every length to the sample's)" if _is_shape(exc) else ""
        )

    def _compare(self, path: Path) -> None:
        """Refuse an export that gives other results than the model."""
        checker = _checker(self.inputs, self.outputs)
        if checker is None:
            log.warning("No runtime is installed to check the exported %s.", self._name)
            return
        accelerator, spec = checker
        exported = accelerator.compile(_OnnxFile(path), spec, None)
        try:
            verify(exported, self, f"The ONNX export of {self._name}")
        finally:
            exported.close()


class _OnnxFile:
    """A source that is a file already."""

    native = None
    sample: Arrays = ()

    def __init__(self, path: Path) -> None:
        self._path = path

    def bind(self, arrays: Sequence[np.ndarray]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(arrays), {}

    def onnx(self) -> Path:
        return self._path


def _checker(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Any:
    """The first runtime that can run an ONNX file here, with a spec for it."""
    for name in ("onnxruntime", "openvino"):
        accelerator = ACCELERATORS.get(name)()
        spec = Spec(
            precision="fp32",
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            threads=machine.cores(),
            config=accelerator.options(),
        )
        if accelerator.refuse(spec) is None:
            return accelerator, spec
    return None


def verify(call: Any, source: TorchSource, who: str) -> None:
    """Compare a flat call with the original at every length that was tried.

    Raises:
        ConfigError: It fails, or its results are not the original's.
    """
    for run in source.runs:
        arrays = tuple(map(to_array, run.inputs))
        lengths = ", ".join(str(tuple(array.shape)) for array in arrays)
        try:
            found = call(*arrays)
        except BigDLError:
            raise
        except Exception as exc:
            raise ConfigError(f"{who} fails for inputs {lengths}: {_first_cause(exc)}") from exc
        for spec, array, wanted in zip(source.outputs, found, run.outputs, strict=True):
            got = torch.from_numpy(np.ascontiguousarray(array))
            if tuple(got.shape) != tuple(wanted.shape):
                raise ConfigError(
                    f"{who} gives {spec.name!r} the shape {tuple(got.shape)} for inputs "
                    f"{lengths}; the original gives {tuple(wanted.shape)}."
                )
            if not _close(wanted, got):
                raise ConfigError(
                    f"{who} gives other results for {spec.name!r} than the original for inputs "
                    f"{lengths}: they differ by up to {_distance(wanted, got):.3g}."
                )


# How far apart two computations of one thing may lie, as a share of its largest value.
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 6e-2}


def _close(wanted: torch.Tensor, got: torch.Tensor) -> bool:
    if not (wanted.is_floating_point() or wanted.is_complex()):
        same = wanted == got.to(wanted.dtype)
        # a tie between two classes may fall either way, once in a while
        return same.numel() == 0 or bool(same.float().mean() >= 0.98)
    # where the original overflows or has no value, the other form must, too
    a, b = wanted.double(), got.double()
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    tolerance = _TOLERANCE.get(wanted.dtype, 1e-3)
    scale = a[finite].abs().max().item() if finite.any() else 0.0
    return _distance(a, b) <= tolerance * scale + 1e-6


def _distance(wanted: torch.Tensor, got: torch.Tensor) -> float:
    a, b = wanted.double(), got.double()
    finite = torch.isfinite(a) & torch.isfinite(b)
    return (a[finite] - b[finite]).abs().max().item() if finite.any() else 0.0


@contextmanager
def quiet_run(model: nn.Module) -> Iterator[None]:
    """No gradients, the global random streams put back, other libraries' warnings held."""
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    devices = list(range(torch.cuda.device_count())) if on_gpu else []
    streams = random.getstate(), np.random.get_state()
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices),
            torch.inference_mode(False),  # a caller's: its tensors would stay bound to it
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])


@contextmanager
def _own_kernels_of_rnns() -> Iterator[None]:
    """The exporter swaps in loops for recurrent layers, so that lengths can vary, but not in the
    operators' cache: what an earlier export left there would fix the length, and what this one
    leaves would reach the process's other work."""
    operators = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)
    try:
        for operator in operators:
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator in operators:
            operator._dispatch_cache.clear()


class _Flat(nn.Module):
    """A model as flat tensors in, a tuple of flat tensors out."""

    def __init__(self, model: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self._interface = interface

    def train(self, mode: bool = True) -> _Flat:
        self.training = False  # the model inside has its modes already
        return self

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dtypes = [check.dtype for check in self._interface.checks]
        # what NumPy lacks travels as float32
        inputs = [leaf.to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
        args, kwargs = self._interface.call_form(inputs)
        outputs, _ = flatten(self.model(*args, **kwargs))
        seen: set[int] = {id(leaf) for leaf in (*leaves, *inputs)}
        apart = []
        for output in outputs:
            if output.dtype is torch.bfloat16:
                output = output.float()
            # an output that is an input, or another output, needs a place of its own
            apart.append(output.clone() if id(output) in seen else output)
            seen.add(id(output))
        return tuple(apart)


class _InputsKept(nn.Module):
    """A model that writes to its inputs, given copies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors(torch.clone, (args, kwargs))
        return self.model(*args, **kwargs)


def _as_module(model: Any) -> nn.Module:
    """The module behind what was given.

    Raises:
        ArgumentError: There is none.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    for name in ("_orig_mod", "module"):  # torch.compile, DataParallel and the like
        wrapped = type(model).__name__ in ("OptimizedModule", *_WRAPPERS)
        inner = getattr(model, name, None) if wrapped else None
        if isinstance(inner, nn.Module):
            return _as_module(inner)
    if isinstance(model, nn.Module):
        return model
    raise ArgumentError(f"model is a {type(model).__name__}; need a torch.nn.Module.")


_WRAPPERS = ("DataParallel", "DistributedDataParallel")


def _argument_paths(arguments: Structure) -> list[tuple[str, str]]:
    return [
        path
        for name, part in zip(arguments.keys, arguments.children, strict=True)
        for path in part.paths(name)
    ]


def _unique_names(arguments: Structure, result: Structure) -> list[str]:
    """Names for an exported file: of the inputs, then of the outputs."""
    wanted = [plain for _, plain in _argument_paths(arguments)]
    for _, plain in result.paths("output"):
        # a named part of the result goes by its own name
        wanted.append(plain if plain == "output" else plain.removeprefix("output_") or plain)
    names: list[str] = []
    for name in wanted:
        name = re.sub(r"\W", "_", name)
        if not name or name[0].isdigit():
            name = f"output_{name}"
        base, number = name, 1
        while name in names:
            number += 1
            name = f"{base}_{number}"
        names.append(name)
    return names


def _first_cause(exc: BaseException) -> str:
    """The innermost reason, in one line."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(exc).__name__}: {text[:300]}"


def _is_shape(exc: BaseException) -> bool:
    text = _first_cause(exc).lower()
    return any(word in text for word in ("dynamic", "symbolic", "constraint", "specializ"))


# --- batches ----------------------------------------------------------------------------------

# Entries of a dict batch that are labels although forward could take them (Hugging Face).
_LABELS = ("labels", "label", "target", "targets")


def split_batch(batch: Any, model: nn.Module, sample: Sample | None = None) -> tuple[Sample, Any]:
    """Inputs and labels of one batch.

    Of a tuple or list as many leading items are inputs as forward has required parameters, or as
    the sample has entries; the rest are labels. Of a dict those entries are inputs that forward
    has parameters for, or that the sample has. A tensor is an input without labels.

    Args:
        batch: What a loader gives.
        model: Whose forward is asked.
        sample: An example of the inputs, if there is one.

    Returns:
        The inputs, as a tuple (by position) or a dict (by keyword), and the labels: None if there
        are none, the thing itself if there is one, else a tuple or a dict.

    Raises:
        DataError: There are fewer items than inputs.
        ArgumentError: It is no batch.
    """
    if isinstance(batch, torch.Tensor):
        return (batch,), None
    if isinstance(batch, Mapping):
        return _split_mapping(batch, model, sample)
    if not isinstance(batch, (tuple, list)):
        raise ArgumentError(
            f"A batch is a {type(batch).__name__}; need a tensor, a tuple, a list or a dict."
        )
    if batch and isinstance(batch[0], Mapping) and _by_keyword(batch[0], model, sample):
        return dict(batch[0]), _labels(tuple(batch[1:]))
    count = _input_count(model, sample)
    if len(batch) < count:
        raise DataError(
            f"A batch has {len(batch)} items, but {type(model).__name__} needs {count} inputs."
        )
    return tuple(batch[:count]), _labels(tuple(batch[count:]))


def _labels(rest: tuple[Any, ...]) -> Any:
    return (rest if len(rest) > 1 else rest[0]) if rest else None


def _input_count(model: nn.Module, sample: Sample | None) -> int:
    if isinstance(sample, torch.Tensor):
        return 1
    if isinstance(sample, (tuple, Mapping)):
        return len(sample)
    parameters = forward_signature(_as_module(model)).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return max(1, len(required))


def _by_keyword(batch: Mapping[Any, Any], model: nn.Module, sample: Sample | None) -> bool:
    if sample is not None:
        return isinstance(sample, Mapping)
    parameters = forward_signature(_as_module(model)).parameters
    return len(batch) > 0 and all(key in parameters for key in batch)


def _split_mapping(
    batch: Mapping[Any, Any], model: nn.Module, sample: Sample | None
) -> tuple[Sample, Any]:
    if isinstance(sample, Mapping):
        wanted = list(sample)
    else:
        parameters = forward_signature(_as_module(model)).parameters
        wanted = [
            name
            for name, p in parameters.items()
            if name in batch and (name not in _LABELS or p.default is p.empty)
        ]
    missing_keys = [name for name in wanted if name not in batch]
    if not wanted and _input_count(model, sample) == 1:  # forward(batch): it takes the dict itself
        return (batch,), None
    if missing_keys or not wanted:
        raise DataError(
            f"A batch has the entries {', '.join(map(str, batch))}, "
            + (
                f"but no {missing_keys[0]!r}, which the sample has."
                if missing_keys
                else f"and {type(model).__name__}.forward has none of them as a parameter."
            )
        )
    rest = {key: value for key, value in batch.items() if key not in wanted}
    labels = (next(iter(rest.values())) if len(rest) == 1 else rest) if rest else None
    return {name: batch[name] for name in wanted}, labels
