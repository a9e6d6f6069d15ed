"""What a call of ours costs beside the same runtime used by hand.

    python benchmarks/overhead.py [--quick]

One JSON line for each model and runtime: milliseconds of a call by hand and by us (timed in
turns in one process), the ratio, the difference in microseconds, and whether the results agree.
The limits: at most 2 % and at most 50 us more. Of a call by hand under 1 ms, 2 % are less than it
takes to look at one argument: there at most 20 us. A last line has the small MLP against eager,
for which the limit is 20 us, and what ``optimize`` says about it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bigdl._base import machine
from bigdl.nano import bench
from bigdl.nano.pytorch import InferenceOptimizer

THREADS = torch.get_num_threads()


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


def resnet18() -> nn.Module:
    from torchvision.models import resnet18 as build

    return build(weights=None)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


MODELS = {
    "tiny": (tiny, (1, 3, 32, 32)),
    "resnet18": (resnet18, (1, 3, 224, 224)),
}


def export(model: nn.Module, x: torch.Tensor, folder: str) -> str:
    """The file as a careful user would make it: the first axis may vary, as in ours."""
    path = str(Path(folder) / "model.onnx")
    torch.onnx.export(
        model,
        (torch.cat([x] * 5),),
        path,
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    return path


def by_hand(runtime: str, model: nn.Module, x: torch.Tensor, folder: str):
    """The runtime's own API, tensors in, a tensor out."""
    if runtime == "compile":
        with torch.no_grad():
            torch._inductor.config.freezing = True
            compiled = torch.compile(model)

            def call():
                with torch.no_grad():
                    return compiled(x)

            call()
            return call
    path = export(model, x, folder)
    if runtime == "onnxruntime":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": THREADS,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    converted = openvino.Core().read_model(path)
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def call():
        # a copy, as a caller wants outputs that the next call does not overwrite
        return torch.from_numpy(np.array(request.infer([x.numpy()], share_inputs=True)[0]))

    return call


def compare(runtime: str, name: str, turns: int) -> dict:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    with tempfile.TemporaryDirectory() as folder:
        hand = by_hand(runtime, model, x, folder)
        fast = InferenceOptimizer.trace(model, x, accelerator=runtime)

        def ours():
            return fast(x)

        timed = bench.compare({"hand": hand, "ours": ours}, warmup=20, turns=turns)
        difference = float((hand() - ours()).abs().max())
    ratio = 1 / bench.speedup(timed["hand"], timed["ours"])
    hand_ms = timed["hand"].median_ms
    extra_us = statistics.median(
        1e3 * (statistics.median(b) - statistics.median(a))
        for a, b in zip(timed["hand"].turns, timed["ours"].turns, strict=True)
    )
    return {
        "benchmark": "overhead",
        "model": name,
        "runtime": runtime,
        "hand_ms": round(hand_ms, 4),
        "ours_ms": round(timed["ours"].median_ms, 4),
        "ratio": round(ratio, 4),
        "extra_us": round(extra_us, 1),
        "largest_difference": difference,
        "kept": ratio <= 1.02 and extra_us <= 50 if hand_ms >= 1.0 else extra_us <= 20,
    }


def small_mlp(turns: int) -> dict:
    """Batch 1 through 64-64-10: no runtime can be worth its call, and we must not hide that."""
    torch.manual_seed(0)
    model, x = mlp().eval(), torch.randn(1, 64)
    optimizer = InferenceOptimizer()
    report = optimizer.optimize(model, [x], budget_s=120)
    best, name = optimizer.get_best_model()

    def eager():
        with torch.inference_mode():
            return model(x)

    # an accelerated model needs no context around it; "keep yours" is the eager call itself
    ours = eager if best is model else lambda: best(x)
    timed = bench.compare({"eager": eager, "ours": ours}, warmup=50, turns=turns)
    extra_us = statistics.median(
        1e3 * (statistics.median(b) - statistics.median(a))
        for a, b in zip(timed["eager"].turns, timed["ours"].turns, strict=True)
    )
    return {
        "benchmark": "overhead",
        "model": "mlp 64-64-10, batch 1",
        "chosen": name,
        "verdict": report.verdict(),
        "speedups": {row.name: round(row.speedup, 3) for row in report.rows if row.speedup},
        "eager_us": round(timed["eager"].median_ms * 1e3, 1),
        "ours_us": round(timed["ours"].median_ms * 1e3, 1),
        "extra_us": round(extra_us, 1),
        "kept": extra_us <= 20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model only, fewer turns")
    parser.add_argument("--only", choices=["openvino", "onnxruntime", "compile", "mlp"])
    given = parser.parse_args()
    turns = 40 if given.quick else 120
    print(json.dumps({"cores": machine.cores(), "threads": THREADS, "torch": torch.__version__}))
    for name in ["tiny"] if given.quick else MODELS:
        for runtime in ("openvino", "onnxruntime", "compile"):
            if given.only in (None, runtime):
                print(json.dumps(compare(runtime, name, turns)), flush=True)
    if given.only in (None, "mlp"):
        print(json.dumps(small_mlp(turns)), flush=True)


if __name__ == "__main__":
    main()
