"""Several ranks: they see alike, decide alike and cut alike, or all stop with an error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ranks.py")
CHECKS = {
    "twin:2": "losses, plans and weights are those of one process on the same global batches, over ten resizes",
    "twin:4": "so they are on four ranks",
    "goals:2": "so are the plans of a tolerance of the loss, and of learned gates",
    "batch_norm:2": "with batch norm and uneven batches a cut run equals its masked twin on the same ranks",
    "options:2": "static_graph, bucket views, unused parameters, hooks, compiled code: all go on after a cut",
    "frozen:2": "a layer that is frozen for a while is averaged again when it trains again",
    "adapters:2": "what frozen outgoing weights are given is read by hooks as in one process",
    "branches:2": "a branch that runs on some ranks only is read on all of them",
    "averages:2": "an average that one rank alone keeps is cut there",
    "resume:2": "a run goes on bit for bit from one file",
    "told:2": "of all ranks the first alone logs to loggers, files and the log",
    "disagreement:2": "ranks that do not agree, or of which one fails, all raise",
    "refusals:2": "what cannot follow a cut is refused by name",
    "late:2": "a rank that does not come is waited for as long as the process group says",
    "ending:2": "a loop that has ended leaves no message with a thread, and no reducer that it replaced",
    "lost:2": "when a process is gone, the others stop with an error",
}

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
    """Claim: what `CHECKS` and the check's own docstring say."""
    assert f"{check} came through\n" in said, said
