"""Optional packages: absent and broken are different things."""

from __future__ import annotations

import json

import pytest

from bigdl._base.optional import is_installed, need
from bigdl.errors import MissingDependencyError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package that can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, code: str):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(code)

    return write


def test_there():
    assert need("json", extra="x", purpose="A test") is json


@pytest.mark.parametrize("module", ["bigdl_no_such", "bigdl_no_such.part"])
def test_absent(module):
    with pytest.raises(MissingDependencyError) as caught:
        need(module, extra="inference", purpose="Saving a report")
    assert str(caught.value) == (
        f"Saving a report needs '{module}', which is not installed. "
        "Install it with: pip install 'bigdl-next[inference]'"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_broken_inside_shows_its_own_error(package):
    package("bigdl_broken_a", "import bigdl_no_such_inner")
    with pytest.raises(ModuleNotFoundError, match="bigdl_no_such_inner") as caught:
        need("bigdl_broken_a", extra="x", purpose="A test")
    assert not isinstance(caught.value, MissingDependencyError)
    package("bigdl_broken_b", "raise OSError('libx.so: cannot open shared object file')")
    with pytest.raises(OSError, match=r"libx\.so"):
        need("bigdl_broken_b", extra="x", purpose="A test")


def test_is_installed_imports_nothing(package):
    package("bigdl_explodes", "raise RuntimeError('imported')")
    assert is_installed("bigdl_explodes")
    assert not is_installed("bigdl_no_such")
    assert not is_installed("bigdl_no_such.part")
