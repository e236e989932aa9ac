"""Models that `fully_shard` has spread over ranks: read, cut, regrown, saved and resumed as in one process."""

from __future__ import annotations

import sys

import pytest

from distributed.test_ranks import chosen, told_by

CHECKS = (
    "sharded_twin:2", "sharded_options:2", "sharded_invisible:2", "sharded_failures:2", "sharded_resume:2",
    "sharded_copies:2", "sharded_adapters:2", "sharded_buffers:2", "sharded_refusals:2", "sharded_own_states:2",
)  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork and no gloo")


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest) -> str:
    """What ranks said that made the checks, one after the other."""
    return told_by(chosen(request))


@pytest.mark.parametrize("check", CHECKS)
def test_shards(check: str, said: str) -> None:
    """Claim: what the docstring of the function of this name says."""
    assert f"{check} came through\n" in said, said
