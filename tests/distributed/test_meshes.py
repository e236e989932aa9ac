"""Meshes of two dims and tensor parallelism: cut as in one process, saved, resumed elsewhere, or refused by name."""

from __future__ import annotations

import sys

import pytest

from distributed.test_ranks import chosen, told_by

CHECKS = (
    "tensor_parallel:2", "refitted:2", "hybrid_twin:2", "sharded_clocks:2", "uneven_batches:2", "mesh_refusals:2",
    "lost_in_a_cut:2",
)  # fmt: skip
ON_MORE_RANKS = (
    "tensor_parallel:4", "hybrid_twin:4", "two_dims:4", "hybrid_options:4", "resume_elsewhere:4", "sharded_clocks:4",
    "joules_and_bytes:4",
)  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork and no gloo")


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest) -> str:
    """What ranks said that made the checks, one after the other."""
    return told_by(chosen(request))


@pytest.mark.parametrize("check", [*CHECKS, *(pytest.param(each, marks=pytest.mark.slow) for each in ON_MORE_RANKS)])
def test_meshes(check: str, said: str) -> None:
    """Claim: what the docstring of the function of this name says."""
    assert f"{check} came through\n" in said, said
