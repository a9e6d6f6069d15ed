"""The examination: what crashes is a finding, never a crash of ours."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
import types

import pytest

from bigdl._base import machine
from bigdl._base.workers import Workers
from bigdl.nano import doctor
from bigdl.nano.pytorch.inference.methods import METHODS

NOTHING = dict.fromkeys(doctor.PACKAGES)


def _crash(method):
    os.kill(os.getpid(), signal.SIGILL if method.precision == "bf16" else signal.SIGSEGV)


def _hang(method):
    time.sleep(600)


def _raise(method):
    raise RuntimeError("could not create a primitive\nand much more")


def _refuse(method):
    return {"status": "refused", "reason": "no such thing here"}


def _succeed(method):
    return {"status": "ok", "latency_ms": 1.5, "error": 0.001}


@pytest.fixture
def examine(monkeypatch):
    """Runs everything with ``fn`` in the place of the small model."""

    def run(fn, *, time_limit_s=60.0):
        monkeypatch.setattr(doctor, "_run_small", fn)
        monkeypatch.setattr(doctor, "_PRELOAD", ())
        names = ("openvino_fp32", "openvino_bf16")
        monkeypatch.setattr(doctor, "METHODS", {name: METHODS[name] for name in names})
        monkeypatch.setattr(doctor, "ACCELERATORS", ["openvino", "theirs"])
        monkeypatch.setattr(doctor, "installed_versions", lambda: {**NOTHING, "torch": "2.14"})
        monkeypatch.setattr(doctor, "PACKAGES", {"torch": ("json", "torch")})
        monkeypatch.setattr(doctor, "_CHECKS", ())
        heard = []
        return doctor.diagnose(time_limit_s=time_limit_s, progress=heard.append), heard

    return run


class TestRuns:
    def test_all_is_well(self, examine):
        found, heard = examine(_succeed)
        assert [run.method for run in found.runs] == [
            "openvino_fp32",
            "openvino_bf16",
            "theirs_fp32",  # of another package
        ]
        assert {(run.status, run.latency_ms, run.error) for run in found.runs} == {
            ("ok", 1.5, 0.001)
        }
        assert found.findings == ()
        assert not found.has_problem
        assert heard[-1] == "running theirs_fp32"

    def test_a_refusal_is_no_problem(self, examine):
        found, _ = examine(_refuse)
        assert {(run.status, run.reason) for run in found.runs} == {
            ("refused", "no such thing here")
        }
        assert not found.has_problem

    def test_a_crash_is_a_problem_of_that_run_only(self, examine):
        found, _ = examine(_crash)
        assert [run.status for run in found.runs] == ["failed"] * 3
        assert "SIGSEGV" in found.runs[0].reason
        assert found.has_problem
        assert len(found.findings) == 3
        assert "openvino_fp32" in found.findings[0].what
        assert "another processor" in found.findings[1].fix  # SIGILL

    def test_a_hang_is_ended(self, examine):
        start = time.monotonic()
        found, _ = examine(_hang, time_limit_s=2.0)
        assert time.monotonic() - start < 30
        assert [run.status for run in found.runs] == ["timeout"] * 3
        assert "2 s" in found.runs[0].reason
        assert "--time-limit" in found.findings[0].fix

    def test_an_error_shows_its_first_line(self, examine):
        found, _ = examine(_raise)
        assert found.runs[0].reason == "RuntimeError: could not create a primitive"

    def test_everything_is_json(self, examine):
        found, _ = examine(_raise)
        read = json.loads(json.dumps(found.to_dict()))
        assert read["ok"] is False
        assert read["runs"][0]["status"] == "failed"

    def test_without_torch_nothing_is_run(self, examine, monkeypatch):
        versions = dict(NOTHING)
        monkeypatch.setattr(doctor, "installed_versions", lambda: versions)
        monkeypatch.setattr(doctor, "_CHECKS", ())
        found = doctor.diagnose()
        assert found.runs == ()
        assert not found.has_problem

    def test_without_worker_processes_it_says_so(self, examine, monkeypatch):
        import socket

        monkeypatch.delattr(socket, "send_fds")
        found, _ = examine(_succeed)
        assert found.runs == ()
        (finding,) = found.findings
        assert finding.kind == "advice"
        assert "Worker processes need" in finding.what


class TestImports:
    def test_broken_packages_are_problems(self, tmp_path, monkeypatch):
        (tmp_path / "bigdl_raises.py").write_text("raise OSError('libx.so: no such file')")
        (tmp_path / "bigdl_dies.py").write_text("import os; os.abort()")
        (tmp_path / "bigdl_works.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))
        packages = {
            f"package-{kind}": (f"bigdl_{kind}", "inference")
            for kind in ("raises", "dies", "works", "absent")
        }
        monkeypatch.setattr(doctor, "PACKAGES", packages)
        versions = {**dict.fromkeys(packages, "1.0"), "package-absent": None}
        broken = doctor._Laboratory(60.0, lambda _: None).check_imports(versions)
        assert set(broken) == {"package-raises", "package-dies"}
        assert "OSError: libx.so: no such file" in broken["package-raises"].what
        assert "SIGABRT" in broken["package-dies"].what
        assert "pip install 'bigdl-next[inference]'" in broken["package-raises"].fix


def _findings(check, **versions):
    return list(check({**NOTHING, **{k.replace("_", "-"): v for k, v in versions.items()}}))


class TestChecks:
    def test_malicious_releases(self):
        (finding,) = _findings(doctor._malicious_release, pytorch_lightning="2.6.3")
        assert finding.kind == "problem"
        assert _findings(doctor._malicious_release, pytorch_lightning="2.6.6") == []

    @pytest.mark.parametrize(
        ("torch", "vision", "fine"),
        [
            ("2.14.1", "0.29.1", True),
            ("2.14.1+cpu", "0.29.1", True),
            ("2.13.0+cpu", "0.29.1", False),
            ("2.8.0", "0.23.0", True),
            ("2.14.1", None, True),
            ("3.0.0", "0.29.1", True),  # unknown to us
        ],
    )
    def test_pairs(self, torch, vision, fine):
        found = _findings(doctor._torch_pair, torch=torch, torchvision=vision)
        assert (found == []) is fine
        assert fine or "torchvision==0.28.*" in found[0].fix

    def test_threads(self, monkeypatch):
        for name in doctor.THREAD_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(machine, "cores", lambda: 2)
        monkeypatch.setattr(machine, "core_ids", lambda: (0, 1))
        assert _findings(doctor._threads) == []
        monkeypatch.setattr(machine, "core_ids", lambda: tuple(range(64)))
        (finding,) = _findings(doctor._threads)
        assert finding.fix == "export OMP_NUM_THREADS=2"
        assert "2 of the 64" in finding.what
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert _findings(doctor._threads) == []
        monkeypatch.setenv("OMP_NUM_THREADS", "64")
        (finding,) = _findings(doctor._threads)
        assert "OMP_NUM_THREADS=64" in finding.what
        monkeypatch.setenv("OMP_NUM_THREADS", "8,2")  # a list for nested levels
        assert _findings(doctor._threads) == []

    def test_compiler(self, monkeypatch):
        monkeypatch.setenv("CXX", "/no/such/compiler")
        (finding,) = _findings(doctor._compiler, torch="2.14")
        assert "/no/such/compiler" in finding.what
        assert _findings(doctor._compiler) == []  # without torch it is of no use

    def test_allocator(self, monkeypatch):
        monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
        monkeypatch.setattr(doctor, "find_allocator", lambda: None)
        assert len(_findings(doctor._allocator)) == 1
        monkeypatch.setattr(doctor, "find_allocator", lambda: "/usr/lib/libjemalloc.so.2")
        assert _findings(doctor._allocator) == []

    @pytest.mark.parametrize(("size", "count"), [(64 * 2**20, 1), (2**31, 0)])
    def test_shared_memory(self, monkeypatch, size, count):
        usage = types.SimpleNamespace(total=size)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
        assert len(_findings(doctor._shared_memory)) == count

    def test_no_shared_memory(self, monkeypatch):
        def missing(_):
            raise FileNotFoundError

        monkeypatch.setattr(doctor.shutil, "disk_usage", missing)
        assert _findings(doctor._shared_memory) == []

    def test_cache(self, monkeypatch, tmp_path):
        monkeypatch.setattr(machine, "cache_dir", lambda: tmp_path / "a" / "bigdl")
        assert _findings(doctor._cache) == []
        monkeypatch.setattr(doctor.os, "access", lambda path, mode: path != tmp_path)
        (finding,) = _findings(doctor._cache)
        assert "XDG_CACHE_HOME" in finding.fix


class TestSmallModel:
    """The real thing, in a process of its own as the command does it."""

    @pytest.fixture
    def run(self):
        pytest.importorskip("torch", reason="needs the [torch] extra")

        def run(name):
            method = METHODS[name]
            with Workers(preload=("torch",), output="capture") as workers:
                return workers.start(doctor._run_small, method).result(timeout_s=120)

        return run

    @pytest.mark.parametrize("name", ["original", "channels_last"])
    def test_the_frameworks_own(self, run, name):
        found = run(name)
        assert found["status"] == "ok"
        assert found["error"] < 1e-5
        assert found["latency_ms"] > 0

    @pytest.mark.parametrize("name", ["openvino_fp32", "onnxruntime_int8"])
    def test_a_runtime(self, run, name):
        pytest.importorskip(METHODS[name].accelerator, reason="needs the [inference] extra")
        found = run(name)
        assert found["status"] == "ok"
        assert found["error"] < (1e-3 if name.endswith("fp32") else 0.3)

    def test_a_wrong_result_is_a_failure(self, monkeypatch):
        torch = pytest.importorskip("torch", reason="needs the [torch] extra")
        from bigdl.nano.pytorch.inference import smoke

        class Wrong(torch.nn.Module):
            def forward(self, x):
                return torch.full((len(x), 10), torch.nan)

            def close(self):
                """Nothing to give back."""

        monkeypatch.setattr(smoke, "build", lambda *args, **kwargs: Wrong())
        found = smoke.run_small(METHODS["original"])
        assert found["status"] == "failed"
        assert "wrong by nan" in found["reason"]

    def test_leaves_the_random_streams_alone(self):
        torch = pytest.importorskip("torch", reason="needs the [torch] extra")
        from bigdl.nano.pytorch.inference import smoke

        before = torch.get_rng_state()
        smoke._small_model()
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_this_machine():
    """Everything that is installed here works, or says why not."""
    pytest.importorskip("torch", reason="needs the [torch] extra")
    found = doctor.diagnose()
    assert [run for run in found.runs if run.status in ("failed", "timeout")] == []
    assert not found.has_problem
    runs = {run.method: run for run in found.runs}
    assert set(runs) >= set(METHODS)
    assert runs["original"].status == "ok"
    assert all(run.reason for run in found.runs if run.status == "refused")


def test_versions_of_what_is_installed():
    versions = doctor.installed_versions()
    assert list(versions)[:3] == ["python", "bigdl", "numpy"]
    import numpy

    assert versions["numpy"] == numpy.__version__


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        doctor.Run(method="a", status="ok").status = "failed"
