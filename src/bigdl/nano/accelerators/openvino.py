"""OpenVINO: fp32, bf16, int8 by NNCF. Never imports a framework: works from ``Source.onnx()``."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bigdl._base.environment import TBB_BESIDE_ALLOCATOR, allocator_in_use, environment
from bigdl._base.errors import (
    AccuracyError,
    BigDLError,
    ConfigError,
    NotReadyError,
    StoredModelError,
)
from bigdl._base.optional import need
from bigdl.nano.accelerators.base import Config, make_config
from bigdl.nano.accelerators.here import int8_saturates, missing, no_bf16
from bigdl.nano.accelerators.signal_stack import signal_stack_kept

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from bigdl.nano.accelerators.base import Arrays, Calibration, Source, Spec

__all__ = ["OpenVino", "OpenVinoCompiled", "OpenVinoConfig"]

_FILE = "model.xml"
# So many calls with one shape make it worth a compiled form of its own.
OFTEN = 3
_INT8_ONLY = ("preset", "fast_bias_correction", "model_type", "subset_size")
_PURPOSE = "The accelerator 'openvino'"


@dataclass(frozen=True, kw_only=True)
class OpenVinoConfig(Config):
    """Options of OpenVINO.

    Args:
        hint: What the runtime is tuned for: the time of one call, or calls from many threads.
        own_shapes: How many shapes of inputs that come again and again get a compiled form of
            their own, which is some per cent faster than the one for all shapes. Each costs the
            memory of another copy of the weights.
        preset: int8 only: how activations are quantized. None is "mixed" for a transformer,
            else "performance".
        fast_bias_correction: int8 only. False is slower to make and may be more accurate; None
            is True.
        model_type: int8 only. "transformer" keeps parts of attention in full precision.
        subset_size: int8 only: at most so many batches are looked at; None is 300.
    """

    hint: Literal["latency", "throughput"] = "latency"
    own_shapes: int = field(default=2, metadata={"min": 0})
    preset: Literal["performance", "mixed"] | None = None
    fast_bias_correction: bool | None = None
    model_type: Literal["transformer"] | None = None
    subset_size: int | None = field(default=None, metadata={"min": 1})


class OpenVino:
    """Runs an ONNX file, or OpenVINO's own, on the CPU."""

    options = OpenVinoConfig

    def refuse(self, spec: Spec) -> str | None:
        config = make_config(OpenVinoConfig, spec.config)
        absent = missing("openvino", extra="inference")
        if absent:
            return absent
        if spec.precision == "int8":
            return missing("nncf", extra="inference")
        unsuited = config.unsuited(_INT8_ONLY, "for precision 'int8' only")
        return unsuited or (no_bf16() if spec.precision == "bf16" else None)

    def compile(
        self, source: Source, spec: Spec, calibration: Calibration | None
    ) -> OpenVinoCompiled:
        if spec.precision == "int8" and calibration is None:
            raise ConfigError("int8 needs calibration data: give calib_data.")
        model = _read(source.onnx(), ConfigError)
        if spec.precision == "int8":
            assert calibration is not None
            model = _quantize(model, spec, calibration)
        return OpenVinoCompiled(model, spec)

    def load(self, directory: Path, spec: Spec, native: Any = None) -> OpenVinoCompiled:
        if not (directory / _FILE).is_file():
            raise StoredModelError(f"{directory} has no {_FILE}.")
        return OpenVinoCompiled(_read(directory / _FILE, StoredModelError), spec)


@functools.cache
def _core() -> Any:
    """One for the process: it holds no model, and making one takes a while."""
    return need("openvino", extra="inference", purpose=_PURPOSE).Core()


def _read(path: Path, error: type[Exception]) -> Any:
    try:
        # read whole: the file may be gone before the model is
        _core().set_property({"ENABLE_MMAP": False})
        return _core().read_model(path)
    except RuntimeError as exc:
        raise error(f"OpenVINO cannot read this model: {_line(exc)}") from exc


# How the lines begin that say where in OpenVINO's source an error arose, not what it is.
_WHERE = ("Exception from", "Check '", "FrontEnd API", "Model wasn't", "While validating", "-- ",
          "Summary:")  # fmt: skip


def _line(exc: BaseException) -> str:
    """The reasons that an error of OpenVINO gives, in one line."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(_WHERE)] or lines[-1:]
    what = [line.removeprefix("-- ") for line in lines if line.startswith("-- Conversion")]
    return "; ".join(dict.fromkeys([*what, *reasons]))[:300] or type(exc).__name__


def _settings(spec: Spec) -> dict[str, Any]:
    config = make_config(OpenVinoConfig, spec.config)
    return {
        "PERFORMANCE_HINT": config.hint.upper(),
        "INFERENCE_NUM_THREADS": spec.threads,
        # said outright: its default is bf16 where the CPU has it; what int8 leaves over is f32
        "INFERENCE_PRECISION_HINT": "bf16" if spec.precision == "bf16" else "f32",
    }


class OpenVinoCompiled:
    """A compiled model with a pool of requests, so that calls from several threads are safe.

    A shape of inputs that comes again gets a compiled form of its own, up to a limit.
    """

    native = False

    def __init__(self, model: Any, spec: Spec) -> None:
        self._model, self._spec = model, spec
        self._order = _input_order(model, spec)
        self._lock = threading.Lock()
        config = make_config(OpenVinoConfig, spec.config)
        is_dynamic = any(None in each.shape for each in spec.inputs)
        self._left = config.own_shapes if is_dynamic else 0
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._own: dict[tuple[Any, ...], _Pool] = {}
        self._any: _Pool | None = _Pool(_compile(model, spec))

    def __call__(self, *arrays: np.ndarray) -> Sequence[np.ndarray]:
        pool = self._any
        if self._left or self._own:
            pool = self._for_shape(arrays)
        if pool is None:
            raise NotReadyError("This model was closed; make it again to call it.")
        if self._order is not None:
            arrays = tuple(arrays[i] for i in self._order)
        return pool(arrays)

    def _for_shape(self, arrays: Arrays) -> _Pool | None:
        shapes = tuple([array.shape for array in arrays])
        own = self._own.get(shapes)
        if own is not None or not self._left or self._any is None:
            return own or self._any
        with self._lock:
            self._seen[shapes] += 1
            if self._seen[shapes] < OFTEN or not self._left or shapes in self._own:
                return self._own.get(shapes, self._any)
            self._left -= 1
            own = self._own[shapes] = self._fixed(shapes) or self._any
            return own

    def _fixed(self, shapes: tuple[tuple[int, ...], ...]) -> _Pool | None:
        """A form for these shapes alone; None if the model cannot be given them."""
        model = self._model.clone()
        order = self._order or range(len(shapes))
        try:
            model.reshape(
                {port: list(shapes[i]) for port, i in zip(model.inputs, order, strict=True)}
            )
            with signal_stack_kept():
                return _Pool(_core().compile_model(model, "CPU", _settings(self._spec)))
        except RuntimeError:
            return None

    def clone(self) -> OpenVinoCompiled:
        if self._any is None:
            raise NotReadyError("This model was closed; make it again to clone it.")
        return OpenVinoCompiled(self._model, self._spec)

    def save(self, directory: Path) -> None:
        if self._any is None:
            raise NotReadyError("This model was closed; make it again to save it.")
        ov = need("openvino", extra="inference", purpose=_PURPOSE)
        ov.save_model(self._model, directory / _FILE, compress_to_fp16=False)

    def close(self) -> None:
        with self._lock:
            self._left = 0
            self._own.clear()
            self._any = self._model = None


def _compile(model: Any, spec: Spec) -> Any:
    # TBB reads its variable once, here, and our caller may have preloaded an allocator himself
    variables: dict[str, str | None] = {**TBB_BESIDE_ALLOCATOR} if allocator_in_use() else {}
    try:
        with environment(**variables), signal_stack_kept():
            return _core().compile_model(model, "CPU", _settings(spec))
    except RuntimeError as exc:
        raise ConfigError(f"OpenVINO cannot run this model: {_line(exc)}") from exc


def _input_order(model: Any, spec: Spec) -> list[int] | None:
    """For each of the model's inputs the number of ours; None if they are the same."""
    wanted = [each.name for each in spec.inputs]
    order = []
    for port in model.inputs:
        names = [i for i, name in enumerate(wanted) if name in port.get_names()]
        if len(names) != 1:
            raise StoredModelError(
                f"OpenVINO's model has an input {sorted(port.get_names())} that is not described."
            )
        order.append(names[0])
    if len(model.outputs) != len(spec.outputs):
        raise StoredModelError(
            f"OpenVINO's model has {len(model.outputs)} outputs, described are "
            f"{len(spec.outputs)}."
        )
    return None if order == list(range(len(wanted))) else order


class _Pool:
    """Idle requests of one compiled model; one more is made when all are busy."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle = [compiled.create_infer_request()]
        self._count = len(compiled.outputs)

    def __call__(self, arrays: Arrays) -> list[np.ndarray]:
        try:
            request = self._idle.pop()  # lists are safe to share between threads
        except IndexError:
            request = self._compiled.create_infer_request()
        # an error leaves the request behind: it may hold anything
        results = request.infer(arrays, share_inputs=True, share_outputs=True)
        outputs = [results[i].copy() for i in range(self._count)]
        self._idle.append(request)
        return outputs


# --- quantization -----------------------------------------------------------------------------


@contextmanager
def _nncf() -> Iterator[Any]:
    """NNCF without its log, its progress bars and its messages to a server."""
    with environment(NNCF_CI="1"):  # read when it is first imported
        nncf = need("nncf", extra="inference", purpose="OpenVINO int8")
    console = need("rich", extra="inference", purpose="NNCF").get_console()
    logger = logging.getLogger("nncf")
    level, quiet = logger.level, console.quiet
    logger.setLevel(logging.ERROR)
    console.quiet = True
    try:
        with signal_stack_kept():  # it loads plugins of its own
            yield nncf
    finally:
        logger.setLevel(level)
        console.quiet = quiet


def _quantize(model: Any, spec: Spec, calibration: Calibration) -> Any:
    config = make_config(OpenVinoConfig, spec.config)
    names = [each.name for each in spec.inputs]
    used = [next(n for n in names if n in port.get_names()) for port in model.inputs]

    def feed(batch: Arrays) -> dict[str, np.ndarray]:
        by_name = dict(zip(names, batch, strict=True))
        return {name: np.ascontiguousarray(by_name[name]) for name in used}

    batches = list(itertools.islice(calibration.batches, config.subset_size or 300))
    if not batches:
        raise ConfigError("calib_data holds no batch; int8 needs at least one.")
    with _nncf() as nncf:
        presets = {
            "performance": nncf.QuantizationPreset.PERFORMANCE,
            "mixed": nncf.QuantizationPreset.MIXED,
        }
        options: dict[str, Any] = {
            "preset": presets[config.preset] if config.preset else None,
            "subset_size": len(batches),
            "fast_bias_correction": config.fast_bias_correction is not False,
            "model_type": nncf.ModelType.TRANSFORMER if config.model_type else None,
        }
        # NNCF's default looks after sums that overflow in the first layer only
        fix = nncf.OverflowFix.ENABLE if int8_saturates() else None
        advanced = nncf.AdvancedQuantizationParameters(overflow_fix=fix)
        control = _AccuracyControl(model, spec, calibration) if calibration.has_limit else None
        try:
            data = nncf.Dataset(batches, feed)
            if control is not None:
                return control.quantize(nncf, data, advanced, options)
            quantized = nncf.quantize(model, data, advanced_parameters=advanced, **options)
        except Exception as exc:
            if control is not None and control.fault is not None:
                raise control.fault from None  # the caller's metric failed: its own error
            if isinstance(exc, BigDLError):
                raise
            raise ConfigError(f"NNCF cannot quantize this model: {_line(exc)}") from exc
    if not _is_quantized(quantized):
        raise ConfigError("NNCF found nothing to quantize in this model.")
    return quantized


def _is_quantized(model: Any) -> bool:
    return any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())


class _AccuracyControl:
    """Layers go back to full precision, the most harmful first, until the limit is kept."""

    def __init__(self, model: Any, spec: Spec, calibration: Calibration) -> None:
        self._model, self._spec, self._calibration = model, spec, calibration
        self._order = _input_order(model, spec)
        self._sign = 1.0 if calibration.higher_is_better else -1.0  # NNCF takes more for better
        self.fault: Exception | None = None

    def quantize(self, nncf: Any, data: Any, advanced: Any, options: dict[str, Any]) -> Any:
        """The quantized model that keeps the limit.

        Raises:
            AccuracyError: There is none but with nothing quantized.
        """
        calibration = self._calibration
        assert calibration.max_drop is not None
        original = OpenVinoCompiled(self._model, replace(self._spec, precision="fp32"))
        baseline = calibration.baseline
        if baseline is None:
            baseline = self._validate(original)
        limit = calibration.max_drop * (abs(baseline) if calibration.relative else 1.0)
        calibration = replace(calibration, baseline=baseline)
        quantized = nncf.quantize_with_accuracy_control(
            self._model,
            calibration_dataset=data,
            validation_dataset=nncf.Dataset([None]),  # ours is in validate()
            validation_fn=self._score,
            max_drop=limit,
            drop_type=nncf.DropType.ABSOLUTE,
            advanced_quantization_parameters=advanced,
            # one: a metric with a state is not to be shared between threads
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                num_ranking_workers=1
            ),
            **options,
        )
        if not _is_quantized(quantized):
            raise AccuracyError(
                f"OpenVINO int8 keeps the limit of {calibration.max_drop:.4g} against the "
                f"original's {baseline:.6g} only with no layer quantized."
            )
        compiled = OpenVinoCompiled(quantized, self._spec)
        try:
            calibration.check(compiled, original, "OpenVINO int8")
        finally:
            compiled.close()
            original.close()
        return quantized

    def _score(self, compiled: Any, _: Any) -> tuple[float, None]:
        pool = _Pool(compiled)
        order = self._order

        def call(*arrays: np.ndarray) -> Sequence[np.ndarray]:
            return pool(arrays if order is None else tuple(arrays[i] for i in order))

        return self._sign * self._validate(call), None

    def _validate(self, call: Any) -> float:
        validate = self._calibration.validate
        assert validate is not None
        try:
            return float(validate(call))
        except Exception as exc:
            self.fault = exc  # NNCF would take it for a kind of metric, and go on
            raise
