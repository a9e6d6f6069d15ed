"""A standalone Spark cluster on this machine, as from a download: a master and two workers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["standalone_cluster"]

_DEPLOY = "org.apache.spark.deploy"


@contextlib.contextmanager
def standalone_cluster(folder: Path, *, workers: int = 2, cores: int = 2) -> Iterator[str]:
    """The master's URL, while the cluster runs; started from the installed pyspark package.

    Args:
        folder: Where workers have their files.
        workers: How many.
        cores: Of each.
    """
    found = find_spec("pyspark")
    assert found is not None
    assert found.origin is not None
    home = Path(found.origin).parent
    env = {
        **os.environ,
        "SPARK_HOME": str(home),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_DAEMON_MEMORY": "256m",
    }
    port = _free_port()
    url = f"spark://127.0.0.1:{port}"
    here = ["--host", "127.0.0.1", "--webui-port"]
    commands = [[f"{_DEPLOY}.master.Master", *here, str(_free_port()), "--port", str(port)]]
    for number in range(workers):
        size = ["-c", str(cores), "-m", "2g", "--work-dir", str(folder / f"work-{number}")]
        commands.append([f"{_DEPLOY}.worker.Worker", *here, str(_free_port()), *size, url])
    with contextlib.ExitStack() as daemons:
        for command in commands:
            daemon = subprocess.Popen(
                [str(home / "bin" / "spark-class"), *command],
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            daemons.callback(daemon.wait, 20)
            daemons.callback(daemon.terminate)
        yield url


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
