"""Importing is cheap, loads no framework, and changes nothing that belongs to others."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

LIGHT = ["bigdl", "bigdl.errors", "bigdl.nano", "bigdl.nano.accelerators", "bigdl.nano.pytorch",
         "bigdl.orca", "bigdl.orca.engines.local", "bigdl.orca.data.adapters",
         "bigdl.orca.data", "bigdl.orca.data.pandas"]  # fmt: skip
LIGHT += ["bigdl.orca.learn", "bigdl.orca.learn.program", "bigdl.orca.learn.pytorch"]
LIMIT_S = 0.3
FRAMEWORKS = {
    "torch", "torchvision", "pytorch_lightning", "lightning", "torchmetrics", "tensorflow",
    "keras", "jax", "pyspark", "ray", "pandas", "pyarrow", "optuna", "sklearn", "scipy",
    "openvino", "onnx", "onnxruntime", "nncf", "torchao", "cv2", "PIL", "transformers",
    "typer", "rich", "matplotlib",
}  # fmt: skip


def _python(code: str, *, timeout: float = 300.0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _seconds(module: str) -> float:
    """Processor seconds that importing takes: on a busy machine the clock on the wall lies.

    Without NumPy's, which every program with data has loaded already.
    """
    return float(
        _python(
            "import numpy, time; start = time.process_time()\n"
            f"import {module}\n"
            "print(time.process_time() - start)"
        )
    )


@pytest.mark.parametrize("module", LIGHT)
def test_quick(module):
    took = min(_seconds(module) for _ in range(5))  # what else runs only ever adds to it
    assert took < LIMIT_S, f"import {module} took {took:.2f} s of processor time"


@pytest.mark.parametrize("module", LIGHT)
def test_no_framework(module):
    loaded = _python(f"import {module}, sys; print(*sys.modules)").split()
    assert not FRAMEWORKS & {name.split(".")[0] for name in loaded}


# What a process has that an import could change, as one comparable value.
SNAPSHOT = """
import builtins, gc, json, locale, logging, os, random, signal, sys, threading, warnings

def snapshot():
    loggers = {
        name: (logger.level, logger.propagate, logger.disabled, len(logger.handlers))
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.split(".")[0] != "bigdl"
    }
    facts = {
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "path": list(sys.path),
        "warning filters": [str(f) for f in warnings.filters],
        "show warning": str(warnings.showwarning),
        "root logger": (logging.root.level, len(logging.root.handlers), logging.root.disabled),
        "loggers": loggers,
        "signals": [str(signal.getsignal(s)) for s in signal.valid_signals()],
        "hooks": [str(sys.excepthook), str(sys.displayhook), str(threading.excepthook)],
        "trace": [str(sys.gettrace()), str(sys.getprofile())],
        "builtins": sorted(vars(builtins)),
        "random": hash(random.getstate()),
        "collector": [gc.isenabled(), *gc.get_threshold()],
        "recursion": sys.getrecursionlimit(),
        "locale": locale.setlocale(locale.LC_ALL),
        "threads": threading.active_count(),
        "children": open("/proc/self/task/%d/children" % os.getpid()).read()
        if os.path.exists("/proc/self/task/%d/children" % os.getpid()) else "",
    }
    if hasattr(os, "sched_getaffinity"):
        facts["affinity"] = sorted(os.sched_getaffinity(0))
    if "numpy" in sys.modules:
        import numpy
        facts["numpy random"] = hash(numpy.random.get_state()[1].tobytes())
        facts["numpy errors"] = numpy.geterr()
    if "torch" in sys.modules:
        import torch
        facts["torch"] = [
            torch.get_num_threads(), torch.get_num_interop_threads(),
            str(torch.get_default_dtype()), torch.is_grad_enabled(),
            torch.initial_seed(), hash(torch.get_rng_state().numpy().tobytes()),
            torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled,
            torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
            str(torch.multiprocessing.get_sharing_strategy()),
            str(torch.multiprocessing.get_start_method(allow_none=True)),
        ]
    return json.loads(json.dumps(facts, default=str))

def compare(before, after):
    changed = {k: [before[k], after[k]] for k in before if before[k] != after[k]}
    # a logger of a library that was loaded on the way is that library's own
    if "loggers" in changed:
        old, new = changed["loggers"]
        if all(new.get(name) == value for name, value in old.items()):
            del changed["loggers"]
    return changed
"""


@pytest.mark.parametrize("module", LIGHT)
def test_nothing_changes(module):
    # NumPy first: what loading it does is not ours
    code = SNAPSHOT + (
        "import numpy\n"
        "before = snapshot()\n"
        f"import {module}\n"
        "print(json.dumps(compare(before, snapshot())))"
    )
    assert json.loads(_python(code)) == {}


# Loads the frameworks, then all our modules; prints what changed, classes touched, our modules.
BESIDE_FRAMEWORKS = """
import importlib, pkgutil
warnings.simplefilter("ignore")
for name in (
    "numpy", "torch", "torch.utils.data", "torch._dynamo", "torch._inductor.config", "torchvision",
    "pytorch_lightning", "torchmetrics", "safetensors.torch", "openvino", "nncf", "nncf.torch",
    "onnx", "onnxruntime", "onnxruntime.quantization", "torchao", "torchao.quantization.pt2e",
    "cv2", "typer", "rich.console", "sklearn",
):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
import torch

def classes():
    tops = ("torch", "torchvision", "pytorch_lightning")
    return {
        f"{value.__module__}.{value.__qualname__}": {
            name: id(member) for name, member in vars(value).items()
            if callable(member) and not name.startswith("_abc")
        }
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in tops and module is not None
        for value in list(vars(module).values())
        if isinstance(value, type) and value.__module__.split(".")[0] in tops
    }

before, theirs = snapshot(), classes()
import bigdl
loaded = []
for info in pkgutil.walk_packages(bigdl.__path__, "bigdl."):
    if info.name.endswith("__main__") or info.name.startswith("bigdl.testing"):
        continue
    try:
        importlib.import_module(info.name)
    except ImportError as exc:
        assert not (exc.name or "").startswith("bigdl"), info.name
        continue
    loaded.append(info.name)
now = classes()
touched = [name for name in theirs if theirs[name] != now.get(name)]
print(json.dumps([compare(before, snapshot()), touched, loaded]))
"""


@pytest.mark.skipif(find_spec("torch") is None, reason="needs the [torch] extra")
def test_nothing_changes_beside_the_frameworks():
    """All our modules, loaded after the frameworks: not even a class of theirs is touched."""
    changed, touched, loaded = json.loads(_python(SNAPSHOT + BESIDE_FRAMEWORKS))
    assert changed == {}
    assert touched == []
    assert "bigdl.nano.pytorch.plan.candidates" in loaded
