"""A small model run by one method, to see whether that works at all. For a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigdl._base import machine
from bigdl.nano import bench
from bigdl.nano.accelerators import ACCELERATORS
from bigdl.nano.accelerators.base import Calibration, Spec, make_config
from bigdl.nano.pytorch.inference.accelerated import build

if TYPE_CHECKING:
    from bigdl.nano.pytorch.inference.methods import Method

__all__ = ["run_small"]

# Largest difference that rounding explains, as a share of the largest output.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.3}


def run_small(method: Method) -> dict[str, Any]:
    """Run a small convolution network by ``method`` and compare it with the original.

    Returns:
        ``status`` "ok" with ``latency_ms`` and ``error``, or "refused" or "failed" with
        ``reason``.

    Raises:
        Exception: Whatever the runtime raises.
    """
    runtime = ACCELERATORS.get(method.accelerator)()
    threads = machine.cores()
    config = make_config(runtime.options, method.config())
    spec = Spec(precision=method.precision, inputs=(), outputs=(), threads=threads, config=config)
    reason = runtime.refuse(spec)
    if reason is not None:
        return {"status": "refused", "reason": str(reason)}
    model, batches = _small_model()
    x = batches[0]  # (4, 3, 32, 32)
    fast = build(
        model,
        name=method.name,
        accelerator=method.accelerator,
        precision=method.precision,
        sample=x,
        config=config,
        calibration=Calibration(batches=[(batch.numpy(),) for batch in batches]),
        threads=threads,
    )
    with torch.inference_mode():
        expected = model(x)
        found = fast(x)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        timing = bench.measure(lambda: fast(x), budget_s=0.5)
    fast.close()
    limit = _TOLERANCE[method.precision]
    if not error <= limit:  # nan too
        reason = f"its result is wrong by {error:.2g} of the largest output (limit {limit})"
        return {"status": "failed", "reason": reason}
    return {"status": "ok", "latency_ms": timing.median_ms, "error": error}


def _small_model() -> tuple[nn.Module, list[torch.Tensor]]:
    """A network with the usual layers, in eval mode, and a few batches for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
        return model.eval(), [torch.rand(4, 3, 32, 32) for _ in range(8)]
