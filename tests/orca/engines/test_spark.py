"""The Spark engine: the contract on one JVM, and what only Spark has."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from bigdl.errors import ConfigError, ContextError
from bigdl.orca.engines import ENGINES, spark_entry, spark_places
from bigdl.orca.engines.base import EngineSettings
from bigdl.testing.engine import EngineContract


def _open(**settings):
    return ENGINES.get("spark").open(EngineSettings(**settings))


@pytest.fixture(scope="module", autouse=True)
def session():
    """One session for all; engines join it."""
    engine = _open(cores=4)
    yield engine.spark
    engine.close()


class TestSpark(EngineContract):
    @classmethod
    def open_engine(cls):
        return _open()


@pytest.fixture
def engine():
    engine = _open()
    yield engine
    engine.close()


# --- Spark's own retries and speculation ------------------------------------------------------


def test_another_attempt_at_a_seat_runs_nothing(engine, tmp_path):
    """Spark's speculation, and its retries, start a task again: it waits, and ends in peace."""

    def work(folder):
        (folder / str(time.time_ns())).touch()
        time.sleep(2)

    task = engine.submit(work, tmp_path)
    while not list(tmp_path.iterdir()):
        task.poll(0.05)
    [seat] = [seat for seat in engine._places._seats.values() if seat.place is not None]
    entrance = engine._service.entrance
    door = entrance.address, entrance.port, entrance.key
    copy = threading.Thread(target=spark_entry.sit, args=(seat.number, 1, str(tmp_path), door))
    copy.start()
    time.sleep(0.5)
    assert copy.is_alive()  # were it to end, Spark would kill the first
    task.result()
    copy.join(10)
    assert not copy.is_alive()
    started = time.monotonic()
    spark_entry.sit(seat.number, 2, str(tmp_path), door)  # its seat is over
    assert time.monotonic() - started < 1
    assert len(list(tmp_path.iterdir())) == 1


def test_strangers_get_no_seat(engine):
    engine.submit(int).result()
    entrance = engine._service.entrance
    spark_entry.sit(10_000, 0, "", (entrance.address, entrance.port, entrance.key))
    spark_entry.sit(0, 0, "", (entrance.address, entrance.port, b"guessed"))
    assert engine.submit(int).result() == 0


def test_executors_that_do_not_fit_are_a_table_before_any_work(engine, monkeypatch, tmp_path):
    here = replace(spark_places.facts(), python="3.8.1", torch="1.13.1")
    monkeypatch.setattr(spark_places, "facts", lambda: here)
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"(?s)node .*python 3.*the caller 3\.8.*torch"
        ) as caught:
            engine.submit((tmp_path / "ran").touch).result(timeout_s=60)
    assert "memory_limit" in str(caught.value)
    assert not (tmp_path / "ran").exists()


# --- beside the work of others ----------------------------------------------------------------


def test_seats_go_back_to_spark(engine, session):
    engine.gang(lambda ctx: ctx.rank, 4)
    started = time.monotonic()
    assert session.range(1000).repartition(4).count() == 1000
    assert time.monotonic() - started < 10
    deadline = time.monotonic() + 10
    while session.sparkContext.statusTracker().getActiveJobsIds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_engines_share_a_session(engine):
    other = _open()
    try:
        assert other.gang(lambda ctx: ctx.rank, 4) == engine.gang(lambda ctx: ctx.rank, 4)
    finally:
        other.close()
    assert engine.gang(lambda ctx: ctx.rank, 4) == [0, 1, 2, 3]


def settings(session):
    return {row.key: row.value for row in session.sql("SET").collect()}


def test_a_joined_session_is_left_as_it_was(session):
    before = settings(session), dict(session.sparkContext.getConf().getAll())
    engine = _open()
    assert engine.spark is session
    engine.gang(lambda ctx: ctx.rank, 2)
    engine.close()
    assert (settings(session), dict(session.sparkContext.getConf().getAll())) == before
    assert session.range(5).count() == 5
    with pytest.raises(ContextError, match="init_orca_context"):
        engine.spark  # noqa: B018


CONTRADICTIONS = [
    ({"cores": 3}, "cores=3.*it has 4 slots"),
    ({"conf": {"spark.ui.enabled": "true"}}, r"spark\.ui\.enabled='true', it has 'false'"),
    ({"cluster_mode": "yarn"}, r"cluster_mode='yarn', it is on 'local\[4\]'"),
    ({"cluster_mode": "k8s", "master": "k8s://x"}, "master='k8s://x', it is on"),
    ({"memory_bytes": 3 << 30}, "memory of 3072 MiB, it has spark.driver.memory=1g"),
    ({"address": "ray://x:1"}, "address=.*Ray's"),
]


@pytest.mark.parametrize(
    ("asked", "says"), CONTRADICTIONS, ids=[str(r[0]) for r in CONTRADICTIONS]
)
def test_what_contradicts_the_running_session_is_an_error(asked, says):
    with pytest.raises(ConfigError, match=says):
        _open(**asked)


def test_what_agrees_joins():
    _open(cores=4, conf={"spark.ui.enabled": "false"}).close()
