"""Drop and grow: the least salient active weights of a tensor make room for those of the largest gradient."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from setpoint.weights.find import Pattern


@torch.no_grad()
def drop_and_grow(
    active: Bool[Tensor, "..."],
    resting: Bool[Tensor, "..."],
    scores: Float[Tensor, "..."],
    gradient: Float[Tensor, "..."],
    share: float,
    pattern: Pattern,
) -> tuple[Bool[Tensor, "..."], Bool[Tensor, "..."]]:
    """Which weights go, and which come in; as many, in an N:M pattern in each block (one at most).

    Args:
        active: weights that may go.
        resting: weights that may come in; not those that have just been dropped.
        scores: saliency of every weight.
        gradient: of the loss, of every weight; one that is zero or not finite brings nothing in.
        share: of the active weights to drop, rounded down.
        pattern: which drops and growths it allows.

    >>> active = torch.tensor([[True, True, False, False]])
    >>> scores, gradient = torch.tensor([[1.0, 2.0, 0.0, 0.0]]), torch.tensor([[9.0, 9.0, 0.1, -0.2]])
    >>> dropped, grown = drop_and_grow(active, ~active, scores, gradient, 0.5, Pattern())
    >>> dropped.tolist(), grown.tolist()
    ([[True, False, False, False]], [[False, False, False, True]])
    """
    size, wanted = gradient.abs(), int(share * int(active.sum()))
    may = resting & (size > 0) & size.isfinite()
    dropped, grown = torch.zeros_like(active), torch.zeros_like(active)
    if pattern.free:
        count = min(wanted, int(may.sum()))
        return lowest(scores, active, count), lowest(-size, may, count)
    weakest = pattern.blocks(scores.masked_fill(~active, torch.inf).contiguous()).min(-1)
    strongest = pattern.blocks(size.masked_fill(~may, -1.0).contiguous()).max(-1)
    able = weakest.values.isfinite() & (strongest.values > 0)
    chosen = lowest(weakest.values, able, min(wanted, int(able.sum())))[..., None]
    pattern.blocks(dropped).scatter_(-1, weakest.indices[..., None], chosen)
    pattern.blocks(grown).scatter_(-1, strongest.indices[..., None], chosen)
    return dropped, grown


def lowest(scores: Float[Tensor, "..."], among: Bool[Tensor, "..."], count: int) -> Bool[Tensor, "..."]:
    """A mask of the `count` lowest scores among these elements, of equal ones the first. Time O(elements)."""
    mask = torch.zeros(among.shape, dtype=torch.bool, device=among.device)  # row-major, whatever `among` is
    if count < 1:
        return mask
    flat = torch.where(among & ~scores.isnan(), scores, torch.inf).flatten()
    bound = flat.kthvalue(count).values
    chosen = mask.view(-1)
    chosen |= flat < bound
    chosen[(flat == bound).nonzero().flatten()[: count - int(chosen.sum())]] = True
    return mask
