"""What a Spark session is started with, as data: every mode, every contradiction."""

from __future__ import annotations

import pytest

from bigdl.errors import ConfigError
from bigdl.orca.engines.base import EngineSettings
from bigdl.orca.engines.spark_conf import (
    contradictions,
    executor_cores,
    session_conf,
    session_env,
    slots_of,
    starts_none,
)

COMMON = {
    "spark.app.name": "bigdl",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "ERROR",
}
HERE = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
PYTHON = {"spark.pyspark.python": "/my/python"}


def conf(environ=None, **settings):
    return session_conf(EngineSettings(**settings), "/my/python", environ or {}, 6)


MODES = [
    ({}, {"spark.master": "local[6]", **HERE, **PYTHON}),
    (
        {"cores": 3, "memory_bytes": 2 << 30},
        {"spark.master": "local[3]", "spark.driver.memory": "2048m", **HERE, **PYTHON},
    ),
    ({"conf": {"spark.master": "local[*]"}}, {"spark.master": "local[*]", **HERE, **PYTHON}),
    (
        {"cluster_mode": "standalone", "master": "local-cluster[2,1,1024]"},
        {"spark.master": "local-cluster[2,1,1024]", **HERE, **PYTHON},
    ),
    (
        {"cluster_mode": "standalone", "master": "spark://127.0.0.1:7077", "cores": 2},
        {"spark.master": "spark://127.0.0.1:7077", "spark.executor.cores": "2",
         "spark.cores.max": "2", **HERE, **PYTHON},
    ),
    (
        {"cluster_mode": "standalone", "master": "spark://far:7077", "cores": 8, "num_nodes": 3,
         "memory_bytes": 64 << 30},
        {"spark.master": "spark://far:7077", "spark.executor.cores": "8", "spark.cores.max": "24",
         "spark.executor.memory": "65536m", **PYTHON},
    ),
    (
        {"cluster_mode": "yarn", "cores": 4, "num_nodes": 5, "memory_bytes": 8 << 30},
        {"spark.master": "yarn", "spark.submit.deployMode": "client", "spark.executor.cores": "4",
         "spark.executor.instances": "5", "spark.executor.memory": "8192m"},
    ),
    (
        {"cluster_mode": "yarn-client", "conf": {"spark.archives": "env.tar.gz#env"}},
        {"spark.master": "yarn", "spark.submit.deployMode": "client",
         "spark.executor.instances": "1", "spark.archives": "env.tar.gz#env"},
    ),
    (
        {"cluster_mode": "k8s-client", "master": "k8s://https://far:6443", "num_nodes": 2,
         "conf": {"spark.kubernetes.container.image": "mine"}},
        {"spark.master": "k8s://https://far:6443", "spark.submit.deployMode": "client",
         "spark.executor.instances": "2", "spark.kubernetes.container.image": "mine"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), MODES, ids=[str(row[0]) for row in MODES])
def test_every_mode(settings, expected):
    assert conf(**settings) == {**COMMON, **expected}


def test_what_the_caller_sets_stands():
    found = conf(conf={"spark.ui.enabled": True, "spark.app.name": "mine", "a": 1})
    assert found["spark.ui.enabled"] == "True"
    assert found["spark.app.name"] == "mine"
    assert found["a"] == "1"


def test_a_python_that_was_named_stays():
    assert "spark.pyspark.python" not in conf({"PYSPARK_PYTHON": "/other"})
    given = {"spark.pyspark.python": "/third"}
    assert conf(conf=given)["spark.pyspark.python"] == "/third"


def test_inside_a_submitted_program_the_cluster_mode_is_what_it_is():
    found = conf({"PYSPARK_GATEWAY_PORT": "1"}, cluster_mode="yarn-cluster")
    assert found["spark.submit.deployMode"] == "cluster"


WRONG = [
    ({"cores": 2, "conf": {"spark.master": "local[4]"}}, r"cores=2.*spark.master='local\[4\]'"),
    ({"cluster_mode": "standalone"}, "needs master="),
    ({"cluster_mode": "standalone", "master": "far:7077"}, "no standalone master"),
    ({"cluster_mode": "standalone", "master": "spark://a:1", "conf": {"spark.master": "spark://b:1"}},
     "spark://b:1.*drop one"),
    ({"cluster_mode": "standalone", "master": "spark://a:1", "cores": 2,
      "conf": {"spark.executor.cores": 4}}, "spark.executor.cores: '2' by the arguments, '4'"),
    ({"memory_bytes": 1 << 30, "conf": {"spark.driver.memory": "3g"}}, "spark.driver.memory"),
    ({"cluster_mode": "yarn", "num_nodes": 2, "conf": {"spark.executor.instances": "3"}},
     "spark.executor.instances: '2' by the arguments, '3' in conf"),
    ({"cluster_mode": "yarn", "conf": {"spark.master": "local[2]"}}, r"local\[2\].*'yarn'"),
    ({"cluster_mode": "yarn-cluster"}, "spark-submit --master yarn --deploy-mode cluster"),
    ({"cluster_mode": "k8s", "master": "https://far"}, "no Kubernetes master"),
    ({"cluster_mode": "k8s", "master": "k8s://https://far"}, "container.image"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "says"), WRONG, ids=[str(row[0]) for row in WRONG])
def test_what_cannot_be_is_an_error(settings, says):
    with pytest.raises(ConfigError, match=says):
        conf(**settings)


def test_variables_while_it_starts():
    assert session_env(conf(), {}) == {
        "PYSPARK_PYTHON": "/my/python",
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    far = conf(cluster_mode="standalone", master="spark://far:7077")
    assert session_env(far, {}) == {"PYSPARK_PYTHON": "/my/python"}
    assert session_env(conf({"PYSPARK_PYTHON": "x"}), {"PYSPARK_PYTHON": "x"}) == {
        "SPARK_LOCAL_IP": "127.0.0.1"
    }


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        ({"spark.master": "local"}, 1),
        ({"spark.master": "local[3]"}, 3),
        ({"spark.master": "local[*]"}, 6),
        ({"spark.master": "local[2, 4]"}, 2),
        ({"spark.master": "local-cluster[2,3,1024]"}, 6),
        ({"spark.master": "spark://a:1"}, None),
        ({"spark.master": "spark://a:1", "spark.cores.max": "12"}, 12),
        ({"spark.master": "yarn", "spark.executor.instances": "3", "spark.executor.cores": "4"},
         12),
        ({"spark.master": "yarn", "spark.executor.instances": "3"}, None),
        ({"spark.master": "yarn", "spark.dynamicAllocation.enabled": "true",
          "spark.dynamicAllocation.maxExecutors": "5", "spark.executor.cores": "4",
          "spark.executor.instances": "1"}, 20),
        ({"spark.master": "spark://a:1", "spark.dynamicAllocation.enabled": "true",
          "spark.dynamicAllocation.maxExecutors": "5", "spark.executor.cores": "4",
          "spark.cores.max": "8"}, 8),
        ({"spark.master": "yarn", "spark.dynamicAllocation.enabled": "true"}, None),
    ],
)  # fmt: skip
def test_slots_that_settings_tell(settings, slots):
    assert slots_of(settings, 6) == slots


DYNAMIC = "spark.dynamicAllocation."


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({}, False),
        ({DYNAMIC + "enabled": "false"}, False),
        ({DYNAMIC + "enabled": "true"}, True),
        ({DYNAMIC + "enabled": "TRUE", DYNAMIC + "minExecutors": "0"}, True),
        ({DYNAMIC + "enabled": "true", DYNAMIC + "minExecutors": "1"}, False),
        ({DYNAMIC + "enabled": "true", DYNAMIC + "initialExecutors": "2"}, False),
        ({DYNAMIC + "enabled": "true", "spark.executor.instances": "3"}, False),
    ],
)
def test_whether_executors_start_only_for_work(settings, answer):
    assert starts_none(settings) is answer


def test_what_agrees_with_a_running_session_contradicts_nothing():
    running = {"spark.master": "local[4]", "spark.driver.memory": "2g", "a": "1"}
    for settings in (
        EngineSettings(),
        EngineSettings(cores=4, memory_bytes=2 << 30, conf={"a": 1}),
    ):
        assert contradictions(settings, running, 4) == []


@pytest.mark.parametrize(
    ("settings", "cores"),
    [
        ({"spark.master": "local[4]"}, None),
        ({"spark.master": "local-cluster[2,3,1024]"}, 3),
        ({"spark.master": "spark://far:7077", "spark.executor.cores": "8"}, 8),
        ({"spark.master": "spark://far:7077"}, None),
        ({"spark.master": "yarn"}, 1),
        ({"spark.master": "k8s://https://far"}, 1),
    ],
)
def test_cores_of_an_executor(settings, cores):
    assert executor_cores(settings) == cores
