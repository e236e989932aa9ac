"""Several ranks: they see alike, decide alike and cut alike, or all stop with an error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ranks.py")
CHECKS = (
    "twin:2", "twin:4", "goals:2", "batch_norm:2", "options:2", "frozen:2", "adapters:2", "branches:2", "averages:2",
    "bad_batch:2", "resume:2", "told:2", "disagreement:2", "slowest_clock:2", "served_once:2",
    "joules_and_bytes:2", "clock_failures:2",
    "refusals:2", "late:2", "ending:2", "lost:2",
)  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork and no gloo")


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest) -> str:
    """What one process said that let ranks make the checks, one after the other; it imports everything once."""
    return told_by(chosen(request))


def chosen(request: pytest.FixtureRequest) -> list[str]:
    """The checks of this module that are to be made, in their order."""
    return [item.callspec.params["check"] for item in request.session.items if item.path == request.path]  # type: ignore[attr-defined]


def told_by(checks: Iterable[str]) -> str:
    """What is said where ranks make these checks."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *checks]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=settings)
    return done.stdout + done.stderr


@pytest.mark.parametrize("check", CHECKS)
def test_ranks(check: str, said: str) -> None:
    """Claim: what the docstring of the function of this name says, on so many ranks."""
    assert f"{check} came through\n" in said, said
