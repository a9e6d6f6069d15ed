"""Accelerated models: modules that run through an ``Accelerator``, called as the original is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from bigdl._base import machine
from bigdl._base.errors import (
    ArgumentError,
    BigDLError,
    ConfigError,
    MissingDependencyError,
    NotReadyError,
)
from bigdl.nano.accelerators import ACCELERATORS
from bigdl.nano.accelerators.base import Config, Spec, make_config
from bigdl.nano.accelerators.here import Missing
from bigdl.nano.pytorch.export.binding import to_array, to_tensor
from bigdl.nano.pytorch.export.quiet import quiet_run
from bigdl.nano.pytorch.export.source import TorchSource
from bigdl.nano.pytorch.export.verify import verify

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bigdl.nano.accelerators.base import Accelerator, Calibration, Compiled, Precision
    from bigdl.nano.pytorch.export.binding import Interface, Sample

__all__ = ["AcceleratedModule", "build"]

PRECISIONS = ("fp32", "bf16", "int8")
# A runtime may get faster for shapes that it has seen so often.
_FIRST_CALLS = 3


def build(
    model: nn.Module,
    *,
    name: str,
    accelerator: str,
    precision: Precision,
    sample: Sample = None,
    dynamic_axes: bool | Mapping[str, Sequence[int]] = True,
    config: Config | Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    threads: int | None = None,
    source: TorchSource | None = None,
) -> AcceleratedModule:
    """Make ``model`` run through an accelerator.

    The result is a snapshot: it is made from a copy of the weights, so training the model
    later does not change it, and nothing done to it changes the model.

    Args:
        model: Any module; it is never changed, and may be in any mode.
        name: What the result calls itself.
        accelerator: A row of the accelerators' table.
        precision: Its arithmetic.
        sample: Example inputs: a tensor, a tuple (by position) or a dict (by keyword).
        dynamic_axes: True: axis 0 of each input may have any length, where the model can do it.
            ``{forward's parameter: [axes]}``: these may.
        config: Options of that accelerator.
        calibration: What int8 looks at.
        threads: Cores a call may use; None is all that are usable.
        source: ``model`` and ``sample`` bound before, instead of a sample.

    Raises:
        ArgumentError: The sample does not fit forward, or options of another accelerator.
        ConfigError: It cannot be done here or for this model; the text says why.
        MissingDependencyError: A package is not installed.
        AccuracyError: The calibration's limit cannot be kept.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"No precision {precision!r}; have {', '.join(PRECISIONS)}.")
    runtime = ACCELERATORS.get(accelerator)()
    threads = machine.cores() if threads is None else threads
    options = make_config(runtime.options, config)
    spec = Spec(precision=precision, inputs=(), outputs=(), threads=threads, config=options)
    _must_run_here(runtime, accelerator, spec)  # before any work
    if source is None:
        if sample is None:
            raise ConfigError(f"{name} needs an input_sample: example inputs of the model.")
        source = TorchSource(model, sample, dynamic_axes)
    spec = Spec(
        precision=precision,
        inputs=source.inputs,
        outputs=source.outputs,
        threads=threads,
        config=options,
    )
    _must_run_here(runtime, accelerator, spec)
    with quiet_run(source.native):
        compiled = runtime.compile(source, spec, calibration)
        try:
            _settle(compiled, source, name, precision)
        except BaseException:
            compiled.close()
            raise
    return AcceleratedModule(
        compiled,
        source.interface,
        spec,
        name=name,
        accelerator=accelerator,
        original=model,
        device=source.device,
    )


def _must_run_here(runtime: Accelerator, accelerator: str, spec: Spec) -> None:
    reason = runtime.refuse(spec)
    if reason is None:
        return
    text = f"{accelerator} {spec.precision} cannot be used: {reason}."
    raise MissingDependencyError(text) if isinstance(reason, Missing) else ConfigError(text)


def _settle(compiled: Compiled, source: TorchSource, name: str, precision: str) -> None:
    """The first calls: full precision is compared with the original, all get warm."""
    if not compiled.native:
        for _ in range(_FIRST_CALLS):
            compiled(*source.sample)
        if precision == "fp32":
            verify(compiled, source.runs, source.outputs, name)
        return
    args, kwargs = source.bind(source.sample)
    try:
        compiled(*args, **kwargs)
    except BigDLError:
        raise
    except Exception as exc:
        text = " ".join(str(exc).split())[:300]
        raise ConfigError(f"{name} cannot run this model: {type(exc).__name__}: {text}") from exc


class AcceleratedModule(nn.Module):
    """A model that runs through an accelerator; made by ``build`` or by loading a folder.

    Called as the original is, with the same outputs in structure and type, without gradients.
    It holds no weights of its own that could be trained: ``parameters()`` is empty. Attributes and
    methods that it lacks are looked up on the original, where there is one; a loaded model has
    none.

    Args:
        compiled: What runs.
        interface: How it is called.
        spec: What it was compiled for.
        name: What it calls itself.
        accelerator: The row of the accelerators' table that made it.
        original: The caller's model, or None.
        device: Where the original's weights were.
    """

    name: str
    accelerator: str
    precision: str

    def __init__(
        self,
        compiled: Compiled,
        interface: Interface,
        spec: Spec,
        *,
        name: str,
        accelerator: str,
        original: nn.Module | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        own = self.__dict__
        # past nn.Module's own bookkeeping: none of these is a part of this module
        own["_original"] = original
        own["_compiled"] = compiled
        own["_interface"] = interface
        own["_spec"] = spec
        own["name"], own["accelerator"] = name, accelerator
        own["precision"] = spec.precision
        own["training"] = False
        own["_device"] = device or torch.device("cpu")
        own["_dtypes"] = interface.output_dtypes
        own["_one"] = interface.result.is_tensor
        own["forward"] = self._native if compiled.native else self._flat

    @property
    def threads(self) -> int:
        """Cores that one call may use."""
        spec: Spec = self._spec
        return spec.threads

    # --- a call ----------------------------------------------------------------------------

    def _flat(self, *args: Any, **kwargs: Any) -> Any:
        """A call through flat arrays."""
        if torch.is_inference_mode_enabled():  # its tensors could not be changed by the caller
            with torch.inference_mode(False):
                return self._flat(*args, **kwargs)
        interface = self._interface
        tensors = interface.tensors(args, kwargs)
        interface.check(tensors, _CPU)
        arrays = self._compiled(*[to_array(tensor) for tensor in tensors])
        if self._one:
            return to_tensor(arrays[0], self._dtypes[0])
        return interface.result.build(
            [to_tensor(array, dtype) for array, dtype in zip(arrays, self._dtypes, strict=True)]
        )

    def _native(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the framework's own kind: arguments beyond the sample are its own matter."""
        interface = self._interface
        if not kwargs and len(args) == interface.plain:
            interface.check(args, self._device)
        else:
            interface.check_known(args, kwargs)
        return self._compiled(*args, **kwargs)

    # --- what a module has -----------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        original = self.__dict__.get("_original")
        if original is not None and not name.startswith("__"):
            return getattr(original, name)
        raise AttributeError(
            f"{self.__dict__.get('name', 'This model')!r} has no attribute {name!r}"
            + ("" if original is not None else ": a loaded model has none of the original's own.")
        )

    def __dir__(self) -> list[str]:
        original = self.__dict__.get("_original")
        own: list[str] = list(super().__dir__())  # type: ignore[no-untyped-call]
        return sorted({*own, *(dir(original) if original is not None else ())})

    def extra_repr(self) -> str:
        return f"{self.name!r}, accelerator={self.accelerator!r}, precision={self.precision!r}"

    def train(self, mode: bool = True) -> AcceleratedModule:
        """Refused: there is nothing to train.

        Raises:
            NotReadyError: ``mode`` is True.
        """
        if mode:
            raise NotReadyError(
                f"{self.name!r} is compiled for inference and cannot be trained. Train the "
                "original and make it anew."
            )
        return self

    def eval(self) -> AcceleratedModule:
        """Returns itself: it always has eval semantics."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> AcceleratedModule:
        """Nothing here can require a gradient."""
        if requires_grad:
            return self.train()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> AcceleratedModule:
        """``to``, ``half``, ``cuda``, …: fine if nothing would change."""
        before = torch.zeros((), dtype=torch.float32, device=self._device)
        after = fn(before)
        if after.dtype is not before.dtype or after.device != before.device:
            raise ConfigError(
                f"{self.name!r} was compiled for {before.device} with inputs of the original's "
                f"types and cannot be moved to {after.device}, {after.dtype}. Move the original "
                "and make it anew."
            )
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As a part of another module it adds nothing; by itself it is an error.

        Raises:
            NotReadyError: There are no weights to give.
        """
        if not args and "destination" not in kwargs:
            self._no_weights("state_dict")
        destination: dict[str, Any] = args[0] if args else kwargs["destination"]
        return destination

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: its weights are part of the compiled form.

        Raises:
            NotReadyError: Always.
        """
        self._no_weights("load_state_dict")

    def _no_weights(self, method: str) -> NoReturn:
        raise NotReadyError(
            f"{self.name!r} has no {method}: its weights are part of the compiled form. Save it "
            "with InferenceOptimizer.save, or use the original's."
        )

    # --- copies, the end -------------------------------------------------------------------

    def clone(self) -> AcceleratedModule:
        """Another stream over the same weights."""
        return AcceleratedModule(
            self._compiled.clone(),
            self._interface,
            self._spec,
            name=self.name,
            accelerator=self.accelerator,
            original=self._original,
            device=self._device,
        )

    def __copy__(self) -> AcceleratedModule:
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> AcceleratedModule:
        # the compiled form cannot be changed, so that a clone is as good as a copy
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ArgumentError(
            f"{self.name!r} cannot be pickled: it belongs to this process. Save it with "
            "InferenceOptimizer.save and load it where it is needed."
        )

    def close(self) -> None:
        """Give back memory and threads; a later call is an error. Twice is harmless."""
        self._compiled.close()


_CPU = torch.device("cpu")
