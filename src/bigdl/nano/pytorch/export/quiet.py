"""Running a user's model, or the exporter, so that nothing is left changed behind it."""

from __future__ import annotations

import random
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["own_kernels_of_rnns", "quiet_run"]


@contextmanager
def quiet_run(model: nn.Module) -> Iterator[None]:
    """No gradients, the global random streams put back, other libraries' warnings held."""
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    devices = list(range(torch.cuda.device_count())) if on_gpu else []
    streams = random.getstate(), np.random.get_state()
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices),
            torch.inference_mode(False),  # a caller's: its tensors would stay bound to it
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])


@contextmanager
def own_kernels_of_rnns() -> Iterator[None]:
    """The exporter swaps in loops for recurrent layers, so that lengths can vary, but not in the
    operators' cache: what an earlier export left there would fix the length, and what this one
    leaves would reach the process's other work."""
    operators = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)
    try:
        for operator in operators:
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator in operators:
            operator._dispatch_cache.clear()
