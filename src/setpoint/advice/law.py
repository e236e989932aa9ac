"""Law: the loss of a run as a function of its average size and its data, and what follows for pruning."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from setpoint.errors import UsageError
from setpoint.ledger import replace_text


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and not math.isnan(value)


@dataclass(frozen=True)
class Law:
    """The scaling law of one family of models: `loss = E + A N^-a + B D^-b`.

    N is the number of parameters, for a run that prunes its mean over the steps (Jin et al., "The journey matters:
    average parameter count over pre-training unifies sparse and dense scaling laws", ICLR 2025); D is the number of
    tokens or samples. A training step costs 6 N FLOPs a token.

    Args:
        irreducible: E, loss that neither size nor data takes away.
        size_scale: A.
        size_exponent: a.
        data_scale: B.
        data_exponent: b.
        source: where the constants come from.
        sizes: smallest and largest N that they were fitted on, or that the law was shown on.
        exponent_errors: standard errors of a and b; None where they are not known.
        ratios: smallest and largest D / compute-optimal D that it was fitted on, or shown on.
        embeddings: whether N counts the parameters of embeddings.

    Raises:
        UsageError: for a scale or an exponent that is no number above 0, for pairs that are none, and for a source that
            is no text.

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
    sizes: tuple[float, float] = (0.0, math.inf)
    exponent_errors: tuple[float, float] | None = None
    ratios: tuple[float, float] = (0.0, math.inf)
    embeddings: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not isinstance(self.embeddings, bool):
            raise UsageError("source of a law is a text, and embeddings is True or False")
        for name in ("irreducible", "size_scale", "size_exponent", "data_scale", "data_exponent"):
            value, signed = getattr(self, name), name == "irreducible"
            if not _is_number(value) or not (-math.inf if signed else 0) < value < math.inf:
                wanted = "a finite number" if signed else "a number above 0"
                raise UsageError(f"{name} of a law must be {wanted}, got {value!r}")
        for name in ("sizes", "exponent_errors", "ratios"):
            pair, ends = getattr(self, name), name != "exponent_errors"
            if pair is None and not ends:
                continue
            known = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(_is_number, pair))
            if not known or min(pair) < 0 or (ends and pair[0] > pair[1]):
                raise UsageError(
                    f"{name} of a law are two numbers of at least 0, in order where they are ends; got {pair!r}"
                )

    def loss(self, size: float, data: float) -> float:
        """The loss of a run of this average size on so many tokens or samples."""
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
            cost: y, mean cost of its steps / that of the final size; x where it is not known.
            final: the N of a pruned run is its final size, so x^-a is 1: what is left is the loss by less data. This
                form is closer to Setpoint's tests, after which it was made (docs/results-law.md).

        Raises:
            UsageError: where it is no finite number.

        >>> LANGUAGE[0].gain(ratio=16, average=2.5, final=True) < 0
        True
        """
        by_size = 1.0 if final else average**-self.size_exponent
        mean_cost = average if cost is None else cost
        with suppress(OverflowError, ZeroDivisionError):
            data: float = self.size_exponent / self.data_exponent * ratio**-self.data_exponent
            gain = float(1 - (by_size + data * mean_cost**self.data_exponent) / (1 + data))
            if math.isfinite(gain):
                return gain
        raise UsageError(
            f"the gain by the law of {self.source!r} is no number at r = {ratio:.3g}: its exponents are "
            f"{self.size_exponent:.3g} and {self.data_exponent:.3g}"
        )

    def interval(self, ratio: float, average: float, cost: float | None = None) -> tuple[float, float]:
        """The 95 % interval of `gain` by the errors of a and b, to first order; the gain itself where none are known.

        The errors are taken as independent, those of `fit_law` too. Published fits do not state how theirs are
        correlated. The ratio and the form of the law are taken as true.

        >>> low, high = LANGUAGE[1].interval(ratio=16, average=1.5)
        >>> low < LANGUAGE[1].gain(ratio=16, average=1.5) < high
        True
        """
        gain, names = self.gain(ratio, average, cost=cost), ("size_exponent", "data_exponent")
        moved = [
            replace(self, **{name: getattr(self, name) * (1 + 1e-6)}).gain(ratio, average, cost=cost) - gain
            for name in names
        ]
        slopes = [each / (1e-6 * getattr(self, name)) for each, name in zip(moved, names, strict=True)]
        half = 1.96 * math.hypot(
            *(slope * error for slope, error in zip(slopes, self.exponent_errors or (0, 0), strict=True))
        )
        return gain - half, gain + half

    def best_average(self, ratio: float) -> float:
        """The x of the largest gain, `r^(b / (a + b))`; 1 where nothing is gained."""
        return float(max(1.0, ratio ** (self.data_exponent / (self.size_exponent + self.data_exponent))))


LANGUAGE = (
    Law(
        1.69,
        406.4,
        0.34,
        410.7,
        0.28,
        "Hoffmann et al. 2022, arXiv 2203.15556, approach 3",
        (5.8e7, 4.68e8),
        (0.02, 0.02),
        (1.0, 20.0),
        embeddings=True,
    ),
    Law(
        1.8172,
        482.01,
        0.3478,
        2085.43,
        0.3658,
        "Besiroglu et al. 2024, arXiv 2404.10102",
        (5.8e7, 4.68e8),
        (0.02, 0.02),
        (1.0, 20.0),
        embeddings=True,
    ),
)
"""Two published fits of the same runs: where they disagree, nothing can be said.

Both have the errors of the second, which shows that those of the first are far too small. Sizes and ratios are those on
which Jin et al. showed the law of the average size, with masks on single weights. N counts embeddings (Pearce and Song
2024, arXiv 2406.12907).
"""


def save_laws(laws: Sequence[Law] | Law, path: Path | str) -> None:
    """Write laws to a JSON file, from which `load_laws` and `setpoint plan --laws` read them.

    A range without an end is left out, since JSON has no infinity.
    """
    held = [asdict(law) for law in ([laws] if isinstance(laws, Law) else laws)]
    plain = [{key: value for key, value in law.items() if not _is_endless(value)} for law in held]
    replace_text(Path(path), json.dumps(plain, indent=1) + "\n")


def _is_endless(value: object) -> bool:
    return isinstance(value, tuple) and math.inf in value


def load_laws(path: Path | str) -> tuple[Law, ...]:
    """The laws of a JSON file: a list of objects, or one, with the arguments of `Law`, of which six are needed.

    Raises:
        UsageError: if the file cannot be read, or holds anything else.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "laws.json"
    >>> save_laws(LANGUAGE, file)
    >>> load_laws(file) == LANGUAGE
    True
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        given = [{**each} for each in (held if isinstance(held, list) else [held])]
        pairs: list[dict[str, Any]] = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in each.items()} for each in given
        ]
        return tuple(Law(**each) for each in pairs)
    except (OSError, ValueError, TypeError) as error:
        needed = ", ".join(each.name for each in fields(Law)[:6])
        raise UsageError(f"{path} holds no laws ({error}): write a JSON list of objects with {needed}") from error


def average_size(start: float, cuts: tuple[float, float]) -> float:
    """The mean size of a run over its steps / its final size, for a size that falls in a straight line between cuts."""
    first, last = cuts
    return first * start + (last - first) * (start + 1) / 2 + (1 - last)


def fit_law(sizes: Sequence[float], data: Sequence[float], losses: Sequence[float], source: str) -> Law:
    """Fit the constants of a family to measured runs, by the Huber loss of the logarithm (as Hoffmann et al. do).

    The errors of the exponents are those of least squares, to first order. With few runs they are too small.

    Args:
        sizes: parameters outside of embeddings, one a run.
        data: tokens or samples, one a run.
        losses: final losses on data that was not trained on, one a run.
        source: what was measured.

    Raises:
        UsageError: for fewer than six runs, sequences of different lengths, values that are not above 0, and for runs
            that no law of this form fits.

    >>> truth = Law(1.0, 50.0, 0.5, 80.0, 0.4, "made up")
    >>> runs = [(n, d) for n in (1e3, 1e4, 1e5) for d in (1e4, 1e5, 1e6)]
    >>> sizes, data = zip(*runs)
    >>> found = fit_law(sizes, data, [truth.loss(n, d) for n, d in runs], "made up")
    >>> abs(found.size_exponent - 0.5) < 0.02 and abs(found.data_exponent - 0.4) < 0.02
    True
    """
    if not len(sizes) == len(data) == len(losses) or len(losses) < 6:
        raise UsageError(
            f"a law of five constants needs at least six runs, each with size, data and loss: got {len(sizes)} sizes, "
            f"{len(data)} numbers of samples and {len(losses)} losses"
        )
    try:
        rows = [torch.tensor([float(each) for each in values], dtype=torch.float64) for values in (sizes, data, losses)]
    except (TypeError, ValueError) as error:
        raise UsageError(f"sizes, data and losses of a law must be numbers: {error}") from error
    if not all(bool((row > 0).all() and row.isfinite().all()) for row in rows):
        raise UsageError("sizes, data and losses of a law must be finite and above 0")
    if any(len(set(row.tolist())) < 3 for row in rows[:2]):
        raise UsageError("a law needs runs of at least three sizes, and of at least three amounts of data")
    order = sorted(range(len(losses)), key=lambda number: [float(row[number]) for row in rows])
    rows = [row[order] for row in rows]  # the same runs in another order have the same law
    constants = _best(rows)
    e, a, by_size, b, by_data = constants
    law = Law(e, a, by_size, b, by_data, source, (float(rows[0].min()), float(rows[0].max())))
    foretold = torch.tensor([law.loss(n, d) for n, d in zip(*(row.tolist() for row in rows[:2]), strict=True)]).double()
    residuals = rows[2].log() - foretold.log()
    unexplained = float((residuals.square().sum() / max(1, len(residuals) - 5)).sqrt())
    if unexplained > _UNEXPLAINED * float(rows[2].log().std()):
        raise UsageError(f"{_NO_LAW}: the losses do not follow size and data. {_MEASURE}")
    found = replace(law, exponent_errors=_errors(law, rows[0], rows[1], residuals))
    try:
        ratios = [float(seen) / law.optimal_data(float(size)) for size, seen in zip(*rows[:2], strict=True)]
    except (OverflowError, ZeroDivisionError):  # exponents near 0: no amount of data is optimal
        return found
    return replace(found, ratios=(min(ratios), max(ratios)))


_UNEXPLAINED = 0.5
"""A fit whose errors are larger than this share of the spread of the losses says nothing."""
_NO_LAW = "no law of this form fits these runs"
_MEASURE = "Measure more runs, each with its best learning rate"


def _best(rows: list[torch.Tensor]) -> tuple[float, ...]:
    """E, A, a, B, b of the best of several searches.

    Raises:
        UsageError: where an exponent is not above 0, or a constant no finite number.
    """
    try:
        fits = [_fitted(rows, begin) for begin in ((0.3, 0.3), (0.5, 0.5), (0.3, 0.6), (0.6, 0.3))]
    except OverflowError as error:
        raise UsageError(f"{_NO_LAW}: a constant would be infinite. {_MEASURE}") from error
    _, constants = min(fits, key=lambda fit: fit[0])
    if min(constants[2], constants[4]) <= 0:
        raise UsageError(f"{_NO_LAW}: losses must fall with the size, and with the data. {_MEASURE}")
    return constants


def _errors(law: Law, size: torch.Tensor, data: torch.Tensor, residuals: torch.Tensor) -> tuple[float, float] | None:
    """Standard errors of a and b: of least squares on log losses, to first order. None with no run to spare."""
    spare = len(residuals) - 5
    if spare < 1:
        return None
    by_size = law.size_scale * size**-law.size_exponent
    by_data = law.data_scale * data**-law.data_exponent
    loss = law.irreducible + by_size + by_data
    # Columns: derivatives of the log loss by log E, log A, log B, a and b.
    slopes = [law.irreducible / loss, by_size / loss, by_data / loss]
    slopes += [-by_size * size.log() / loss, -by_data * data.log() / loss]
    columns = torch.stack(slopes, 1)
    covariance = torch.linalg.pinv(columns.T @ columns) * (residuals.square().sum() / spare)
    of_size, of_data = covariance.diagonal()[3:].clamp(min=0).sqrt().tolist()
    return of_size, of_data


def _fitted(rows: list[torch.Tensor], exponents: tuple[float, float]) -> tuple[float, tuple[float, ...]]:
    """The Huber loss that is reached, and E, A, a, B, b, from these exponents on."""
    log_size, log_data, log_loss = (row.log() for row in rows)
    reducible = float((rows[2].min() / 2).log())  # the search begins with the losses as three equal parts or so
    begin = [
        reducible,
        reducible + exponents[0] * float(log_size.mean()),
        reducible + exponents[1] * float(log_data.mean()),
    ]
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
    reached = float(closure().detach())
    e, a, b, by_size, by_data = searched.tolist()
    return reached, (math.exp(e), math.exp(a), by_size, math.exp(b), by_data)
