"""What ``bigdl doctor`` finds out: the machine, what is installed, and what really runs.

Prints nothing and imports no framework: whatever could crash runs in a process of its own, with
a time limit.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version

from bigdl import __version__
from bigdl._base import machine
from bigdl._base.environment import THREAD_VARIABLES, find_allocator
from bigdl._base.errors import ConfigError, TimeLimitError, WorkerLostError
from bigdl._base.workers import Workers
from bigdl.nano.accelerators import ACCELERATORS
from bigdl.nano.accelerators.here import no_cpp
from bigdl.nano.pytorch.inference.methods import METHODS, method_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigdl.nano.pytorch.inference.methods import Method

__all__ = ["Diagnosis", "Finding", "Run", "diagnose"]

Versions = dict[str, str | None]

# Package -> the module it brings, and the extra that brings it ("": bigdl itself).
PACKAGES = {
    "numpy": ("numpy", ""),
    "torch": ("torch", "torch"),
    "torchvision": ("torchvision", "torch"),
    "pytorch-lightning": ("pytorch_lightning", "torch"),
    "torchmetrics": ("torchmetrics", "torch"),
    "safetensors": ("safetensors", "torch"),
    "opencv-python-headless": ("cv2", "vision"),
    "onnx": ("onnx", "inference"),
    "onnxscript": ("onnxscript", "inference"),
    "onnxruntime": ("onnxruntime", "inference"),
    "openvino": ("openvino", "inference"),
    "nncf": ("nncf", "inference"),
    "torchao": ("torchao", "inference"),
}

# Imported once for all that is tried; several of the packages import it again.
_PRELOAD = ("torch",)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What became of a small model by one method.

    Args:
        method: Its name, as in the table of ``optimize``.
        status: "ok", "refused" (it says itself why not here), "failed" or "timeout".
        latency_ms: Median of a call; None unless ok.
        error: Largest difference from the original's output, as a share of its largest value;
            None unless ok.
        reason: Why not; "" if ok.
    """

    method: str
    status: Literal["ok", "refused", "failed", "timeout"]
    latency_ms: float | None = None
    error: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to do.

    Args:
        kind: "problem" (something installed does not work) or "advice".
        what: What was found, in one sentence.
        fix: What to do about it.
    """

    kind: Literal["problem", "advice"]
    what: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that was found."""

    machine: machine.Machine
    versions: Versions
    runs: tuple[Run, ...]
    findings: tuple[Finding, ...]

    @property
    def has_problem(self) -> bool:
        """Whether something installed does not work."""
        return any(finding.kind == "problem" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = dataclasses.asdict(self)
        found["machine"]["isa"] = sorted(self.machine.isa)
        return {"ok": not self.has_problem, **found}


def diagnose(
    *, time_limit_s: float = 120.0, progress: Callable[[str], None] = lambda _: None
) -> Diagnosis:
    """Look at the machine, import what is installed, and run a small model everywhere.

    Args:
        time_limit_s: For each import and each run; what takes longer is ended.
        progress: Called with what is about to be done.
    """
    versions = installed_versions()
    findings = [finding for check in _CHECKS for finding in check(versions)]
    runs: list[Run] = []
    laboratory = _Laboratory(time_limit_s, progress)
    try:
        broken = laboratory.check_imports(versions)
        findings += broken.values()
        if versions["torch"] and "torch" not in broken:  # it makes the small model
            runs = laboratory.run_accelerators()
    except ConfigError as exc:  # this system has no worker processes
        findings.append(
            Finding(
                kind="advice",
                what=f"Nothing could be tried: {_first_line(exc)}",
                fix="Try an accelerator by hand: InferenceOptimizer.trace(model, sample, name).",
            )
        )
    findings += [_failure(run) for run in runs if run.status in ("failed", "timeout")]
    return Diagnosis(
        machine=machine.describe(), versions=versions, runs=tuple(runs), findings=tuple(findings)
    )


def installed_versions() -> Versions:
    """Versions of Python, of bigdl and of the packages it works with; None if not installed."""
    versions: Versions = {"python": platform.python_version(), "bigdl": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def methods() -> list[Method]:
    """What is tried: the methods of ``optimize``, and fp32 on accelerators of other packages."""
    ours = {method.accelerator for method in METHODS.values()}
    others = [name for name in ACCELERATORS if name not in ours]
    return [*METHODS.values(), *(method_of(name, "fp32") for name in others)]


# --- what could crash -------------------------------------------------------------------------


class _Laboratory:
    """Tries things in processes of their own, one after another.

    Args:
        time_limit_s: What takes longer is ended.
        progress: Called with what is about to be tried.
    """

    def __init__(self, time_limit_s: float, progress: Callable[[str], None]) -> None:
        self._time_limit_s = time_limit_s
        self._progress = progress

    def check_imports(self, versions: Versions) -> dict[str, Finding]:
        """Installed packages that cannot be imported."""
        broken = {}
        preload: tuple[str, ...] = ()
        for package, (module, extra) in PACKAGES.items():
            if versions[package] is None:
                continue
            self._progress(f"importing {module}")
            with Workers(preload=preload, output="capture") as workers:
                _, status, reason = self._try(workers, _import, module)
            if status != "ok":
                broken[package] = _broken_import(package, extra, reason)
            elif module == "torch":
                preload = _PRELOAD
        return broken

    def run_accelerators(self) -> list[Run]:
        """The small model by every method, and on the accelerators that other packages add."""
        runs = []
        with Workers(preload=_PRELOAD, output="capture") as workers:
            for method in methods():
                self._progress(f"running {method.name}")
                found, status, reason = self._try(workers, _run_small, method)
                runs.append(
                    Run(method=method.name, **(found or {"status": status, "reason": reason}))
                )
        return runs

    def _try(
        self, workers: Workers, fn: Callable[..., Any], *args: Any
    ) -> tuple[Any, Literal["ok", "failed", "timeout"], str]:
        """(value, status, reason) of ``fn(*args)``."""
        try:
            return workers.start(fn, *args).result(timeout_s=self._time_limit_s), "ok", ""
        except TimeLimitError:
            return None, "timeout", f"took longer than {self._time_limit_s:g} s and was ended"
        except WorkerLostError as exc:
            return None, "failed", _first_line(exc)
        except Exception as exc:  # noqa: BLE001  (whatever a runtime raises is the finding)
            return None, "failed", f"{type(exc).__name__}: {_first_line(exc)}"


def _import(module: str) -> None:
    import importlib

    importlib.import_module(module)


def _run_small(method: Method) -> dict[str, Any]:
    from bigdl.nano.pytorch.inference.smoke import run_small

    return run_small(method)


def _first_line(exc: BaseException) -> str:
    return next(iter(str(exc).strip().splitlines()), "") or "no text"


def _broken_import(package: str, extra: str, reason: str) -> Finding:
    requirement = f"bigdl-next[{extra}]" if extra else "bigdl-next"
    return Finding(
        kind="problem",
        what=f"{package} is installed, but importing it failed: {reason}.",
        fix=f"pip uninstall -y {package} && pip install '{requirement}'",
    )


def _failure(run: Run) -> Finding:
    """The problem that a run which should have worked is."""
    fix = f"Leave it out, excludes=[{run.method!r}], and report it with the versions shown here."
    if "SIGILL" in run.reason:
        fix = "The installed build is for another processor: install one built for this one."
    elif "SIGKILL" in run.reason:
        fix = "The system ended it, most likely for memory: raise the memory limit."
    elif run.status == "timeout":
        fix = "If the machine is busy, run this again with a larger --time-limit."
    return Finding(
        kind="problem",
        what=f"{run.method} did not run a small model: {run.reason}.",
        fix=fix,
    )


# --- what a look is enough for ----------------------------------------------------------------


def _malicious_release(versions: Versions) -> Iterator[Finding]:
    if versions["pytorch-lightning"] in ("2.6.2", "2.6.3"):
        yield Finding(
            kind="problem",
            what=f"pytorch-lightning {versions['pytorch-lightning']} is a malicious release.",
            fix="pip install 'pytorch-lightning>=2.6.6', and renew every secret kept here.",
        )


def _torch_pair(versions: Versions) -> Iterator[Finding]:
    """torch 2.n goes with torchvision 0.(n + 15)."""
    if not versions["torch"] or not versions["torchvision"]:
        return
    torch, vision = Version(versions["torch"]), Version(versions["torchvision"])
    if torch.major == 2 and vision.major == 0 and vision.minor != torch.minor + 15:
        yield Finding(
            kind="problem",
            what=f"torch {torch} and torchvision {vision} do not belong together.",
            fix=f"pip install 'torchvision==0.{torch.minor + 15}.*'",
        )


def _threads(_: Versions) -> Iterator[Finding]:
    """Thread pools do not read quotas: they start a thread for each core that they see."""
    usable = machine.cores()
    given = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    for name, text in given.items():
        if text.isdigit() and int(text) > usable:
            yield Finding(
                kind="advice",
                what=f"{name}={text}, but this process may use {usable} cores.",
                fix=f"export {name}={usable}",
            )
    if usable < len(machine.core_ids()) and "OMP_NUM_THREADS" not in given:
        yield Finding(
            kind="advice",
            what=f"A quota allows {usable} of the {len(machine.core_ids())} cores that thread "
            "pools see.",
            fix=f"export OMP_NUM_THREADS={usable}",
        )


def _compiler(versions: Versions) -> Iterator[Finding]:
    reason = no_cpp()
    if versions["torch"] and reason:
        yield Finding(
            kind="advice",
            what=f"torch.compile is refused: {reason}.",
            fix="apt-get install g++ python3-dev, or what this system calls them",
        )


def _allocator(_: Versions) -> Iterator[Finding]:
    if platform.system() == "Linux" and find_allocator() is None:
        yield Finding(
            kind="advice",
            what="No jemalloc or tcmalloc for the processes that we start.",
            fix="apt-get install libjemalloc2 (training with large batches may gain from it)",
        )


def _shared_memory(_: Versions) -> Iterator[Finding]:
    """Loader workers pass batches through /dev/shm; containers often give it 64 MiB."""
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return
    if size < 512 * 2**20:
        yield Finding(
            kind="advice",
            what=f"/dev/shm has {size / 2**20:.0f} MiB: loader workers may die of a bus error.",
            fix="docker run --shm-size=2g, or num_workers=0",
        )


def _cache(_: Versions) -> Iterator[Finding]:
    folder = machine.cache_dir()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        yield Finding(
            kind="advice",
            what=f"{folder} cannot be written: plans are measured anew in each run.",
            fix="export XDG_CACHE_HOME=/a/folder/of/yours",
        )


_CHECKS: tuple[Callable[[Versions], Iterator[Finding]], ...] = (
    _malicious_release,
    _torch_pair,
    _threads,
    _compiler,
    _allocator,
    _shared_memory,
    _cache,
)
