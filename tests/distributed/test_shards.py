"""Models that `fully_shard` has spread over ranks: read, cut, regrown, saved and resumed as in one process."""

from __future__ import annotations

import sys

import pytest

from distributed.test_ranks import chosen, told_by

CHECKS = {
    "sharded_twin:2": "losses, plans, weights and moments are those of one process, over ten resizes",
    "sharded_options:2": "resharding, mixed precision, recomputing, compiled code, hooks go on",
    "sharded_invisible:2": "with a budget of 1.0 it trains bit for bit as without Setpoint",
    "sharded_failures:2": "a cut or a return that fails on one rank is put back on all",
    "sharded_resume:2": "a run goes on bit for bit from a checkpoint of torch.distributed.checkpoint",
    "sharded_copies:2": "sharded and whole copies of the model are cut and regrown alike",
    "sharded_adapters:2": "what frozen outgoing weights are given is read by hooks as in one process",
    "sharded_buffers:2": "running statistics rest and come back on the rank whose they are",
    "sharded_refusals:2": "what cannot follow a cut is refused by name",
}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork and no gloo")


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest) -> str:
    """What ranks said that made the checks, one after the other."""
    return told_by(chosen(request))


@pytest.mark.parametrize("check", CHECKS)
def test_shards(check: str, said: str) -> None:
    """Claim: what `CHECKS` and the check's own docstring say."""
    assert f"{check} came through\n" in said, said
