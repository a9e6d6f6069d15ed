"""torch.compile: the model as kernels that are generated and compiled on this machine."""

from __future__ import annotations

import copy
import itertools
import threading
import types
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bigdl._base.errors import BigDLError, ConfigError
from bigdl.nano.accelerators.base import Config, make_config
from bigdl.nano.accelerators.here import missing, no_bf16, no_cpp, triton_hazard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bigdl.nano.accelerators.base import Calibration, Source, Spec, TensorSpec
    from bigdl.nano.accelerators.torch_native import NativeCompiled

__all__ = ["TorchCompile", "TorchCompileConfig", "compiled_call"]


@dataclass(frozen=True, kw_only=True)
class TorchCompileConfig(Config):
    """Options of torch.compile.

    Args:
        channels_last: Keep pictures and the weights of convolutions with the channels innermost.
        freezing: Fold weights into the kernels, as they cannot change any more. Faster, and the
            compiler keeps a second copy of them.
        mode: What the compiler spends its time on.
    """

    channels_last: bool = False
    freezing: bool = True
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"


class TorchCompile:
    """The user's own code, compiled. Python's part of it still runs at each call."""

    options = TorchCompileConfig

    def refuse(self, spec: Spec) -> str | None:
        absent = missing("torch", extra="torch")
        if absent:
            return absent
        if spec.precision == "int8":
            return "torch.compile does not quantize by itself; 'torch_int8' does, and compiles"
        reason = triton_hazard() or no_cpp()
        return reason or (no_bf16() if spec.precision == "bf16" else None)

    def compile(
        self, source: Source, spec: Spec, calibration: Calibration | None
    ) -> NativeCompiled:
        from torch import nn

        if not isinstance(source.native, nn.Module):
            raise ConfigError("torch.compile runs PyTorch modules, and this model is not one.")
        compiled = _build(copy.deepcopy(source.native), spec)
        args, kwargs = source.bind(source.sample)
        try:
            compiled(*args, **kwargs)  # compiles now, not at the user's first call
        except BigDLError:
            raise
        except Exception as exc:
            raise ConfigError(f"torch.compile cannot compile this model: {line(exc)}") from exc
        return compiled

    def load(self, directory: Path, spec: Spec, native: Any = None) -> NativeCompiled:
        from bigdl.nano.accelerators.torch_modules import freeze, read_weights

        return _build(freeze(read_weights(native, directory)), spec)


def line(exc: BaseException) -> str:
    """The compiler's reason, in one line."""
    lines = [text.strip() for text in str(exc).splitlines() if text.strip()]
    return f"{type(exc).__name__}: {(lines or [''])[0][:300]}"


def _build(module: Any, spec: Spec) -> NativeCompiled:
    from bigdl.nano.accelerators.torch_native import NativeCompiled, in_layout

    config = make_config(TorchCompileConfig, spec.config)
    if config.channels_last:
        in_layout(module)
    call = compiled_call(module, config, spec.inputs)
    return NativeCompiled(module, call, spec, channels_last=config.channels_last)


_number = itertools.count()


def compiled_call(
    module: Any, config: TorchCompileConfig, inputs: Sequence[TensorSpec]
) -> Callable[..., Any]:
    """``module`` compiled at its first call, for any length of the axes that vary.

    Where a varying axis has length 1 at that call, or gets it later, one more form is compiled.
    """
    import torch

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    # The compiler counts its recompilations by code object: with one each, models of one class
    # do not use up each other's.
    code = call.__code__.replace(co_name=f"call_{next(_number)}")
    own = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    options = None if config.mode == "default" else torch._inductor.list_mode_options(config.mode)
    return _Compiling(torch.compile(own, options=options), module, config, inputs)


class _Compiling:
    """A compiled function that knows when a call may compile anew.

    Only then the compiler is told to fold the weights in, which it reads from a setting of the
    process, and which axes vary: else it would compile for fixed lengths first, and again when
    others come.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        module: Any,
        config: TorchCompileConfig,
        inputs: Sequence[TensorSpec],
    ) -> None:
        self._compiled, self._inputs, self._freezing = compiled, inputs, config.freezing
        self._made_of = module, config, inputs
        self._varying = [
            tuple(axis for axis, length in enumerate(spec.shape) if length is None)
            for spec in inputs
        ]
        self._known: set[Any] = set()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is compiled there."""
        return compiled_call, self._made_of

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = None if kwargs or len(args) != len(self._inputs) else self._kind(args)
        if kind is not None and kind in self._known:
            return self._compiled(*args, **kwargs)
        import torch

        with (
            self._lock,
            torch._inductor.config.patch(freezing=self._freezing),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the compiler's, about its own code
            marked_args, marked_kwargs = self._marked(args, kwargs)
            result = self._compiled(*marked_args, **marked_kwargs)
        if kind is not None:
            self._known.add(kind)
        return result

    def _kind(self, args: Sequence[Any]) -> Any:
        """What the compiler tells calls apart by; None for calls that are not plain tensors."""
        import torch

        kind: list[Any] = [torch.is_autocast_enabled("cpu")]
        for value, varying in zip(args, self._varying, strict=True):
            if not hasattr(value, "is_contiguous"):
                return None
            shape = value.shape
            kind.append(tuple([min(shape[axis], 2) for axis in varying]))
            kind.append((value.requires_grad, value.is_inference()))
            kind.append(value.is_contiguous() or value.stride())
        return tuple(kind)

    def _marked(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        import torch

        from bigdl.nano.pytorch.export.structure import flatten

        tensors, structure = flatten((args, kwargs))
        if len(tensors) != len(self._inputs):
            return args, kwargs  # another form of call than the sample's
        aliases = [tensor.detach() for tensor in tensors]  # the marks are not for the caller's
        for alias, varying in zip(aliases, self._varying, strict=True):
            for axis in varying:
                if alias.shape[axis] > 1:
                    torch._dynamo.maybe_mark_dynamic(alias, axis)
        marked_args, marked_kwargs = structure.build(aliases)
        return marked_args, marked_kwargs
