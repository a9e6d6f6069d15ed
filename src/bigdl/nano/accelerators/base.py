"""The seam between a model and what runs it. Knows NumPy; imports no framework, no runtime.

A framework offers a ``Source``; an ``Accelerator`` turns it into a ``Compiled``. So F frameworks
and R runtimes cost F + R files: a runtime asks a source for ``native`` (the framework's own
callable) or for ``onnx()`` and never learns which framework made it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import numpy as np

from bigdl._base.errors import AccuracyError, ArgumentError, ConfigError
from bigdl._base.registry import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

Precision = Literal["fp32", "bf16", "int8"]
Arrays = tuple[np.ndarray, ...]


C = TypeVar("C", bound="Config")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One flat input or output of a model.

    Args:
        name: Its name in exported files.
        dtype: NumPy's name of its type, or "bfloat16", which NumPy lacks: it travels as float32.
        shape: Its axes; None is an axis of any length.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of one accelerator; each accelerator has its own subclass.

    A field is annotated ``bool``, ``int`` or ``Literal[...]``, with ``| None`` where "not said"
    is an answer; ``field(metadata={"min": n})`` bounds a number. All faults are reported
    together.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        wrong = [
            f"{option.name}={getattr(self, option.name)!r} (need {need})"
            for option in fields(self)
            if (need := _fault(getattr(self, option.name), hints[option.name], option.metadata))
        ]
        if wrong:
            raise ConfigError(f"{type(self).__name__} cannot be used: {', '.join(wrong)}.")

    def unsuited(self, names: Sequence[str], why: str) -> str | None:
        """A sentence if one of the options ``names`` was given although it does not apply."""
        given = [name for name in names if getattr(self, name) is not None]
        return f"{', '.join(given)}: {why}" if given else None


def _fault(value: object, hint: Any, metadata: Mapping[str, Any]) -> str | None:
    """What is needed instead of ``value``; None if it is right."""
    choices = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    if value is None and type(None) in choices:
        return None
    for choice in choices or (hint,):
        if get_origin(choice) is Literal:
            if isinstance(value, str) and value in get_args(choice):
                return None
            return "one of " + ", ".join(map(repr, get_args(choice)))
        if choice is bool:
            return None if isinstance(value, bool) else "True or False"
        if choice is int:
            lowest = metadata.get("min", 0)
            whole = isinstance(value, int) and not isinstance(value, bool)
            return None if whole and value >= lowest else f"a whole number >= {lowest}"
    return None


def make_config(options: type[C], given: Config | Mapping[str, Any] | None) -> C:
    """``given`` as the options of one accelerator.

    Args:
        options: The accelerator's own class.
        given: An instance of it, a mapping of its fields, or None for its defaults.

    Raises:
        ArgumentError: Another accelerator's options, or an option that it does not have.
        ConfigError: A value that an option cannot have.
    """
    if given is None or type(given) is Config:
        return options()
    if isinstance(given, options):
        return given
    if isinstance(given, Config):
        raise ArgumentError(
            f"config is a {type(given).__name__}, but this accelerator takes {options.__name__}."
        )
    known = tuple(option.name for option in fields(options))
    for name in given:
        if name not in known:
            raise ArgumentError(
                f"{options.__name__} has no option {name!r}; have "
                f"{', '.join(known) or 'none'}.{nearest(name, known)}"
            )
    return options(**given)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is asked of an accelerator.

    Args:
        precision: The arithmetic wanted.
        inputs: The model's flat inputs, in order.
        outputs: The model's flat outputs, in order.
        threads: Cores one call may use.
        config: The accelerator's own options.
    """

    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    threads: int
    config: Config = field(default_factory=Config)

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"Spec cannot be used: threads={self.threads} (need >= 1).")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The data that a quantizing accelerator may look at.

    Args:
        batches: Flat inputs, batch by batch; can be iterated more than once.
        validate: Accuracy of a flat call (arrays in, sequence of arrays out) on the whole
            validation set; None when accuracy is not asked for.
        max_drop: How much ``validate`` may lose against the original; None is no limit.
        relative: ``max_drop`` is a share of the original's accuracy, not a difference.
        higher_is_better: The direction of ``validate``.
        baseline: The original's own accuracy where it is known; else an accelerator takes its
            own form of full precision for the original.
    """

    batches: Iterable[Arrays]
    validate: Callable[[Callable[..., Sequence[np.ndarray]]], float] | None = None
    max_drop: float | None = None
    relative: bool = True
    higher_is_better: bool = True
    baseline: float | None = None

    @property
    def has_limit(self) -> bool:
        """Whether accuracy is asked for and limited."""
        return self.validate is not None and self.max_drop is not None

    def drop(self, accuracy: float, baseline: float) -> float:
        """How much ``accuracy`` lost against ``baseline``, in the terms of ``max_drop``."""
        lost = baseline - accuracy if self.higher_is_better else accuracy - baseline
        if self.relative and lost:
            lost = lost / abs(baseline) if baseline else float("inf") * lost
        return lost

    def check(
        self,
        call: Callable[..., Sequence[np.ndarray]],
        original: Callable[..., Sequence[np.ndarray]],
        who: str,
    ) -> None:
        """Hold ``call`` to the limit, if there is one.

        Args:
            call: The new form.
            original: The same model in full precision, asked if the baseline is not known.
            who: The subject of the error's sentence.

        Raises:
            AccuracyError: It loses more than ``max_drop``.
        """
        if self.validate is None or self.max_drop is None:
            return
        baseline = self.validate(original) if self.baseline is None else self.baseline
        accuracy = self.validate(call)
        lost = self.drop(accuracy, baseline)
        if not lost <= self.max_drop:  # so that NaN is a loss, too
            kind = "relative" if self.relative else "absolute"
            raise AccuracyError(
                f"{who} has accuracy {accuracy:.6g}, the original {baseline:.6g}: a {kind} loss "
                f"of {lost:.4g}, but at most {self.max_drop:.4g} is allowed."
            )


@runtime_checkable
class Source(Protocol):
    """A framework's model, offered to any accelerator."""

    @property
    def native(self) -> Any:
        """The framework's own callable in eval mode, apart from the user's object; or None.

        It may be shared: an accelerator that changes it works on a copy.
        """

    @property
    def sample(self) -> Arrays:
        """Flat inputs of one example call; not to be changed."""

    def bind(self, arrays: Sequence[np.ndarray]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The framework's (args, kwargs) for flat ``arrays``: how ``native`` is called."""

    def onnx(self) -> Path:
        """Path of an ONNX file of this model with its flat inputs; exported once, then kept.

        Raises:
            ConfigError: The model cannot be exported; the text says what is in the way.
        """


@runtime_checkable
class Compiled(Protocol):
    """A model that runs.

    Calls from several threads are safe, inputs are never written, and outputs have memory of
    their own.
    """

    #: True: called with the framework's own (args, kwargs), returns its own structure.
    #: False: called with flat NumPy arrays in order, returns a sequence of them.
    native: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def clone(self) -> Compiled:
        """Another stream over the same weights."""

    def save(self, directory: Path) -> None:
        """Write the runtime's own files, and nothing else, into ``directory`` (it exists)."""

    def close(self) -> None:
        """Give back memory and threads; calling it twice is harmless."""


@runtime_checkable
class Accelerator(Protocol):
    """A way to run a model: one small file for each runtime."""

    options: type[Config]

    def refuse(self, spec: Spec) -> str | None:
        """Why ``spec`` cannot run here, in one sentence; None if it can."""

    def compile(self, source: Source, spec: Spec, calibration: Calibration | None) -> Compiled:
        """Make ``source`` runnable as ``spec`` asks.

        Raises:
            ConfigError: It cannot be done for this model; the text says why.
            AccuracyError: ``calibration.max_drop`` cannot be kept.
        """

    def load(self, directory: Path, spec: Spec, native: Any = None) -> Compiled:
        """Load what ``Compiled.save`` wrote.

        Args:
            directory: Where the files are.
            spec: The spec that it was compiled with.
            native: The framework's model, for forms that run the user's code.
        """
