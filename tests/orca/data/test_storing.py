"""Shards as pickles: a folder is whole or none, nobody else's, and read only when trusted."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from bigdl.errors import DataError
from bigdl.orca import init_orca_context
from bigdl.orca.data import XShards


@pytest.fixture(scope="module", autouse=True)
def context():
    with init_orca_context(cores=2) as context:
        yield context


@pytest.fixture
def saved(tmp_path):
    XShards.partition(np.arange(6), 3).save_pickle(tmp_path / "saved")
    return tmp_path / "saved"


def load(folder):
    return XShards.load_pickle(folder, trusted=True)


def head_of(folder):
    return json.loads((folder / "shards.json").read_text())


def test_urls(tmp_path):
    url = f"file://{tmp_path}/deep/er"
    XShards.partition(np.arange(6), 3).save_pickle(url)
    assert [shard.tolist() for shard in load(url).collect()] == [[0, 1], [2, 3], [4, 5]]
    assert len(load(tmp_path / "deep" / "er")) == 6


def test_objects_of_the_program_itself(tmp_path):
    """Their classes travel by value: another program reads them."""
    program = """
        import sys
        from bigdl.orca import init_orca_context
        from bigdl.orca.data import XShards

        class Box:
            def __init__(self, value):
                self.value = value

        with init_orca_context(cores=2):
            XShards.partition([1, 2], 2).transform_shard(lambda s: [Box(s[0])]).save_pickle(
                sys.argv[1]
            )
        """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert [box.value for (box,) in load(tmp_path / "a").collect()] == [1, 2]


def test_nothing_is_unpickled_unless_trusted(tmp_path, saved):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    name = head_of(saved)["shards"][0]["name"]
    data = pickle.dumps(Evil())
    (saved / name).write_bytes(data)
    head = head_of(saved)
    head["shards"][0]["bytes"] = len(data)
    (saved / "shards.json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match="trusted=True"):
        XShards.load_pickle(saved)
    load(saved)  # planned, not read
    assert not (tmp_path / "ran").exists()


DAMAGE = [
    (lambda f: (f / "shards.json").unlink(), "no whole shards"),
    (lambda f: (f / "shards.json").write_text("{"), "no whole shards"),
    (lambda f: (f / "shards.json").write_text('{"schema_version": 1}'), "no whole shards"),
    (lambda f: change(f, schema_version=2), "schema version 2; this version reads 1"),
    (lambda f: (f / head_of(f)["shards"][1]["name"]).unlink(), "There is no .*removed"),
    (lambda f: (f / head_of(f)["shards"][1]["name"]).write_bytes(b"x"), "has 1 bytes, and had"),
    (lambda f: change(f, shards=[{"name": "../x.pickle", "bytes": 1}]), "no name of a shard"),
    (lambda f: change(f, shards=[{"name": "/etc/passwd", "bytes": 1}]), "no name of a shard"),
]


def change(folder, **values):
    (folder / "shards.json").write_text(json.dumps({**head_of(folder), **values}))


@pytest.mark.parametrize(("damage", "text"), DAMAGE, ids=range(len(DAMAGE)))
def test_what_is_damaged_says_so_before_it_is_read(saved, damage, text):
    damage(saved)
    with pytest.raises(DataError, match=text):
        load(saved)


def test_other_peoples_files_stay(tmp_path, saved):
    shards = XShards.partition(np.arange(2), 2)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    (saved / "notes.txt").write_text("mine")
    for path in ("file", "folder", "saved"):
        with pytest.raises(FileExistsError, match=r"file|mine\.txt|notes\.txt"):
            shards.save_pickle(tmp_path / path, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "folder" / "mine.txt").read_text() == "mine"
    assert len(load(saved)) == 6


def test_an_empty_folder_and_what_a_broken_call_left_are_used(saved):
    (saved / "shards.json").unlink()
    XShards.partition(np.arange(4), 2).save_pickle(saved)
    assert len(load(saved)) == 4
    assert len(list(saved.iterdir())) == 3


KILLED = """
    import os, signal, sys, time
    import numpy as np
    from bigdl.orca import init_orca_context
    from bigdl.orca.data import XShards

    def last_is_slow(shard):
        if shard[0] == 1:
            time.sleep(1)
            os.kill(driver, signal.SIGKILL)
            time.sleep(300)
        return shard

    driver = os.getpid()
    init_orca_context(cores=2)
    shards = XShards.partition(np.arange(2), 2).transform_shard(last_is_slow)
    shards.save_pickle(sys.argv[1], overwrite=True)
"""


def test_a_driver_killed_while_it_replaces_leaves_what_was(saved):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(saved)]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [shard.tolist() for shard in load(saved).collect()] == [[0, 1], [2, 3], [4, 5]]
    XShards.partition(np.arange(4), 2).save_pickle(saved, overwrite=True)  # and tidies up
    assert len(list(saved.iterdir())) == 3
