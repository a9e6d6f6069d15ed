"""How BigDL 2.x' arguments and settings of the Orca context are answered: they work, or the error
says what to write now. One table each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigdl._base.calls import Gone, Renamed

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["INIT", "MODES", "SETTINGS"]


def _conf(name: str) -> Gone:
    return Gone(f"it is Spark's own setting: conf={{{name!r}: …}}.")


def _variable(name: str) -> Gone:
    return Gone(f"set the environment variable {name} before starting Python.")


def _ray(name: str) -> Gone:
    return Gone(f"it is an option of Ray: ray_options={{{name!r}: …}}.", harmless=(None, False))


#: Keywords of ``init_orca_context``.
INIT: Mapping[str, Renamed | Gone] = {
    "num_executors": Renamed("num_nodes"),
    "executor_cores": Renamed("cores"),
    "executor_memory": Renamed("memory"),
    "ray_args": Renamed("ray_options"),
    "hadoop_conf": _variable("HADOOP_CONF_DIR"),
    "hadoop_user_name": _variable("HADOOP_USER_NAME"),
    "driver_cores": _conf("spark.driver.cores"),
    "driver_memory": _conf("spark.driver.memory"),
    "jars": _conf("spark.jars"),
    "extra_python_lib": _conf("spark.submit.pyFiles"),
    "penv_archive": _conf("spark.archives"),
    "additional_archive": _conf("spark.archives"),
    "container_image": _conf("spark.kubernetes.container.image"),
    "python_location": _conf("spark.pyspark.python"),
    "spark_yarn_archive": _conf("spark.yarn.archive"),
    "extra_executor_memory_for_ray": _conf("spark.executor.memoryOverhead"),
    "spark_log_level": Gone(
        "call get_spark_session().sparkContext.setLogLevel(…) on the context.",
        harmless=(None, "WARN"),
    ),
    "redirect_spark_log": Gone(
        "Spark logs where its own log4j says.", harmless=(None, True, False)
    ),
    "enable_numa_binding": Gone(
        "start the workers of a standalone cluster under numactl.", harmless=(None, False)
    ),
    "object_store_memory": _ray("object_store_memory"),
    "system_config": _ray("_system_config"),
    "env": _ray("runtime_env"),
    "extra_params": Gone("options of Ray have their own names in ray_options=."),
    "password": Gone("Ray's token authentication is always on.", harmless=(None,)),
    "include_webui": _ray("include_dashboard"),
    "verbose": Gone("the library logs through Python's logging.", harmless=(None, True, False)),
    "num_ray_nodes": Gone("Ray on Spark has one node an executor: num_nodes=."),
    "ray_node_cpu_cores": Gone("Ray on Spark takes cores= from each executor's."),
}

#: Values of ``cluster_mode``.
MODES: Mapping[str, str] = {
    "ray": "runtime='ray', and address= for a running cluster",
    "spark-submit": "an existing SparkSession is found and joined: runtime='spark'",
    "bigdl-submit": "an existing SparkSession is found and joined: runtime='spark'",
}

#: Settings that were attributes of ``OrcaContext``.
SETTINGS: Mapping[str, Gone] = {
    "log_output": Gone("what workers write always reaches you.", harmless=(True, False)),
    "pandas_read_backend": Gone(
        "readers are bigdl.orca.data.pandas; options are pandas' own.", harmless=("pandas",)
    ),
    "serialize_data_creator": Gone("creators run in the workers at once.", harmless=(False,)),
    "train_data_store": Gone(
        "data is spooled to memory or disk by its size.", harmless=("DRAM", "DISK")
    ),
    "shard_size": Gone("say how many: shards.repartition(n).", harmless=(None,)),
    "_shard_size": Gone("say how many: shards.repartition(n).", harmless=(None,)),
    "_eager_mode": Gone("shards are lazy; cache() makes them once.", harmless=(False,)),
    "barrier_mode": Gone("gangs need no barrier mode.", harmless=(True, False)),
}
