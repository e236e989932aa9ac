"""Set-ups of training: optimizers, precisions, accumulation, compilers and wrappers; `make nightly` has all of them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from matrix.rows import AXES, Row, every_row, goes_on_like_a_fresh_one, pairwise

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="there is no gloo"),
    pytest.mark.filterwarnings("ignore"),  # of PyTorch, about one rank, and what compilers think of it
]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process alone, as a group."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = Path(tmp_path_factory.mktemp("group"), "store")
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SLICE = [Row(**row) for row in pairwise()]
ROWS = [pytest.param(row, marks=[pytest.mark.slow] * (n % 3 > 0), id=str(row)) for n, row in enumerate(SLICE)]


def test_every_two_values_meet() -> None:
    """Claim: the slice has every pair of values of two axes, in less than a tenth of all rows."""
    for one, other in itertools.combinations(AXES, 2):
        met = {(row[one], row[other]) for row in pairwise()}
        assert len(met) == len(AXES[one]) * len(AXES[other])
    assert len(SLICE) * 10 < len(list(every_row()))


@pytest.mark.parametrize("row", ROWS)
def test_a_cut_run_goes_on_like_a_fresh_small_one(row: Row, one_rank: None) -> None:
    """Claim: after two cuts a run goes on, bit for bit, like a fresh small model in the same set-up that was given the
    states of weights, moments and scaler.
    """
    goes_on_like_a_fresh_one(row)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("row", [replace(row, device="cuda") for row in SLICE], ids=str)
def test_so_does_one_on_an_accelerator(row: Row, one_rank: None) -> None:
    """Claim: so it does on an accelerator."""
    goes_on_like_a_fresh_one(row)
