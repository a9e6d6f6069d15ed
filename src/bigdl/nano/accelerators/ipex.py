"""Intel Extension for PyTorch: a row that says why it is not used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NoReturn

from bigdl._base.errors import ConfigError
from bigdl.nano.accelerators.base import Config

if TYPE_CHECKING:
    from pathlib import Path

    from bigdl.nano.accelerators.base import Calibration, Source, Spec


@dataclass(frozen=True, kw_only=True)
class IpexConfig(Config):
    """It has no options."""


class Ipex:
    """Never runs: the project ended at 2.8.0, which loads beside torch 2.8 only, and was not
    faster there than torch's own bf16 or its compiler."""

    options = IpexConfig

    def refuse(self, spec: Spec) -> str:
        try:
            found = f"torch {version('torch')} is installed"
        except PackageNotFoundError:
            found = "torch is not installed"
        return (
            f"IPEX ended at 2.8.0, which needs torch 2.8 ({found}); "
            "bf16 with channels_last or 'compile' is as fast without it"
        )

    def compile(self, source: Source, spec: Spec, calibration: Calibration | None) -> NoReturn:
        raise ConfigError(f"ipex cannot be used: {self.refuse(spec)}.")

    def load(self, directory: Path, spec: Spec, native: Any = None) -> NoReturn:
        raise ConfigError(f"ipex cannot be used: {self.refuse(spec)}.")
