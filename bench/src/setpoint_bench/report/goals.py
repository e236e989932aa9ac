"""The headline goals of Setpoint against its rivals, and whether a task's results reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from setpoint.report.numbers import percent
from setpoint_bench.report.columns import interval_text, realised_text, share_text
from setpoint_bench.report.results import Cell
from setpoint_bench.report.statistics import Difference, difference, share_of
from setpoint_bench.report.summary import DENSE, SETPOINT, Row, rounds_of, series

REACHED, PARTLY, MISSED = "reached", "reached where measured", "not reached"
UNDECIDED, UNKNOWN = "undecided", "not measured"
NEAR = {"accuracy": 0.003, "loss": 0.01}
MOST_SECONDS = {0.5: 0.65, 0.25: 0.5}
LEAST_REALISED = 0.85
MOST_APART = 0.02
"""Final FLOPs are called equal up to this share."""


@dataclass(frozen=True)
class Goal:
    """One goal on one task.

    Args:
        verdict: "reached"; "reached where measured", where a part was not measured; "not reached"; "undecided", where
            an interval holds both, or fewer than three seeds have none; or "not measured".
        evidence: the numbers behind the verdict, or what is missing.
    """

    letter: str
    text: str
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Field:
    """The rows of one task and the runs behind them, as the goals look at them."""

    rows: Sequence[Row]
    groups: dict[str, tuple[Cell, ...]]

    def ours(self) -> list[Row]:
        """Setpoint's rows, the largest budget first."""
        return [row for row in self.rows if row.method == SETPOINT]

    def at(self, budget: float) -> Row | None:
        """Setpoint's row at a budget."""
        return next((row for row in self.ours() if row.budget == budget), None)

    def of(self, budget: float | None, *families: str) -> list[Row]:
        """Rows of these families at a budget."""
        return [row for row in self.rows if row.family in families and row.budget == budget]

    def ahead(self, row: Row, rival: Row) -> Difference | None:
        """How far a row's metric is better than a rival's, seed by seed: above 0 is better."""
        found = difference(self.groups[row.label], self.groups[rival.label])
        return None if found is None else better(found, row.metric)


def better(found: Difference, metric: str) -> Difference:
    """A difference of metrics turned so that above 0 is better."""
    if metric == "accuracy":
        return found
    low, high = (None if end is None else -end for end in (found.high, found.low))
    return Difference(-found.mean, found.num, found.deviation, low, high)


def goals(cells: Sequence[Cell], rows: Sequence[Row]) -> tuple[Goal, ...]:
    """Every goal on one task."""
    field = Field(rows, series(cells))
    return tuple(_judged(letter, text, field, check) for letter, text, check in GOALS)


PRUNED_AFTER = ("magnitude-oneshot", "filter-oneshot", "torch-pruning-norm", "torch-pruning-taylor")
OPEN_LOOPS = ("filter-first", "cubic", "prunetrain", "movement", "l0-gates")
WANTED: Mapping[str, tuple[str, ...]] = {"b": PRUNED_AFTER, "c": (*PRUNED_AFTER, *OPEN_LOOPS)}
"""Methods that a goal names: each must be measured beside each of Setpoint's rows for it to be reached in full."""


def _judged(letter: str, text: str, field: Field, check: Callable[[Field], Iterator[Check]]) -> Goal:
    verdict, evidence = _verdict(check(field))
    untimed = _untimed(field) if check is _seconds and verdict != MISSED else []
    if untimed:
        return Goal(letter, text, UNKNOWN, _joined(f"{', '.join(untimed)} untimed", evidence))
    absent, cheaper = _absent(field, letter), _cheaper(field) if check is _better_than_pruned else []
    if verdict == UNKNOWN:
        return Goal(letter, text, verdict, evidence)
    verdict = PARTLY if verdict == REACHED and (absent or cheaper) else verdict
    missing = f"not run: {', '.join(absent)}" if absent else ""
    return Goal(letter, text, verdict, _joined(evidence, missing, _told(cheaper)))


def _told(cheaper: Sequence[str]) -> str:
    return f"left out, clearly worse but over {percent(MOST_APART)} cheaper: {', '.join(cheaper)}" if cheaper else ""


def _absent(field: Field, letter: str) -> list[str]:
    """Methods that a goal names and that were not run, with their budgets."""
    ours = field.ours()
    absent = [
        f"{method} {row.budget:g}" if row.budget is not None else method
        for row in ours
        for method in WANTED.get(letter, ())
        if not any(rival.method == method for rival in field.rows if rival.budget == row.budget)
    ]
    if letter == "b":
        absent += [f"{SETPOINT} {budget:g}" for budget in MOST_SECONDS if field.at(budget) is None]
    return absent


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))


@dataclass(frozen=True)
class Check:
    """One comparison that a goal consists of.

    Args:
        good: whether it holds; None where the runs are too few, or too far apart, to say.
        margin: by how much; the smallest margin decides which are reported.
        text: its numbers.
    """

    good: bool | None
    margin: float
    text: str


FEW = 2
"""Up to this number, comparisons are reported one by one."""


def _verdict(checks: Iterator[Check]) -> tuple[str, str]:
    found = sorted(checks, key=lambda check: check.margin)
    if not found:
        return UNKNOWN, ""
    good = sum(check.good is True for check in found)
    evidence = "; ".join(check.text for check in found[: max(FEW, min(len(found) - good, 2 * FEW))])
    if len(found) > FEW:
        evidence = f"{good} of {len(found)}; the narrowest: {evidence}"
    if any(check.good is False for check in found):
        return MISSED, evidence
    return REACHED if good == len(found) else UNDECIDED, evidence


def _not_below(found: Difference, bound: float) -> bool | None:
    """Whether all of a difference's interval is at a bound or above; None where it lies on both sides."""
    if found.low is None or found.high is None:
        return None
    return True if found.low >= bound else False if found.high < bound else None


def _above_zero(found: Difference) -> bool | None:
    """Whether all of its interval is above 0; None where it lies on both sides."""
    if found.low is None or found.high is None:
        return None
    return True if found.low > 0 else False if found.high <= 0 else None


def _near_dense(field: Field) -> Iterator[Check]:
    row = field.at(0.5)
    # The bound of 0.01 is for nats: a loss that is no cross-entropy has another scale.
    if row is not None and row.difference is not None and (row.metric == "accuracy" or row.unit == "nats"):
        found, bound = better(row.difference, row.metric), -NEAR[row.metric]
        text = f"{interval_text(row.difference, row.metric)} to dense"
        yield Check(_not_below(found, bound), found.mean - bound, text)


def _clocked(field: Field, budget: float) -> list[Row]:
    """Rows that Setpoint's seconds are compared with at a budget: dense, and post-training methods."""
    return [rival for rival in field.rows if rival.method == DENSE] + field.of(budget, "post-training")


def _untimed(field: Field) -> list[str]:
    """Labels of rows that goal (b) names and that were not timed."""
    spoken = [
        row
        for budget in MOST_SECONDS
        if (ours := field.at(budget)) is not None
        for row in (ours, *_clocked(field, budget))
    ]
    return list(dict.fromkeys(row.label for row in spoken if row.seconds is None))


def _seconds(field: Field) -> Iterator[Check]:
    for budget, most in MOST_SECONDS.items():
        row = field.at(budget)
        if row is None or row.seconds is None or row.clock == "shared":
            continue
        for rival in _clocked(field, budget):
            ours, theirs = (rounds_of(field.groups[each.label], row.clock) for each in (row, rival))
            share = share_of(ours, theirs)
            if share is not None:
                text = f"{share_text(share)} of {rival.method}'s at {budget:g}"
                yield Check(share.at_most(most), most - share.value, text)


def _better_than_pruned(field: Field) -> Iterator[Check]:
    for row in field.ours():
        for rival in field.of(row.budget, "post-training", "open-loop"):
            if _counts(field, row, rival):
                yield from _compared(field, row, rival, _above_zero)


def _cheaper(field: Field) -> list[str]:
    """Rivals that are clearly worse and spend less at the end, which are not compared."""
    return [
        rival.label
        for row in field.ours()
        for rival in field.of(row.budget, "post-training", "open-loop")
        if not _counts(field, row, rival)
    ]


def _counts(field: Field, row: Row, rival: Row) -> bool:
    """Whether the rival is comparable, or spends less and still is not clearly worse."""
    found = field.ahead(row, rival)
    return _comparable(row, rival) or (found is not None and _above_zero(found) is not True)


def _comparable(row: Row, rival: Row) -> bool:
    """Whether the rival spends at least as much at the end; of a masked one, its FLOPs in theory."""
    theirs = rival.final_flops_ratio if rival.theoretical_ratio is None else rival.theoretical_ratio
    return row.final_flops_ratio is None or theirs is None or theirs >= row.final_flops_ratio * (1 - MOST_APART)


def _better_than_small(field: Field) -> Iterator[Check]:
    def beyond_deviation(found: Difference) -> bool | None:
        if found.deviation is None or found.low is None or found.high is None:
            return None
        if found.low > 0 and found.mean > found.deviation:
            return True
        return False if found.high <= found.deviation else None

    for row in field.ours():
        for rival in field.rows:
            # A single seed has no deviation to exceed.
            if rival.method == "small" and rival.budget == row.budget and min(row.num_seeds, rival.num_seeds) > 1:
                yield from _compared(field, row, rival, beyond_deviation)


def _not_below_long(field: Field) -> Iterator[Check]:
    for row in field.ours():
        for rival in field.rows:
            if rival.method == "small-long" and rival.budget == row.budget:
                yield from _compared(field, row, rival, lambda found: _not_below(found, 0.0))


def _compared(field: Field, row: Row, rival: Row, good: Callable[[Difference], bool | None]) -> Iterator[Check]:
    found = field.ahead(row, rival)
    if found is not None:
        apart = "" if found.deviation is None else f", standard deviation {_amount(found.deviation, row)}"
        text = f"{_ahead(found.mean, row)} {rival.label} (n = {found.num}{apart}{_interval(found, row.metric)})"
        yield Check(good(found), found.mean, text)


def _interval(found: Difference, metric: str) -> str:
    return f", {interval_text(found, metric).partition(' ')[2]}" if found.low is not None else ""


def _ahead(value: float, row: Row) -> str:
    return f"{_amount(abs(value), row)} {'better' if value >= 0 else 'worse'} than"


def _amount(value: float, row: Row) -> str:
    return f"{100 * value:.2f} points" if row.metric == "accuracy" else f"{value:.4f} {row.unit}".rstrip()


def _realised(field: Field) -> Iterator[Check]:
    for row in field.ours():
        if row.realised is not None:
            text = f"{realised_text(row)} at budget {row.budget or 1:g}"
            yield Check(row.realised.at_least(LEAST_REALISED), row.realised.value - LEAST_REALISED, text)


GOALS: tuple[tuple[str, str, Callable[[Field], Iterator[Check]]], ...] = (
    ("a", "within 0.3 points (image) or 0.01 nats (language) of dense at budget 0.5", _near_dense),
    (
        "b",
        "at most 0.65 of the training seconds of dense and of each post-training method at budget 0.5, 0.5 at 0.25",
        _seconds,
    ),
    (
        "c",
        "better than every post-training method and open-loop structured one at equal final FLOPs",
        _better_than_pruned,
    ),
    ("d", "better than `small` by more than the standard deviation", _better_than_small),
    ("e", "not below `small-long`", _not_below_long),
    ("f", "seconds saved / FLOPs saved at least 0.85", _realised),
)
"""The goals by letter."""
