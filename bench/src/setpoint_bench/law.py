"""Law: the loss of a run as a function of its average size and its data, and what follows for pruning from scratch.

`loss = E + A N^-a + B D^-b`, with the mean size N of a run over its steps (Jin et al., "The journey matters: average
parameter count over pre-training unifies sparse and dense scaling laws", ICLR 2025) and D tokens. A training step
costs 6 N FLOPs a token. docs/results-law.md has the tests of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Law:
    """The scaling law of one family of models.

    Args:
        irreducible: E, loss that neither size nor data takes away.
        size_scale, size_exponent: A and a.
        data_scale, data_exponent: B and b.
        source: where the constants come from.

    >>> law = Law(1.69, 406.4, 0.34, 410.7, 0.28, "Hoffmann et al. 2022")
    >>> round(100 * law.gain(ratio=16, average=2.5), 1), round(100 * law.gain(ratio=1, average=2.5), 1)
    (6.7, -4.0)
    """

    irreducible: float
    size_scale: float
    size_exponent: float
    data_scale: float
    data_exponent: float
    source: str

    def loss(self, size: float, data: float) -> float:
        """The loss of a run of this average size on so many tokens."""
        by_size: float = self.size_scale * size**-self.size_exponent
        by_data: float = self.data_scale * data**-self.data_exponent
        return self.irreducible + by_size + by_data

    def optimal_data(self, size: float) -> float:
        """The compute-optimal number of tokens for a size: no other split of `N D` has a lower loss."""
        ratio = (self.data_exponent * self.data_scale) / (self.size_exponent * self.size_scale)
        return float((ratio * size**self.size_exponent) ** (1 / self.data_exponent))

    def gain(self, ratio: float, average: float, *, final: bool = False, cost: float | None = None) -> float:
        """What pruning gains over a small dense model of the same final size and the same training FLOPs.

        With `k = a / b`, relative to the small model's reducible loss: `1 - (x^-a + k r^-b y^b) / (1 + k r^-b)`.

        Args:
            ratio: r, data of the small model / its compute-optimal data.
            average: x, mean size of the pruned run over its steps / its final size.
            final: the N of a pruned run is its final size, so x^-a is 1: what is left is the loss by less data.
            cost: y, mean cost of its steps / that of the final size; x where it is not known.
        """
        by_size = 1.0 if final else average**-self.size_exponent
        mean_cost = average if cost is None else cost
        data: float = self.size_exponent / self.data_exponent * ratio**-self.data_exponent
        return float(1 - (by_size + data * mean_cost**self.data_exponent) / (1 + data))


LANGUAGE = (
    Law(1.69, 406.4, 0.34, 410.7, 0.28, "Hoffmann et al. 2022, arXiv 2203.15556, approach 3"),
    Law(1.8172, 482.01, 0.3478, 2085.43, 0.3658, "Besiroglu et al. 2024, arXiv 2404.10102"),
)
"""Two published fits of the same runs: where they disagree, nothing can be said."""


def average_size(start: float, cuts: tuple[float, float]) -> float:
    """The mean size of a run over its steps / its final size, for a size that falls in a straight line between cuts."""
    first, last = cuts
    return first * start + (last - first) * (start + 1) / 2 + (1 - last)


def fit_law(sizes: Sequence[float], data: Sequence[float], losses: Sequence[float], source: str) -> Law:
    """Fit the constants of a family to measured runs, by the Huber loss of the logarithm (as Hoffmann et al. do).

    >>> truth = Law(1.0, 50.0, 0.5, 80.0, 0.4, "made up")
    >>> sizes, data = zip(*[(n, d) for n in (1e3, 1e4, 1e5) for d in (1e4, 1e5, 1e6)])
    >>> found = fit_law(sizes, data, list(map(truth.loss, sizes, data)), "made up")
    >>> abs(found.size_exponent - 0.5) < 0.02 and abs(found.data_exponent - 0.4) < 0.02
    True
    """
    # Sorted, since sums depend on the order in the last digits: the same runs in another order have the same law.
    runs = torch.tensor(sorted(zip(sizes, data, losses, strict=True)), dtype=torch.float64).T
    # The surface has several minima: Hoffmann et al. start from a grid, too.
    fits = [_fitted(runs, begin) for begin in ((0.3, 0.3), (0.5, 0.5), (0.3, 0.6), (0.6, 0.3))]
    _, (e, a, by_size, b, by_data) = min(fits, key=lambda fit: fit[0])
    return Law(math.exp(e), math.exp(a), by_size, math.exp(b), by_data, source)


def _fitted(runs: torch.Tensor, exponents: tuple[float, float]) -> tuple[float, list[float]]:
    """The Huber loss that is reached, and log E, log A, a, log B, b, from these exponents on."""
    log_size, log_data, log_loss = runs.log()
    reducible = float((runs[2].min() / 2).log())  # the search begins with the losses as three equal parts or so
    by_size, by_data = exponents
    begin = [reducible, reducible + by_size * float(log_size.mean()), reducible + by_data * float(log_data.mean())]
    searched = torch.tensor([*begin, *exponents], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([searched], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15, history_size=50,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> torch.Tensor:
        search.zero_grad()
        e, a, b, by_size, by_data = searched
        parts = torch.stack([e.expand_as(log_size), a - by_size * log_size, b - by_data * log_data])
        loss = torch.nn.functional.huber_loss(parts.logsumexp(0), log_loss, delta=1e-3, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    search.step(closure)  # type: ignore[no-untyped-call]
    e, a, b, by_size_found, by_data_found = searched.tolist()
    return float(closure().detach()), [e, a, by_size_found, b, by_data_found]
