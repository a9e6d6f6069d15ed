"""torch itself: the model as it is, in channels_last, in bf16."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import ConfigError
from bigdl.nano.accelerators.base import Config, make_config
from bigdl.nano.accelerators.here import missing, no_bf16

if TYPE_CHECKING:
    from pathlib import Path

    from bigdl.nano.accelerators.base import Calibration, Source, Spec
    from bigdl.nano.accelerators.torch_native import NativeCompiled

__all__ = ["Eager", "EagerConfig"]


@dataclass(frozen=True, kw_only=True)
class EagerConfig(Config):
    """Options of running in torch itself.

    Args:
        channels_last: Keep pictures and the weights of convolutions with the channels innermost.
    """

    channels_last: bool = False


class Eager:
    """The user's own code, without gradients."""

    options = EagerConfig

    def refuse(self, spec: Spec) -> str | None:
        absent = missing("torch", extra="torch")
        if absent:
            return absent
        if spec.precision == "int8":
            return "torch's own modules have no int8 form; 'torch_int8' quantizes them"
        return no_bf16() if spec.precision == "bf16" else None

    def compile(
        self, source: Source, spec: Spec, calibration: Calibration | None
    ) -> NativeCompiled:
        from torch import nn

        if not isinstance(source.native, nn.Module):
            raise ConfigError("eager runs PyTorch modules, and this model is not one.")
        return _build(source.native, spec, source.bind(source.sample))

    def load(self, directory: Path, spec: Spec, native: Any = None) -> NativeCompiled:
        from bigdl.nano.accelerators.torch_modules import freeze, read_weights

        return _build(freeze(read_weights(native, directory)), spec, None)


def _build(native: Any, spec: Spec, example: Any) -> NativeCompiled:
    from bigdl.nano.accelerators.torch_native import NativeCompiled, in_layout, prepare_bf16

    config = make_config(EagerConfig, spec.config)
    changes = config.channels_last or spec.precision == "bf16"
    module = copy.deepcopy(native) if changes else native
    if config.channels_last:
        in_layout(module)
    if spec.precision == "bf16":
        prepare_bf16(module, example)
    return NativeCompiled(module, module, spec, channels_last=config.channels_last)
