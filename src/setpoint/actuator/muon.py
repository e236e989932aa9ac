"""Muon: an optimizer whose step depends on the matrix, not on each entry alone; how that step follows a cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Muon, Optimizer


def steps_by_matrix(kind: type[Optimizer]) -> bool:
    """Whether optimizers of this class are PyTorch's Muon.

    Muon makes the momentum matrix of a weight orthogonal by Newton-Schulz iterations,

        X <- a X + (b (X X^T) + c (X X^T)^2) X,    X_0 = B / ||B||_F,

    and steps by `lr * factor(shape) * X`. Rows and columns of zeros stay zero in every product and add nothing to
    the norm. So the iterations on a cut matrix and on its masked twin give the same entries, up to the bfloat16
    rounding in which PyTorch computes them. Only the factor depends on the shape (`shape_factor`): the masked twin
    must have the learning-rate factor of the cut shape.

    References:
        Jordan et al.: "Muon: an optimizer for hidden layers in neural networks", 2024. Liu et al.: "Muon is scalable
        for LLM training", arXiv 2502.16982 (the factor that matches AdamW).
    """
    return issubclass(kind, Muon)


def shape_factor(settings: Mapping[str, Any], shape: Sequence[int]) -> float:
    """What Muon multiplies the learning rate of a matrix by: `sqrt(max(1, m / n))`, or `0.2 sqrt(max(m, n))`.

    The param group's "adjust_lr_fn" chooses; the shape has m rows and n columns.

    >>> shape_factor({"adjust_lr_fn": None}, (8, 2)), shape_factor({"adjust_lr_fn": "match_rms_adamw"}, (25, 4))
    (2.0, 1.0)
    """
    rows, columns = shape
    if settings["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
