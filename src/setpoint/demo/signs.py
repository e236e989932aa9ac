"""Signs: small images of the letters of an invented alphabet, drawn by code, so that the demo needs no data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SIDE = 24
"""Height and width of an image, in pixels."""
OLD = range(48)
"""The letters that the network in the wheel was pretrained on."""
NEW = range(100, 110)
"""The letters that it learns in the demo."""

_STROKES, _PIECES = 3, 5
_AT_ONCE = 64


def draw(signs: Sequence[int], each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of letters, in random order, each written anew: turned, sheared, moved, wobbly, on noisy paper.

    Args:
        signs: numbers in the alphabet.
        each: images of each letter.
        seed: the same seed draws the same images.

    Returns:
        Images (n, 1, 24, 24) with mean 0 and variance 1 each, and the place of each one's letter in `signs` (n).

    >>> pictures, labels = draw([3, 7], 5, seed=0)
    >>> pictures.shape, sorted(labels.tolist())
    (torch.Size([10, 1, 24, 24]), [0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(signs)), each))
    shapes = np.stack([_sign(sign) for sign in signs])
    chunks = (labels[at : at + _AT_ONCE] for at in range(0, len(labels), _AT_ONCE))
    pictures = np.concatenate([_pictures(shapes[chunk], rng) for chunk in chunks])
    return torch.from_numpy(pictures[:, None]), torch.from_numpy(labels)


def _sign(sign: int) -> np.ndarray:
    """Strokes of a letter as start, bend and end (strokes, 3, 2): between points of a grid, each from another's end."""
    rng = np.random.default_rng((2026, sign))
    grid = np.stack(np.meshgrid([-0.8, 0.0, 0.8], [-0.8, 0.0, 0.8]), axis=-1).reshape(9, 2)
    walk = rng.permutation(9)[: _STROKES + 1]
    starts, ends = grid[walk[:-1]], grid[walk[1:]]
    bends = (starts + ends) / 2 + rng.normal(0, 0.45, starts.shape)
    return np.stack([starts, bends, ends], axis=1)


def _pictures(strokes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images (n, 24, 24) of strokes (n, strokes, 3, 2)."""
    num = len(strokes)
    points = strokes + rng.normal(0, 0.12, strokes.shape)
    stray = rng.uniform(-1.3, 1.3, (num, 1, 1, 2)) + rng.normal(0, 0.35, (num, 1, 3, 2))  # a scratch that means nothing
    points = np.concatenate([_moved(points, rng), stray], axis=1)
    t = np.linspace(0, 1, _PIECES + 1)[:, None]
    curve = (
        (1 - t) ** 2 * points[:, :, None, 0] + 2 * t * (1 - t) * points[:, :, None, 1] + t**2 * points[:, :, None, 2]
    )
    curve = curve.astype(np.float32)
    at = np.linspace(-1.4, 1.4, SIDE, dtype=np.float32)
    x, y = (axis.reshape(1, -1) for axis in np.meshgrid(at, at))
    nearest = np.full((num, SIDE * SIDE), np.inf, dtype=np.float32)
    for start, end in zip(
        curve[:, :, :-1].reshape(num, -1, 2).swapaxes(0, 1),
        curve[:, :, 1:].reshape(num, -1, 2).swapaxes(0, 1),
        strict=True,
    ):
        (x0, y0), (dx, dy) = start.T[..., None], (end - start).T[..., None]
        share = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx**2 + dy**2 + 1e-6), 0, 1)
        np.minimum(nearest, (x - x0 - share * dx) ** 2 + (y - y0 - share * dy) ** 2, out=nearest)
    thick = rng.uniform(0.08, 0.16, (num, 1)).astype(np.float32)
    ink = np.exp(-nearest / (2 * thick**2)).reshape(num, SIDE, SIDE)
    shade = (rng.normal(0, 0.15, (num, 2)) @ np.concatenate([x, y])).reshape(ink.shape)
    found = ink * rng.uniform(0.6, 1.0, (num, 1, 1)) + shade + rng.normal(0, 0.2, ink.shape)
    found = found - found.mean(axis=(1, 2), keepdims=True)
    pictures: np.ndarray = (found / found.std(axis=(1, 2), keepdims=True)).astype(np.float32)
    return pictures


def _moved(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points (n, strokes, 3, 2), those of an image turned, sheared, stretched and moved together."""
    num = len(points)
    angle, shear = rng.uniform(-0.5, 0.5, num), rng.uniform(-0.3, 0.3, num)
    size = rng.uniform(0.65, 1.15, (num, 2))
    turn = np.stack([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    turn = turn @ np.stack([[np.ones(num), shear], [np.zeros(num), np.ones(num)]]).transpose(2, 0, 1)
    shapes = np.einsum("nij,nskj->nski", turn * size[:, :, None], points)
    moved: np.ndarray = shapes + rng.uniform(-0.2, 0.2, (num, 1, 1, 2))
    return moved
