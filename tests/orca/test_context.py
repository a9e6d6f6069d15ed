"""The Orca context: one at a time, every argument answered, gone at the end however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from bigdl._base import machine
from bigdl._base.calls import Gone
from bigdl.errors import ArgumentError, ConfigError, ContextError
from bigdl.orca import OrcaContext, init_orca_context, old_names, stop_orca_context
from bigdl.orca.context import current_engine
from bigdl.orca.engines import ENGINES


@pytest.fixture(autouse=True)
def stopped():
    yield
    stop_orca_context()


# --- its life ---------------------------------------------------------------------------------


def test_without_arguments_it_is_this_machine():
    context = init_orca_context()
    assert isinstance(context, OrcaContext)
    assert (context.runtime, context.slots) == ("local", machine.cores())
    assert context.spark is None
    assert context.ray_address is None
    assert current_engine() is context.engine
    assert OrcaContext.current() is context
    assert repr(context) == f"<OrcaContext on local, {context.slots} slots>"


def test_work_runs_on_it():
    with init_orca_context(cores=2):
        assert current_engine().gang(lambda ctx: ctx.rank, 2) == [0, 1]


def test_cores_are_slots_also_more_than_there_are():
    assert init_orca_context(cores=64).slots == 64


@pytest.mark.parametrize(
    ("memory", "size"),
    [("2g", 2 << 30), ("512m", 512 << 20), ("1.5G", 3 << 29), ("100000k", 102_400_000),
     ("2GB", 2 << 30), ("1GiB", 1 << 30), ("1048576", 1 << 20)],
)  # fmt: skip
def test_memory_is_written_as_spark_does(memory, size):
    assert init_orca_context(memory=memory)._settings.memory_bytes == size


def test_the_same_again_is_the_running_one():
    context = init_orca_context(cores=2, memory="1g")
    assert init_orca_context("local", cores=2, memory="1024m") is context
    assert init_orca_context(cores=2, memory="1g", conf={}) is context


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"cores": 3}, "cores=2, asked 3"),
        ({}, "cores=2, asked None"),
        ({"cores": 2, "memory": "1g"}, "memory_bytes=None, asked 1073741824"),
        ({"cores": 2, "runtime": "spark"}, "asked for Spark"),
        ({"cores": 2, "runtime": "ray"}, "asked for Ray"),
    ],
)
def test_others_are_an_error_and_change_nothing(arguments, says):
    context = init_orca_context(cores=2)
    with pytest.raises(ContextError, match=rf"local processes.*{says}.*stop_orca_context"):
        init_orca_context(**arguments)
    assert OrcaContext.current() is context
    assert context.slots == 2


def test_stop_then_start():
    for cores in (1, 2, 3):
        assert init_orca_context(cores=cores).slots == cores
        assert current_engine().submit(abs, -cores).result() == cores
        stop_orca_context()


def test_stopping_what_does_not_run():
    stop_orca_context()
    context = init_orca_context()
    stop_orca_context()
    stop_orca_context()
    context.stop()


def test_an_old_one_does_not_stop_the_new_one():
    old = init_orca_context(cores=1)
    old.stop()
    new = init_orca_context(cores=2)
    old.stop()
    assert OrcaContext.current() is new


def test_with_stops_at_the_end_and_lets_errors_through():
    with pytest.raises(KeyError, match="mine"), init_orca_context() as context:
        raise KeyError("mine")
    with pytest.raises(ContextError, match=r"stopped.*init_orca_context"):
        context.slots  # noqa: B018
    assert "stopped" in repr(context)


def test_a_stopped_engine_says_so():
    engine = init_orca_context().engine
    stop_orca_context()
    with pytest.raises(ContextError, match="init_orca_context"):
        engine.submit(int)


def test_without_one_the_error_says_how():
    for ask in (current_engine, OrcaContext.current, OrcaContext.get_spark_session):
        with pytest.raises(ContextError, match=r"No Orca context.*init_orca_context\(\)"):
            ask()


def test_no_spark_session_on_local_processes():
    init_orca_context()
    with pytest.raises(ContextError, match=r"local processes.*runtime='spark'"):
        OrcaContext.get_spark_session()


def test_a_worker_has_none_of_its_callers():
    init_orca_context(cores=1)
    with pytest.raises(ContextError, match="No Orca context"):
        current_engine().submit(current_engine).result()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_has_none_and_ends_nothing():
    context = init_orca_context(cores=1)
    context.engine.submit(int).result()
    code = (
        "import os\n"
        "from bigdl.orca import init_orca_context, stop_orca_context, OrcaContext\n"
        "context = init_orca_context(cores=1)\n"
        "print(context.engine.submit(abs, -1).result(), flush=True)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try:\n"
        "        OrcaContext.current()\n"
        "    except RuntimeError:\n"
        "        stop_orca_context()\n"
        "        os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)\n"
        "print(context.engine.submit(abs, -2).result(), flush=True)\n"
    )
    assert _run(code).stdout == "1\n7\n2\n"


# --- what may be asked ------------------------------------------------------------------------

WRONG = [
    ({"cluster_mode": "lokal"}, ConfigError, "Did you mean 'local'"),
    ({"cluster_mode": 3}, ArgumentError, "cluster_mode has to be a str, not int"),
    ({"cluster_mode": "yarn-cleint"}, ConfigError, "Did you mean 'yarn-client'"),
    ({"cluster_mode": "ray"}, ConfigError, "runtime='ray'"),
    ({"cluster_mode": "spark-submit"}, ConfigError, "existing SparkSession"),
    ({"cluster_mode": "bigdl-submit"}, ConfigError, "existing SparkSession"),
    ({"cluster_mode": "standalone"}, ConfigError, "without master="),
    ({"runtime": "sprak"}, ConfigError, "Did you mean 'spark'"),
    ({"runtime": "local"}, ConfigError, "None for local processes"),
    ({"runtime": 1}, ConfigError, "runtime=1 is not known"),
    ({"cluster_mode": "yarn", "runtime": "ray"}, ConfigError, "joined by address="),
    ({"runtime": "ray", "init_ray_on_spark": True}, ConfigError, "init_ray_on_spark"),
    ({"runtime": "ray", "conf": {"spark.ui": "x"}}, ConfigError, "conf= without Spark"),
    ({"master": "spark://host:7077"}, ConfigError, "master= with cluster_mode='local'"),
    ({"address": "ray://host:1"}, ConfigError, "address= without runtime='ray'"),
    ({"conf": {"a": "b"}}, ConfigError, "conf= without Spark"),
    ({"ray_options": {"a": 1}}, ConfigError, "ray_options= without Ray"),
    ({"num_nodes": 2}, ConfigError, "num_nodes=2 with cluster_mode='local'"),
    ({"num_nodes": 0}, ConfigError, "num_nodes=0 cannot be"),
    ({"num_nodes": "two"}, ArgumentError, "num_nodes has to be a whole number, not 'two'"),
    ({"cores": 0}, ConfigError, "cores=0 cannot be"),
    ({"cores": -4}, ConfigError, "cores=-4 cannot be"),
    ({"cores": 1.5}, ArgumentError, "cores has to be a whole number, not 1.5"),
    ({"cores": True}, ArgumentError, "cores has to be a whole number, not True"),
    ({"memory": 2}, ArgumentError, 'such as "2g", not 2'),
    ({"memory": "two"}, ConfigError, "memory='two' cannot be read"),
    ({"memory": "0g"}, ConfigError, "memory='0g' cannot be read"),
    ({"memory": "-1g"}, ConfigError, "memory='-1g' cannot be read"),
    ({"memory": "9999t"}, ConfigError, "more than this machine's"),
    ({"conf": "spark.ui"}, ArgumentError, "conf has to be a dict"),
    ({"ray_options": 3}, ArgumentError, "ray_options has to be a dict"),
    ({"master": 7}, ArgumentError, "master has to be a str"),
    ({"core": 2}, ArgumentError, "Did you mean 'cores'"),
    ({"memroy": "2g"}, ArgumentError, "Did you mean 'memory'"),
    ({"cluster": "local"}, ArgumentError, "no argument 'cluster'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "says"), WRONG, ids=[str(row[0]) for row in WRONG])
def test_wrong_arguments_are_answered(arguments, kind, says):
    with pytest.raises(kind) as caught:
        init_orca_context(**arguments)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(ContextError):
        OrcaContext.current()


def test_contradictions_are_named_together():
    with pytest.raises(ConfigError) as caught:
        init_orca_context(runtime="ray", conf={"a": 1}, num_nodes=3, init_ray_on_spark=True)
    assert "num_nodes=3" in str(caught.value)
    assert "init_ray_on_spark" in str(caught.value)


NOT_YET = [
    ({"runtime": "ray"}, "ray", "Ray"),
    ({"init_ray_on_spark": True}, "ray_on_spark", "Ray on Spark"),
]


@pytest.mark.parametrize(("arguments", "row", "name"), NOT_YET, ids=[str(r[0]) for r in NOT_YET])
def test_engines_without_a_row_are_one_clear_error(arguments, row, name):
    if row in ENGINES:
        pytest.skip(f"the table has {row}")
    with pytest.raises(ConfigError, match=rf"^{name} .*this version.*local processes"):
        init_orca_context(**arguments)


def test_an_engine_is_one_row(monkeypatch):
    """Another engine needs a row in the table, and nothing else."""
    asked = []

    class Mine:
        name = "spark"
        spark = "the session"

        @classmethod
        def open(cls, settings):
            asked.append(settings)
            return cls()

        def slots(self):
            return 12

        def close(self):
            asked.append("closed")

    monkeypatch.setattr(sys.modules[__name__], "Mine", Mine, raising=False)
    monkeypatch.setitem(sys.modules, "house_of_mine", sys.modules[__name__])
    monkeypatch.setitem(ENGINES._rows(), "spark", "house_of_mine:Mine")
    with init_orca_context("yarn-client", cores=4, num_nodes=3, conf={"a": "b"}) as context:
        assert (context.runtime, context.slots) == ("spark", 12)
        assert OrcaContext.get_spark_session() == "the session"
    settings, end = asked
    assert (settings.cluster_mode, settings.cores, settings.num_nodes) == ("yarn-client", 4, 3)
    assert settings.conf == {"a": "b"}
    assert end == "closed"


# --- BigDL 2.x --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", old_names.INIT)
def test_every_old_argument_is_answered(name):
    answer = old_names.INIT[name]
    if isinstance(answer, Gone):
        with pytest.raises(ArgumentError) as caught:
            init_orca_context(**{name: "something"})
        assert f"{name}=…) is gone: {answer.instead}" in str(caught.value)
        assert init_orca_context(**{name: answer.harmless[0]}).runtime == "local"
    else:
        value = {"cores": 1, "memory": "1g", "num_nodes": 1, "ray_options": {}}[answer.to]
        context = init_orca_context(**{name: value})
        assert context is init_orca_context(**{answer.to: value})


def test_old_programs_of_one_machine_run():
    with init_orca_context(cluster_mode="local", cores="*") as context:
        assert context.slots == machine.cores()
    assert init_orca_context("local", cores=1, memory="1g", num_nodes=1).slots == 1


@pytest.mark.parametrize("name", old_names.SETTINGS)
def test_every_old_setting_is_answered(name):
    answer = old_names.SETTINGS[name]
    before = dict(vars(OrcaContext))
    for value in answer.harmless:
        setattr(OrcaContext, name, value)
    with pytest.raises(ConfigError) as caught:
        setattr(OrcaContext, name, 12345)
    assert str(caught.value) == f"OrcaContext.{name} = 12345 is gone: {answer.instead}"
    with pytest.raises(AttributeError, match="is gone"):
        getattr(OrcaContext, name)
    assert dict(vars(OrcaContext)) == before


def test_a_setting_that_never_was():
    with pytest.raises(AttributeError, match="no setting 'colour'"):
        OrcaContext.colour = "blue"
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        OrcaContext.colour  # noqa: B018


# --- its end ----------------------------------------------------------------------------------


def _run(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **kwargs
    )


PROGRAM = textwrap.dedent("""
    import os, sys
    from bigdl.orca import init_orca_context
    from bigdl.orca.context import current_engine

    init_orca_context(cores=2)
    refs = current_engine().scatter([1, 2])
    current_engine().submit(__import__("time").sleep, 300)
    print(current_engine().submit(os.getpid).result(), flush=True)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("sys.exit(5)", 5), ("raise KeyError('x')", 1), ("sys.exit('words')", 1)],
)
def test_it_stops_at_exit_and_the_exit_code_is_kept(tmp_path, end, code):
    done = _run(PROGRAM + end, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == code
    assert not os.path.exists(f"/proc/{int(done.stdout)}")
    assert list(tmp_path.iterdir()) == []
    said = {"raise KeyError('x')": "KeyError: 'x'", "sys.exit('words')": "words"}.get(end, "")
    assert done.stderr.strip().endswith(said)
    assert len(done.stderr.splitlines()) <= 4 or "Traceback" in done.stderr
