"""What the tests of engines need of the machine."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

_HOME = os.environ.get("JAVA_HOME")
_JAVA = shutil.which(str(Path(_HOME, "bin", "java")) if _HOME else "java")
_MISSING = "pyspark" if find_spec("pyspark") is None else "a Java runtime" if not _JAVA else ""
_AS_DATA = {"test_spark_conf.py"}  # these start nothing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on Spark are skipped where it cannot run, and nowhere else."""
    here = Path(__file__).parent
    for item in items:
        name = item.path.name
        on_spark = item.path.parent == here and name.startswith("test_spark")
        if _MISSING and on_spark and name not in _AS_DATA:
            item.add_marker(pytest.mark.skip(reason=f"Spark needs {_MISSING}"))
