"""What a Spark session is started with, as data: from the arguments of ``init_orca_context``.

Standard library only, and nothing is started or changed here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from bigdl._base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bigdl.orca.engines.base import EngineSettings

__all__ = [
    "contradictions",
    "executor_cores",
    "is_here",
    "master_of",
    "session_conf",
    "session_env",
    "slots_of",
    "starts_none",
]

_LOOPBACK = "127.0.0.1"
_CLUSTER = re.compile(r"local-cluster\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")
_LOCAL = re.compile(r"local(?:\[\s*(\d+|\*)\s*(?:,\s*\d+\s*)?\])?")


def master_of(settings: EngineSettings, cores: int) -> str:
    """The master that the arguments mean.

    Args:
        settings: As ``init_orca_context`` was asked.
        cores: Of this machine, where nothing else was asked.

    Raises:
        ConfigError: ``conf`` has another, or the mode needs one.
    """
    mode = settings.cluster_mode.partition("-")[0]
    asked = settings.conf.get("spark.master")
    if mode == "local":
        master = f"local[{settings.cores or cores}]"
        if asked is not None:
            if settings.cores is None or str(asked) == master:
                return str(asked)
            raise ConfigError(
                f"cores={settings.cores} and conf's spark.master={asked!r} contradict each "
                "other: give one of them."
            )
        return master
    master = "yarn" if mode == "yarn" else settings.master or str(asked or "")
    if not master:
        raise ConfigError(f"cluster_mode={settings.cluster_mode!r} needs master=.")
    if asked is not None and asked != master:
        raise ConfigError(
            f"conf has spark.master={asked!r}, and the arguments mean {master!r}: drop one."
        )
    if mode == "k8s" and not master.startswith("k8s://"):
        raise ConfigError(
            f'master={master!r} is no Kubernetes master ("k8s://https://host:port").'
        )
    if mode == "standalone" and not (master.startswith("spark://") or _CLUSTER.fullmatch(master)):
        raise ConfigError(f'master={master!r} is no standalone master ("spark://host:7077").')
    return master


def session_conf(
    settings: EngineSettings, python: str, environ: Mapping[str, str], cores: int
) -> dict[str, str]:
    """All settings of a session that we start; what the caller gave stands.

    Args:
        settings: As ``init_orca_context`` was asked.
        python: The caller's interpreter.
        environ: The caller's environment.
        cores: Of this machine.

    Raises:
        ConfigError: Arguments and ``conf`` contradict each other, or the mode cannot be had so.
    """
    master = master_of(settings, cores)
    mode, _, deploy = settings.cluster_mode.partition("-")
    if deploy == "cluster" and "PYSPARK_GATEWAY_PORT" not in environ:
        raise ConfigError(
            f"cluster_mode={settings.cluster_mode!r} runs this program inside the cluster, which "
            f"is done from outside: spark-submit --master {mode} --deploy-mode cluster … . From "
            f"here use cluster_mode={mode + '-client'!r}."
        )
    conf = {
        "spark.master": master,
        "spark.app.name": "bigdl",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
    }
    if is_here(master):
        conf |= {"spark.driver.host": _LOOPBACK, "spark.driver.bindAddress": _LOOPBACK}
    if "PYSPARK_PYTHON" not in environ and mode in ("local", "standalone"):
        conf["spark.pyspark.python"] = python
    asked: dict[str, str] = {}
    if settings.memory_bytes is not None:
        name = "spark.driver.memory" if mode == "local" else "spark.executor.memory"
        asked[name] = f"{max(1, settings.memory_bytes >> 20)}m"
    if mode != "local" and settings.cores is not None:
        asked["spark.executor.cores"] = str(settings.cores)
    if mode == "standalone" and settings.cores is not None and not is_here(master, cluster=True):
        asked["spark.cores.max"] = str(settings.cores * settings.num_nodes)
    if mode in ("yarn", "k8s"):
        asked["spark.executor.instances"] = str(settings.num_nodes)
        conf["spark.submit.deployMode"] = deploy or "client"
    given = {name: str(value) for name, value in settings.conf.items()}
    if mode == "k8s" and "spark.kubernetes.container.image" not in given:
        raise ConfigError(
            "cluster_mode='k8s' needs an image with Python and what your program imports: "
            "conf={'spark.kubernetes.container.image': …}."
        )
    wrong = [
        f"{name}: {value!r} by the arguments, {given[name]!r} in conf"
        for name, value in asked.items()
        if name in given and given[name] != value
    ]
    if wrong:
        raise ConfigError("Arguments and conf= contradict each other: " + "; ".join(wrong) + ".")
    return {**conf, **asked, **given}


def session_env(conf: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that have to be set while the session starts."""
    env: dict[str, str] = {}
    if "spark.pyspark.python" in conf and "PYSPARK_PYTHON" not in environ:
        env["PYSPARK_PYTHON"] = conf["spark.pyspark.python"]
    if is_here(conf["spark.master"]):
        env["SPARK_LOCAL_IP"] = _LOOPBACK  # local-cluster's executors know no other setting
    return env


def is_here(master: str, *, cluster: bool = False) -> bool:
    """Whether all of Spark runs on this machine (``cluster``: as local-cluster)."""
    if cluster:
        return _CLUSTER.fullmatch(master) is not None
    return (
        master.startswith("local")
        or re.match(r"spark://(127\.[\d.]+|localhost|\[::1\]):", master) is not None
    )


def slots_of(conf: Mapping[str, str], cores: int) -> int | None:
    """Cores' worth of work of a session with these settings; None = its executors have to say.

    Args:
        conf: The session's settings.
        cores: Of this machine, for "local[*]".
    """
    master = conf.get("spark.master", "")
    if match := _CLUSTER.fullmatch(master):
        return int(match[1]) * int(match[2])
    if match := _LOCAL.fullmatch(master):
        return cores if match[1] == "*" else int(match[1] or 1)
    each = conf.get("spark.executor.cores")
    if _is_elastic(conf):
        most = conf.get("spark.dynamicAllocation.maxExecutors")
        if most is not None and each is not None:
            found = int(most) * int(each)
            limit = conf.get("spark.cores.max")
            return min(found, int(limit)) if limit is not None else found
        return None
    if (limit := conf.get("spark.cores.max")) is not None:
        return int(limit)
    many = conf.get("spark.executor.instances")
    return int(many) * int(each) if many is not None and each is not None else None


def starts_none(conf: Mapping[str, str]) -> bool:
    """Whether a session with these settings starts no executor before there is work for one."""
    names = (
        "spark.dynamicAllocation.minExecutors",
        "spark.dynamicAllocation.initialExecutors",
        "spark.executor.instances",
    )
    return _is_elastic(conf) and all(int(conf.get(name, "0")) == 0 for name in names)


def _is_elastic(conf: Mapping[str, str]) -> bool:
    return conf.get("spark.dynamicAllocation.enabled", "false").lower() == "true"


def executor_cores(conf: Mapping[str, str]) -> int | None:
    """Cores of each executor with these settings; None = they have to say."""
    master = conf.get("spark.master", "")
    if match := _CLUSTER.fullmatch(master):
        return int(match[2])
    each = conf.get("spark.executor.cores")
    if each is None and master.startswith(("yarn", "k8s://")):
        each = "1"  # their default
    return int(each) if each is not None else None


def contradictions(settings: EngineSettings, conf: Mapping[str, str], slots: int) -> list[str]:
    """What was asked that a running session has otherwise, in words.

    Args:
        settings: As ``init_orca_context`` was asked.
        conf: The session's.
        slots: The session's.
    """
    master = conf.get("spark.master", "")
    mode = settings.cluster_mode.partition("-")[0]
    starts = {"standalone": ("spark://", "local-cluster"), "yarn": ("yarn",), "k8s": ("k8s://",)}
    wrong = []
    if mode in starts and not master.startswith(starts[mode]):
        wrong.append(f"cluster_mode={settings.cluster_mode!r}, it is on {master!r}")
    if settings.master is not None and settings.master != master:
        wrong.append(f"master={settings.master!r}, it is on {master!r}")
    if settings.cores is not None and settings.cores * settings.num_nodes != slots:
        wrong.append(
            f"cores={settings.cores} on {settings.num_nodes} node(s), it has {slots} slots"
        )
    if settings.memory_bytes is not None:
        name = "spark.driver.memory" if master.startswith("local[") else "spark.executor.memory"
        has = conf.get(name, "1g")
        if _megabytes(has) != settings.memory_bytes >> 20:
            wrong.append(f"memory of {settings.memory_bytes >> 20} MiB, it has {name}={has}")
    wrong += [
        f"conf's {name}={value!r}, it has {conf.get(name)!r}"
        for name, value in settings.conf.items()
        if conf.get(name) != str(value)
    ]
    return wrong


def _megabytes(text: str) -> int:
    """Spark's way to write a size, in MiB; -1 if it is none."""
    match = re.fullmatch(r"(\d+)([kmgt]?)b?", text.strip().lower())
    if match is None:
        return -1
    size = (
        int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}[match[2]]
    )
    return size >> 20
