"""Documents, dependencies and scripts say what the code does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SCRIPTS = [
    *(path for path in sorted((ROOT / "scripts").iterdir()) if path.is_file()),
    ROOT / ".ci" / "run",
]


def _pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name: Version(version) for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class TestPages:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_links_lead_somewhere(self, page):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"

    def test_every_error_is_described(self):
        from bigdl import errors

        page = (ROOT / "docs" / "errors.md").read_text()
        rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.M))
        assert set(rows) == set(errors.__all__)
        for name, builtin in rows.items():
            assert builtin in {kind.__name__ for kind in getattr(errors, name).__mro__}

    def test_every_method_is_described(self):
        from bigdl.nano.pytorch.inference.methods import METHODS

        page = (ROOT / "docs" / "inference.md").read_text()
        rows = re.findall(r"^\| (`[^|]+) \|", page, re.M)
        named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
        assert named == set(METHODS)

    def test_extras_are_those_of_the_project(self):
        page = (ROOT / "docs" / "install.md").read_text()
        for extra, brings in re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", page, re.M):
            assert extra in EXTRAS
            if extra != "all":
                packages = {Requirement(line).name for line in EXTRAS[extra]}
                assert set(brings.split(", ")) <= packages


class TestDependencies:
    def test_every_package_is_locked_within_its_range(self):
        pins = _pins()
        lines = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
        for requirement in map(Requirement, lines):
            if requirement.name == PROJECT["name"]:
                continue  # an extra made of extras
            if requirement.marker is not None and not requirement.marker.evaluate(
                {"sys_platform": "linux"}
            ):
                continue
            pin = pins[_normal(requirement.name)]
            assert requirement.specifier.contains(pin, prereleases=True), requirement

    def test_what_belongs_together(self):
        pins = _pins()
        assert (str(pins["torch"]), str(pins["torchvision"])) == ("2.14.1", "0.29.1")
        assert pins["pandas"].major < 3  # Spark's range

    def test_malicious_releases_are_out_of_range(self):
        (lightning,) = [
            requirement
            for requirement in map(Requirement, EXTRAS["torch"])
            if requirement.name == "pytorch-lightning"
        ]
        assert not lightning.specifier.contains("2.6.2")
        assert not lightning.specifier.contains("2.6.3")

    def test_all_is_all(self):
        (line,) = EXTRAS["all"]
        assert Requirement(line).extras == set(EXTRAS) - {"all", "dev"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are for bash")
class TestScripts:
    @pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
    def test_is_well_formed(self, script):
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if not script.name.startswith("_"):
            assert os.access(script, os.X_OK)

    @pytest.fixture
    def copy(self, tmp_path):
        """What the scripts need, without an environment."""
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, tmp_path)
        shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
        return tmp_path

    def _run(self, folder, *command, **variables):
        return subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    @pytest.mark.parametrize("name", ["test", "demo"])
    def test_without_a_usable_python_it_says_what_to_do(self, copy, name):
        old = copy / "old-python"
        old.write_text("#!/bin/sh\nexit 1\n")
        old.chmod(0o755)
        done = self._run(copy, copy / "scripts" / name, PYTHON=str(old))
        assert done.returncode != 0
        assert "Need Python 3.11 or newer" in done.stderr
        assert not (copy / ".venv").exists()

    def _fake_environment(self, copy):
        """A .venv whose Python notes what it is asked to do."""
        python = copy / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        import sys

        python.write_text(
            "#!/bin/sh\n"
            f'echo "$@" >> "{copy}/calls"\n'
            'case "$*" in\n'
            "  '-m pip'*|'-m pytest'*|examples/*) exit 0;;\n"
            f'  *) exec {sys.executable} "$@";;\n'
            "esac\n"
        )
        python.chmod(0o755)

    def _calls(self, copy):
        calls = (copy / "calls").read_text().splitlines()
        (copy / "calls").unlink()
        return [call for call in calls if call.startswith(("-m pip install", "-m pytest", "exam"))]

    def test_installs_when_something_has_changed_and_only_then(self, copy):
        self._fake_environment(copy)
        script = copy / "scripts" / "test"
        assert self._run(copy, script, "-k", "a b").returncode == 0
        install, test = self._calls(copy)
        assert (
            "--editable .[torch,inference,vision,cli,dev] --constraint constraints.txt" in install
        )
        assert test == "-m pytest -k a b"

        self._run(copy, script, "--all", "-x")
        assert self._calls(copy) == ["-m pytest -m  -x"]  # the marker's filter is taken away

        with (copy / "constraints.txt").open("a") as file:
            file.write("# changed\n")
        self._run(copy, script)
        assert len(self._calls(copy)) == 2

    def test_a_folder_is_meant_from_where_the_command_is_given(self, copy):
        self._fake_environment(copy)
        (copy / "here" / "pictures").mkdir(parents=True)
        self._run(copy / "here", copy / "scripts" / "demo", "pictures")
        assert self._calls(copy)[-1] == f"examples/demo.py {copy}/here/pictures"
