"""Who may import whom. The tables below are the house's walls; widen one in the open."""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "bigdl"
FILES = sorted(SRC.rglob("*.py"))

# floor -> floors below it that it may use; "errors" is a public door of the ground floor
MAY_IMPORT = {
    "_base": {"_base"},
    "errors": {"_base"},
    "nano": {"_base", "errors", "nano"},
    "orca": {"_base", "errors", "nano", "orca"},
    "testing": {"_base", "errors", "nano", "orca", "testing"},
    "__main__": {"nano"},
}

# What comes with every installation, and where on the ground floor it may be used.
CORE = {
    "numpy": ("*",),
    "cloudpickle": ("_base/workers.py",),
    "packaging": ("*",),
    "fsspec": ("*",),
}

# The training plan knows torch only; these put it into Lightning's Trainer.
LIGHTNING = (
    "nano/pytorch/trainer.py",
    "nano/pytorch/torch_nano.py",
    "nano/pytorch/module.py",
    "nano/pytorch/lightning/*",
)

# A foreign library lives in the files named for it.
FOREIGN = {
    "torch": (
        "nano/pytorch/*",
        "nano/accelerators/eager.py",  # the frameworks' own ways to run a model
        "nano/accelerators/torch_*.py",
        "nano/accelerators/ipex.py",
        "orca/learn/pytorch/*",
        "orca/data/adapters/*loader*.py",
        "testing/accelerator.py",
        "testing/program.py",
    ),
    "torchvision": ("nano/pytorch/vision/*",),
    "PIL": ("nano/pytorch/vision/*",),
    "cv2": ("nano/pytorch/vision/*",),
    "pytorch_lightning": LIGHTNING,
    "lightning": LIGHTNING,
    "lightning_fabric": LIGHTNING,
    "torchmetrics": ("nano/pytorch/inference/metrics.py", "nano/pytorch/module.py"),
    "safetensors": (
        "nano/pytorch/*",
        "orca/learn/pytorch/codec.py",
        "nano/accelerators/eager.py",
        "nano/accelerators/torch_*.py",
    ),
    "xxhash": ("nano/pytorch/frozen/feature_cache.py",),
    "torchao": ("nano/accelerators/torch_int8.py",),
    "onnx": ("nano/pytorch/export/source.py", "nano/accelerators/onnxruntime.py"),
    "onnxscript": ("nano/pytorch/export/source.py",),
    "onnxruntime": ("nano/accelerators/onnxruntime.py",),
    "openvino": ("nano/accelerators/openvino.py",),
    "nncf": ("nano/accelerators/openvino.py",),
    "intel_extension_for_pytorch": ("nano/accelerators/ipex.py",),
    "neural_compressor": ("nano/accelerators/neural_compressor.py",),
    "pandas": (
        "orca/data/adapters/pandas*.py",
        "orca/data/adapters/spark_shards.py",
        "orca/data/frames.py",
        "orca/data/readers.py",  # the line to install
        "orca/data/steps.py",  # and this one
        "testing/xshards.py",
    ),
    "pyspark": (
        "orca/data/adapters/spark*.py",
        "orca/data/xshards.py",  # the line to install
        "orca/engines/spark*.py",
    ),
    "py4j": ("orca/data/adapters/spark*.py",),
    "pyarrow": (
        "orca/data/adapters/arrow*.py",
        "orca/data/adapters/spark*.py",
        "orca/data/spool*.py",
        "orca/data/adapters/parquet.py",
        "orca/data/adapters/__init__.py",  # the line to install
        "orca/data/readers.py",  # and this one
        "orca/engines/spark_session.py",  # and this one
    ),
    "tensorboard": ("orca/learn/callbacks/tensorboard.py",),
    "mlflow": ("orca/learn/callbacks/mlflow.py",),
    "pytest": ("testing/*",),
    "typer": ("nano/cli.py",),
    "rich": ("nano/cli.py", "nano/accelerators/openvino.py"),  # NNCF's progress bars are rich's
}


def _name(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


def _imports(path: Path):
    """Every absolute module name that ``path`` imports, by statement or by a literal string."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno} imports by a relative name"
            yield node.module
            if node.module == "bigdl" or node.module.startswith("bigdl."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            first = node.args[0]
            is_import = called in {"need", "import_module", "__import__"}
            if is_import and isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def _floor(path: Path) -> str:
    first = path.relative_to(SRC).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_floors(path):
    floor = _floor(path)
    if floor == "__init__":  # the version only
        assert not [name for name in _imports(path) if name.startswith("bigdl.")]
        return
    for name in _imports(path):
        if name.startswith("bigdl.") and name != "bigdl.__version__":
            assert name.split(".")[1] in MAY_IMPORT[floor], f"{_name(path)} imports {name}"


def test_the_second_floor_uses_public_names_of_the_first():
    for path in (SRC / "orca").rglob("*.py"):
        for name in _imports(path):
            if name.startswith("bigdl.nano."):
                assert not any(part.startswith("_") for part in name.split(".")), (path, name)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_foreign_libraries_live_where_they_are_named(path):
    for name in _imports(path):
        top = name.split(".")[0]
        if top == "bigdl" or top in sys.stdlib_module_names:
            continue
        homes = CORE.get(top) or FOREIGN.get(top)
        assert homes, f"{_name(path)} imports {name}, which no table here knows"
        assert any(fnmatch.fnmatch(_name(path), home) for home in homes), (
            f"{_name(path)} imports {name}; it lives in {', '.join(homes)}"
        )


def _tables() -> dict[str, str]:
    """Modules of implementations, each with the table that names it."""
    from bigdl.nano.accelerators import ACCELERATORS
    from bigdl.orca.data.adapters import ADAPTERS
    from bigdl.orca.engines import ENGINES

    tables = {"ACCELERATORS": ACCELERATORS, "ADAPTERS": ADAPTERS, "ENGINES": ENGINES}
    return {
        row.partition(":")[0]: name
        for name, table in tables.items()
        for row in table._known.values()
    }


# Implementations that lend something to their own kin.
KIN = {
    "bigdl.nano.accelerators.eager": ("nano/accelerators/torch_*.py", "nano/accelerators/ipex.py"),
    "bigdl.nano.accelerators.torch_compile": ("nano/accelerators/torch_int8.py",),
}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_nobody_imports_an_implementation(path):
    tables = _tables()
    for name in _imports(path):
        homes = KIN.get(name, ())
        if name in tables and not any(fnmatch.fnmatch(_name(path), home) for home in homes):
            pytest.fail(f"{_name(path)} imports {name}; ask the table {tables[name]}")


def test_no_circle_at_import():
    """Each module can be the first one imported: no order among them is needed."""
    names = [
        ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if not {"__main__", "testing"} & set(path.relative_to(SRC).with_suffix("").parts)
    ]
    # modules are forgotten between imports, so that each is first; frameworks stay loaded
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    for loaded in [m for m in sys.modules if m.split('.')[0] == 'bigdl']:\n"
        "        del sys.modules[loaded]\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as exc:\n"
        "        kinds = ('ModuleNotFoundError', 'MissingDependencyError')  # it was loaded anew\n"
        "        absent = type(exc).__name__ in kinds\n"
        "        assert absent and not (exc.name or '').startswith('bigdl'), name\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
