"""The table of accelerators. Each is one file, imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigdl._base.registry import Registry

if TYPE_CHECKING:
    from bigdl.nano.accelerators.base import Accelerator

ACCELERATORS: Registry[type[Accelerator]] = Registry(
    "accelerator",
    {
        "eager": "bigdl.nano.accelerators.eager:Eager",
        "compile": "bigdl.nano.accelerators.torch_compile:TorchCompile",
        "torch_int8": "bigdl.nano.accelerators.torch_int8:TorchInt8",
        "onnxruntime": "bigdl.nano.accelerators.onnxruntime:OnnxRuntime",
        "openvino": "bigdl.nano.accelerators.openvino:OpenVino",
        "ipex": "bigdl.nano.accelerators.ipex:Ipex",
        "inc": "bigdl.nano.accelerators.neural_compressor:NeuralCompressor",
    },
    group="bigdl.accelerators",
)
