"""The Erdos-Renyi kernel distribution: how a density is spread over layers by their shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping


def erk_densities(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Densities of all tensors, higher where a tensor is small, so that together they have the density asked for.

    `density_l = scale * sum(shape_l) / prod(shape_l)`, with kernel dims taking part in both. A tensor that
    would be more than full is full, and the scale is found again for the others, until none is.

    Args:
        shapes: shape of each weight, by name.
        density: kept fraction of all weights together, in [0, 1].

    Raises:
        ValueError: for a density out of range.

    References:
        Mocanu et al.: "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
        by network science", Nature Communications 9 (2018). The kernel's dims: Evci et al., ICML 2020, section 3.

    >>> erk_densities({"wide": (100, 100), "narrow": (10, 10)}, 0.1)
    {'wide': 0.0918..., 'narrow': 0.9181...}
    """
    if not 0 <= density <= 1:
        raise ValueError(f"a density is a fraction in [0, 1], got {density!r}")
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    wanted, full = density * sum(sizes.values()), set[str]()
    while len(full) < len(raw):
        rest = [name for name in raw if name not in full]
        scale = (wanted - sum(sizes[name] for name in full)) / sum(raw[name] * sizes[name] for name in rest)
        over = {name for name in rest if scale * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in full else scale * raw[name] for name in raw}
        full |= over
    return dict.fromkeys(raw, 1.0)
