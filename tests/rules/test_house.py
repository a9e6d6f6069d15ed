"""What the source may not hold, whoever writes it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "bigdl"
FILES = sorted(SRC.rglob("*.py"))
TEXTS = sorted(
    path
    for folder in ("src", "tests", "benchmarks", "examples", "scripts", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md", ".sh", ""} and path.is_file() and ".egg-info" not in str(path)
)

# Whose work it is to print: functions, and the command.
PRINTS = {"summary", "search_summary"}
COMMAND = "nano/cli.py"
# The one file that may set environment variables of this process.
SETS_ENVIRONMENT = "_base/environment.py"


def _name(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _functions_around(tree: ast.AST):
    """(node, name of the innermost function around it)."""

    def walk(node, function):
        for child in ast.iter_child_nodes(node):
            yield child, function
            inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from walk(child, child.name if inner else function)

    yield from walk(tree, None)


def test_no_utils():
    bad = [
        path
        for path in SRC.rglob("*")
        if re.fullmatch(r"_?(utils?|helpers?|misc|common)", path.stem)
    ]
    assert bad == []


def test_names_are_lowercase():
    assert [path for path in FILES if path.name != path.name.lower()] == []


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(_tree(path)), f"{_name(path)} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_nothing_is_printed(path):
    printing = {"print", "pprint", "pprint.pprint", "sys.stdout.write"}
    for node, function in _functions_around(_tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in printing:
            allowed = function in PRINTS or _name(path) == COMMAND
            assert allowed, f"{_name(path)}:{node.lineno} prints"


# Calls that reach further than the call that makes them, by the end of their dotted name.
PROCESS_WIDE = (
    "addHandler", "basicConfig", "captureWarnings", "setLevel", "os.putenv", "os.chdir",
    "set_num_threads", "set_num_interop_threads", "set_default_dtype", "set_start_method",
    "set_float32_matmul_precision", "use_deterministic_algorithms",
    "torch.manual_seed", "torch.random.manual_seed", "random.seed", "seed_everything",
    "signal.signal",
)  # fmt: skip
# Files that may make one of those: they take it back, or they run in a process of their own.
SCOPED: dict[str, set[str]] = {
    "_base/nursery.py": {"os.chdir", "signal.signal"},
    "nano/accelerators/onnxruntime.py": {"addHandler", "setLevel"},
    "nano/accelerators/openvino.py": {"setLevel"},
    "nano/launch.py": {"signal.signal"},
    "nano/pytorch/processes/place.py": {
        "set_num_threads",
        "use_deterministic_algorithms",
        "set_default_dtype",
        "set_float32_matmul_precision",
    },
    "nano/pytorch/inference/context.py": {"set_num_threads"},
    "nano/pytorch/inference/instance_worker.py": {"set_num_threads"},
    "nano/pytorch/plan/process.py": {"set_num_threads"},
    "nano/pytorch/inference/smoke.py": {"torch.manual_seed"},
    "nano/pytorch/inference/trial.py": {"set_num_threads"},
    "orca/data/spool_guard.py": {"os.chdir", "signal.signal"},  # a process of its own
    "orca/engines/host.py": {"os.chdir"},
    "orca/engines/spark_session.py": {"signal.signal"},
    "testing/accelerator.py": {"torch.manual_seed"},
}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_nothing_is_set_for_the_whole_process(path):
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            reach = [name for name in PROCESS_WIDE if f".{called}".endswith(f".{name}")]
            assert set(reach) <= SCOPED.get(_name(path), set()), (
                f"{_name(path)}:{node.lineno} calls {called}"
            )


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_the_environment_is_changed_in_one_place(path):
    if _name(path) == SETS_ENVIRONMENT:
        return
    writes = (
        r"os\.environ\[[^\]]+\]\s*=[^=]"
        r"|os\.environ\.(update|pop|setdefault|clear|popitem)\b"
        r"|del os\.environ|os\.environ\s*\|=|\b(un)?setenv\("
    )
    assert not re.search(writes, path.read_text()), f"{_name(path)} changes the environment"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_caught_exceptions_are_named(path):
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{_name(path)}:{node.lineno} catches everything"


def test_nothing_is_left_for_later():
    mark = re.compile("TO" + "DO|FIX" + "ME|XX" + "X")
    bad = [path for path in TEXTS if mark.search(path.read_text(errors="replace"))]
    assert bad == []


def test_errors_are_documented():
    from bigdl import errors

    for name in errors.__all__:
        assert getattr(errors, name).__doc__
