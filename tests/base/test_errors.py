"""The error tree: drawn as it is, kept through pickling, each member documented."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

import bigdl.errors
from bigdl._base import errors
from bigdl.errors import BigDLError, WorkerError, WorkerLostError

TREE = [getattr(errors, name) for name in errors.__all__]
BUILTINS = {
    "ArgumentError": TypeError,
    "ConfigError": ValueError,
    "DataError": ValueError,
    "ImageError": OSError,
    "MissingDependencyError": ImportError,
    "AccuracyError": ValueError,
    "NotReadyError": RuntimeError,
    "ContextError": RuntimeError,
    "StoredModelError": ValueError,
    "TimeLimitError": TimeoutError,
    "SearchError": RuntimeError,
    "WorkerError": RuntimeError,
    "WorkerLostError": WorkerError,
    "BigDLError": Exception,
}


@pytest.mark.parametrize("kind", TREE)
def test_kinds(kind):
    assert issubclass(kind, BigDLError)
    assert issubclass(kind, BUILTINS[kind.__name__])
    assert kind.__doc__
    assert "\n" not in kind.__doc__.split("\n\n")[0].strip()
    assert getattr(bigdl.errors, kind.__name__) is kind


def test_the_drawing_is_the_tree():
    drawn = re.findall(r"^(?:[│ ]*[├└]── )?(\w+)(?:\((\w+)\))?", errors.__doc__, re.M)
    drawn = {name: base for name, base in drawn if name.endswith("Error")}
    assert set(drawn) == {kind.__name__ for kind in TREE}
    for name, base in drawn.items():
        if base:
            assert BUILTINS[name].__name__ == base


def test_the_list_is_complete():
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == set(errors.__all__)
    assert list(errors.__all__) == sorted(errors.__all__)
    assert bigdl.errors.__all__ == errors.__all__


@pytest.mark.parametrize("kind", TREE)
@pytest.mark.parametrize("duplicate", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_pickles_to_the_same(kind, duplicate):
    error = kind("asked 4, found 3")
    error.add_note("a note")
    again = duplicate(error)
    assert type(again) is kind
    assert str(again) == "asked 4, found 3"
    assert again.args == error.args
    assert again.__notes__ == ["a note"]


@pytest.mark.parametrize("kind", [WorkerError, WorkerLostError])
def test_a_workers_error_keeps_its_attributes(kind):
    facts = {"rank": 1, "host": "here", "shard": 7, "traceback": "Traceback …"}
    error = kind("worker 1 of 4: boom", **facts)
    error.more = 3
    again = pickle.loads(pickle.dumps(error))
    assert vars(again) == {**facts, "more": 3}
    assert str(again) == "worker 1 of 4: boom"
