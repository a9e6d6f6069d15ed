"""The seam between a model and what runs it. Knows NumPy; imports no framework, no runtime.

A framework offers a ``Source``; an ``Accelerator`` turns it into a ``Compiled``. So F frameworks
and R runtimes cost F + R files: a runtime asks a source for ``native`` (the framework's own
callable) or for ``onnx()`` and never learns which framework made it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from bigdl._base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

Precision = Literal["fp32", "bf16", "int8"]
Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One flat input or output of a model.

    Args:
        name: Its name in exported files.
        dtype: NumPy's name of its type, or "bfloat16".
        shape: Its axes; None is an axis of any length.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of one accelerator; each accelerator has its own subclass, and checks it."""


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
    """

    batches: Iterable[Arrays]
    validate: Callable[[Callable[..., Sequence[np.ndarray]]], float] | None = None
    max_drop: float | None = None
    relative: bool = True
    higher_is_better: bool = True


@runtime_checkable
class Source(Protocol):
    """A framework's model, offered to any accelerator."""

    @property
    def native(self) -> Any:
        """The framework's own callable in eval mode, or None if there is none."""

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
