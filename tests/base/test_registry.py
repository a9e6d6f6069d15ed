"""Tables of implementations: ours win, others join, wrong names are answered."""

from __future__ import annotations

import importlib.metadata
import json
from importlib.metadata import EntryPoint

import pytest

from bigdl._base.registry import Registry, nearest
from bigdl.errors import ConfigError


@pytest.fixture
def others(monkeypatch):
    asked = []

    def entry_points(*, group):
        asked.append(group)
        return [EntryPoint("dumps", "json:dumps", group), EntryPoint("ours", "json:load", group)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return asked


def test_imported_when_asked():
    table = Registry("thing", {"loads": "json:loads", "broken": "no_such_module:x"})
    assert table.get("loads") is json.loads
    with pytest.raises(ModuleNotFoundError):
        table.get("broken")


def test_a_wrong_name_is_answered_with_the_right_one():
    table = Registry("accelerator", {"openvino": "a:b", "onnxruntime": "a:b"})
    with pytest.raises(ConfigError) as caught:
        table.get("openvin")
    assert "No accelerator 'openvin'" in str(caught.value)
    assert "onnxruntime, openvino" in str(caught.value)
    assert "Did you mean 'openvino'?" in str(caught.value)


def test_other_packages_add_rows_but_take_none(others):
    table = Registry("thing", {"ours": "json:loads"}, group="bigdl.things")
    assert others == []  # nobody is asked at import
    assert list(table) == ["ours", "dumps"]
    assert table.get("dumps") is json.dumps
    assert table.get("ours") is json.loads
    assert "dumps" in table
    assert others == ["bigdl.things"]


def test_repr_shows_the_rows():
    assert repr(Registry("thing", {"a": "x:y", "b": "x:y"})) == "Registry(thing: a, b)"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("opnvino", " Did you mean 'openvino'?"), ("zzz", ""), (3, "")],
)
def test_nearest(name, sentence):
    assert nearest(name, ["openvino", "onnxruntime"]) == sentence
