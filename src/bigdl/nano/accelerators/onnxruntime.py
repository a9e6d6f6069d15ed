"""ONNX Runtime: fp32, int8 with calibrated ranges (QDQ), int8 with ranges found at each call.

Never imports a framework: it works from ``Source.onnx()``.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bigdl._base.errors import ConfigError, NotReadyError, StoredModelError
from bigdl._base.optional import need
from bigdl.nano.accelerators.base import Config, make_config
from bigdl.nano.accelerators.here import int8_saturates, missing
from bigdl.nano.accelerators.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import ModuleType

    from bigdl.nano.accelerators.base import Arrays, Calibration, Source, Spec

__all__ = ["OnnxRuntime", "OnnxRuntimeCompiled", "OnnxRuntimeConfig"]

_FILE = "model.onnx"
_INT8_ONLY = ("quantization", "calibration_method")


@dataclass(frozen=True, kw_only=True)
class OnnxRuntimeConfig(Config):
    """Options of ONNX Runtime.

    Args:
        quantization: int8 only. "static": ranges of activations come from calibration data.
            "dynamic": they are found at each call, for matrix products alone; needs no data.
            None is "static".
        calibration_method: int8 "static" only: how a range is taken from what was seen. None is
            "minmax".
        spinning: Let threads wait busily for the next call: lower latency, idle cores burn.
    """

    quantization: Literal["static", "dynamic"] | None = None
    calibration_method: Literal["minmax", "entropy", "percentile"] | None = None
    spinning: bool = True

    @property
    def is_dynamic(self) -> bool:
        return self.quantization == "dynamic"


class OnnxRuntime:
    """Runs an ONNX file on the CPU."""

    options = OnnxRuntimeConfig

    def refuse(self, spec: Spec) -> str | None:
        config = make_config(OnnxRuntimeConfig, spec.config)
        absent = missing("onnxruntime", "onnx", extra="inference")
        if absent:
            return absent
        if spec.precision == "bf16":
            return "ONNX Runtime has no bf16 arithmetic on a CPU"
        if spec.precision == "fp32":
            return config.unsuited(_INT8_ONLY, "for precision 'int8' only")
        if config.is_dynamic:
            return config.unsuited(("calibration_method",), "for static quantization only")
        return None

    def compile(
        self, source: Source, spec: Spec, calibration: Calibration | None
    ) -> OnnxRuntimeCompiled:
        config = make_config(OnnxRuntimeConfig, spec.config)
        path = source.onnx()
        if spec.precision == "fp32":
            return OnnxRuntimeCompiled(_copied(path), spec)
        if calibration is None and not config.is_dynamic:
            raise ConfigError("int8 needs calibration data: give calib_data.")
        folder = Scratch()
        with _quiet():
            if config.is_dynamic:
                _quantize_dynamic(path, folder.path / _FILE)
            else:
                assert calibration is not None
                _quantize_static(path, folder.path / _FILE, spec, config, calibration)
        compiled = OnnxRuntimeCompiled(folder, spec)
        if calibration is not None and calibration.has_limit:
            original = OnnxRuntimeCompiled(_copied(path), spec)
            try:
                calibration.check(compiled, original, "ONNX Runtime int8")
            except BaseException:
                compiled.close()
                raise
            finally:
                original.close()
        return compiled

    def load(self, directory: Path, spec: Spec, native: Any = None) -> OnnxRuntimeCompiled:
        if not (directory / _FILE).is_file():
            raise StoredModelError(f"{directory} has no {_FILE}.")
        return OnnxRuntimeCompiled(_copied(directory / _FILE), spec)


def _copied(path: Path) -> Scratch:
    """A folder of our own with the file and, for large models, the weights beside it."""
    folder = Scratch()
    for part in _parts(path):
        shutil.copyfile(part, folder.path / part.name)
    return folder


def _parts(path: Path) -> list[Path]:
    """The file itself and its weights, which are in a file of their own if they are large."""
    return [path, *sorted(path.parent.glob(f"{path.name}.data"))]


class OnnxRuntimeCompiled:
    """A session. ONNX Runtime lets threads share one, copies outputs, and never writes inputs."""

    native = False

    def __init__(self, folder: Scratch, spec: Spec) -> None:
        self._folder: Scratch | None = folder
        self._spec = spec
        self._inputs = [each.name for each in spec.inputs]
        self._outputs = [each.name for each in spec.outputs]
        ort = need("onnxruntime", extra="inference", purpose="The accelerator 'onnxruntime'")
        config = make_config(OnnxRuntimeConfig, spec.config)
        path = str(folder.path / _FILE)
        try:
            session = ort.InferenceSession(
                path, _options(ort, spec.threads, config), providers=["CPUExecutionProvider"]
            )
        except _faults(ort) as exc:
            raise ConfigError(f"ONNX Runtime cannot run this model: {_line(exc)}") from exc
        self._names = {each.name for each in session.get_inputs()}
        _must_match(self._inputs, session.get_inputs(), self._outputs, session.get_outputs())
        self._run: Any = session.run

    def __call__(self, *arrays: np.ndarray) -> Sequence[np.ndarray]:
        if self._run is None:
            raise NotReadyError("This model was closed; make it again to call it.")
        outputs: list[np.ndarray] = self._run(self._outputs, self._feed(arrays))
        return outputs

    def _feed(self, arrays: Arrays) -> dict[str, np.ndarray]:
        feed = dict(zip(self._inputs, arrays, strict=True))
        if len(self._names) < len(feed):  # an input that the model does not use
            feed = {name: array for name, array in feed.items() if name in self._names}
        return feed

    def clone(self) -> OnnxRuntimeCompiled:
        """A session of its own over the same file."""
        if self._folder is None:
            raise NotReadyError("This model was closed; make it again to clone it.")
        return OnnxRuntimeCompiled(_copied(self._folder.path / _FILE), self._spec)

    def save(self, directory: Path) -> None:
        if self._folder is None:
            raise NotReadyError("This model was closed; make it again to save it.")
        for part in _parts(self._folder.path / _FILE):
            shutil.copyfile(part, directory / part.name)

    def close(self) -> None:
        self._run = None
        if self._folder is not None:
            self._folder.close()
            self._folder = None


def _must_match(
    inputs: Sequence[str], found_in: Any, outputs: Sequence[str], found_out: Any
) -> None:
    """An input may be missing, where the model does not use it; all else must be there."""
    strange = [each.name for each in found_in if each.name not in inputs]
    lacking = [name for name in outputs if name not in {each.name for each in found_out}]
    if strange or lacking:
        raise StoredModelError(
            f"The ONNX file has other inputs or outputs than described: {strange or lacking}."
        )


def _options(ort: ModuleType, threads: int, config: OnnxRuntimeConfig) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors: warnings about a graph are no user's matter
    spinning = "1" if config.spinning else "0"
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    return options


def _faults(ort: ModuleType) -> tuple[type[BaseException], ...]:
    """What the runtime raises; its own errors share no base but RuntimeError or Exception."""
    state = ort.capi.onnxruntime_pybind11_state
    own = [value for value in vars(state).values() if isinstance(value, type)]
    errors = [each for each in own if issubclass(each, Exception)]
    return (RuntimeError, ValueError, *errors)


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300]


# --- quantization -----------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold the quantizer's advice, which it gives to the root logger, and its set-up of it."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.disabled
    null = logging.NullHandler()
    root.addHandler(null)  # with a handler there, logging.warning() installs none
    root.disabled = True
    try:
        yield
    finally:
        root.disabled = disabled
        root.setLevel(level)
        root.handlers[:] = handlers


def _prepared(path: Path, folder: Path) -> Path:
    """The model with known shapes and folded constants, as the quantizer wants it."""
    pre = need("onnxruntime.quantization.shape_inference", extra="inference", purpose="Quantizing")
    target = folder / "prepared.onnx"
    large = sum(part.stat().st_size for part in _parts(path)) > 1_900_000_000
    try:
        # symbolic shape inference needs sympy and fails for some graphs; it is not needed
        pre.quant_pre_process(path, target, skip_symbolic_shape=True, save_as_external_data=large)
        _forget_weight_shapes(target)
    except Exception as exc:
        raise ConfigError(f"ONNX Runtime cannot prepare this model: {_line(exc)}") from exc
    return target


def _forget_weight_shapes(path: Path) -> None:
    """Drop what the file says twice of its weights: the quantizer transposes some of them and
    would then find the second statement wrong."""
    onnx = need("onnx", extra="inference", purpose="Quantizing")
    model = onnx.load(path, load_external_data=False)
    weights = {each.name for each in model.graph.initializer}
    kept = [each for each in model.graph.value_info if each.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.save(model, path)


class _Reader:
    """Calibration batches, in the form that the quantizer reads."""

    def __init__(self, names: Sequence[str], batches: Iterator[Arrays]) -> None:
        self._names, self._batches = names, batches
        self.seen = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        self.seen += 1
        return {
            name: np.ascontiguousarray(array)
            for name, array in zip(self._names, batch, strict=True)
        }

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        while (feed := self.get_next()) is not None:
            yield feed


def _quantize_static(
    path: Path, target: Path, spec: Spec, config: OnnxRuntimeConfig, calibration: Calibration
) -> None:
    q = need("onnxruntime.quantization", extra="inference", purpose="Quantizing")
    methods = {
        "minmax": q.CalibrationMethod.MinMax,
        "entropy": q.CalibrationMethod.Entropy,
        "percentile": q.CalibrationMethod.Percentile,
    }
    with Scratch() as work:
        prepared = _prepared(path, work)
        reader = _Reader(_used_inputs(prepared, spec), iter(calibration.batches))
        try:
            q.quantize_static(
                prepared,
                target,
                reader,
                quant_format=q.QuantFormat.QDQ,
                # x86 multiplies unsigned by signed; two signed operands cost most of the gain
                activation_type=q.QuantType.QUInt8,
                weight_type=q.QuantType.QInt8,
                per_channel=True,
                reduce_range=int8_saturates(),
                calibrate_method=methods[config.calibration_method or "minmax"],
                use_external_data_format=len(_parts(prepared)) > 1,
            )
        except Exception as exc:
            if reader.seen == 0:
                raise ConfigError("calib_data holds no batch; int8 needs at least one.") from None
            raise ConfigError(f"ONNX Runtime cannot quantize this model: {_line(exc)}") from exc


def _used_inputs(path: Path, spec: Spec) -> list[str]:
    onnx = need("onnx", extra="inference", purpose="Quantizing")
    used = {each.name for each in onnx.load(path, load_external_data=False).graph.input}
    names = [each.name for each in spec.inputs]
    if not used.issuperset(names):
        unused = sorted(set(names) - used)
        raise ConfigError(f"int8 cannot be calibrated: the model does not use {unused}.")
    return names


# What the dynamic form makes faster; a convolution becomes slower.
_DYNAMIC_OPS = ["MatMul", "Gemm", "Attention", "LSTM", "Gather", "EmbedLayerNormalization"]


def _quantize_dynamic(path: Path, target: Path) -> None:
    q = need("onnxruntime.quantization", extra="inference", purpose="Quantizing")
    onnx = need("onnx", extra="inference", purpose="Quantizing")
    with Scratch() as work:
        prepared = _prepared(path, work)
        kinds = {node.op_type for node in onnx.load(prepared, load_external_data=False).graph.node}
        if not kinds & {"MatMul", "Gemm", "Attention", "LSTM"}:
            raise ConfigError("int8 dynamic changes nothing: no matrix product in the model.")
        try:
            q.quantize_dynamic(
                prepared,
                target,
                op_types_to_quantize=_DYNAMIC_OPS,
                per_channel=True,
                reduce_range=int8_saturates(),
                weight_type=q.QuantType.QInt8,
                use_external_data_format=len(_parts(prepared)) > 1,
            )
        except Exception as exc:
            raise ConfigError(f"ONNX Runtime cannot quantize this model: {_line(exc)}") from exc
