"""Plan: what the law says of a run that is not begun yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from setpoint.advice.law import LANGUAGE, Law, average_size
from setpoint.controller.schedule import Schedule, spans
from setpoint.controller.selection import cheapest, landing_widths
from setpoint.cost.budget import Budget
from setpoint.cost.flops import flops_cost
from setpoint.cost.params import params_cost
from setpoint.cost.parse import is_time, parse_budget
from setpoint.errors import UsageError
from setpoint.groups.example import Example, in_shapes, inputs_of, num_samples, shapes_of, tensors_of
from setpoint.groups.group import widths_of
from setpoint.groups.trace import trace
from setpoint.loop.candidates import restricted
from setpoint.spending.checks import check_reachable

START = 2.0
"""Size to start from, as a multiple of the final size, where none is given: in the tests of language models no start
was clearly ahead, and in most of them this one was the least behind."""
STARTS = (2.0, 4.0, 8.0)
"""Sizes among which the law's best is named."""
TESTED = 10.0
"""Up to this ratio, by a law that was fitted to them, the direct tests found no gain."""
TESTED_SIZE = 64_000.0
"""Up to so many parameters, embeddings included; a larger pair was level in the mean of two seeds."""
UNPROVEN = (
    "Setpoint's tests found no gain at ratios of 1 to 64 for language models of 5 thousand parameters, at 1 to 16 for "
    "51 thousand, and at 8 for 200 thousand, in the mean of two seeds. These ratios are by the best sizes at equal "
    "FLOPs. By a fitted law they are 0.2 to 10"
)
OF_ANY_SIZE = "no size is given, and the tests are of small models: with size= the advice may be another"
LARGER_STARTS = "; in the tests larger starts lost more"
UNPROVEN_OF_OTHERS = f"{UNPROVEN}. A law that was measured for these models predicted gains"
OF_LANGUAGE = (
    "the constants are of language models: for a model that is given no tokens the gain is a guess. On images, at 4 "
    "and 16 times the passes of a task, pruned and small models were level"
)
OF_TOKENS = "the model's input is of whole numbers, so it is taken for a language model of subword tokens"


@dataclass(frozen=True)
class Advice:
    """Whether pruning while training pays by the laws, and how: `print(advice)` says it in a few lines.

    Args:
        verdict: what the laws say: `"prune"` where all predict a gain, `"train the small model"` where none does, else
            `"undecided"`. So it is for laws of one's own where 0 is in `interval`.
        advice: what to do: `"train the small model"` or `"unknown"`. Setpoint's tests count for more than the laws. By
            the published ones a predicted gain, or an open question, is `"train the small model"` up to a ratio of 10
            and the size that was tested, and `"unknown"` beyond, and where no size is given. By laws of one's own a
            predicted gain is `"unknown"`, since the tests found none where such a law predicted one.
        size: N_f, parameters of the finished model as the laws count them: the published ones count embeddings. None
            where only a ratio was given.
        ratio: r, data of the small model / its compute-optimal data, lowest and highest of the laws.
        start: size to start from, as a multiple of the final size.
        average: mean size of the run in final sizes, on the law's straight line between the cuts. Sizes come down at
            decisions only, which lie above this line, so `tokens` and `steps` are of a slightly larger mean.
        cuts: begin and end of the cuts, as shares of the steps.
        gain: of the reducible loss against the small dense model of equal final size and training FLOPs, lowest and
            highest of the laws; negative is a loss.
        interval: of the gain: the lowest and the highest end of the laws' 95 % intervals, where a law states the errors
            of its exponents; else as `gain`. It says how well the exponents are known. It does not say whether the law
            holds, nor how well the ratio is known, which is taken as given.
        bill: FLOPs of the whole run.
        tokens: tokens or samples that the bill pays for in a run that is cut by `schedule`.
        batch: tokens or samples of a step: as given, in whole rows of the example, or of the example; None where
            neither says.
        steps: optimizer steps of that run, where the batch is known. `attach` with the same bill and
            `controller=PricedController(schedule=advice.schedule)` plans as many for a budget of FLOPs, less
            Setpoint's own work. A budget of parameters fixes no FLOPs, so there the numbers may differ by much.
        notes: what weakens the advice.
        sources: of the constants.
        best_start: size from which the laws predict the largest gain, of 2, 4 and 8 final sizes, with FLOPs in
            proportion to size.
        best_gain: what all laws predict from there at least.
        gain_by_final_size: as `gain`, by the form of the laws in which a pruned run has its final size. It is closer
            to most of Setpoint's tests than the published form, and never above 0.
        small_tokens: tokens or samples that the bill pays for with the small model, from the start.
        small_steps: optimizer steps of that, where the batch is known.
        in_proportion: whether FLOPs were taken in proportion to size. A model has its own.
    """

    verdict: str
    advice: str
    size: float | None
    ratio: tuple[float, float]
    start: float
    average: float
    cuts: tuple[float, float]
    gain: tuple[float, float]
    interval: tuple[float, float]
    bill: float | None
    tokens: float | None
    batch: float | None
    steps: int | None
    notes: tuple[str, ...]
    sources: tuple[str, ...]
    best_start: float
    best_gain: float
    gain_by_final_size: tuple[float, float]
    small_tokens: float | None = None
    small_steps: int | None = None
    in_proportion: bool = True

    @property
    def pays(self) -> bool:
        """Whether all laws say that pruning gains. `advice` also counts the tests, in which it did not."""
        return self.verdict == "prune"

    @property
    def schedule(self) -> Schedule:
        """When the cuts are made, for a controller: in a straight line, as the law's gain is stated."""
        first, last = self.cuts
        land = max(last, Schedule.land)
        if first == last:
            return Schedule(0.0, last, land, num_cuts=1, shape="linear")
        return Schedule(first, last, land, shape="linear")

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {**asdict(self), "schedule": asdict(self.schedule)}

    def __str__(self) -> str:
        tests = next((note for note in self.notes if note.startswith(UNPROVEN)), "")
        law = "The published law" if tests == UNPROVEN else "The given law"
        does = "This is uncertain" if self.advice == "unknown" else "Train the small model"
        says = {"prune": "predicts a gain from pruning", "train the small model": "predicts a loss from pruning"}
        headline = f"{does}. {law} {says.get(self.verdict, 'says nothing certain, since its fits disagree')}."
        lines = [f"{headline} {tests}." if tests else headline]
        lines.append(f"  data / compute-optimal data: {_range(*self.ratio)}")
        lines.append(f"  a start at {self.start:.3g} times the final size, cut between {self.cuts[0]:.0%} and "
                     f"{self.cuts[1]:.0%} of the steps: {_compared(*self.gain)} reducible loss than a small dense "
                     f"model of the same training FLOPs, as predicted{self._within()}")  # fmt: skip
        best = self.best_gain > max(0.0, min(self.gain)) and not math.isclose(self.best_start, self.start, rel_tol=0.05)
        if best and self.in_proportion:
            lines.append(f"  by the law alone a start at {self.best_start:g} times gains most:"
                         f"{' at least' if len(self.sources) > 1 else ''} {100 * self.best_gain:.1f} % less reducible "
                         f"loss{LARGER_STARTS if self.best_start > self.start else ''}")  # fmt: skip
        lines.append(
            f"  by final size in place of average size, which fits most of Setpoint's tests better: "
            f"{_compared(*self.gain_by_final_size)}"
        )
        if self.bill is not None:
            lines.append(
                f"  {self.bill:.3g} FLOPs train the small model{self._paid(self.small_tokens, self.small_steps)}"
            )
        if self.bill is not None and self.advice != "train the small model":
            lines.append(f"  they train a pruned run{self._paid(self.tokens, self.steps)}")
            lines.append(
                f"  attach such a run with controller=setpoint.PricedController(schedule=setpoint.{self.schedule})"
            )
        lines += [f"  note: {note}" for note in self.notes if note != tests]
        return "\n".join([*lines, f"  constants: {'; '.join(self.sources)}"])

    def _within(self) -> str:
        """The interval of the gain, where it is wider than the spread of the laws."""
        known = any(not math.isclose(*ends) for ends in zip(self.gain, self.interval, strict=True))
        return f" (95 % interval: {_compared(*self.interval)})" if known else ""

    def _paid(self, tokens: float | None, steps: int | None) -> str:
        """On how many tokens, and in how many steps."""
        paid = f" on {tokens:.3g} tokens or samples" if tokens is not None else ""
        return f"{paid}, {steps:,} steps of {self.batch:,g}" if steps is not None else paid


def plan(
    model: nn.Module | None = None,
    budget: Any = None,
    *,
    example: Example | None = None,
    size: float | None = None,
    ratio: float | None = None,
    tokens: float | None = None,
    samples: float | None = None,
    flops: float | None = None,
    seconds: float | None = None,
    joules: float | None = None,
    batch: float | None = None,
    start: float | None = None,
    cuts: tuple[float, float] = (0.25, 0.75),
    laws: Sequence[Law] | Law = LANGUAGE,
) -> Advice:
    """Say whether pruning while training pays, from which start size, and how many steps the run's FLOPs pay for.

    The comparison is with a small dense model of the same final size that is trained from scratch with the same
    FLOPs. A pretrained model is not covered: others have paid for its training, so fine-tune and prune it.

    Args:
        model: to be pruned from; with `budget` it gives final size and start, with `example` tokens and batch. The bill
            counts its own FLOPs; those of a size alone are 6 a parameter and token.
        budget: the budget of a step, as `attach` takes it, of FLOPs or parameters.
        example: inputs of one step, as `attach` takes them.
        size: parameters of the finished model as the laws count them, where no model is given.
        ratio: data / compute-optimal data of the finished model, where it is known: then nothing else is needed.
        tokens: what the small model would be trained on.
        samples: the same of a model that is given no tokens; needs the `laws` of its family.
        flops: the bill of the whole run.
        seconds: the bill, in seconds of training on this machine; needs model and example. Dense steps are
            timed, of `batch` or of as many rows as it takes until more are no quicker. The seconds of smaller models
            are taken to shrink as their FLOPs do.
        joules: the bill, in joules as this machine meters them; like `seconds`.
        batch: tokens or samples of an optimizer step; by default those of the example.
        start: size to start from, as a multiple of the final size; by default 2, or the model's own.
        cuts: begin and end of the cuts, as shares of the steps; `schedule` of the advice is theirs.
        laws: constants of the family, published ones of language models by default; `setpoint.advice.law.fit_law`
            finds those of another family from measured runs.

    Raises:
        UsageError: without a size or without data or bill, for values that cannot be, and for a family without laws.

    >>> print(plan(ratio=8, size=5e4).verdict, "by the law; advice:", plan(ratio=8, size=5e4).advice)
    prune by the law; advice: train the small model
    """
    for name, value, least, most in (
        *(("size", size, 1.0, _MOST), ("ratio", ratio, 1e-9, 1e9), ("tokens", tokens, 1.0, _MOST)),
        *(("samples", samples, 1.0, _MOST), ("flops", flops, 1.0, _MOST), ("seconds", seconds, 0.0, _MOST)),
        *(("joules", joules, 0.0, _MOST), ("batch", batch, 1.0, _MOST)),
    ):
        if value is not None and not (_number(value) and 0 < value < math.inf):
            raise UsageError(f"{name} must be a finite number above 0, got {value!r}")
        if value is not None and not least <= value <= most:
            raise UsageError(f"{name} must be between {least:g} and {most:g}, got {value:g}")
    if batch is not None and float(batch) % 1:
        raise UsageError(f"batch must be a whole number of tokens or samples, got {batch!r}")
    size, ratio, tokens, samples, flops, seconds, joules, batch = (
        None if each is None else float(each) for each in (size, ratio, tokens, samples, flops, seconds, joules, batch)
    )
    if start is not None and not (_number(start) and 1 < start <= 1e6):
        raise UsageError(f"start must be above 1 (it counts final sizes) and at most 1e6, got {start!r}")
    if not (_pair(cuts) and 0 <= cuts[0] <= cuts[1] <= 1 and cuts[1] > 0):
        raise UsageError(f"cuts must be two shares of the steps in order, such as (0.25, 0.75), got {cuts!r}")
    cuts = float(cuts[0]), float(cuts[1])
    laws = tuple(laws) if isinstance(laws, Sequence) else (laws,)
    if not laws:
        raise UsageError("laws is empty: give the constants of a family, or leave it out")
    if not all(isinstance(law, Law) for law in laws):
        raise UsageError(f"laws are of setpoint.advice.law.Law, got {', '.join(type(law).__name__ for law in laws)}")
    if model is not None and not isinstance(model, nn.Module):
        raise UsageError(f"model must be a torch.nn.Module, got {type(model).__name__}: build it first")
    if model is None and budget is not None:
        raise UsageError("budget is for a model: give the model and its example, or size= without a budget")
    if ratio is not None and batch is not None:
        raise UsageError("batch needs a number of tokens or a bill: leave it out with ratio, or give one of those")
    if len({law.embeddings for law in laws}) > 1:
        raise UsageError("some of these laws count embeddings and others do not: give them in two calls")
    published = all(law in LANGUAGE for law in laws)
    given = [name for name, value in {"tokens": tokens, "samples": samples, "flops": flops, "seconds": seconds,
                                      "joules": joules, "ratio": ratio}.items() if value is not None]  # fmt: skip
    if len(given) != 1:
        raise UsageError(
            "give exactly one of tokens, samples (what a small model would be trained on), flops, seconds, joules (the "
            f"bill of the run) and ratio: got {', '.join(given) or 'none'}"
        )
    if published and ratio is None and (samples or (example is not None and not counts_tokens(example))):
        raise UsageError(
            "the published constants are of language models and count tokens; for samples of another kind no constants "
            "are known: measure runs of your own and give laws=[fit_law(...)] of setpoint.advice.law, or give the ratio"
        )
    known = None if model is None else _Known.of(model, budget, example, embeddings=laws[0].embeddings)
    asked = batch
    if known is not None:
        if size is not None or start is not None:
            raise UsageError("model and budget give size and start: leave these out")
        size, start, batch = known.size, known.start, known.in_rows(batch) if batch else known.tokens
    if size is None and ratio is None:
        raise UsageError("give the final size: a model with its budget and example, or size=, or the ratio itself")
    if (seconds or joules) and known is None:
        raise UsageError(
            f"{given[0]} of which model? Give a model with its budget, whose step is timed on this machine"
        )
    if known is not None and batch and (timed := seconds or joules):
        flops = timed * known.flops_per(given[0], batch)
    cost = known.final_flops / known.tokens if known is not None else 6 * size if size is not None else None
    data = tokens or samples or (flops / cost if flops and cost else None)
    ratios = [ratio if ratio is not None else _ratio(law, size, data) for law in laws]

    def gains_of(begun: float, cost: float | None = None) -> list[float]:
        return [law.gain(r, average_size(begun, cuts), cost=cost) for law, r in zip(laws, ratios, strict=True)]

    best = max(STARTS, key=lambda begun: min(gains_of(begun)))
    start = start or START
    mean_cost = None if known is None else average_size(known.flops / known.final_flops, cuts)
    average, gains = average_size(start, cuts), gains_of(start, mean_cost)
    low, high = min(gains), max(gains)
    finals = [law.gain(r, average, final=True, cost=mean_cost) for law, r in zip(laws, ratios, strict=True)]
    lows, highs = zip(*(law.interval(r, average, mean_cost) for law, r in zip(laws, ratios, strict=True)), strict=True)
    interval = min(lows), max(highs)
    sure = (low, high) if published else interval
    verdict = "prune" if sure[0] > 0 else "train the small model" if sure[1] <= 0 else "undecided"
    tested = published and max(ratios) <= TESTED and size is not None and size <= TESTED_SIZE
    advice = "train the small model" if tested or verdict == "train the small model" else "unknown"
    bill = cost * data if cost and data else None
    notes = _notes(size, ratios, laws, published=published, gains=high > 0)
    if published and size is None and advice == "unknown" and max(ratios) <= TESTED:
        notes.append(OF_ANY_SIZE)
    if published and example is not None:
        notes.append(OF_TOKENS if counts_tokens(example) else OF_LANGUAGE)
    if start > STARTS[-1]:
        notes.append(f"starts above {STARTS[-1]:g} times the final size were not measured, this is {start:.3g}")
    if asked and asked != batch:
        notes.append(f"a step of {asked:,.0f} has no whole rows of the example: steps are of {batch:,.0f}")
    found = Advice(
        verdict, advice, size, (min(ratios), max(ratios)), start, average, cuts, (low, high), interval,
        bill, None, batch, None,
        tuple(notes), tuple(law.source for law in laws), best, min(gains_of(best)),
        (min(finals), max(finals)), in_proportion=known is None,
    )  # fmt: skip
    if bill is None or cost is None or data is None:
        return found
    mean = _mean(found.schedule, known.flops / known.final_flops if known is not None else start)
    paid = data / mean
    steps = int(paid // batch) if batch else None
    if paid < 1 or (steps is not None and steps < 2):
        least = cost * mean * max(1.0, 2 * (batch or 0))
        if batch is None:
            raise UsageError(f"{bill:.3g} FLOPs pay for less than one token or sample: that is {least:.3g} FLOPs here")
        raise UsageError(
            f"{bill:.3g} FLOPs pay for {steps} steps of {batch:,g}, and a run has two steps at least: that is "
            f"{least:.3g} FLOPs here"
        )
    return replace(
        found, tokens=paid, steps=steps, small_tokens=data, small_steps=int(data // batch) if batch else None
    )


_MOST = 1e30


def _mean(schedule: Schedule, start: float) -> float:
    """The mean cost of a step in a run that follows a schedule from `start` down to 1.

    It comes down at decisions alone, so it is above the mean of the line.

    >>> round(_mean(Schedule(0.25, 0.75, 0.75, shape="linear"), 2.0), 3)
    1.531
    """
    stretches = spans(schedule, 0, _LONG)
    return sum(steps * schedule.at(at, _LONG, start=start, limit=1.0) for at, steps in stretches) / _LONG


_LONG = 100_000

_MORE, _QUICKER = 4, 1.1
"""Steps are timed with so many times more rows, while these make so many times more FLOPs in a second."""


def _number(value: Any) -> bool:
    try:
        return not isinstance(value, (bool, str)) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_number, value))


def _ratio(law: Law, size: float | None, data: float | None) -> float:
    assert size is not None and data is not None, "checked by plan"
    with suppress(OverflowError, ZeroDivisionError):
        if 0 < (optimal := law.optimal_data(size)) < math.inf:
            return data / optimal
    raise UsageError(
        f"by the law of {law.source!r} no number of tokens or samples is compute-optimal for {size:.3g} parameters, "
        f"since its exponents are {law.size_exponent:.3g} and {law.data_exponent:.3g}: give ratio=, or another law"
    )


def _notes(
    size: float | None, ratios: Sequence[float], laws: Sequence[Law], *, published: bool, gains: bool
) -> list[str]:
    notes = [UNPROVEN] if published else [UNPROVEN_OF_OTHERS] if gains else []
    if size is not None and not all(law.sizes[0] <= size <= law.sizes[1] for law in laws):
        sizes = max(law.sizes[0] for law in laws), min(law.sizes[1] for law in laws)
        notes.append(
            f"the law was fitted or shown on {sizes[0]:.2g} to {sizes[1]:.2g} parameters, this is {size:.2g}: the law "
            "is extrapolated"
        )
    beyond = [law for law, ratio in zip(laws, ratios, strict=True) if not law.ratios[0] <= ratio <= law.ratios[1]]
    if beyond:
        low, high = beyond[0].ratios
        here = _range(min(ratios), max(ratios))
        notes.append(f"the law was shown for ratios of {low:.3g} to {high:.3g}, this is {here}")
    if any(math.isinf(law.ratios[1]) for law in laws):
        notes.append("the law does not say on which ratios it was measured")
    return notes


def _range(low: float, high: float) -> str:
    return f"{low:.3g}" if math.isclose(low, high, rel_tol=5e-3) else f"{low:.3g} to {high:.3g}"


def _compared(low: float, high: float) -> str:
    """A gain between these two, in words.

    >>> _compared(0.041, 0.079), _compared(-0.011, -0.008), _compared(-0.01, 0.02)
    ('4.1 to 7.9 % less', '0.8 to 1.1 % more', 'between 1.0 % more and 2.0 % less')
    """
    if low < 0 < high:
        return f"between {-100 * low:.1f} % more and {100 * high:.1f} % less"
    near, far = (f"{100 * gain:.1f}" for gain in sorted((abs(low), abs(high))))
    return f"{near if near == far else f'{near} to {far}'} % {'more' if high <= 0 else 'less'}"


@dataclass(frozen=True, eq=False)
class _Known:
    """What model, budget and example say.

    Args:
        size: parameters at the widths that meet the budget, with those of embeddings, and of a head tied to them, or
            without.
        start: those of the dense model / size.
        flops: of a dense step.
        final_flops: of a step at the widths that meet the budget.
        tokens: of a step; samples, where its inputs are no tokens.
    """

    model: nn.Module
    example: Example
    size: float
    start: float
    flops: float
    final_flops: float
    tokens: int

    @property
    def rows(self) -> int:
        """Rows of the example."""
        return num_samples(self.example)

    @classmethod
    def of(cls, model: nn.Module, budget: Any, example: Example | None, *, embeddings: bool) -> _Known:
        """Trace a model.

        Args:
            embeddings: whether these count.

        Raises:
            UsageError: without budget or example, or for a budget of something else.
        """
        goal = budget_per_step(budget)
        if example is None:
            raise UsageError("give an example of the inputs of one step, as attach takes it")
        if not min((leaf.numel() for leaf in tensors_of(inputs_of(example))), default=0):
            raise UsageError("the example holds no numbers: give the inputs of one step, with one row at least")
        found = trace(model, example)
        groups = tuple(group for group in found.groups if group.lossless)
        flops, dense = flops_cost(restricted(found, groups)), widths_of(groups)
        cost = {"flops": flops, "params": params_cost(model, groups)}[goal.resource]
        size = params_cost(model if embeddings else _OutsideOfEmbeddings(model), groups)
        if not (size.total(dense) and flops.total(dense)):
            raise UsageError(
                "the model has no size that a law knows: it has no FLOPs, or no parameters outside of embeddings and "
                "of heads tied to them"
            )
        limit = goal.absolute(cost.total(dense))
        if not 0 < limit < cost.total(dense):
            raise UsageError(
                f"the budget is {limit / cost.total(dense):.3g} of the dense model, so nothing is pruned: ask for "
                "less, such as '50%'"
            )
        check_reachable(goal, cost.total(dense), cheapest(cost, groups))
        final = landing_widths(cost, dense, dense, groups, limit)
        start = size.total(dense) / size.total(final)
        return cls(model, example, size.total(final), start, flops.total(dense), flops.total(final), _count(example))

    def in_rows(self, batch: float) -> float:
        """The step of whole rows that is closest to one of so many tokens."""
        row, rest = divmod(self.tokens, self.rows)
        return batch if rest else max(1, round(batch / row)) * row

    def flops_per(self, unit: str, batch: float) -> float:
        """FLOPs of a second or a joule of dense training with AdamW, in steps of this batch, measured here.

        A step of the whole batch may not fit in memory, so rows are added only while that quickens the pace.

        Raises:
            UsageError: where nothing meters joules.
        """
        asked = max(1, round(batch * self.rows / self.tokens))
        rows = min(self.rows, asked)
        pace = self._pace(unit, rows)
        while rows < asked:
            rows, before = min(_MORE * rows, asked), pace
            try:
                pace = self._pace(unit, rows)
            except RuntimeError as error:
                if "memory" not in str(error):  # PyTorch has no type for a CPU's
                    raise
                break
            if pace < _QUICKER * before:
                return max(pace, before)
        return pace

    def _pace(self, unit: str, rows: int) -> float:
        from setpoint.resources.measure_step import measure_step

        shapes = [[rows, *shape[1:]] if shape[:1] == [self.rows] else shape for shape in shapes_of(self.example)]
        step = in_shapes(self.example, shapes)
        seconds, joules, why = measure_step(self.model, step)
        spent = seconds if unit == "seconds" else joules
        if spent is None:
            raise UsageError(f"joules cannot be metered on this machine ({why}): give the bill in seconds or FLOPs")
        return self.flops * _count(step) / self.tokens / spent


class _OutsideOfEmbeddings(nn.Module):
    """The parameters of a model that no embedding has, by their names in the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        embeddings = [each for each in model.modules() if isinstance(each, (nn.Embedding, nn.EmbeddingBag))]
        embedded = {id(parameter) for each in embeddings for parameter in each.parameters()}
        self._found = [each for each in model.named_parameters() if id(each[1]) not in embedded]

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters."""
        return iter(self._found)


def budget_per_step(budget: Any) -> Budget:
    """The budget that `plan` is given with a model, of FLOPs or parameters.

    Raises:
        UsageError: for any other.
    """
    if budget is None:
        raise UsageError("give the budget of a step, of flops or params, such as '25%' (--budget 25%)")
    single = budget[0] if isinstance(budget, (list, tuple)) and len(budget) == 1 else budget
    goal = None if is_time(single) else parse_budget(single)
    if not isinstance(goal, Budget) or goal.resource not in ("flops", "params") or goal.per != "step":
        raise UsageError(
            f"plan takes one budget of flops or params per step, such as '25%', and the bill of the run as flops=, "
            f"seconds= or joules=, in amounts; got {budget!r}"
        )
    return goal


def counts_tokens(example: Example) -> bool:
    """Whether a model is given tokens."""
    return _tokens(example) is not None


def _count(example: Example) -> int:
    """Tokens of a step, or its samples where it has none."""
    return _tokens(example) or num_samples(example)


def _tokens(example: Example) -> int | None:
    """Tokens of a step: entries of the first tensor of whole numbers."""
    for leaf in pytree.tree_leaves(inputs_of(example)):
        if (
            isinstance(leaf, Tensor)
            and not leaf.is_floating_point()
            and not leaf.is_complex()
            and leaf.dtype != torch.bool
        ):
            return leaf.numel()
    return None
