"""Plain data is pickled at once, everything else with care; both come back as they were."""

from __future__ import annotations

import collections
import pickle
import sys
import time

import numpy as np
import pytest

from bigdl._base import workers
from bigdl.orca.engines.pickling import dumps


class Own:
    def __eq__(self, other):
        return type(other) is Own

    __hash__ = None


PLAIN = [
    None, True, 3, 2.5, 1j, "text", b"bytes", (), [], {}, set(), [1, ["a", (2.0, None)]],
    {"step": 3, "loss": 0.5, ("a", 1): [True]}, {1, 2}, frozenset({"x"}),
    np.float32(2), np.bool_(True), np.arange(5), {"x": np.zeros((2, 3))},
]  # fmt: skip
OTHER = [
    Own(), [Own()], {"a": Own()}, {1: [2, Own()]}, collections.OrderedDict(a=1),
    collections.Counter("aab"), np.array([Own()], dtype=object), list(range(5000)),
    {i: i for i in range(3000)}, [[1]] * 900, int, len,
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_data_needs_no_look_at_the_modules(value, monkeypatch):
    monkeypatch.setattr(workers, "dumps", lambda _: pytest.fail("not plain?"))
    again = pickle.loads(dumps(value))
    assert type(again) is type(value)
    np.testing.assert_equal(again, value)


@pytest.mark.parametrize("value", OTHER, ids=lambda value: repr(value)[:40])
def test_everything_else_goes_the_careful_way(value, monkeypatch):
    asked = []
    careful = workers.dumps
    monkeypatch.setattr(workers, "dumps", lambda v: asked.append(1) or careful(v))
    again = pickle.loads(dumps(value))
    assert asked == [1]
    assert np.array_equal(again, value) if isinstance(value, np.ndarray) else again == value


def test_a_list_that_holds_itself():
    loop = [1]
    loop.append(loop)
    again = pickle.loads(dumps(loop))
    assert again[1] is again


def test_an_array_of_a_class_of_main_goes_the_careful_way(monkeypatch):
    mine = type("Mine", (np.ndarray,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Mine", mine, raising=False)
    assert b"cloudpickle" in dumps(np.zeros(2).view(mine))


def test_events_are_quick():
    event = {"step": 12, "loss": 0.25, "rows": 32}
    started = time.process_time()
    for _ in range(1000):
        dumps(event)
    assert time.process_time() - started < 0.2
