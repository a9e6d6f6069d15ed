"""Every accelerator of ours against the contract."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from bigdl.nano.accelerators import ACCELERATORS
from bigdl.testing.accelerator import AcceleratorContract


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads that wait for each other take ages on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def accelerator(name):
    @pytest.fixture(scope="class")
    @classmethod
    def fixture(cls):
        return ACCELERATORS.get(name)()

    return fixture


class TestEager(AcceleratorContract):
    accelerator = accelerator("eager")


class TestEagerChannelsLast(AcceleratorContract):
    accelerator = accelerator("eager")
    config = MappingProxyType({"channels_last": True})


class TestEagerBf16(AcceleratorContract):
    accelerator = accelerator("eager")
    precision = "bf16"
    config = MappingProxyType({"channels_last": True})


class TestCompile(AcceleratorContract):
    accelerator = accelerator("compile")


class TestCompileBf16(AcceleratorContract):
    accelerator = accelerator("compile")
    precision = "bf16"
    config = MappingProxyType({"channels_last": True})


class TestTorchInt8(AcceleratorContract):
    accelerator = accelerator("torch_int8")
    precision = "int8"


class TestOnnxRuntime(AcceleratorContract):
    accelerator = accelerator("onnxruntime")


class TestOnnxRuntimeInt8(AcceleratorContract):
    accelerator = accelerator("onnxruntime")
    precision = "int8"


class TestOnnxRuntimeInt8Dynamic(AcceleratorContract):
    accelerator = accelerator("onnxruntime")
    precision = "int8"
    config = MappingProxyType({"quantization": "dynamic"})


class TestOpenVino(AcceleratorContract):
    accelerator = accelerator("openvino")


class TestOpenVinoThroughput(AcceleratorContract):
    accelerator = accelerator("openvino")
    config = MappingProxyType({"hint": "throughput", "own_shapes": 0})


class TestOpenVinoBf16(AcceleratorContract):
    accelerator = accelerator("openvino")
    precision = "bf16"


class TestOpenVinoInt8(AcceleratorContract):
    accelerator = accelerator("openvino")
    precision = "int8"
