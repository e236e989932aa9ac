"""Release: one version, a README that renders anywhere, and distributions that work in a fresh environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import setpoint

ROOT = Path(__file__).parents[1]


def _project(folder: str = "") -> dict[str, Any]:
    text = (ROOT / folder / "pyproject.toml").read_text(encoding="utf-8")
    project: dict[str, Any] = tomllib.loads(text)["project"]
    return project


PYTHONS = [
    each.removeprefix("Programming Language :: Python :: ")
    for each in _project()["classifiers"]
    if each.startswith("Programming Language :: Python :: 3.")
]
"""Every Python that the classifiers name, the oldest first."""


def test_one_version_and_one_home() -> None:
    """Claim: both distributions, `setpoint.__version__` and CITATION.cff agree on version, authors and home; both ask
    for the oldest Python of the classifiers, and each requirement, of extras and of builds too, has a lower bound.
    """
    wheel, bench = _project(), _project("bench")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert wheel["version"] == bench["version"] == setpoint.__version__
    assert f"setpoint=={wheel['version']}" in bench["dependencies"]
    assert f"\nversion: {wheel['version']}\n" in citation
    assert wheel["authors"] == bench["authors"] == [{"name": "Setpoint developers"}]
    assert wheel["urls"] == bench["urls"] and f"\nrepository-code: {wheel['urls']['Source']}\n" in citation
    assert wheel["requires-python"] == bench["requires-python"] == f">={PYTHONS[0]}"
    for folder, project in (("", wheel), ("bench", bench)):
        builds = tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
        for part in (builds["requires"], project["dependencies"], *project.get("optional-dependencies", {}).values()):
            assert all(_lowest(one) for one in part if not one.startswith("setpoint[")), part


def test_every_link_of_the_readme_is_absolute_and_leads_somewhere() -> None:
    """Claim: no link of the README is relative, as PyPI has no files; those into the repository name what is there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    home = _project()["urls"]["Source"]
    raw = home.replace("https://github.com", "https://raw.githubusercontent.com") + "/main/"
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert links
    for link in links:
        assert link.startswith("https://"), link
        for start in (f"{home}/blob/main/", f"{home}/tree/main/", raw):
            if link.startswith(start):
                assert (ROOT / link.removeprefix(start).partition("#")[0]).exists(), link


@pytest.mark.parametrize("name", ["setpoint", "setpoint_bench"])
def test_wheel_and_source_archive_hold_the_same(built: Path, tmp_path: Path, name: str) -> None:
    """Claim: the wheel that the source archive builds has the files of the wheel that the repository builds."""
    archive = _archive(built, name)
    with tarfile.open(archive) as held:
        held.extractall(tmp_path, filter="data")
    _build(tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path / "again", "wheel")
    assert _names(_wheel(built, name)) == _names(_wheel(tmp_path / "again", name))
    if name == "setpoint":
        assert {"setpoint/py.typed", "setpoint/report/page.css"} <= _names(_wheel(built, name))


def test_the_wheel_installs_and_runs(built: Path, tmp_path: Path) -> None:
    """Claim: the wheel alone imports and says its version."""
    target = tmp_path / "target"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", target, _wheel(built, "setpoint")]
    _run(sys.executable, "-m", "pip", *install, folder=tmp_path)
    env = {"PYTHONPATH": str(target)}
    code = "import setpoint; print(setpoint.__file__, setpoint.__version__)"
    told = _run(sys.executable, "-c", code, folder=tmp_path, env=env).stdout.split()
    assert Path(told[0]).is_relative_to(target) and told[1] == _project()["version"]
    shown = _run(target / "bin" / "setpoint", "--version", folder=tmp_path, env=env).stdout
    assert shown.startswith(f"setpoint {_project()['version']}, torch ")


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_works_where_nothing_else_is_installed(built: Path, folder: Path, version: str) -> None:
    """Claim: on each Python of the classifiers, the wheel and what it requires are enough for README and inspect."""
    python = _environment(f"python{version}", folder)
    _install(python, folder, _wheel(built, "setpoint"))
    _use(python, folder)


@pytest.mark.slow
def test_the_lowest_versions_work(built: Path, folder: Path) -> None:
    """Claim: the lowest version of every dependency, on the oldest Python, is enough for README and inspect."""
    python = _environment(f"python{PYTHONS[0]}", folder)
    lowest = dict(map(_lowest, _project()["dependencies"]))
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in lowest.items()))
    _install(python, folder, _wheel(built, "setpoint"), "--constraint", constraints)
    code = "import sys, importlib.metadata as held; print(*map(held.version, sys.argv[1:]))"
    there = _run(python, "-c", code, *lowest, folder=folder).stdout.split()
    assert [Version(Version(each).public) for each in there] == list(map(Version, lowest.values()))
    _use(python, folder)


@pytest.mark.slow
def test_the_benchmark_works_where_nothing_else_is_installed(built: Path, folder: Path) -> None:
    """Claim: the wheels of both distributions are enough for a benchmark, and so is the benchmark's source archive."""
    python = _environment(sys.executable, folder)
    _install(python, folder, _wheel(built, "setpoint"), _wheel(built, "setpoint_bench"))
    command = python.parent / "setpoint"
    bench = ["bench", "--task", "digits", "--methods", "dense,setpoint", "--steps", "20", "--out", folder / "digits"]
    _run(command, *bench, folder=folder)
    lines = (folder / "digits" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["method"] for line in lines} == {"dense", "setpoint"}

    again = ["--no-deps", "--force-reinstall", _archive(built, "setpoint_bench")]
    _run(python, "-m", "pip", "install", "--quiet", *again, folder=folder)
    assert "digits" in _run(command, "list", "tasks", folder=folder).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels and the source archives of both distributions."""
    pytest.importorskip("hatchling")
    made = tmp_path_factory.mktemp("built")
    for source in (ROOT, ROOT / "bench"):
        _build(source, made, "wheel")
        _build(source, made, "sdist")
    return made


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that goes with the test: an environment with PyTorch takes gigabytes, and `tmp_path` is kept."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def _lowest(requirement: str) -> tuple[str, str]:
    """Name and lowest version of a requirement."""
    parsed = Requirement(requirement)
    (version,) = (each.version for each in parsed.specifier if each.operator in (">=", "=="))
    return parsed.name, version


def _build(source: Path, out: Path, kind: str) -> None:
    code = "import sys, hatchling.build as build; getattr(build, f'build_{sys.argv[2]}')(sys.argv[1])"
    _run(sys.executable, "-c", code, out, kind, folder=source)


def _wheel(built: Path, name: str) -> Path:
    (found,) = built.glob(f"{name}-*.whl")
    return found


def _archive(built: Path, name: str) -> Path:
    (found,) = built.glob(f"{name}-*.tar.gz")
    return found


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as held:
        return {name for name in held.namelist() if not name.endswith("/RECORD")}


def _ask(*command: object, folder: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What a command answers that sees no other package than those of its own Python."""
    alone = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=alone | (env or {}), capture_output=True, text=True, timeout=3600
    )


def _run(
    *command: object, folder: Path, env: dict[str, str] | None = None, status: int = 0
) -> subprocess.CompletedProcess[str]:
    done = _ask(*command, folder=folder, env=env)
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def _environment(interpreter: str, folder: Path) -> Path:
    """The Python of a new environment; skips where there is no such interpreter, or no index to install from."""
    if shutil.which(interpreter) is None:
        pytest.skip(f"{interpreter} is not on the PATH")
    asked = _ask(interpreter, "-c", "import ensurepip, venv", folder=folder)
    if asked.returncode:  # a shim without an interpreter behind it, or Debian's python3 without python3-venv
        pytest.skip(f"{interpreter} makes no environment: {asked.stderr.strip()}")
    _run(interpreter, "-m", "venv", folder / "fresh", folder=folder)
    python = folder / "fresh" / "bin" / "python"
    asked = _ask(python, "-m", "pip", "download", "--quiet", "--no-deps", "hatchling", folder=folder)
    if asked.returncode:
        pytest.skip(f"pip reaches no index of packages: {asked.stderr.strip()}")
    return python


def _install(python: Path, folder: Path, *arguments: object) -> None:
    """Install with pip; skips where that takes a CUDA build of PyTorch, unless SETPOINT_TEST_CUDA is set."""
    plan = folder / "plan.json"
    install = [python, "-m", "pip", "install", "--quiet", *arguments]
    _run(*install, "--dry-run", "--report", plan, folder=folder)
    held = {each["metadata"]["name"]: each["metadata"]["version"] for each in json.loads(plan.read_text())["install"]}
    if any(name.startswith("nvidia-") for name in held) and not os.environ.get("SETPOINT_TEST_CUDA"):
        pytest.skip(
            f"the index has only a CUDA build of torch {held['torch']} for this Python, several GB with what it needs:"
            " SETPOINT_TEST_CUDA=1 installs it"
        )
    _run(*install, folder=folder)
    _run(python, "-m", "pip", "check", folder=folder)


def _use(python: Path, folder: Path) -> None:
    """Do what the README shows, and what the command line offers without the benchmark."""
    first, after = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[:2]
    code = f"{first}\n{after}\nassert torch.equal(small(inputs), model(inputs))\nprint(setpoint.__file__)"
    told = _run(python, "-W", "error", "-c", code, folder=folder).stdout.splitlines()
    assert Path(told[-1]).is_relative_to(folder)

    command = python.parent / "setpoint"
    assert _run(command, "--version", folder=folder).stdout.startswith(f"setpoint {_project()['version']}, torch ")
    assert "inspect" in _run(command, "--help", folder=folder).stdout
    (folder / "net.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(4, 8)\n")
    found = _run(command, "inspect", "net.py:build", "--input", "2,4", "--json", folder=folder)
    assert json.loads(found.stdout)["params"] == 40
    refused = _run(command, "inspect", "resnet18", folder=folder, status=2)
    assert "pip install setpoint-bench" in refused.stderr
