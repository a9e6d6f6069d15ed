"""The command: exit codes, one-line errors, JSON alone on stdout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from bigdl import __version__
from bigdl._base import machine
from bigdl.errors import ConfigError
from bigdl.nano import cli, doctor

pytest.importorskip("typer", reason="needs the [cli] extra")
pytest.importorskip("rich", reason="needs the [cli] extra")

RUNS = (
    doctor.Run(method="original", status="ok", latency_ms=0.25, error=0.0),
    doctor.Run(method="ipex_bf16", status="refused", reason="[not] installed"),
)
PROBLEM = doctor.Finding(kind="problem", what="openvino [int8] fell over.", fix="pip install it")
ADVICE = doctor.Finding(kind="advice", what="No jemalloc.", fix="apt-get install libjemalloc2")


@pytest.fixture
def bigdl(capsys):
    """Runs the command here: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


@pytest.fixture
def found(monkeypatch):
    """Replaces the examination by a known result."""

    def install(*findings: doctor.Finding) -> None:
        result = doctor.Diagnosis(
            machine=machine.describe(),
            versions={"python": "3.11", "openvino": None},
            runs=RUNS,
            findings=findings,
        )

        def diagnose(*, time_limit_s, progress):
            progress(f"something, at most {time_limit_s} s")
            return result

        monkeypatch.setattr(doctor, "diagnose", diagnose)

    return install


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["doktor"], "No such command 'doktor'. Did you mean 'doctor'?"),
            (["optimise"], "No such command 'optimise'."),
            (["doctor", "--jsn"], "--json"),
            (["doctor", "now"], "(now)"),
            (["doctor", "--time-limit", "soon"], "--time-limit"),
            (["doctor", "--time-limit", "0"], "--time-limit"),
            (["doctor", "--time-limit"], "--time-limit"),
            (["--verbose"], "--verbose"),
        ],
    )
    def test_wrong_usage_is_one_line_and_2(self, bigdl, arguments, words):
        code, out, err = bigdl(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("bigdl: ")
        assert err.count("\n") == 1
        assert words in err

    @pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["doctor", "--help"]])
    def test_help_has_an_example(self, bigdl, arguments):
        code, out, err = bigdl(*arguments)
        assert (code, err) == (0, "")
        assert "Example: bigdl doctor" in out

    def test_without_a_command_help_and_2(self, bigdl):
        code, out, _ = bigdl()
        assert code == 2
        assert "doctor" in out

    def test_version(self, bigdl):
        assert bigdl("--version") == (0, __version__ + "\n", "")


class TestDoctor:
    def test_nothing_wrong(self, bigdl, found):
        found(ADVICE)
        code, out, err = bigdl("doctor")
        assert (code, err) == (0, "")
        for words in (
            "usable cores", "original", "0.25", "refused", "[not] installed",
            "pip install 'bigdl-next[inference]'", "advice: No jemalloc.",
            "fix: apt-get install libjemalloc2", "No problem found",
        ):  # fmt: skip
            assert words in out

    def test_a_problem_is_1_and_has_its_fix(self, bigdl, found):
        found(PROBLEM)
        code, out, _ = bigdl("doctor")
        assert code == 1
        assert "problem: openvino [int8] fell over." in out
        assert "fix: pip install it" in out
        assert "No problem found" not in out

    @pytest.mark.parametrize(("finding", "expected"), [(ADVICE, 0), (PROBLEM, 1)])
    def test_json_alone_on_stdout(self, bigdl, found, finding, expected):
        found(finding)
        code, out, _ = bigdl("doctor", "--json")
        read = json.loads(out)
        assert code == expected
        assert read["ok"] is (expected == 0)
        assert read["machine"]["cores"] == machine.cores()
        assert read["machine"]["isa"] == sorted(machine.isa())
        assert read["versions"] == {"python": "3.11", "openvino": None}
        assert read["runs"][0]["latency_ms"] == 0.25
        assert read["runs"][1]["reason"] == "[not] installed"
        assert read["findings"] == [
            {"kind": finding.kind, "what": finding.what, "fix": finding.fix}
        ]

    def test_an_error_of_ours_is_one_line_and_1(self, bigdl, monkeypatch):
        def diagnose(**_):
            raise ConfigError("The first line.\nThe second.")

        monkeypatch.setattr(doctor, "diagnose", diagnose)
        assert bigdl("doctor") == (1, "", "bigdl: The first line. The second.\n")

    def test_ctrl_c(self, bigdl, monkeypatch):
        def diagnose(**_):
            raise KeyboardInterrupt

        monkeypatch.setattr(doctor, "diagnose", diagnose)
        code, out, err = bigdl("doctor")
        assert (code, out) == (130, "")
        assert "Traceback" not in err


class TestProcess:
    """As a user starts it."""

    @pytest.mark.parametrize(
        "command",
        [
            [sys.executable, "-m", "bigdl"],
            [shutil.which("bigdl", path=os.path.dirname(sys.executable))],
        ],
        ids=["module", "script"],
    )
    def test_starts(self, command):
        assert command[0], "the bigdl command is not installed beside this Python"
        done = subprocess.run(
            [*command, "doktor"], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "bigdl: No such command 'doktor'. Did you mean 'doctor'?\n"

    @pytest.mark.parametrize("missing", ["typer", "rich"])
    def test_without_the_extra_the_line_to_install(self, missing):
        code = (
            f"import sys; sys.modules[{missing!r}] = None\nfrom bigdl.nano.cli import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert "pip install 'bigdl-next[cli]'" in done.stderr
        assert done.stderr.count("\n") == 1

    def test_a_reader_may_leave(self):
        code = (
            "import sys\n"
            "from bigdl.nano import cli, doctor\n"
            "def diagnose(**_):\n"
            "    raise BrokenPipeError\n"
            "doctor.diagnose = diagnose\n"
            "cli.main(['doctor'])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stderr) == (1, "")
