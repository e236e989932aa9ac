"""What the law predicts, and the advice that follows, against numbers worked out by other means."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import setpoint
from setpoint.advice.law import LANGUAGE, Law, average_size, fit_law
from setpoint.errors import BudgetError, UsageError
from setpoint.resources.measure_step import measure_step

HOFFMANN = LANGUAGE[0]


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


def test_advice_for_a_size_and_tokens() -> None:
    """Claim: the ratio is data over compute-optimal data, and the bill pays for as many tokens as it costs."""
    advice = setpoint.plan(size=1e8, tokens=20 * HOFFMANN.optimal_data(1e8), batch=1e6, laws=[HOFFMANN])
    assert advice.pays and advice.ratio == pytest.approx((20.0, 20.0)) and not advice.notes
    assert advice.bill == pytest.approx(6 * 1e8 * 20 * HOFFMANN.optimal_data(1e8))
    assert advice.tokens is not None and advice.steps == int(advice.tokens // 1e6)
    assert 6 * 1e8 * advice.average * advice.tokens == pytest.approx(advice.bill)
    same = setpoint.plan(size=1e8, flops=advice.bill, laws=[HOFFMANN])
    assert same.ratio == pytest.approx(advice.ratio)
    assert str(advice).startswith("Prune. The given law predicts a gain from pruning.\n") and advice.advice == "prune"
    assert "less reducible loss than a small dense model" in str(advice)
    assert "steps" in str(advice) and "Hoffmann" in str(advice)
    assert f"  a pruned run of {advice.bill:.3g} FLOPs trains on {advice.tokens:.3g} tokens or samples, " in str(advice)
    assert advice.to_dict()["verdict"] == "prune"


def test_small_models_are_left_alone_and_open_questions_stay_open() -> None:
    """Claim: where all laws lose, the advice is the small model; where they disagree, nothing is advised."""
    assert setpoint.plan(ratio=0.3).verdict == "train the small model"
    assert setpoint.plan(ratio=1.05, start=8).verdict == "train the small model"
    signs = Law(1, 1, 0.9, 1, 0.1, "one"), Law(1, 1, 0.1, 1, 0.9, "other")
    ratio = next(r for r in (1.5, 2, 3, 5, 8) if signs[0].gain(r, 1.5) * signs[1].gain(r, 1.5) < 0)
    open_question = setpoint.plan(ratio=ratio, start=2, laws=signs)
    assert open_question.verdict == "undecided" and open_question.advice == "unknown"


def test_the_headline_says_what_was_measured() -> None:
    """Claim: what the project's tests found comes first, beside what the published law predicts; the start is small."""
    gain, loss = setpoint.plan(ratio=16), setpoint.plan(ratio=0.3)
    assert gain.start == 2 and setpoint.plan(ratio=16, start=8).start == 8
    assert "by the law alone a start at 8 times" in str(setpoint.plan(ratio=16))
    assert "by the law alone" not in str(setpoint.plan(ratio=16, start=8)) + str(loss)
    assert "by the law alone a start at 2 times gains most: at least 1.6 %" in str(setpoint.plan(ratio=4, start=8))
    (headline, *_), (other, *_) = (str(each).splitlines() for each in (gain, loss))
    assert headline.startswith("Train the small model. The published law predicts a gain from pruning. ")
    assert other.startswith("Train the small model. The published law predicts a loss from pruning. ")
    assert headline.endswith("found no gain at ratios of 1, 4, 16 and 64.") and other.endswith("1, 4, 16 and 64.")
    assert "4.0 to 5.7 % less reducible loss" in str(gain) and "% more reducible loss" in str(loss)


@pytest.mark.parametrize(
    ("ratio", "advice"),
    [(0.3, "train the small model"), (64, "train the small model"), (64.01, "unknown"), (1e6, "unknown")],
)
def test_nothing_is_advised_beyond_what_was_tested(ratio: float, advice: str) -> None:
    """Claim: the advice never becomes rosier where less is known, and the dictionary says the same as the text."""
    found = setpoint.plan(ratio=ratio)
    words = {"train the small model": "Train the small model. ", "unknown": "Nothing is known. "}[advice]
    assert found.advice == found.to_dict()["advice"] == advice and str(found).startswith(words)


def test_what_is_extrapolated_is_said() -> None:
    """Claim: a size that no fit has seen, and a ratio beyond those that the law is meant for, stand in the notes."""
    notes = setpoint.plan(size=5e4, tokens=1e9).notes
    assert any("extrapolated" in note for note in notes) and any("ratios of 1 to 64" in note for note in notes)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))


def test_a_model_and_a_budget_give_size_start_and_batch() -> None:
    """Claim: final size is the budget's share of the model's FLOPs a token, the start its inverse."""
    example = (torch.zeros(4, 8, dtype=torch.long),)
    advice = setpoint.plan(build(), "25% flops", example=example, tokens=1e6)
    assert advice.start == 4.0 and advice.size == pytest.approx(0.25 * 2 * 16 * 64, rel=0.2)
    assert advice.steps is not None and advice.tokens is not None and advice.steps == int(advice.tokens // 32)


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
        ({"size": 2e8, "flops": 1.0}, "1 FLOPs pay for less than one token or sample, and a run has two steps"),
        ({"size": 2e8, "tokens": 5e10, "batch": 1e12}, "pay for 0 steps of 1e\\+12, and a run has two steps"),
        ({"ratio": 4, "start": "2"}, "start must be above 1"),
        ({"ratio": 4, "start": 1e300}, "start must be above 1"),
        ({"ratio": 4, "cuts": None}, "cuts must be two shares"),
        ({"ratio": 4, "cuts": ("a", "b")}, "cuts must be two shares"),
        ({"ratio": 4, "cuts": (0, 0)}, "cuts must be two shares"),
        ({"ratio": 4, "laws": [1.0]}, "laws are of setpoint.advice.law.Law, got float"),
        ({"ratio": 4, "batch": 10}, "batch needs a number of tokens or a bill"),
        ({"budget": 0.5, "size": 1e6, "tokens": 1e6}, "budget is for a model"),
        ({"model": "gpt2", "budget": 0.5, "tokens": 1e6}, "model must be a torch.nn.Module, got str"),
        ({"size": 1e8, "samples": 1e9, "laws": list(LANGUAGE)}, "count tokens"),
        ({"model": nn.Linear(2, 2), "tokens": 10}, "plan takes one budget of flops"),
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
    """Claim: embeddings are parameters and cost no FLOPs, so the start follows from the FLOPs at the widths left.

    A neuron has 33 parameters, all else 8,048. Of 64 neurons 90 % of the parameters leave 33, in blocks 32: half of the
    FLOPs.
    """
    model = nn.Sequential(nn.Embedding(500, 16), nn.LayerNorm(16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    example = (torch.zeros(4, 8, dtype=torch.long),)
    assert sum(each.numel() for each in model.parameters()) == 8048 + 64 * 33
    advice = setpoint.plan(model, "90% params", example=example, tokens=1e6)
    assert advice.start == pytest.approx(2.0) and advice.size == pytest.approx(16 * 64)


def test_one_law_and_numbers_of_numpy_will_do() -> None:
    """Claim: a law alone is a list of one, and a NumPy number is a number."""
    assert setpoint.plan(ratio=16, laws=HOFFMANN).gain == setpoint.plan(ratio=16, laws=[HOFFMANN]).gain
    assert setpoint.plan(size=np.float32(1e8), tokens=1e9).ratio == setpoint.plan(size=1e8, tokens=1e9).ratio


@pytest.mark.parametrize("wrong", [{"size_scale": 0.0}, {"data_exponent": -1.0}])
def test_a_law_that_cannot_be(wrong: dict[str, float]) -> None:
    """Claim: scales and exponents are above 0."""
    constants = {"irreducible": 1.0, "size_scale": 1.0, "size_exponent": 0.3, "data_scale": 1.0, "data_exponent": 0.3}
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} of a law must be above 0"):
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
    assert advice.pays and advice.steps == int(1e6 / advice.average // 4)


def test_the_committed_predictions_are_those_of_the_law() -> None:
    """Claim: results/law.json, written before any run, holds what the law says."""
    file = Path(__file__).parents[2] / "results" / "law.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["predicted"]
    assert len(rows) == 12
    for row in rows:
        x = average_size(row["start"], (0.25, 0.75))
        assert row["gain"] == pytest.approx([law.gain(row["ratio"], x) for law in LANGUAGE])
