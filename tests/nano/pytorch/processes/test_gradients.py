"""Gradients in the memory that workers add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bigdl._base.collective.alone import Alone
from bigdl.nano.pytorch.processes.gradients import Summing, _Shared


def convolutions() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    )
    return model.to(memory_format=torch.channels_last)


def test_a_gradient_is_a_view_of_the_memory_that_is_added_up():
    """No copy out: what is summed is what the optimizer reads; clearing drops the view only."""
    model = convolutions()
    gradients = _Shared(list(model.parameters()), Alone(), Summing())
    memory = gradients._kernel.gradients
    for _ in range(2):
        model(torch.randn(5, 3, 8, 8)).sum().backward()
        gradients.reduce(rows=1, weight=1.0, loss=0.0, unit=1.0, stop=False)
        for parameter, array in zip(model.parameters(), memory, strict=True):
            assert parameter.grad.data_ptr() == array.ctypes.data
            assert parameter.grad.stride() == parameter.stride()
            assert np.abs(array).sum() == pytest.approx(parameter.grad.abs().sum().item())
        gradients.clear()
        assert all(parameter.grad is None for parameter in model.parameters())
    gradients.close()
