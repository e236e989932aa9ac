"""Release: one version everywhere, a README that renders outside the repository, and a wheel that installs and runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import setpoint

ROOT = Path(__file__).parents[1]


def _project(folder: str = "") -> dict[str, Any]:
    text = (ROOT / folder / "pyproject.toml").read_text(encoding="utf-8")
    project: dict[str, Any] = tomllib.loads(text)["project"]
    return project


def test_one_version_and_one_home() -> None:
    """Claim: both distributions, `setpoint.__version__` and CITATION.cff agree on version, authors and home."""
    wheel, bench = _project(), _project("bench")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert wheel["version"] == bench["version"] == setpoint.__version__
    assert f"setpoint=={wheel['version']}" in bench["dependencies"]
    assert f"\nversion: {wheel['version']}\n" in citation
    assert wheel["authors"] == bench["authors"] == [{"name": "Setpoint developers"}]
    assert wheel["urls"] == bench["urls"] and f"\nrepository-code: {wheel['urls']['Source']}\n" in citation


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


def test_the_wheel_installs_and_runs(tmp_path: Path) -> None:
    """Claim: wheel and source archive hold the same package, and the wheel alone imports and says its version."""
    pytest.importorskip("hatchling")
    built = tmp_path / "built"
    code = "import sys, hatchling.build as build; build.build_wheel(sys.argv[1]); build.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, built], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        held.extractall(tmp_path, filter="data")
    again = tmp_path / "again"
    code = "import sys, hatchling.build as build; build.build_wheel(sys.argv[1])"
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    subprocess.run([sys.executable, "-c", code, again], cwd=source, check=True, capture_output=True, timeout=120)
    assert _names(wheel) == _names(next(again.glob("*.whl")))
    assert {"setpoint/py.typed", "setpoint/report/page.css"} <= _names(wheel)

    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    env = {**os.environ, "PYTHONPATH": str(target)}
    code = "import setpoint; print(setpoint.__file__, setpoint.__version__)"
    told = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120
    ).stdout.split()
    assert Path(told[0]).is_relative_to(target) and told[1] == _project()["version"]
    shown = subprocess.run(
        [target / "bin" / "setpoint", "--version"], env=env, check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert shown.startswith(f"setpoint {_project()['version']}, torch ")


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as held:
        return {name for name in held.namelist() if not name.endswith("/RECORD")}
