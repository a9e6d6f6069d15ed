"""Files that tasks spool: who may read them, where they go when there is no room, their end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bigdl.errors import ConfigError
from bigdl.orca.data.spool_lease import Lease, call
from bigdl.testing.processes import are_gone, is_alive, within

pa = pytest.importorskip("pyarrow")

from bigdl.orca.data import spool_site, spool_write  # noqa: E402
from bigdl.orca.data.spool import Shard, Shards  # noqa: E402
from bigdl.orca.data.spool_write import Converted, Order, written  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="as Spark's executors are")


class AsTheyAre:
    """Rows are written as they come."""

    def __call__(self, rows):
        [batch] = rows.combine_chunks().to_batches()
        return Converted(batch=batch, described=[])


@pytest.fixture
def lease():
    one = Lease()
    yield one
    one.close()


def order(lease, *roots, in_memory=False):
    roots = tuple(map(str, roots))
    return Order(ticket=lease.ticket, convert=AsTheyAre(), roots=roots, in_memory=in_memory)


def batch(first, last, width=1):
    ids = np.arange(first, last)
    return pa.record_batch({"id": ids, **{f"x{i}": ids * 1.0 for i in range(1, width)}})


def test_blocks_stay_small_where_rows_become_larger(lease, tmp_path):
    small = pa.record_batch({"id": np.arange(5000), "text": ["x"] * 5000})
    large = pa.record_batch({"id": np.arange(5000, 5040), "text": ["y" * 200_000] * 40})
    again = pa.record_batch({"id": np.arange(5040, 9000), "text": ["z"] * 3960})
    notes = written(order(lease, tmp_path), 0, [small, large, again])
    shards = shards_of(lease, notes)
    blocks = list(shards.read(shards.blocks()))
    assert ids_of(shards) == list(range(9000))
    assert max(block.nbytes for block in blocks) <= 2 * spool_write.BLOCK_BYTES


def shards_of(lease, notes):
    found = [json.loads(note) for note in notes]
    return Shards(
        shards=tuple(
            Shard(
                partition=note["partition"],
                path=note["path"],
                guard=tuple(note["guard"]),
                rows=note["rows"],
                block_rows=note["block_rows"],
                bytes=note["bytes"],
            )
            for note in found
        ),
        token=lease.ticket.token,
    )


def ids_of(shards):
    batches = list(shards.read(shards.blocks()))
    return [i for one in batches for i in one.column(0).to_pylist()]


def guard_pids(*roots):
    return [
        json.loads(path.read_text())["pid"] for root in roots for path in root.glob("*/guard.json")
    ]


# --- blocks and files ---------------------------------------------------------------------------


def test_rows_of_any_batches_become_even_blocks_in_order(lease, tmp_path, monkeypatch):
    monkeypatch.setattr(spool_write, "BLOCK_BYTES", 8 * 100)
    monkeypatch.setattr(spool_write, "FILE_BYTES", 20_000)
    cuts = [0, 1, 1, 250, 251, 999, 1000, 2345]
    batches = [batch(a, b) for a, b in pairwise(cuts)]
    shards = shards_of(lease, written(order(lease, tmp_path), 3, batches))
    assert len(shards.shards) > 3
    blocks = shards.blocks()
    assert blocks[:, 2].sum() == 2345
    assert set(blocks[:, 2]) == {100, 45}
    assert ids_of(shards) == list(range(2345))
    backwards = [i for one in shards.read(blocks[::-1]) for i in one.column(0).to_pylist()]
    assert sorted(backwards) == list(range(2345))
    assert backwards[0] == 2300


def test_a_partition_without_rows_writes_nothing(lease, tmp_path):
    assert written(order(lease, tmp_path), 0, [batch(0, 0)]) == []
    assert list(tmp_path.iterdir()) == []


def test_folders_are_the_owners_alone(lease, tmp_path):
    written(order(lease, tmp_path), 0, [batch(0, 5)])
    [folder] = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.arrow")} == {0o600}
    assert lease.ticket.token not in (folder / "guard.json").read_text()
    [pid] = guard_pids(tmp_path)
    assert lease.ticket.token not in Path(f"/proc/{pid}/cmdline").read_text()
    assert lease.ticket.token not in Path(f"/proc/{pid}/environ").read_text()


def test_several_tasks_of_a_host_have_one_guard(lease, tmp_path):
    program = (
        "import pickle, sys\n"
        "from bigdl.orca.data.spool_write import written\n"
        "order, partition, batches = pickle.load(sys.stdin.buffer)\n"
        "print(*written(order, partition, batches), sep='\\n')\n"
    )
    from bigdl._base.workers import dumps

    tasks = [
        subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1) for _ in range(4)
    ]
    for i, task in enumerate(tasks):
        task.stdin.write(dumps((order(lease, tmp_path), i, [batch(10 * i, 10 * i + 10)])))
        task.stdin.close()
    notes = []
    for task in tasks:
        notes += task.stdout.read().decode().split("\n")[:-1]
        task.stdout.close()
        assert task.wait(60) == 0
    assert lease.guards == 1
    assert len(guard_pids(tmp_path)) == 1
    assert sorted(ids_of(shards_of(lease, notes))) == list(range(40))


# --- memory and disk ----------------------------------------------------------------------------


def test_files_are_in_memory_while_half_of_it_stays_free(lease, tmp_path, monkeypatch):
    free = [1 << 40]
    monkeypatch.setattr(spool_site.machine, "available_memory_bytes", lambda: free[0])
    monkeypatch.setattr(spool_write, "BLOCK_BYTES", 8000)
    first = shards_of(lease, written(order(lease, tmp_path, in_memory=True), 0, [batch(0, 5000)]))
    assert first.shards[0].path.startswith("/dev/shm/")
    held = sum(Path(shard.path).stat().st_blocks * 512 for shard in first.shards)
    free[0] = held + 20_000  # half of free and held together is 10,000 more
    more = shards_of(lease, written(order(lease, tmp_path, in_memory=True), 1, [batch(0, 5000)]))
    where = [shard.path.startswith("/dev/shm/") for shard in more.shards]
    assert where == [True, False] or where == [False]
    assert ids_of(more) == list(range(5000))
    lease.close()
    assert not list(Path("/dev/shm").glob(f"*{lease.ticket.name}*"))


def test_a_full_dev_shm_is_no_error(lease, tmp_path, monkeypatch):
    monkeypatch.setattr(spool_write, "BLOCK_BYTES", 8000)
    left = [3]

    def reserve(file, first, count):
        left[0] -= 1
        return left[0] >= 0

    monkeypatch.setattr(spool_write, "reserve", reserve)
    notes = written(order(lease, tmp_path, in_memory=True), 0, [batch(0, 9000)])
    shards = shards_of(lease, notes)
    assert [shard.path.startswith("/dev/shm/") for shard in shards.shards] == [True, False]
    assert ids_of(shards) == list(range(9000))


def test_a_full_disk_is_an_error_that_names_it_and_leaves_nothing(lease, tmp_path, monkeypatch):
    add = spool_write._File.add

    def full(self, rows):
        if self.rows:
            raise OSError(28, "No space left on device")
        add(self, rows)

    monkeypatch.setattr(spool_write._File, "add", full)
    monkeypatch.setattr(spool_write, "BLOCK_BYTES", 800)
    [note] = written(order(lease, tmp_path), 0, [batch(0, 500)])
    assert "The disk is full" in json.loads(note)["error"]
    assert str(tmp_path) in json.loads(note)["error"]
    [folder] = tmp_path.iterdir()
    assert list(folder.glob("*.arrow")) == []
    [note] = written(order(lease, tmp_path), 1, [batch(0, 500)])  # others need not try
    assert json.loads(note)["error"] == "another partition failed"


def test_a_root_that_cannot_be_written_is_an_error(lease, tmp_path, monkeypatch):
    monkeypatch.setattr(spool_site, "_PATIENCE_S", 0.5)
    from bigdl.errors import DataError

    with pytest.raises(DataError, match="Nobody guards"):
        spool_site.Site(lease.ticket, [str(tmp_path / "nowhere" / "at all")], None)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SPARK_LOCAL_DIRS": "{0}/blockmgr-1,{1}/blockmgr-2"}, ["{0}", "{1}"]),
        ({"SPARK_LOCAL_DIRS": "{0}"}, ["{0}"]),
        ({"LOCAL_DIRS": "{1},{1}"}, ["{1}"]),
        ({"SPARK_LOCAL_DIRS": "/no/such/place"}, ["{tmp}"]),
        ({}, ["{tmp}"]),
    ],
)
def test_where_the_application_has_its_directories(tmp_path, monkeypatch, variables, expected):
    import tempfile

    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        root.mkdir()
    for name in ("SPARK_LOCAL_DIRS", "LOCAL_DIRS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(*roots))
    expected = [one.format(*roots, tmp=tempfile.gettempdir()) for one in expected]
    assert spool_site.local_roots() == expected


# --- other hosts --------------------------------------------------------------------------------

READ = """
import pickle, sys
shards, forbidden = pickle.load(sys.stdin.buffer)
opened = []
def watch(event, args):
    if event == "open" and isinstance(args[0], str) and "bigdl-spool" in args[0]:
        opened.append(args[0])
        if args[0].startswith(forbidden):
            raise PermissionError(13, "not on this host", args[0])
sys.addaudithook(watch)
for block in shards.read(shards.blocks()):
    print(*block.column(0).to_pylist())
print(sum(not one.startswith(forbidden) for one in opened), file=sys.stderr)
"""


def test_what_lies_on_another_host_comes_from_its_guard(lease, tmp_path, monkeypatch):
    """Two executors with roots of their own; the reader may open those of one only."""
    monkeypatch.setattr(spool_write, "BLOCK_BYTES", 800)
    notes = []
    for i, root in enumerate([tmp_path / "one", tmp_path / "other"]):
        root.mkdir()
        notes += written(order(lease, root), i, [batch(700 * i, 700 * i + 700, width=3)])
    assert lease.guards == 2
    from bigdl._base.workers import dumps

    read = subprocess.run(
        [sys.executable, "-c", READ],
        input=dumps((shards_of(lease, notes), str(tmp_path / "other"))),
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert list(map(int, read.stdout.split())) == list(range(1400))
    assert int(read.stderr) >= 1  # the file of this host was opened directly


def test_strangers_get_nothing(lease, tmp_path):
    [note] = written(order(lease, tmp_path), 0, [batch(0, 5)])
    guard = tuple(json.loads(note)["guard"])
    assert guard[0] == "127.0.0.1"
    with pytest.raises(OSError, match="closed"):
        call(guard, "another token")
    with socket.create_connection(guard, timeout=5) as line:
        line.sendall(b"GET / HTTP/1.1\r\n\r\n".ljust(32))
        assert len(line.recv(100)) == 32  # a question, and nothing more
        assert line.recv(100) == b""
    with call(guard, lease.ticket.token) as line:  # who knows the token gets spooled files only
        for name in ("../../etc/passwd", "/etc/passwd", "guard.json"):
            line.sendall(json.dumps([name, 0, 10]).encode() + b"\n")
            assert line.recv(100) == b"\xff" * 8


def test_an_owner_whose_address_is_not_this_machines():
    with pytest.raises(ConfigError, match=r"spark\.driver\.host"):
        Lease("192.0.2.1")


# --- ends ---------------------------------------------------------------------------------------


def test_letting_go_removes_files_and_guards(lease, tmp_path):
    notes = written(order(lease, tmp_path, in_memory=True), 0, [batch(0, 5)])
    [pid] = guard_pids(tmp_path)
    assert is_alive(pid)
    lease.close()
    assert list(tmp_path.iterdir()) == []
    assert not os.path.exists(json.loads(notes[0])["path"])
    assert are_gone([pid])


OWN = """
import pickle, sys, time
from bigdl.orca.data.spool_lease import Lease
from bigdl.orca.data.spool_write import Order, written
convert, batch, root = pickle.load(sys.stdin.buffer)
lease = Lease()
order = Order(ticket=lease.ticket, convert=convert, roots=(root,), in_memory=True)
[note] = written(order, 0, [batch])
print(note, flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_the_owner_is_killed(tmp_path, ending):
    from bigdl._base.workers import dumps

    owner = subprocess.Popen([sys.executable, "-c", OWN], stdin=-1, stdout=-1)
    owner.stdin.write(dumps((AsTheyAre(), batch(0, 99), str(tmp_path))))
    owner.stdin.close()
    path = Path(json.loads(owner.stdout.readline())["path"])
    [pid] = guard_pids(tmp_path)
    assert path.exists()
    owner.send_signal(ending)
    owner.wait(10)
    owner.stdout.close()
    assert within(15, lambda: not path.parent.exists() and not list(tmp_path.iterdir()))
    assert are_gone([pid])


WRITE = """
import pickle, sys, time
from bigdl.orca.data.spool_write import written
order, batch = pickle.load(sys.stdin.buffer)
[note] = written(order, 0, [batch])
print(note, flush=True)
time.sleep(100)
"""


def test_the_writer_is_killed_and_its_rows_live_on_until_the_owner_lets_go(lease, tmp_path):
    """What was lost with an executor would be lost to a run that goes on after it."""
    from bigdl._base.workers import dumps

    writer = subprocess.Popen([sys.executable, "-c", WRITE], stdin=-1, stdout=-1)
    writer.stdin.write(dumps((order(lease, tmp_path), batch(0, 99))))
    writer.stdin.close()
    note = writer.stdout.readline().decode()
    writer.stdout.close()
    writer.kill()
    writer.wait(10)
    time.sleep(0.3)
    shards = shards_of(lease, [note])
    elsewhere = replace(shards.shards[0], path=f"/not/here/{Path(shards.shards[0].path).name}")
    assert ids_of(replace(shards, shards=(elsewhere,))) == list(range(99))
    lease.close()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_was_gone_before_leaves_no_guard(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_site, "_PATIENCE_S", 1.0)
    lease = Lease()
    lease.close()
    [note] = written(order(lease, tmp_path), 0, [batch(0, 5)])  # as raising would be tried again
    assert "cannot be reached from this executor" in json.loads(note)["error"]
    assert within(5, lambda: not list(tmp_path.iterdir()))


# --- more rows than memory ------------------------------------------------------------------

LARGE = """
import json, pickle, sys
import numpy as np, pyarrow as pa
from bigdl.orca.data.adapters.spark_spool import spooled
from bigdl.orca.data.columns import Columns
from bigdl.orca.data.memory import Shaping
from bigdl.orca.data.spool import SpooledRows
from bigdl.orca.data.spool_lease import Lease
from bigdl.orca.data.spool_write import Converted, Order, written

def own():  # bytes of this process' own; mapped files can be taken back at any time
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak = [0]
def rows():
    for i in range(200):
        peak[0] = max(peak[0], own())
        yield pa.record_batch({"id": np.arange(10_000) + 10_000 * i, "y": np.zeros(10_000)})
        for _ in range(9):
            yield pa.record_batch({"id": np.full(10_000, -1), "y": np.zeros(10_000)})

lease = Lease()
convert = pickle.load(sys.stdin.buffer)
order = Order(ticket=lease.ticket, convert=convert, roots=(sys.argv[1],), in_memory=False)
before = own()
notes = [json.loads(note) for note in written(order, 0, rows())]
wrote = peak[0] - before
shards = spooled(notes, lease).shards
source = SpooledRows(
    shards=shards, columns=Columns(features=("id",), labels=("y",), fill={}, free=frozenset()),
    schema=None, shaping=Shaping(has_labels=True), window_bytes=16 << 20,
)
before, peak, total, ids = own(), 0, 0, 0
for number, batch in enumerate(source.open(0, 1).batches(4096, seed=1)):
    total += batch.rows
    found = batch.data[0]
    ids += int(found[found >= 0].sum())
    if number % 50 == 0:
        peak = max(peak, own())
print(json.dumps([sum(shard.bytes for shard in shards.shards), wrote, peak - before, total, ids]))
lease.close()
"""


def test_writing_and_reading_take_memory_for_a_window_and_not_for_all(tmp_path):
    pytest.importorskip("pyspark")
    from bigdl._base.workers import dumps

    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path)],
        input=dumps(AsTheyAre()), capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    size, wrote, read, rows, ids = json.loads(done.stdout)
    assert size > 300 << 20
    assert (rows, ids) == (20_000_000, sum(range(2_000_000)))
    assert wrote < 48 << 20
    assert read < 3 * (16 << 20) + (24 << 20)
