"""The public names, as a list: adding or losing one is a change of this file."""

from __future__ import annotations
import __future__

import importlib
import subprocess
import sys
import types
import typing
from importlib.util import find_spec

import pytest

PUBLIC = {
    "bigdl": ["__version__"],
    "bigdl.errors": [
        "AccuracyError",
        "ArgumentError",
        "BigDLError",
        "ConfigError",
        "ContextError",
        "DataError",
        "ImageError",
        "MissingDependencyError",
        "NotReadyError",
        "SearchError",
        "StoredModelError",
        "TimeLimitError",
        "WorkerError",
        "WorkerLostError",
    ],
    "bigdl.nano": ["Pipeline"],
    "bigdl.nano.pytorch": [
        "Guard",
        "InferenceOptimizer",
        "Pipeline",
        "Plan",
        "TorchNano",
        "Trainer",
        "nano",
    ],
    "bigdl.orca.learn": ["Predictor"],
    "bigdl.orca.learn.callbacks": [
        "Callback",
        "EarlyStopping",
        "LearningRateMonitor",
        "MLflow",
        "ModelCheckpoint",
        "Progress",
        "TensorBoard",
        "TrainingState",
    ],
    "bigdl.orca": ["OrcaContext", "init_orca_context", "stop_orca_context"],
    "bigdl.orca.data": ["XShards", "per_worker"],
    "bigdl.orca.data.pandas": ["read_csv", "read_json", "read_parquet"],
}
# Those whose import needs an extra: checked where it is installed.
WITH_TORCH = {
    "bigdl.nano.pytorch.vision": ["datasets", "transforms"],
    "bigdl.nano.pytorch.vision.datasets": ["ImageFolder"],
}
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs the [torch] extra")


def _shown(module: types.ModuleType) -> set[str]:
    """What a reader of ``dir()`` takes for public: no submodules, no names of the language."""
    shown = set()
    for name in dir(module):
        value = vars(module).get(name)
        is_foreign = (
            isinstance(value, (types.ModuleType, __future__._Feature))
            or getattr(value, "__module__", None) == "typing"
            or value is typing.Any
            or name == "TYPE_CHECKING"
        )
        if not name.startswith("_") and not is_foreign:
            shown.add(name)
    return shown


@pytest.mark.parametrize("name", PUBLIC)
def test_the_list(name):
    module = importlib.import_module(name)
    assert sorted(getattr(module, "__all__", [])) == PUBLIC[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_dir_shows_them_and_no_others(name):
    module = importlib.import_module(name)
    assert _shown(module) == {item for item in PUBLIC[name] if not item.startswith("_")}


@needs_torch
@pytest.mark.parametrize("name", WITH_TORCH)
def test_the_list_of_what_needs_torch(name):
    module = importlib.import_module(name)
    assert sorted(module.__all__) == WITH_TORCH[name]
    assert set(WITH_TORCH[name]) <= set(dir(module))
    for item in WITH_TORCH[name]:
        assert getattr(module, item).__doc__


@needs_torch
def test_transforms_are_torchvisions_by_name():
    from torchvision import transforms as theirs

    from bigdl.nano.pytorch.vision import transforms as ours

    public = {name for name in dir(theirs) if not name.startswith("_")}
    assert public <= set(dir(ours))
    for name in public:
        assert getattr(ours, name) is not None
    assert set(theirs.transforms.__all__) <= set(ours.__all__)


@needs_torch
@pytest.mark.parametrize("name", PUBLIC)
def test_each_is_there_and_documented(name):
    module = importlib.import_module(name)
    for item in PUBLIC[name]:
        value = getattr(module, item)
        assert isinstance(value, str) or value.__doc__, f"{name}.{item} has no docstring"


def test_a_wrong_name_is_an_attribute_error():
    import bigdl.nano.pytorch

    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        bigdl.nano.pytorch.Trainr  # noqa: B018


@pytest.mark.parametrize("name", [*PUBLIC["bigdl.nano.pytorch"], "vision.transforms"])
def test_without_torch_the_line_to_install(name):
    """Torch is hidden from a new process: what is asked for says how to get it."""
    package, _, item = f"bigdl.nano.pytorch.{name}".rpartition(".")
    hidden = dict.fromkeys(("torch", "torchvision"))
    code = f"import sys; sys.modules.update({hidden})\nfrom {package} import {item}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("bigdl._base.errors.MissingDependencyError: bigdl.nano.pytorch")
    assert last.endswith("pip install 'bigdl-next[torch]'")
