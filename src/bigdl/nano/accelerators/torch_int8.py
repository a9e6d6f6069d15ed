"""int8 within torch: quantized by torchao's export flow, run by torch's compiler."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigdl._base import machine
from bigdl._base.errors import BigDLError, ConfigError, NotReadyError
from bigdl._base.optional import need
from bigdl.nano.accelerators.base import Config
from bigdl.nano.accelerators.here import int8_saturates, missing, no_cpp, triton_hazard
from bigdl.nano.accelerators.torch_compile import TorchCompileConfig, compiled_call, line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np

    from bigdl.nano.accelerators.base import Arrays, Calibration, Source, Spec

__all__ = ["TorchInt8", "TorchInt8Compiled", "TorchInt8Config"]

_PURPOSE = "The accelerator 'torch_int8'"


@dataclass(frozen=True, kw_only=True)
class TorchInt8Config(Config):
    """It has no options: activations are unsigned with calibrated ranges, weights signed with a
    range for each channel."""


class TorchInt8:
    """Quantizes a PyTorch module without leaving torch."""

    options = TorchInt8Config

    def refuse(self, spec: Spec) -> str | None:
        absent = missing("torch", extra="torch") or missing("torchao", extra="inference")
        if absent:
            return absent
        if spec.precision != "int8":
            return f"it is for int8 only, not {spec.precision}"
        if "avx2" not in machine.isa():
            return "torchao's quantizer for torch's compiler needs an x86 CPU with AVX2"
        return triton_hazard() or no_cpp()

    def compile(
        self, source: Source, spec: Spec, calibration: Calibration | None
    ) -> TorchInt8Compiled:
        from bigdl.nano.pytorch.export.source import TorchSource

        if not isinstance(source, TorchSource):
            raise ConfigError("torch_int8 quantizes PyTorch modules, and this model is not one.")
        if calibration is None:
            raise ConfigError("int8 needs calibration data: give calib_data.")
        graph = _quantized(source, calibration)
        compiled = TorchInt8Compiled(graph, spec)
        try:
            compiled(*source.sample)  # compiles now, not at the user's first call
            for arrays in _other_kind(source):
                compiled(*arrays)
        except BigDLError:
            raise
        except Exception as exc:
            raise ConfigError(f"torch.compile cannot compile the int8 model: {line(exc)}") from exc
        calibration.check(compiled, source.reference, "torch int8")
        return compiled

    def load(self, directory: Path, spec: Spec, native: Any = None) -> TorchInt8Compiled:
        from bigdl.nano.accelerators.torch_graph import read_graph

        need("torchao.quantization.pt2e", extra="inference", purpose=_PURPOSE)  # its operators
        return TorchInt8Compiled(read_graph(directory), spec)


class TorchInt8Compiled:
    """A quantized graph, compiled; flat arrays in and out."""

    native = False

    def __init__(self, graph: Any, spec: Spec) -> None:
        self._graph: Any = graph
        self._spec = spec
        self._call: Any = compiled_call(graph, TorchCompileConfig(), spec.inputs)
        self._constants = frozenset(
            tensor.untyped_storage().data_ptr()
            for tensor in (*graph.parameters(), *graph.buffers())
        )

    def __call__(self, *arrays: np.ndarray) -> Sequence[np.ndarray]:
        import torch

        if self._call is None:
            raise NotReadyError("This model was closed; make it again to call it.")
        from bigdl.nano.accelerators.torch_native import own_memory

        inputs = tuple([torch.from_numpy(_writable(array)) for array in arrays])
        with torch.inference_mode(False), torch.no_grad():
            # the compiler takes a copy of an input for the input itself
            outputs = own_memory(self._call(*inputs), self._constants, inputs, {})
        return [output.numpy() for output in outputs]

    def clone(self) -> TorchInt8Compiled:
        """Another handle: torch's own calls share no state."""
        return copy.copy(self)

    def save(self, directory: Path) -> None:
        from bigdl.nano.accelerators.torch_graph import write_graph

        if self._graph is None:
            raise NotReadyError("This model was closed; make it again to save it.")
        write_graph(self._graph, directory)

    def close(self) -> None:
        self._call = self._graph = None


def _other_kind(source: Any) -> list[Arrays]:
    """Inputs of which another form is compiled than of the sample: it must not fail later."""
    from bigdl.nano.pytorch.export.binding import to_array

    def is_single(arrays: Arrays) -> bool:
        return any(
            arrays[i].shape[axis] == 1 for tie in source.interface.ties for i, axis in tie.members
        )

    runs = [tuple(map(to_array, run.inputs)) for run in source.runs]
    return [arrays for arrays in runs if is_single(arrays) != is_single(source.sample)][:1]


def _writable(array: np.ndarray) -> np.ndarray:
    """torch warns of arrays that it could write to by mistake."""
    return array if array.flags.writeable else array.copy()


# --- quantization -----------------------------------------------------------------------------


def _quantized(source: Any, calibration: Calibration) -> Any:
    """The model as a graph with quantizers in it, calibrated."""
    import torch

    pt2e = need("torchao.quantization.pt2e.quantize_pt2e", extra="inference", purpose=_PURPOSE)
    x86 = need(
        "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer",
        extra="inference",
        purpose=_PURPOSE,
    )
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(
        x86.get_default_x86_inductor_quantization_config(reduce_range=int8_saturates())
    )
    batches = iter(calibration.batches)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            prepared = pt2e.prepare_pt2e(_exported(source), quantizer)
    except BigDLError:
        raise
    except Exception as exc:
        raise ConfigError(f"torchao cannot quantize this model: {line(exc)}") from exc
    _calibrate(prepared, batches)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = pt2e.convert_pt2e(prepared)
    except Exception as exc:
        raise ConfigError(f"torchao cannot quantize this model: {line(exc)}") from exc
    if not any("quantize_per" in str(node.target) for node in graph.graph.nodes):
        raise ConfigError("torchao found nothing to quantize in this model.")
    return graph


def _exported(source: Any) -> Any:
    """The model as one graph of operators."""
    flat = copy.deepcopy(source.flat).cpu()
    _as_functions(flat, source.example())
    _widen_single_channels(flat)
    return source.exported(flat).module(check_guards=False)


def _as_functions(model: Any, example: Sequence[Any]) -> None:
    """Replace modules without weights that are called more than once by plain functions.

    The quantizer looks for a layer by its module and takes two calls of one for a single layer
    with two outputs.
    """
    import torch
    from torch import nn

    counts: dict[int, int] = {}

    def count(module: nn.Module, *_: Any) -> None:
        counts[id(module)] = counts.get(id(module), 0) + 1

    bare = [
        module
        for module in model.modules()
        if not any(True for _ in module.children()) and not module.state_dict()
    ]
    handles = [module.register_forward_pre_hook(count) for module in bare]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    for parent in model.modules():
        for name, child in parent._modules.items():
            if counts.get(id(child), 0) > 1:
                parent._modules[name] = _function(child)


def _function(module: Any) -> Any:
    """A module whose calls look like those of a function: the inner one is never entered."""
    from torch import nn

    class AsFunction(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return module.forward(*args, **kwargs)

    return AsFunction()


def _widen_single_channels(model: Any) -> None:
    """Give convolutions of pictures with one channel a second one, of zeros.

    A picture with one channel is in two memory layouts at once, and where the number of rows is
    free, torch's compiler takes it for the one that its own int8 kernel does not return.
    """
    from torch import nn

    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if type(child) in (nn.Conv2d, nn.Conv3d) and child.in_channels == 1:
                parent._modules[name] = _two_channels(child)


def _two_channels(conv: Any) -> Any:
    import torch
    from torch import nn

    wide = copy.deepcopy(conv)
    wide.in_channels = 2
    weight = torch.cat([conv.weight, torch.zeros_like(conv.weight)], 1)
    wide.weight = nn.Parameter(weight, requires_grad=False)
    pad: Any = (0, 0) * (weight.dim() - 2) + (0, 1)  # the last axis first
    return nn.Sequential(nn.ConstantPad3d(pad, 0.0), wide)


def _calibrate(prepared: Any, batches: Iterator[Arrays]) -> None:
    import torch

    seen = 0
    with torch.no_grad():
        for batch in batches:
            prepared(*[torch.from_numpy(_writable(array)) for array in batch])
            seen += 1
    if seen == 0:
        raise ConfigError("calib_data holds no batch; int8 needs at least one.")
