"""One Spark session for the tests of a file."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bigdl.orca.data.spool_lease import Lease


@pytest.fixture(scope="module")
def spark(tmp_path_factory):
    """Two threads on this machine, all on loopback; its Python workers are this Python."""
    if find_spec("pyspark") is None:
        pytest.skip("needs the [spark] extra")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java 17 or 21")
    from pyspark.sql import SparkSession

    folder = tmp_path_factory.mktemp("spark")
    names = []  # of the spools that this process has made; others make some too
    begin = Lease.__init__

    def noted(lease, *args):
        begin(lease, *args)
        names.append(lease.ticket.name)

    def spooled_folders():
        roots = [Path("/dev/shm"), folder / "local"]
        found = [path for root in roots for path in root.glob("bigdl-spool-*")]
        return {path for path in found if path.name.rpartition("-")[2] in names}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lease, "__init__", noted)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        settings = {
            "spark.ui.enabled": "false",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.local.dir": str(folder / "local"),
            "spark.sql.warehouse.dir": str(folder / "warehouse"),
            "spark.sql.shuffle.partitions": "3",
            "spark.sql.session.timeZone": "Europe/Berlin",
            "spark.ui.showConsoleProgress": "false",
        }
        builder = SparkSession.builder.master("local[2]").appName("tests")
        for name, value in settings.items():
            builder = builder.config(name, value)
        session = builder.getOrCreate()
        session.sparkContext.setLogLevel("OFF")
        session.spooled_folders = spooled_folders
        yield session
        session.stop()
