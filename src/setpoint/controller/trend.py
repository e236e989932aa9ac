"""A trend: where the observed loss was heading, how noisy it is, and how far it left that line after a cut."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

_MOST_BINS = 8
_LEAST_BINS = 4
_LEAST_IN_BIN = 2
_SIGNIFICANT = 4.0  # standard errors by which the loss must lie above its trend to have left it
_NOTABLE = 0.10  # share by which it must at least have risen over the cut: every cut costs a little


@dataclass(frozen=True)
class Trend:
    """A straight line over `x = ln(step)`, as a loss that falls by a power of time looks over a short while."""

    level: float  # value at `centre`
    slope: float  # change for each unit of x
    centre: float  # mean of x over the bins
    spread: float  # sum of squares of x about the centre
    noise: float  # standard deviation of a bin's median about the line
    num_bins: int  # how many bins it was fitted to

    def at(self, step: float) -> float:
        return self.level + self.slope * (math.log(step) - self.centre)

    def error(self, step: float) -> float:
        """Standard error of `at`: the further from where it was fitted, the larger."""
        return self.noise * math.sqrt(1 / self.num_bins + (math.log(step) - self.centre) ** 2 / self.spread)


@dataclass(frozen=True)
class Excess:
    """How far the loss lies above the trend that it had before a cut."""

    value: float  # mean distance over the window after the cut, in the unit of the loss
    error: float  # standard error of it
    foretold: float  # what the trend foretold there
    before: float  # value of the trend at the cut
    cut: int = 0  # the step of the cut

    def significant(self) -> bool:
        """Whether the loss has left its trend: well above it, and well above where it was at the cut.

        A loss that falls fast and then flattens lies above any line drawn through its fall.

        >>> Excess(0.5, error=0.1, foretold=2.0, before=2.0).significant()
        True
        >>> Excess(0.5, error=0.1, foretold=1.5, before=2.0).significant()
        False
        """
        rise = self.foretold + self.value - self.before
        return self.value > _SIGNIFICANT * self.error and rise > _NOTABLE * abs(self.before)


Losses = Float64[np.ndarray, " _observed"]


def fit_trend(steps: Losses, losses: Losses) -> Trend | None:
    """The trend of these losses, or None where there are fewer than eight.

    Least squares draw the line through the medians of 4 to 8 bins of equally many losses, and `noise^2 = sum of squared
    residuals / (bins - 2)`.
    """
    binned = _bins(steps, losses)
    if binned is None:
        return None
    x, y = binned
    centre, level = float(x.mean()), float(y.mean())
    spread = float(((x - centre) ** 2).sum())
    slope = float(((x - centre) * (y - level)).sum()) / spread
    residual = y - level - slope * (x - centre)
    noise = math.sqrt(float((residual**2).sum()) / (len(x) - 2))
    return Trend(level, slope, centre, spread, noise, len(x))


def excess_after(steps: Losses, losses: Losses, *, changed: int, cut: int, now: int) -> Excess | None:
    """The excess of a cut: the second half of what followed it, against what came before it; None with too few losses.

        value = mean over the bins of (median - trend),    error^2 = noise^2 / bins + trend.error^2.

    The window before begins a quarter of the way from the last change of the model (`changed`, 0 for none) to the cut,
    so that recovery from that change is over, and reaches back at most twice as far as the cut is old, so that a line
    fits. Losses that are not finite are left out.
    """
    begin = max(changed + (cut - changed) / 4, cut - 2 * (now - cut))
    finite = np.isfinite(losses) & (steps >= 1)
    before = finite & (steps > begin) & (steps <= cut)
    after = finite & (steps > (cut + now) / 2) & (steps <= now)
    trend, binned = fit_trend(steps[before], losses[before]), _bins(steps[after], losses[after])
    if trend is None or binned is None:
        return None
    x, y = binned
    middle = math.exp(float(x.mean()))
    foretold = trend.at(middle)
    error = math.hypot(trend.noise / math.sqrt(len(x)), trend.error(middle))
    return Excess(float(y.mean()) - foretold, error, foretold, trend.at(cut))


def _bins(steps: Losses, losses: Losses) -> tuple[Losses, Losses] | None:
    num_bins = min(_MOST_BINS, len(losses) // _LEAST_IN_BIN)
    if num_bins < _LEAST_BINS:
        return None
    x = np.array([np.log(part).mean() for part in np.array_split(steps, num_bins)])
    y = np.array([np.median(part) for part in np.array_split(losses, num_bins)])
    return x, y
