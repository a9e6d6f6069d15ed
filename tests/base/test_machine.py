"""Facts of the machine, read from copies of other machines' files and from this one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigdl._base import cgroups, machine

GIB = 2**30


class FakeMachine:
    """A root folder with as many of the kernel's files as a test writes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._mounts: list[str] = []
        self._groups: list[str] = []

    def write(self, path: str, text: str) -> FakeMachine:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return self

    def mount(
        self, point: str, kind: str, *, controllers: str = "", shows: str = "/"
    ) -> FakeMachine:
        number = len(self._mounts) + 30
        options = f"rw,{controllers}" if controllers else "rw"
        self._mounts.append(
            f"{number} 29 0:{number} {shows} {point} rw,nosuid shared:9 - {kind} cgroup {options}"
        )
        (self.root / point.lstrip("/").replace(r"\040", " ")).mkdir(parents=True, exist_ok=True)
        return self.write(
            "/proc/self/mountinfo",
            "22 1 8:1 / / rw - ext4 /dev/sda rw\n" + "\n".join(self._mounts) + "\n",
        )

    def member(self, line: str) -> FakeMachine:
        self._groups.append(line)
        return self.write("/proc/self/cgroup", "\n".join(self._groups) + "\n")


@pytest.fixture
def fake(tmp_path):
    return FakeMachine(tmp_path)


@pytest.fixture
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(machine, "core_ids", lambda: tuple(range(16)))


def v2(fake: FakeMachine, path: str = "/app") -> FakeMachine:
    return fake.mount("/sys/fs/cgroup", "cgroup2").member(f"0::{path}")


def v1(fake: FakeMachine, path: str = "/app", shows: str = "/") -> FakeMachine:
    for number, name in enumerate(("cpu,cpuacct", "memory"), 1):
        fake.mount(f"/sys/fs/cgroup/{name}", "cgroup", controllers=name, shows=shows)
        fake.member(f"{number}:{name}:{path}")
    return fake


@pytest.mark.usefixtures("sixteen_cores")
class TestCores:
    def test_without_control_groups_the_affinity_counts(self, fake):
        assert machine.cores(root=fake.root) == 16

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("max 100000", 16),
            ("400000 100000", 4),
            ("150000 100000", 2),  # 1.5 counts up
            ("5000 100000", 1),  # never less than one
            ("3200000 100000", 16),  # more than there are
            ("20000 10000", 2),  # another period
        ],
    )
    def test_version_2(self, fake, text, expected):
        v2(fake).write("/sys/fs/cgroup/app/cpu.max", text + "\n")
        assert machine.cores(root=fake.root) == expected

    @pytest.mark.parametrize(
        ("quota", "period", "expected"),
        [(-1, 100000, 16), (300000, 100000, 3), (250000, 100000, 3), (1000, 100000, 1)],
    )
    def test_version_1(self, fake, quota, period, expected):
        v1(fake)
        fake.write("/sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us", f"{quota}\n")
        fake.write("/sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_period_us", f"{period}\n")
        assert machine.cores(root=fake.root) == expected

    def test_a_parent_may_be_tighter(self, fake):
        v2(fake, "/slice/service/job")
        fake.write("/sys/fs/cgroup/slice/cpu.max", "200000 100000")
        fake.write("/sys/fs/cgroup/slice/service/cpu.max", "max 100000")
        fake.write("/sys/fs/cgroup/slice/service/job/cpu.max", "800000 100000")
        assert machine.cores(root=fake.root) == 2

    def test_the_group_itself_may_be_tighter(self, fake):
        v2(fake, "/slice/job")
        fake.write("/sys/fs/cgroup/slice/cpu.max", "900000 100000")
        fake.write("/sys/fs/cgroup/slice/job/cpu.max", "300000 100000")
        assert machine.cores(root=fake.root) == 3

    def test_siblings_do_not_count(self, fake):
        v2(fake, "/mine").write("/sys/fs/cgroup/other/cpu.max", "100000 100000")
        fake.write("/sys/fs/cgroup/mine/cpu.max", "max 100000")
        assert machine.cores(root=fake.root) == 16

    def test_a_container_sees_its_group_at_the_mount(self, fake):
        """Version 1 without a namespace: the host's path, but only our part is mounted."""
        v1(fake, "/docker/abc/inner", shows="/docker/abc")
        for folder, quota in (("", "500000"), ("/inner", "-1")):
            fake.write(f"/sys/fs/cgroup/cpu,cpuacct{folder}/cpu.cfs_quota_us", quota)
            fake.write(f"/sys/fs/cgroup/cpu,cpuacct{folder}/cpu.cfs_period_us", "100000")
        assert machine.cores(root=fake.root) == 5

    @pytest.mark.parametrize("path", ["/../../elsewhere", "/gone/away"])
    def test_a_path_outside_the_mount_reads_the_mount(self, fake, path):
        v2(fake, path).write("/sys/fs/cgroup/cpu.max", "600000 100000")
        assert machine.cores(root=fake.root) == 6

    def test_hybrid_takes_the_tightest_of_both_versions(self, fake):
        v1(fake, "/a")
        fake.mount("/sys/fs/cgroup/unified", "cgroup2").member("0::/b")
        fake.write("/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", "700000")
        fake.write("/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us", "100000")
        assert machine.cores(root=fake.root) == 7
        fake.write("/sys/fs/cgroup/unified/b/cpu.max", "200000 100000")
        assert machine.cores(root=fake.root) == 2

    def test_mounts_may_stand_anywhere(self, fake):
        fake.mount(r"/mnt/control\040groups", "cgroup2").member("0::/x")
        fake.write("/mnt/control groups/x/cpu.max", "200000 100000")
        assert machine.cores(root=fake.root) == 2

    @pytest.mark.parametrize("text", ["", "garbage", "100000", "100000 0", "-5 100000"])
    def test_what_cannot_be_read_limits_nothing(self, fake, text):
        v2(fake).write("/sys/fs/cgroup/app/cpu.max", text)
        assert machine.cores(root=fake.root) == 16

    def test_two_threads_of_a_core_count_once(self, fake):
        for core in range(16):
            fake.write(
                f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list",
                f"{core % 8},{core % 8 + 8}\n",
            )
        assert machine.physical_cores(root=fake.root) == 8
        assert machine.cores(root=fake.root) == 16

    def test_without_a_topology_each_core_counts(self, fake):
        assert machine.physical_cores(root=fake.root) == 16

    def test_nodes_hold_usable_cores_only(self, fake):
        fake.write("/sys/devices/system/node/node0/cpulist", "0-3,8-11\n")
        fake.write("/sys/devices/system/node/node1/cpulist", "4-7,12-99\n")
        fake.write("/sys/devices/system/node/node2/cpulist", "\n")  # memory only
        fake.write("/sys/devices/system/node/node10/cpulist", "200-210\n")  # not for us
        assert machine.numa_nodes(root=fake.root) == (
            (0, 1, 2, 3, 8, 9, 10, 11),
            (4, 5, 6, 7, 12, 13, 14, 15),
        )

    def test_one_node_where_nothing_is_known(self, fake):
        assert machine.numa_nodes(root=fake.root) == (tuple(range(16)),)


class TestMemory:
    @pytest.fixture
    def fake(self, fake):
        return fake.write(
            "/proc/meminfo",
            f"MemTotal:       {64 * GIB // 1024} kB\nMemFree: 1 kB\n"
            f"MemAvailable:   {40 * GIB // 1024} kB\n",
        )

    def test_the_machine_is_the_limit(self, fake):
        assert machine.memory_limit_bytes(root=fake.root) == 64 * GIB
        assert machine.available_memory_bytes(root=fake.root) == 40 * GIB

    def test_version_2(self, fake):
        v2(fake)
        fake.write("/sys/fs/cgroup/app/memory.max", f"{8 * GIB}\n")
        fake.write("/sys/fs/cgroup/app/memory.current", f"{5 * GIB}\n")
        fake.write("/sys/fs/cgroup/app/memory.stat", f"anon 1\ninactive_file {2 * GIB}\n")
        assert machine.memory_limit_bytes(root=fake.root) == 8 * GIB
        assert machine.available_memory_bytes(root=fake.root) == 5 * GIB

    def test_version_2_slows_down_from_high_on(self, fake):
        v2(fake).write("/sys/fs/cgroup/app/memory.max", "max")
        fake.write("/sys/fs/cgroup/app/memory.high", f"{3 * GIB}")
        assert machine.memory_limit_bytes(root=fake.root) == 3 * GIB

    def test_a_parent_may_have_less_left(self, fake):
        v2(fake, "/slice/job")
        fake.write("/sys/fs/cgroup/slice/memory.max", f"{10 * GIB}")
        fake.write("/sys/fs/cgroup/slice/memory.current", f"{9 * GIB}")
        fake.write("/sys/fs/cgroup/slice/job/memory.max", f"{6 * GIB}")
        fake.write("/sys/fs/cgroup/slice/job/memory.current", f"{1 * GIB}")
        assert machine.memory_limit_bytes(root=fake.root) == 6 * GIB
        assert machine.available_memory_bytes(root=fake.root) == 1 * GIB

    def test_version_1(self, fake):
        v1(fake)
        fake.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
        fake.write("/sys/fs/cgroup/memory/app/memory.limit_in_bytes", f"{4 * GIB}")
        fake.write("/sys/fs/cgroup/memory/app/memory.usage_in_bytes", f"{3 * GIB}")
        fake.write(
            "/sys/fs/cgroup/memory/app/memory.stat",
            f"inactive_file 0\ntotal_inactive_file {2 * GIB}\n",
        )
        assert machine.memory_limit_bytes(root=fake.root) == 4 * GIB
        assert machine.available_memory_bytes(root=fake.root) == 3 * GIB

    def test_no_limit(self, fake):
        v1(fake).write("/sys/fs/cgroup/memory/app/memory.limit_in_bytes", "9223372036854771712")
        assert machine.memory_limit_bytes(root=fake.root) == 64 * GIB

    def test_over_the_limit_nothing_is_left(self, fake):
        v2(fake).write("/sys/fs/cgroup/app/memory.high", f"{GIB}")
        fake.write("/sys/fs/cgroup/app/memory.current", f"{2 * GIB}")
        assert machine.available_memory_bytes(root=fake.root) == 0

    def test_a_limit_above_the_machine_changes_nothing(self, fake):
        v2(fake).write("/sys/fs/cgroup/app/memory.max", f"{500 * GIB}")
        assert machine.memory_limit_bytes(root=fake.root) == 64 * GIB


ARM = "Features\t: fp asimd evtstrm aes crc32 asimddp sve bf16 i8mm\n"
BIG = "flags\t\t: sse4_2 avx2 fma avx512f avx512bw avx512dq avx512vl avx512_vnni\n"
LITTLE = "flags\t\t: sse4_2 avx2 fma avx_vnni\n"


class TestInstructionSets:
    @pytest.mark.parametrize(
        ("cpuinfo", "expected"),
        [
            ("", set()),
            (BIG, {"sse4_2", "avx2", "avx512", "avx512_vnni"}),
            (BIG + LITTLE, {"sse4_2", "avx2"}),  # only what all cores have
            ("flags : avx2\n", set()),  # without fma it is of no use to us
            ("flags : avx512f\n", set()),  # nor is a part of AVX-512
            ("flags : amx_int8 amx_bf16\n", set()),  # masked: no tiles
            ("flags : amx_tile amx_int8 amx_bf16\n", {"amx_int8", "amx_bf16"}),
            (ARM, {"neon", "asimddp", "bf16"}),
            ("Features : half thumb neon vfpv4\n", {"neon"}),
        ],
    )
    def test_linux(self, fake, cpuinfo, expected):
        fake.write("/proc/cpuinfo", "processor : 0\n" + cpuinfo)
        assert machine.isa(root=fake.root) == expected

    def test_macos(self):
        m2 = (
            "hw.optional.arm64: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_BF16: 1\n"
        )
        assert machine._macos_isa(m2) == {"neon", "asimddp", "bf16"}
        intel = "hw.optional.avx2_0: 1\nhw.optional.fma: 1\nhw.optional.avx512f: 0\n"
        assert machine._macos_isa(intel + "hw.optional.sse4_2: 1\n") == {"sse4_2", "avx2"}
        assert machine._macos_isa("") == set()

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_this_machine_agrees_with_torch(self):
        torch = pytest.importorskip("torch", reason="compares with torch's own finding")
        capability = torch.backends.cpu.get_cpu_capability()
        if capability == "AVX512":
            assert {"avx2", "avx512"} <= machine.isa()
        elif capability == "AVX2":
            assert "avx2" in machine.isa()
        else:
            assert "avx2" not in machine.isa()


class TestPlaces:
    def test_cache_of_the_standard(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert machine.cache_dir() == tmp_path / "bigdl"
        assert list(tmp_path.iterdir()) == []  # only named, not made

    @pytest.mark.parametrize("value", ["", "relative/path"])
    def test_cache_at_home(self, monkeypatch, tmp_path, value):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert machine.cache_dir() == tmp_path / ".cache" / "bigdl"

    def test_cache_without_a_home(self, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
        assert machine.cache_dir().is_absolute()
        assert machine.cache_dir().name.startswith("bigdl-")


class TestDescription:
    def test_table(self, fake, sixteen_cores, monkeypatch):
        monkeypatch.setattr(os, "cpu_count", lambda: 32)
        v2(fake).write("/sys/fs/cgroup/app/cpu.max", "400000 100000")
        fake.write("/proc/cpuinfo", "model name : Some CPU @ 2 GHz\n" + BIG)
        fake.write("/proc/meminfo", f"MemTotal: {GIB // 1024} kB\nMemAvailable: 524288 kB\n")
        text = str(machine.describe(root=fake.root))
        assert "4 of 32; affinity allows 16; a CPU quota allows 4" in text
        assert "Some CPU @ 2 GHz" in text
        assert "avx2 avx512 avx512_vnni sse4_2" in text
        assert "1.0 GiB" in text
        assert "0.5 GiB" in text

    def test_is_frozen_and_hashable(self):
        found = machine.describe()
        assert hash(found) == hash(dataclasses.replace(found))
        with pytest.raises(dataclasses.FrozenInstanceError):
            found.cores = 3

    def test_this_machine(self):
        found = machine.describe()
        assert 1 <= found.physical_cores <= found.cores <= len(found.core_ids)
        assert 0 < found.available_memory_bytes <= found.memory_limit_bytes
        assert sorted(core for node in found.numa_nodes for core in node) == list(found.core_ids)


# --- the real thing ---------------------------------------------------------------------------


def _ask(expression: str, *, before: str = "") -> str:
    """The value of ``expression`` in a new process that first runs ``before``."""
    code = f"import os\n{before}\nfrom bigdl._base import machine\nprint({expression})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_a_restricted_affinity_counts():
    last = max(os.sched_getaffinity(0))
    answer = _ask(
        "machine.cores(), machine.core_ids(), machine.numa_nodes()",
        before=f"os.sched_setaffinity(0, {{{last}}})",
    )
    assert answer == f"1 ({last},) (({last},),)"


class _ControlGroup:
    """A real control group below this process's own, or below the top; removed at the end."""

    def __init__(self, controller: str, settings: dict[str, dict[str, str]]) -> None:
        self._found = list(cgroups.groups(controller, Path("/")))
        self._controller = controller
        self._settings = settings  # file that only this version has -> what to write

    def __enter__(self) -> Path:
        reasons = []
        for parent in self._found:
            group = parent / f"bigdl-test-{os.getpid()}"
            try:
                group.mkdir()
            except OSError as exc:
                reasons.append(f"{parent}: {exc.strerror}")
                continue
            try:
                for mark, settings in self._settings.items():
                    if (group / mark).exists():
                        for name, value in settings.items():
                            (group / name).write_text(value)
                        self.group = group
                        return group
                reasons.append(f"{parent}: the {self._controller} controller is not handed down")
            except OSError as exc:
                reasons.append(f"{group}: {exc.strerror}")
            group.rmdir()
        pytest.skip(
            "not permitted to make a control group here: " + "; ".join(reasons or ["none"])
        )

    def __exit__(self, *_: object) -> None:
        self.group.rmdir()


def _join(group: Path) -> str:
    return f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux'")
def test_a_real_cpu_quota_counts():
    settings = {
        "cpu.max": {"cpu.max": "100000 100000"},
        "cpu.cfs_quota_us": {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"},
    }
    with _ControlGroup("cpu", settings) as group:
        assert _ask("machine.cores()", before=_join(group)) == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux'")
def test_a_real_memory_limit_counts():
    limit = 512 * 2**20
    settings = {
        "memory.max": {"memory.max": str(limit)},
        "memory.limit_in_bytes": {"memory.limit_in_bytes": str(limit)},
    }
    with _ControlGroup("memory", settings) as group:
        answer = _ask(
            "machine.memory_limit_bytes(), machine.available_memory_bytes()", before=_join(group)
        )
    allowed, available = map(int, answer.split())
    assert allowed == limit
    assert limit // 2 < available < limit
