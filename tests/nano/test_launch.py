"""``bigdl launch``: what a process finds, what a failure does, what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bigdl._base import machine

pytest.importorskip("typer", reason="needs the [cli] extra")
pytest.importorskip("rich", reason="needs the [cli] extra")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc and the scheduler")


@pytest.fixture
def script(tmp_path):
    def write(code: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(code))
        return str(path)

    return write


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bigdl", "launch", *arguments]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, timeout=60
    )


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def test_what_each_process_finds(script):
    path = script("""
        import json, os, sys
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS".split()
        found = {name: os.environ[name] for name in names}
        found |= {"cores": sorted(os.sched_getaffinity(0)), "arguments": sys.argv[1:]}
        print(json.dumps(found))
    """)
    done = launch("-n", "2", path, "--epochs", "3", "-n", "7", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    by_label = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    found = [json.loads(by_label[f"[{rank}]"]) for rank in range(2)]
    assert [one["RANK"] for one in found] == [one["LOCAL_RANK"] for one in found] == ["0", "1"]
    for one in found:
        assert (one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert one["MASTER_ADDR"] == "127.0.0.1"
        assert one["arguments"] == ["--epochs", "3", "-n", "7", "--help"]
    if machine.cores() >= 2:
        assert not set(found[0]["cores"]) & set(found[1]["cores"])
        assert all(one["OMP_NUM_THREADS"] == str(len(one["cores"])) for one in found)


def test_torch_distributed_finds_the_others(script):
    pytest.importorskip("torch")
    path = script("""
        import torch, torch.distributed as dist
        dist.init_process_group("gloo", init_method="env://")
        total = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(total)
        print(total.item())
        dist.destroy_process_group()
    """)
    done = launch("-n", "2", path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] 3.0", "[1] 3.0"]


def test_the_first_failure_ends_the_rest_and_is_the_exit_code(script):
    path = script("""
        import os, sys, time
        if os.environ["RANK"] == "1":
            print("no more", file=sys.stderr, end="")
            sys.exit(7)
        time.sleep(300)
    """)
    start = time.monotonic()
    done = launch("-n", "2", path)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "[1] no more\n")
    assert time.monotonic() - start < 30


def test_a_killed_process_is_a_failure(script):
    path = script("""
        import os, signal, time
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(300)
    """)
    assert launch("-n", "2", path).returncode == 128 + signal.SIGKILL


def test_one_that_will_not_end_is_ended(script):
    path = script("""
        import os, signal, sys, time
        from pathlib import Path
        ready = Path(__file__).with_name("ready")
        if os.environ["RANK"] == "1":
            while not ready.exists():
                time.sleep(0.02)
            sys.exit(3)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ready.touch()
        time.sleep(300)
    """)
    assert launch("-n", "2", path).returncode == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_launcher(script, tmp_path, number):
    path = script("""
        import os, time
        from pathlib import Path
        Path(__file__).with_name("pid" + os.environ["RANK"]).write_text(f"{os.getpid()};")
        time.sleep(300)
    """)
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    started = subprocess.Popen(
        command("-n", "2", path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: all(one.exists() and one.read_text().endswith(";") for one in files))
        pids = [int(one.read_text()[:-1]) for one in files]
        assert all(map(is_running, pids))
        started.send_signal(number)
        code = started.wait(20)
    finally:
        started.kill()
        started.wait()
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    wait_until(lambda: not any(map(is_running, pids)))


def test_a_dry_run_starts_nothing(script, tmp_path):
    path = script("from pathlib import Path; Path(__file__).with_name('started').touch()")
    done = launch("-n", "2", "--dry-run", path, "--epochs", "3")
    assert done.returncode == 0
    assert f"{path} --epochs 3" in done.stdout
    assert "[0]   RANK=0" in done.stdout
    assert "[1]   RANK=1" in done.stdout
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["-n", "2", "missing.py"], "missing.py"),
        (["-n", "0", __file__], "-n"),
        (["-n", "many", __file__], "-n"),
        (["--processes", "2", __file__], "--processes"),
        (["-n", "2", os.path.dirname(__file__)], "directory"),
        (["-n", "2"], "SCRIPT"),
    ],
)
def test_wrong_usage_is_one_line_and_2(arguments, word):
    done = launch(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert word in done.stderr
