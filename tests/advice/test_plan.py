"""What the law predicts, and the advice that follows, against numbers worked out by other means."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import setpoint
from setpoint.advice.law import LANGUAGE, Law, average_size, fit_law, load_laws, save_laws
from setpoint.advice.plan import OF_ANY_SIZE, OF_LANGUAGE, OF_TOKENS, UNPROVEN, UNPROVEN_OF_OTHERS
from setpoint.controller.schedule import Schedule
from setpoint.errors import BudgetError, UsageError
from setpoint.resources.measure_step import measure_step

HOFFMANN = LANGUAGE[0]
OWN = replace(
    HOFFMANN, exponent_errors=None, embeddings=False, source="Hoffmann's constants, as if they were one's own"
)


@pytest.mark.parametrize("size", [1e5, 1e8])
def test_no_split_of_the_compute_beats_the_optimal_one(size: float) -> None:
    """Claim: at the same `N D`, a model of another size has a higher loss than one with its compute-optimal data."""
    for law in LANGUAGE:
        data = law.optimal_data(size)
        best = law.loss(size, data)
        assert all(law.loss(size * factor, data / factor) > best for factor in (0.5, 0.9, 1.1, 2.0))


@pytest.mark.parametrize(("ratio", "start", "percent"), [
    (1, 2, -0.8), (1, 4, -4.0), (1, 8, -11), (4, 2, 1.6), (4, 4, 1.5), (4, 8, -2), (16, 2, 4.0), (16, 4, 6.7),
    (16, 8, 7), (64, 2, 6.0), (64, 4, 11), (64, 8, 15),
])  # fmt: skip
def test_gains_as_published(ratio: float, start: float, percent: float) -> None:
    """Claim: with Hoffmann's constants the gains are those of the design's table, to its digits."""
    gain = 100 * HOFFMANN.gain(ratio, average_size(start, (0.25, 0.75)))
    assert gain == pytest.approx(percent, abs=0.06 if isinstance(percent, float) else 0.6)


@pytest.mark.parametrize("law", LANGUAGE)
def test_a_gain_is_a_difference_of_losses(law: Law) -> None:
    """Claim: the gain is what the losses of two runs of the same FLOPs say, whatever the size."""
    size, ratio, average = 2e8, 9.0, 2.5
    data = ratio * law.optimal_data(size)
    small, pruned = law.loss(size, data), law.loss(average * size, data / average)
    assert law.gain(ratio, average) == pytest.approx((small - pruned) / (small - law.irreducible))


def test_the_best_average_is_the_best() -> None:
    """Claim: no other mean size gains more; at a ratio of 1 or less nothing gains."""
    for law in LANGUAGE:
        for ratio in (2.0, 16.0, 64.0):
            best = law.best_average(ratio)
            assert all(law.gain(ratio, best) >= law.gain(ratio, best * factor) for factor in (0.7, 0.95, 1.05, 1.4))
        assert law.best_average(0.5) == 1 and all(law.gain(0.5, x) < 0 for x in (1.01, 2.0, 8.0))


def test_a_fit_predicts_runs_that_it_has_not_seen() -> None:
    """Claim: from noisy runs of a known law the fit predicts the loss of larger and longer ones within one percent."""
    truth, generator = Law(0.7, 30.0, 0.45, 60.0, 0.35, "made up"), torch.Generator().manual_seed(0)
    runs = [(n, d) for n in (1e4, 3e4, 1e5, 3e5) for d in (1e6, 4e6, 1.6e7, 6.4e7)]
    noise = (1 + 1e-3 * torch.randn(len(runs), generator=generator)).tolist()
    losses = [truth.loss(n, d) * e for (n, d), e in zip(runs, noise, strict=True)]
    found = fit_law([n for n, _ in runs], [d for _, d in runs], losses, "here")
    assert found.loss(1e6, 2.5e8) == pytest.approx(truth.loss(1e6, 2.5e8), rel=0.01)
    assert found.sizes == (1e4, 3e5) and found.source == "here"


def mean(start: float) -> float:
    """The mean cost of a run with eight equal cuts, evenly from 25 to 75 % of it: 7/16 are made there, in the mean."""
    return 0.25 * start + 0.5 * (start - 7 / 16 * (start - 1)) + 0.25


def test_advice_for_a_size_and_tokens() -> None:
    """Claim: the ratio is data over compute-optimal data, and the bill pays for as many tokens as it costs.

    A gain by a law of one's own is no advice to prune: the tests found none where such a law predicted one.
    """
    advice = setpoint.plan(size=1e8, tokens=20 * HOFFMANN.optimal_data(1e8), batch=1e6, laws=[OWN])
    assert advice.pays and advice.ratio == pytest.approx((20.0, 20.0))
    assert advice.notes == (UNPROVEN_OF_OTHERS,)
    assert advice.bill == pytest.approx(6 * 1e8 * 20 * HOFFMANN.optimal_data(1e8))
    assert advice.tokens is not None and advice.steps == int(advice.tokens // 1e6)
    assert 6 * 1e8 * mean(2) * advice.tokens == pytest.approx(advice.bill)
    same = setpoint.plan(size=1e8, flops=advice.bill, laws=[OWN])
    assert same.ratio == pytest.approx(advice.ratio)
    assert str(advice).startswith(
        "This is uncertain. The given law predicts a gain from pruning. Setpoint's tests found "
    )
    assert advice.advice == "unknown" and str(advice).count(UNPROVEN) == 1
    assert "less reducible loss than a small dense model" in str(advice)
    assert "steps" in str(advice) and "Hoffmann" in str(advice)
    assert f"  they train a pruned run on {advice.tokens:.3g} tokens or samples, {advice.steps:,} steps" in str(advice)
    assert advice.small_tokens == pytest.approx(20 * HOFFMANN.optimal_data(1e8))
    assert f"FLOPs train the small model on {advice.small_tokens:.3g} tokens or samples, " in str(advice)
    assert advice.to_dict()["verdict"] == "prune"


def test_small_models_are_left_alone_and_open_questions_stay_open() -> None:
    """Claim: where all laws lose, the advice is the small model; where they disagree, nothing is advised."""
    assert setpoint.plan(ratio=0.3).verdict == "train the small model"
    assert setpoint.plan(ratio=1.05, start=8).verdict == "train the small model"
    signs = Law(1, 1, 0.9, 1, 0.1, "one"), Law(1, 1, 0.1, 1, 0.9, "other")
    ratio = next(r for r in (1.5, 2, 3, 5, 8) if signs[0].gain(r, 1.5) * signs[1].gain(r, 1.5) < 0)
    open_question = setpoint.plan(ratio=ratio, start=2, laws=signs)
    assert open_question.verdict == "undecided" and open_question.advice == "unknown"
    published = setpoint.plan(ratio=1.5, size=5e4)
    assert published.verdict == "undecided" and published.advice == "train the small model"  # the tests know


def test_who_trains_the_small_model_is_told_how() -> None:
    """Claim: the advice to train it says on how much and in how many steps, and shows no schedule of cuts."""
    text = str(setpoint.plan(size=2e8, tokens=1e9, batch=1e5))
    assert text.startswith("Train the small model. ") and "PricedController" not in text
    assert "  1.2e+18 FLOPs train the small model on 1e+09 tokens or samples, 10,000 steps of 100,000\n" in text


def test_the_published_laws_are_of_language() -> None:
    """Claim: a model that is given no tokens gets a note, where only the ratio is known."""
    model, example = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)), (torch.zeros(4, 8),)
    assert OF_LANGUAGE in setpoint.plan(model, "50%", example=example, ratio=16).notes
    assert OF_LANGUAGE not in setpoint.plan(ratio=16).notes


def test_the_headline_says_what_was_measured() -> None:
    """Claim: what the project's tests found comes first, beside what the published law predicts; the start is small."""
    gain, loss = setpoint.plan(ratio=8, size=5e4), setpoint.plan(ratio=0.3)
    assert gain.start == 2 and setpoint.plan(ratio=16, start=8).start == 8
    assert "by the law alone a start at 8 times" in str(setpoint.plan(ratio=16))
    assert "by the law alone" not in str(setpoint.plan(ratio=16, start=8)) + str(loss)
    assert "larger starts lost more" in str(setpoint.plan(ratio=16))
    smaller = str(setpoint.plan(ratio=4, start=8))
    assert "by the law alone a start at 2 times gains most: at least 1.6 %" in smaller and "lost more" not in smaller
    (headline, *_), (other, *_) = (str(each).splitlines() for each in (gain, loss))
    assert headline.startswith("Train the small model. The published law predicts a gain from pruning. ")
    assert other.startswith("Train the small model. The published law predicts a loss from pruning. ")
    assert all(each.endswith("By a fitted law they are 0.2 to 10.") for each in (headline, other))
    assert "4.0 to 5.7 % less reducible loss" in str(setpoint.plan(ratio=16)) and "% more reducible loss" in str(loss)


def test_the_form_of_final_sizes_is_the_law_with_the_final_size() -> None:
    """Claim: its gain is that of the losses at the final size and the fewer tokens, and it is never above 0."""
    size, average, ratio = 1e8, 1.5, 4.0
    data = ratio * HOFFMANN.optimal_data(size)
    small, pruned = HOFFMANN.loss(size, data), HOFFMANN.loss(size, data / average)
    by_losses = (small - pruned) / (small - HOFFMANN.irreducible)
    assert HOFFMANN.gain(ratio, average, final=True) == pytest.approx(by_losses)
    found = setpoint.plan(size=size, tokens=data, laws=[HOFFMANN])
    assert found.gain_by_final_size == pytest.approx((by_losses, by_losses))
    assert f"fits most of Setpoint's tests better: {-100 * by_losses:.1f} % more\n" in str(found)
    assert all(setpoint.plan(ratio=r, start=s).gain_by_final_size[1] <= 0 for r in (0.1, 1, 64) for s in (1.01, 2, 8))


def test_the_interval_follows_from_the_errors_of_the_exponents() -> None:
    """Claim: it is what laws with moved exponents predict, half its width grows with the errors, and it may be none."""
    known = replace(OWN, exponent_errors=(0.01, 0.0))
    low, high = known.interval(16, 1.5)
    shifted = [replace(OWN, size_exponent=OWN.size_exponent + s * 0.0196).gain(16, 1.5) for s in (-1, 1)]
    assert (low, high) == pytest.approx(sorted(shifted), rel=2e-2)
    wide = replace(OWN, exponent_errors=(0.02, 0.0)).interval(16, 1.5)
    assert wide[1] - wide[0] == pytest.approx(2 * (high - low), rel=1e-3)
    assert OWN.interval(16, 1.5) == (OWN.gain(16, 1.5),) * 2
    found = setpoint.plan(ratio=16, laws=[known])
    assert found.interval == pytest.approx(known.interval(16, found.average)) and "(95 % interval: " in str(found)
    assert "interval" not in str(setpoint.plan(ratio=16, laws=[OWN]))
    published = setpoint.plan(ratio=16)
    assert published.interval[0] <= published.gain[0] <= published.gain[1] <= published.interval[1]
    with pytest.raises(UsageError, match="exponent_errors"):
        replace(OWN, exponent_errors=(-0.1, 0.1))


@pytest.mark.parametrize(
    ("ratio", "advice"),
    [(0.3, "train the small model"), (10, "train the small model"), (10.01, "unknown"), (1e6, "unknown")],
)
def test_nothing_is_advised_beyond_what_was_tested(ratio: float, advice: str) -> None:
    """Claim: the advice never becomes rosier where less is known, and the dictionary says the same as the text."""
    found = setpoint.plan(ratio=ratio, size=5e4)
    words = {"train the small model": "Train the small model. ", "unknown": "This is uncertain. "}[advice]
    assert found.advice == found.to_dict()["advice"] == advice and str(found).startswith(words)


def test_what_is_extrapolated_is_said() -> None:
    """Claim: a size that no fit has seen, and a ratio beyond those that the law is meant for, stand in the notes."""
    notes = setpoint.plan(size=5e4, tokens=1e9).notes
    assert any("extrapolated" in note for note in notes) and any("ratios of 1 to 20" in note for note in notes)
    assert any("starts above 8" in note for note in setpoint.plan(ratio=4, start=9).notes)
    plain = Law(1.0, 50.0, 0.5, 80.0, 0.4, "by hand")
    assert "the law does not say on which ratios it was measured" in setpoint.plan(ratio=4, laws=plain).notes
    given = setpoint.plan(build(), "25% flops", example=(torch.zeros(4, 8, dtype=torch.long),), ratio=4)
    assert given.size is not None and given.size < 7e7 and any("extrapolated" in note for note in given.notes)


def test_the_tests_say_nothing_of_larger_models() -> None:
    """Claim: where the laws predict a gain, the advice for models far larger than those of the tests is "unknown"."""
    for size, advice in ((5e4, "train the small model"), (7e9, "unknown")):
        found = setpoint.plan(size=size, ratio=8)
        assert found.verdict == "prune" and found.advice == advice
    assert setpoint.plan(size=7e9, ratio=0.5).advice == "train the small model"


def test_without_a_size_the_tests_say_nothing() -> None:
    """Claim: a ratio alone is of any model, so a predicted gain is "unknown" and a note asks for the size."""
    found = setpoint.plan(ratio=5)
    assert found.verdict == "prune" and found.advice == "unknown" and OF_ANY_SIZE in str(found)
    assert setpoint.plan(ratio=5, size=5e4).advice == "train the small model"
    assert OF_ANY_SIZE not in setpoint.plan(ratio=16).notes  # no size would change it
    loses = setpoint.plan(ratio=0.5)
    assert loses.advice == "train the small model" and OF_ANY_SIZE not in loses.notes


@pytest.mark.parametrize(
    ("law", "given", "said"),
    [
        (Law(1, 10, 0.5, 100, 0.001, "own"), {"size": 1e5, "samples": 1e7}, "compute-optimal for 1e\\+05 parameters"),
        (Law(1, 1e-300, 0.001, 1e300, 0.001, "own"), {"size": 1e5, "samples": 1e7}, "give ratio="),
        (Law(1, 10, 0.5, 100, 2000, "own"), {"ratio": 0.5}, "no number at r = 0.5"),
        (Law(1, 1, 5, 1, 154, "own"), {"ratio": 0.01}, "no number at r = 0.01"),
        (Law(1, 1, 1e300, 1, 5, "own"), {"ratio": 1e-5}, "no number at r = 1e-05"),
    ],
)
def test_a_law_without_an_answer_is_an_error_that_names_it(law: Law, given: dict[str, float], said: str) -> None:
    """Claim: exponents for which no data are optimal, or no gain is a number, are refused in words."""
    with pytest.raises(UsageError, match=said):
        setpoint.plan(**given, laws=law)  # type: ignore[arg-type]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))


def test_a_model_and_a_budget_give_size_start_and_batch() -> None:
    """Claim: final size is parameters outside of embeddings at the widths that meet the budget, the start follows.

    A quarter of the FLOPs leaves 16 of 64 neurons, each of 33 parameters; 48 more belong to none.
    """
    example = (torch.zeros(4, 8, dtype=torch.long),)
    advice = setpoint.plan(normed(50), "25% flops", example=example, tokens=1e6, laws=OWN)
    assert advice.size == 16 * 33 + 48 and advice.start == (64 * 33 + 48) / advice.size
    assert advice.bill == pytest.approx(1e6 * 6 * 2 * 16 * 16)  # its own FLOPs: two layers of 16 x 16
    assert advice.steps is not None and advice.steps == int(1e6 / mean(4) // 32)


def test_the_published_constants_count_embeddings() -> None:
    """Claim: by them size and start are of all parameters, also of a head that shares the embedding, once."""
    example = (torch.zeros(4, 8, dtype=torch.long),)
    found = setpoint.plan(Tied(), "80% flops", example=example, tokens=1e6)
    own = setpoint.plan(Tied(), "80% flops", example=example, tokens=1e6, laws=OWN)
    assert found.size is not None and own.size is not None and found.size == own.size + 50 * 16
    assert found.start * found.size == pytest.approx(sum(each.numel() for each in Tied().parameters()))
    assert OF_TOKENS in found.notes
    with pytest.raises(UsageError, match="some of these laws count embeddings"):
        setpoint.plan(ratio=4, laws=[OWN, HOFFMANN])


def normed(words: int) -> nn.Module:
    """Of which the neurons alone are cut."""
    return nn.Sequential(nn.Embedding(words, 16), nn.LayerNorm(16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))


class Tied(nn.Module):
    """A language model whose head has the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.up, self.down = nn.Embedding(50, 16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embedding(x))
        return self.head(x + self.down(self.up(x).relu()))


def test_a_model_and_its_size_get_the_same_advice() -> None:
    """Claim: `plan(model, budget)` says what `plan(size, start)` says of the sizes before and after, the head aside."""
    example = (torch.zeros(4, 8, dtype=torch.long),)
    advice = setpoint.plan(Tied(), "80% flops", example=example, tokens=1e6, laws=OWN)
    assert advice.size is not None and advice.size * advice.start == pytest.approx(64 * 33 + 48)
    assert 0 < advice.size < 64 * 33 and (advice.size - 48) % 33 == 0
    same = setpoint.plan(size=advice.size, start=advice.start, tokens=1e6, laws=OWN)
    assert (same.size, same.start, same.ratio) == (advice.size, advice.start, advice.ratio)
    # The head costs as much before as after, so the model's steps are cheaper in the mean than those of its size.
    assert advice.gain[0] > same.gain[0]
    cost = average_size(1 / 0.8, advice.cuts)
    assert advice.gain[0] == pytest.approx(OWN.gain(advice.ratio[0], advice.average, cost=cost), abs=0.01)


def test_a_convolution_has_as_many_parameters_as_it_has() -> None:
    """Claim: places share a filter's parameters, so that they count in the bill and not in the size."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3))
    law = Law(0.1, 5.0, 0.5, 5.0, 0.5, "measured here")
    advice = setpoint.plan(model, "50% flops", example=(torch.zeros(2, 3, 12, 12),), samples=1e6, laws=law)
    assert advice.size == 16 * (28 + 36) + 4 and advice.start == (32 * (28 + 36) + 4) / advice.size
    assert advice.bill is not None and advice.bill > 6 * advice.size * 1e6


@pytest.mark.parametrize(("budget", "cuts"), [("50%", (0.25, 0.75)), ("25%", (0.1, 0.6)), ("50%", (0.4, 0.4))])
def test_a_bill_pays_for_the_steps_that_were_planned(budget: str, cuts: tuple[float, float]) -> None:
    """Claim: with the schedule of the advice, `loop.total_steps` is what `plan` says, within 2 %."""
    model, example = normed(50), (torch.zeros(4, 8, dtype=torch.long),)
    optimizer = torch.optim.AdamW(model.parameters())
    advice = setpoint.plan(model, budget, example=example, flops=2e9, cuts=cuts)
    assert f"setpoint.PricedController(schedule=setpoint.{advice.schedule})" in str(advice)
    assert Schedule(**advice.to_dict()["schedule"]) == advice.schedule
    controller = setpoint.PricedController(schedule=advice.schedule)
    bill = {"flops": budget, "flops/run": 2e9}
    loop = setpoint.attach(model, optimizer, bill, example=example, total_steps=100, controller=controller)
    assert advice.steps == pytest.approx(loop.total_steps, rel=0.02)
    loop.detach()


def test_a_bill_in_seconds_is_timed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: seconds become FLOPs by the pace of the model's own steps, which are timed, and the model is untouched."""
    example = (torch.zeros(4, 8, dtype=torch.long),)
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = list[float]()

    def recorded(*args: Any) -> tuple[float, float | None, str]:
        readings = measure_step(*args)
        measured.append(readings[0])
        return readings

    monkeypatch.setattr("setpoint.resources.measure_step.measure_step", recorded)
    bills = [setpoint.plan(model, "25% flops", example=example, seconds=s).bill for s in (10.0, 1000.0)]
    assert bills[0] and bills[1] and all(seconds > 0 for seconds in measured)
    a_step = 3 * 2 * 32 * 2 * 16 * 64  # forward and backward of 32 tokens through two linear layers
    assert [bill * measured[i] for i, bill in enumerate(bills) if bill] == pytest.approx([10 * a_step, 1000 * a_step])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_seconds_are_timed_at_the_batch_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the rows of the example are repeated up to the batch, of which one step is as many FLOPs."""
    shapes = list[tuple[int, ...]]()

    def measured(_: nn.Module, example: Any) -> tuple[float, float | None, str]:
        shapes.append(tuple(example[0].shape))
        return 0.5, 2.0, "a meter"

    monkeypatch.setattr("setpoint.resources.measure_step.measure_step", measured)
    example = (torch.zeros(4, 8, dtype=torch.long),)
    for unit, rate in (("seconds", 0.5), ("joules", 2.0)):
        for batch, rows in ((None, 4), (256, 32), (8, 1)):
            advice = setpoint.plan(build(), "25% flops", example=example, batch=batch, **{unit: 10 * rate})
            assert shapes.pop() == (rows, 8) and advice.bill == pytest.approx(10 * rows * 8 * 6 * 2 * 16 * 64)


@pytest.mark.parametrize(("asked", "steps_of"), [(1, 8), (8, 8), (19, 16), (21, 24), (800, 800)])
def test_a_step_has_whole_rows(asked: int, steps_of: int) -> None:
    """Claim: a batch is rounded to rows of the example, at least one, and a note says so."""
    example = (torch.zeros(4, 8, dtype=torch.long),)
    advice = setpoint.plan(build(), "25% flops", example=example, batch=asked, tokens=1e6)
    assert advice.tokens is not None
    assert advice.batch == steps_of and advice.steps == int(advice.tokens // steps_of)
    said = f"a step of {asked} has no whole rows of the example: steps are of {steps_of}"
    assert any(said in note for note in advice.notes) == (asked != steps_of)


def test_a_batch_that_does_not_fit_in_memory_has_the_pace_of_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: memory that runs out ends the timing; any other error is raised."""
    complaint = "DefaultCPUAllocator: can't allocate memory"

    def measured(_: nn.Module, example: Any) -> tuple[float, float | None, str]:
        if len(example[0]) > 16:
            raise RuntimeError(complaint)
        return 0.5, None, "no meter"

    monkeypatch.setattr("setpoint.resources.measure_step.measure_step", measured)
    given: dict[str, Any] = {"example": (torch.zeros(4, 8).long(),), "batch": 8000, "seconds": 1e4}
    assert setpoint.plan(build(), "25% flops", **given).bill == pytest.approx(1e4 / 0.5 * 16 * 8 * 6 * 2 * 16 * 64)
    complaint = "shapes differ"
    with pytest.raises(RuntimeError, match="shapes differ"):
        setpoint.plan(build(), "25% flops", **given)


class OnlyWords(nn.Module):
    """A language model of an embedding and a head tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(x))


@pytest.mark.parametrize("budget", ["50% flops", "50% params"])
@pytest.mark.parametrize("model", [OnlyWords(), nn.Sequential(nn.Embedding(50, 32), nn.LayerNorm(32))])
def test_a_model_of_embeddings_alone_has_no_size(model: nn.Module, budget: str) -> None:
    """Claim: neither has a model without FLOPs, and both are refused."""
    with pytest.raises(UsageError, match="no size that a law knows"):
        setpoint.plan(model, budget, example=(torch.zeros(4, 8).long(),), tokens=1e6, laws=OWN)


def test_no_more_rows_are_timed_than_change_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a step of a very large batch is never made; rows are added only while they quicken the pace."""
    timed = list[int]()

    def measured(_: nn.Module, example: Any) -> tuple[float, float | None, str]:
        timed.append(len(example[0]))
        return 1e-3 + 1e-4 * timed[-1], None, "no meter"

    monkeypatch.setattr("setpoint.resources.measure_step.measure_step", measured)
    example = (torch.zeros(4, 8, dtype=torch.long),)
    advice = setpoint.plan(build(), "25% flops", example=example, batch=8e7, seconds=1e6)
    assert timed == [4, 16, 64, 256, 1024]
    assert advice.bill == pytest.approx(1e6 * 1024 * 8 * 6 * 2 * 16 * 64 / (1e-3 + 1e-4 * 1024))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"size": 1e6}, "exactly one of tokens, samples.*got none"),
        ({"size": 1e6, "tokens": 1e6, "flops": 1e9}, "exactly one.*got tokens, flops"),
        ({"tokens": 1e6}, "give the final size"),
        ({"size": 0, "tokens": 1e6}, "size must be a finite number above 0, got 0"),
        ({"size": 1e6, "tokens": math.nan}, "tokens must be a finite number above 0, got nan"),
        ({"ratio": 4, "start": 1}, "start must be above 1"),
        ({"ratio": 4, "cuts": (0.8, 0.2)}, "cuts must be two shares of the steps in order"),
        ({"ratio": 4, "laws": ()}, "laws is empty"),
        ({"size": 1e6, "samples": 1e5}, "count tokens; for samples of another kind no constants"),
        ({"model": nn.Linear(8, 2), "budget": 0.5, "example": (torch.ones(4, 8),), "tokens": 9}, "another kind"),
        ({"size": 1e6, "seconds": 60}, "seconds of which model"),
        ({"size": 1e300, "tokens": 1e9}, "size must be between 1 and 1e"),
        ({"size": 1e-9, "tokens": 5}, "size must be between 1 and 1e"),
        ({"size": 10**400, "tokens": 1}, "size must be a finite number above 0"),
        ({"size": True, "tokens": 1}, "size must be a finite number above 0, got True"),
        ({"size": 2e8, "flops": 1.0}, "1 FLOPs pay for less than one token or sample: that is 1.84e\\+09"),
        ({"size": 2e8, "tokens": 5e10, "batch": 1e12}, "pay for 0 steps of 1e\\+12, and a run has two steps"),
        ({"size": 2e8, "tokens": 5e10, "batch": 7.5}, "batch must be a whole number of tokens or samples, got 7.5"),
        ({"ratio": 4, "start": "2"}, "start must be above 1"),
        ({"ratio": 4, "start": 1e300}, "start must be above 1"),
        ({"ratio": 4, "cuts": None}, "cuts must be two shares"),
        ({"ratio": 4, "cuts": ("a", "b")}, "cuts must be two shares"),
        ({"ratio": 4, "cuts": (0, 0)}, "cuts must be two shares"),
        ({"ratio": 4, "laws": None}, "laws are of setpoint.advice.law.Law, got NoneType"),
        ({"ratio": 4, "laws": [1.0]}, "laws are of setpoint.advice.law.Law, got float"),
        ({"ratio": 4, "batch": 10}, "batch needs a number of tokens or a bill"),
        ({"budget": 0.5, "size": 1e6, "tokens": 1e6}, "budget is for a model"),
        ({"model": "gpt2", "budget": 0.5, "tokens": 1e6}, "model must be a torch.nn.Module, got str"),
        ({"size": 1e8, "samples": 1e9, "laws": list(LANGUAGE)}, "count tokens"),
        ({"model": nn.Linear(2, 2), "tokens": 10}, "give the budget of a step, of flops or params"),
        ({"model": nn.Linear(2, 2), "budget": "8 ms latency", "tokens": 10}, "plan takes one budget of flops"),
        ({"model": nn.Linear(2, 2), "budget": 0.5, "tokens": 10}, "give an example"),
        ({"model": build(), "budget": 1.0, "example": (torch.zeros(1, 8).long(),), "tokens": 10}, "nothing is"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned(given: dict[str, Any], words: str) -> None:
    """Claim: a sentence says what is missing or wrong."""
    with pytest.raises(UsageError, match=words):
        setpoint.plan(**given)


def test_a_budget_that_no_cut_meets_is_refused() -> None:
    """Claim: as by attach, with the least that can be asked for."""
    with pytest.raises(BudgetError, match="cannot be reached.*Ask for at least"):
        setpoint.plan(build(), "0.0001% flops", example=(torch.zeros(4, 8).long(),), flops=1e12)


def test_a_budget_of_parameters_is_one_of_widths() -> None:
    """Claim: embeddings are parameters of the budget and none of the size; the bill is of FLOPs at the widths left.

    A neuron has 33 parameters, all else 8,048, of which 8,000 are embeddings. Of 64 neurons 90 % of the parameters
    leave 33, in blocks 32: half of the FLOPs.
    """
    model = normed(500)
    example = (torch.zeros(4, 8, dtype=torch.long),)
    assert sum(each.numel() for each in model.parameters()) == 8048 + 64 * 33
    advice = setpoint.plan(model, "90% params", example=example, tokens=1e6, laws=OWN)
    assert advice.size == 48 + 32 * 33 and advice.start == (48 + 64 * 33) / advice.size
    assert advice.bill == pytest.approx(1e6 * 6 * 16 * 64)


def test_one_law_and_numbers_of_numpy_will_do() -> None:
    """Claim: a law alone is a list of one, and a NumPy number is a number."""
    assert setpoint.plan(ratio=16, laws=HOFFMANN).gain == setpoint.plan(ratio=16, laws=[HOFFMANN]).gain
    assert setpoint.plan(size=np.float32(1e8), tokens=1e9).ratio == setpoint.plan(size=1e8, tokens=1e9).ratio


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_cuts_are_plain_numbers(kind: Any) -> None:
    """Claim: whatever numbers they are given as, the advice has floats, which JSON can hold."""
    advice = setpoint.plan(ratio=4, cuts=(kind(0.25), kind(0.75)))
    assert advice == setpoint.plan(ratio=4, cuts=(0.25, 0.75))
    assert json.loads(json.dumps(advice.to_dict()))["cuts"] == [0.25, 0.75] and advice.schedule.settle == 0.75


@pytest.mark.parametrize("wrong", [{"size_scale": 0.0}, {"data_exponent": -1.0}])
def test_a_law_that_cannot_be(wrong: dict[str, float]) -> None:
    """Claim: scales and exponents are above 0."""
    constants = {"irreducible": 1.0, "size_scale": 1.0, "size_exponent": 0.3, "data_scale": 1.0, "data_exponent": 0.3}
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} of a law must be a number above 0"):
        Law(**{**constants, **wrong}, source="wrong")


def test_a_fit_needs_runs() -> None:
    """Claim: too few runs, or runs without a positive loss, are refused."""
    with pytest.raises(UsageError, match="at least six runs"):
        fit_law([1e4] * 3, [1e6] * 3, [2.0] * 3, "here")
    with pytest.raises(UsageError, match="finite and above 0"):
        fit_law([1e4] * 6, [1e6] * 6, [2.0] * 5 + [math.nan], "here")


def test_samples_with_a_law_of_ones_own() -> None:
    """Claim: with measured constants, a model of images is planned in samples."""
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    law = Law(0.1, 5.0, 0.5, 5.0, 0.5, "measured here")
    advice = setpoint.plan(model, 0.25, example=(torch.zeros(4, 8),), samples=1e6, laws=[law])
    assert advice.pays and advice.steps == int(1e6 / mean(4) // 4)


def test_the_committed_predictions_are_those_of_the_law() -> None:
    """Claim: results/law.json, written before any run, holds what the law says."""
    file = Path(__file__).parents[2] / "results" / "law.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["predicted"]
    assert len(rows) == 12
    for row in rows:
        x = average_size(row["start"], (0.25, 0.75))
        assert row["gain"] == pytest.approx([law.gain(row["ratio"], x) for law in LANGUAGE])


def test_constants_that_are_none_and_runs_that_show_nothing_are_refused() -> None:
    """Claim: pairs, numbers and runs that cannot be are refused by name, and a fitted law knows its ratios."""
    for name, value in (("exponent_errors", (0.1,)), ("exponent_errors", 0.1), ("sizes", (5, 1)), ("ratios", ("a", 1))):
        with pytest.raises(UsageError, match=f"{name} of a law are two numbers"):
            replace(OWN, **{name: value})
    with pytest.raises(UsageError, match="irreducible of a law must be a finite number"):
        replace(OWN, irreducible=math.nan)
    with pytest.raises(UsageError, match="size_scale of a law must be a number"):
        replace(OWN, size_scale="400")
    with pytest.raises(UsageError, match="at least three sizes"):
        fit_law([1e4, 1e5] * 3, [1e5, 1e6, 1e7] * 2, [3.0, 2.5] * 3, "two sizes")
    with pytest.raises(UsageError, match="must be numbers"):
        fit_law(["a"] * 6, [1e5] * 6, [3.0] * 6, "words")  # type: ignore[list-item]
    sizes, data = [1e3, 1e4, 1e5] * 3, [1e4] * 3 + [1e5] * 3 + [1e6] * 3
    with pytest.raises(UsageError, match="losses must fall"):
        fit_law(sizes, data, [0.5 * n**0.15 + 0.5 * d**0.1 for n, d in zip(sizes, data, strict=True)], "rising")
    truth = Law(1.0, 50.0, 0.5, 80.0, 0.4, "made up")
    found = fit_law(sizes, data, [truth.loss(n, d) for n, d in zip(sizes, data, strict=True)], "made up")
    beyond = 3 * found.ratios[1]
    assert found.ratios[0] < found.ratios[1]
    assert any("the law was shown for ratios" in note for note in setpoint.plan(ratio=beyond, laws=found).notes)
    assert not any("was shown for" in note for note in setpoint.plan(ratio=found.ratios[1] / 2, laws=found).notes)


def test_a_fit_knows_its_errors_and_no_order_of_runs() -> None:
    """Claim: the truth lies within four standard errors, noise widens these, and a law of noise alone is refused."""
    truth, generator = Law(0.7, 30.0, 0.45, 60.0, 0.35, "made up"), torch.Generator().manual_seed(0)
    runs = [(n, d) for n in (1e4, 3e4, 1e5, 3e5) for d in (1e6, 4e6, 1.6e7, 6.4e7)]
    drawn = torch.randn(len(runs), generator=generator).tolist()
    widths = []
    for noise in (1e-4, 1e-3):
        rows = [(n, d, truth.loss(n, d) * (1 + noise * e)) for (n, d), e in zip(runs, drawn, strict=True)]
        found = fit_law(*zip(*rows, strict=True), "here")
        assert found == fit_law(*zip(*rows[::-1], strict=True), "here")
        assert found.exponent_errors is not None
        of_size, of_data = found.exponent_errors
        assert abs(found.size_exponent - 0.45) < 4 * of_size and abs(found.data_exponent - 0.35) < 4 * of_data
        widths.append(of_size)
    assert widths[1] > 3 * widths[0]
    sizes, data = zip(*runs, strict=True)
    with pytest.raises(UsageError, match="no law of this form fits"):
        fit_law(sizes, data, [2 + e / 5 for e in drawn], "noise")


def test_laws_are_read_from_a_file(tmp_path: Path) -> None:
    """Claim: what was saved is read back; anything else is refused with what is needed."""
    file = tmp_path / "laws.json"
    save_laws([OWN], file)
    assert load_laws(file) == (OWN,)
    for text in ("[1]", "{}", "nothing", '[{"irreducible": 1, "size_scale": -1}]'):
        file.write_text(text)
        with pytest.raises(UsageError, match="holds no laws.*irreducible, size_scale"):
            load_laws(file)


def test_published_laws_are_known_in_any_order() -> None:
    """Claim: the advice depends on which laws are given, and not on their order or number."""
    for laws in (LANGUAGE, LANGUAGE[::-1], LANGUAGE[1]):
        found = setpoint.plan(ratio=8, laws=laws)
        assert found.advice == "unknown" and found.notes == (UNPROVEN, OF_ANY_SIZE)
