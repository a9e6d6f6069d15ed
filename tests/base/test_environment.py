"""Settings of processes: right as data, in force where applied, gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bigdl._base.environment import (
    THREAD_VARIABLES,
    ProcessSettings,
    allocator_in_use,
    environment,
    find_allocator,
    thread_variables,
)
from bigdl._base.machine import core_ids
from bigdl.errors import ArgumentError, ConfigError


class TestEnvironment:
    def test_sets_and_takes_back(self, monkeypatch):
        monkeypatch.setenv("BIGDL_TEST_OLD", "old")
        monkeypatch.setenv("BIGDL_TEST_GONE", "there")
        monkeypatch.delenv("BIGDL_TEST_NEW", raising=False)
        before = dict(os.environ)
        with environment(BIGDL_TEST_OLD="1", BIGDL_TEST_NEW="2", BIGDL_TEST_GONE=None):
            assert os.environ["BIGDL_TEST_OLD"] == "1"
            assert os.environ["BIGDL_TEST_NEW"] == "2"
            assert "BIGDL_TEST_GONE" not in os.environ
        assert dict(os.environ) == before

    def test_takes_back_after_an_error(self):
        before = dict(os.environ)
        with pytest.raises(KeyboardInterrupt), environment(BIGDL_TEST_NEW="2"):
            raise KeyboardInterrupt
        assert dict(os.environ) == before

    def test_takes_back_what_the_block_changed(self):
        before = dict(os.environ)
        with environment(BIGDL_TEST_NEW="2"):
            os.environ["BIGDL_TEST_NEW"] = "3"
            with environment(BIGDL_TEST_NEW="4"):
                del os.environ["BIGDL_TEST_NEW"]
            assert os.environ["BIGDL_TEST_NEW"] == "3"
        assert dict(os.environ) == before

    def test_leaves_other_variables_alone(self, monkeypatch):
        monkeypatch.delenv("BIGDL_TEST_OTHER", raising=False)
        with environment(BIGDL_TEST_NEW="2"):
            os.environ["BIGDL_TEST_OTHER"] = "the user's"
        assert os.environ.pop("BIGDL_TEST_OTHER") == "the user's"

    def test_a_number_is_refused_before_anything_is_set(self):
        before = dict(os.environ)
        words = r"environment\(N=…\) takes a string.* not int"
        with pytest.raises(ArgumentError, match=words), environment(M="1", N=2):
            pass
        assert dict(os.environ) == before

    def test_a_value_the_system_refuses_leaves_nothing_behind(self):
        before = dict(os.environ)
        with pytest.raises(ValueError, match="null byte"), environment(A_FIRST="1", B="a\0b"):
            pass
        assert dict(os.environ) == before

    def test_children_see_it(self):
        with environment(**thread_variables(3)):
            done = subprocess.run(
                [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        assert done.stdout.strip() == "3"


class TestThreads:
    def test_all_names(self):
        variables = thread_variables(2)
        assert set(variables) == set(THREAD_VARIABLES)
        assert {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"} <= set(variables)
        assert set(variables.values()) == {"2", "MKL_DOMAIN_ALL=2"}

    @pytest.mark.parametrize("n", [0, -1])
    def test_none_is_refused(self, n):
        with pytest.raises(ConfigError, match=rf"{n} threads"):
            thread_variables(n)

    def test_torch_obeys(self):
        pytest.importorskip("torch", reason="asks torch for its threads")
        code = "import torch; print(torch.get_num_threads())"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **thread_variables(1)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == "1"


class TestProcessSettings:
    def test_nothing_asked_nothing_set(self):
        assert ProcessSettings().variables() == {}

    def test_threads_default_to_the_cores(self):
        assert ProcessSettings(cores=core_ids()[:1]).variables() == thread_variables(1)
        assert ProcessSettings(cores=core_ids()[:1], threads=4).variables() == thread_variables(4)

    def test_all_faults_at_once(self, tmp_path):
        with pytest.raises(ConfigError) as caught:
            ProcessSettings(threads=0, cores=(9999,), allocator=tmp_path / "none.so")
        for words in ("threads=0", "[9999]", "usable here", "none.so"):
            assert words in str(caught.value)

    @pytest.mark.parametrize("cores", [(), (core_ids()[0],) * 2])
    def test_cores_are_a_set(self, cores):
        with pytest.raises(ConfigError, match="cores="):
            ProcessSettings(cores=cores)

    def test_an_allocator_joins_other_preloads(self, tmp_path, monkeypatch):
        library = tmp_path / "libjemalloc.so.2"
        library.touch()
        settings = ProcessSettings(allocator=library)
        monkeypatch.delenv("LD_PRELOAD", raising=False)
        monkeypatch.delenv("MALLOC_CONF", raising=False)
        assert settings.variables()["LD_PRELOAD"] == str(library)
        assert "background_thread:true" in settings.variables()["MALLOC_CONF"]
        assert settings.variables()["TBB_ENABLE_SANITIZERS"] == "1"
        monkeypatch.setenv("LD_PRELOAD", "/other.so")
        monkeypatch.setenv("MALLOC_CONF", "the user's")
        assert settings.variables()["LD_PRELOAD"] == f"{library}:/other.so"
        assert settings.variables()["MALLOC_CONF"] == "the user's"

    def test_changes_nothing_here(self):
        before = dict(os.environ)
        ProcessSettings(threads=1, cores=core_ids()[:1]).variables()
        assert dict(os.environ) == before


def _elf(path: Path, *, machine: int | None = None) -> Path:
    """A file with this Python's ELF head, or that of another machine."""
    head = bytearray(Path(sys.executable).resolve().read_bytes()[:64])
    if machine is not None:
        head[18:20] = machine.to_bytes(2, "little")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="preloading is looked for on Linux only")
class TestAllocator:
    @pytest.fixture(autouse=True)
    def only_the_fake_root(self, monkeypatch, tmp_path):
        monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
        monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))

    def test_none(self, tmp_path):
        assert find_allocator(root=tmp_path) is None

    def test_jemalloc_before_tcmalloc(self, tmp_path):
        second = _elf(tmp_path / "usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")
        assert find_allocator(root=tmp_path) == second
        first = _elf(tmp_path / "usr/lib64/libjemalloc.so.2")
        assert find_allocator(root=tmp_path) == first

    def test_another_architecture_is_passed_over(self, tmp_path):
        _elf(tmp_path / "usr/lib/sparc-linux-gnu/libjemalloc.so.2", machine=2)
        (tmp_path / "usr/lib64").mkdir(parents=True)
        (tmp_path / "usr/lib64/libjemalloc.so").write_text("INPUT(-ljemalloc)")  # a linker script
        assert find_allocator(root=tmp_path) is None
        mine = _elf(tmp_path / "usr/lib/tcm-linux-gnu/libtcmalloc.so.4")
        assert find_allocator(root=tmp_path) == mine

    def test_the_users_path_comes_first(self, tmp_path, monkeypatch):
        _elf(tmp_path / "usr/lib64/libjemalloc.so.2")
        mine = _elf(tmp_path / "mine/libjemalloc.so.2")
        monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path / 'missing'}:{mine.parent}")
        assert find_allocator(root=tmp_path) == mine

    def test_this_process_has_what_its_maps_say(self):
        maps = Path("/proc/self/maps").read_text()
        expected = next((k for k in ("jemalloc", "tcmalloc") if f"/lib{k}" in maps), None)
        assert allocator_in_use() == expected

    def test_a_process_that_is_gone_has_none(self):
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        assert allocator_in_use(child.pid) is None

    @pytest.mark.skipif(shutil.which("cc") is None, reason="builds a small library with cc")
    def test_a_preload_is_seen_in_the_child(self, tmp_path):
        """A library of our own with that name stands for the real one: what counts is the load."""
        source = tmp_path / "empty.c"
        source.write_text("int nothing_here;\n")
        library = tmp_path / "libjemalloc.so.2"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        code = "from bigdl._base.environment import allocator_in_use; print(allocator_in_use())"
        settings = ProcessSettings(allocator=library)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **settings.variables()},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == "jemalloc"
