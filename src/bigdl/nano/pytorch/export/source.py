"""A PyTorch module as a ``Source``: bound to a sample, exported to ONNX, checked."""

from __future__ import annotations

import inspect
import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bigdl._base.errors import ArgumentError, BigDLError, ConfigError
from bigdl._base.optional import need
from bigdl.nano.accelerators.base import TensorSpec
from bigdl.nano.accelerators.here import missing, triton_hazard
from bigdl.nano.accelerators.scratch import Scratch
from bigdl.nano.accelerators.torch_modules import frozen_copy
from bigdl.nano.pytorch.export.axes import Probe, Run, declared_axes, probe_axes, resize
from bigdl.nano.pytorch.export.binding import (
    Interface,
    as_call,
    bind_sample,
    forward_signature,
    spec_dtype,
    to_array,
    to_tensor,
)
from bigdl.nano.pytorch.export.flat import Flat, InputsKept, as_module
from bigdl.nano.pytorch.export.quiet import own_kernels_of_rnns, quiet_run
from bigdl.nano.pytorch.export.simpler import simpler_operators
from bigdl.nano.pytorch.export.splitting import split_batch
from bigdl.nano.pytorch.export.structure import Structure, Unknown, flatten
from bigdl.nano.pytorch.export.verify import first_cause, is_close, run_onnx_file, verify

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bigdl.nano.accelerators.base import Arrays
    from bigdl.nano.pytorch.export.binding import Sample

__all__ = ["TorchSource", "split_batch"]

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
        module = as_module(model)
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
        return InputsKept(self._module) if self._writes else self._module

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
        return Flat(self._module, self.interface)

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
            if not is_close(first, second):
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
                program = self._to_onnx(model)
                if not any(map(_is_circular, program.model.graph)):
                    return program
            except BigDLError:
                raise
            except Exception as exc:
                if "adaptive_" not in first_cause(exc):
                    raise ConfigError(self._export_fault(exc)) from exc
            try:  # ONNX has no such pooling, OpenVINO no such padding: in other operators, then
                return self._to_onnx(self.exported(model).run_decompositions(simpler_operators()))
            except Exception as exc:
                raise ConfigError(self._export_fault(exc)) from exc

    def _to_onnx(self, model: Any) -> Any:
        shapes = self.dynamic_shapes()
        with own_kernels_of_rnns():
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
        return f"{self._name} cannot be exported to ONNX: {first_cause(exc)}" + (
            " (dynamic_axes=False fixes every length to the sample's)" if _is_shape(exc) else ""
        )

    def _compare(self, path: Path) -> None:
        """Refuse an export that gives other results than the model."""
        exported = run_onnx_file(path, self.inputs, self.outputs)
        if exported is None:
            log.warning("No runtime is installed to check the exported %s.", self._name)
            return
        try:
            verify(exported, self.runs, self.outputs, f"The ONNX export of {self._name}")
        finally:
            exported.close()


def _is_circular(node: Any) -> bool:
    """Whether an ONNX node pads with what lies at the other end."""
    mode = node.attributes.get("mode") if node.op_type == "Pad" else None
    return mode is not None and mode.as_string() == "wrap"


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


def _is_shape(exc: BaseException) -> bool:
    text = first_cause(exc).lower()
    return any(word in text for word in ("dynamic", "symbolic", "constraint", "specializ"))
