"""Exchanges: who goes and who comes, against a search through all weights."""

from __future__ import annotations

import pytest
import torch

from setpoint.weights.find import Pattern
from setpoint.weights.masking import drop_and_grow, lowest


@pytest.mark.parametrize("seed", range(3))
def test_the_least_salient_go_and_the_largest_gradients_come(seed: int) -> None:
    """Claim: as a sort of all weights says; never more than may come, and none without a finite gradient."""
    generator = torch.Generator().manual_seed(seed)
    active, scores, gradient = (torch.rand(7, 9, generator=generator) for _ in range(3))
    active, gradient = active < 0.6, gradient - 0.5
    resting = ~active & (torch.rand(7, 9, generator=generator) < 0.8)
    gradient.view(-1)[:: 3 + seed] = 0.0
    gradient[0, 0], gradient[1, 1] = torch.nan, torch.inf
    able = [i for i in range(63) if resting.view(-1)[i] and 0 < gradient.view(-1)[i].abs() < torch.inf]
    for share in (0.0, 0.2, 0.9):
        gone, came = drop_and_grow(active, resting, scores, gradient, share, Pattern())
        count = min(int(share * int(active.sum())), len(able))
        worst = sorted((i for i in range(63) if active.view(-1)[i]), key=lambda i: scores.view(-1)[i].item())
        best = sorted(able, key=lambda i: -gradient.view(-1)[i].abs().item())
        assert gone.flatten().nonzero().flatten().tolist() == sorted(worst[:count])
        assert came.flatten().nonzero().flatten().tolist() == sorted(best[:count])


@pytest.mark.parametrize("shape", [(6, 8), (3, 8, 2, 3)])
def test_a_pattern_exchanges_within_its_blocks(shape: tuple[int, ...]) -> None:
    """Claim: in the blocks whose weakest weight is weakest, it goes and the block's largest gradient comes."""
    torch.manual_seed(0)
    pattern = Pattern.named("2:4")
    scores, gradient = torch.rand(shape), torch.randn(shape)
    active = torch.zeros(shape, dtype=torch.bool)
    order = pattern.blocks(torch.rand(shape)).argsort(-1)
    pattern.blocks(active).scatter_(-1, order[..., :2], True)
    resting = ~active
    pattern.blocks(resting)[0] = False  # has just been dropped there
    gone, came = drop_and_grow(active, resting, scores, gradient, 0.25, pattern)
    ranked = []
    for i, (on, may, score, size) in enumerate(
        zip(*(pattern.blocks(x).reshape(-1, 4) for x in (active, resting, scores, gradient.abs())), strict=True)
    ):
        if may.any():
            weak = score.masked_fill(~on, torch.inf).argmin()
            ranked.append((score[weak].item(), i, int(weak), int(size.masked_fill(~may, -1).argmax())))
    chosen = sorted(ranked)[: int(0.25 * int(active.sum()))]
    expected = sorted((i, out, into) for _, i, out, into in chosen)
    went, back = (pattern.blocks(x).reshape(-1, 4).nonzero().tolist() for x in (gone, came))
    assert [(i, out, into) for (i, out), (_, into) in zip(went, back, strict=True)] == expected and expected


def test_equal_scores_go_in_their_order() -> None:
    """Claim: the choice among equals does not depend on chance, and nothing outside `among` is chosen."""
    among = torch.tensor([False, True, True, True, True])
    assert lowest(torch.zeros(5), among, 2).tolist() == [False, True, True, False, False]
    assert not lowest(torch.zeros(5), among, 0).any()
