"""Intel Neural Compressor: a row that says why it is not used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from bigdl._base.errors import ConfigError
from bigdl._base.optional import is_installed
from bigdl.nano.accelerators.base import Config

if TYPE_CHECKING:
    from pathlib import Path

    from bigdl.nano.accelerators.base import Calibration, Source, Spec


@dataclass(frozen=True, kw_only=True)
class NeuralCompressorConfig(Config):
    """It has no options."""


class NeuralCompressor:
    """Never runs: for current torch it wraps the quantizer and the kernels of ``torch_int8``,
    gives the same numbers at the same speed, and needs more packages for it."""

    options = NeuralCompressorConfig

    def refuse(self, spec: Spec) -> str:
        found = "" if is_installed("neural_compressor") else "neural_compressor is not installed: "
        return (
            f"{found}it would quantize with torchao's own quantizer and give "
            "the same model as 'torch_int8', which is a row of its own"
        )

    def compile(self, source: Source, spec: Spec, calibration: Calibration | None) -> NoReturn:
        raise ConfigError(f"inc cannot be used: {self.refuse(spec)}.")

    def load(self, directory: Path, spec: Spec, native: Any = None) -> NoReturn:
        raise ConfigError(f"inc cannot be used: {self.refuse(spec)}.")
