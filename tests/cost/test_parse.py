"""Tests of budgets as people write them: one grammar for Python and the command line."""

from __future__ import annotations

import re

import pytest

from setpoint.cost.budget import Budget, parse_budget
from setpoint.errors import BudgetError


@pytest.mark.parametrize("text", ["0.5", "50%", " 50 % ", "5e-1", "50% flops", "0.5 flops", "0.5 of flops"])
def test_a_number_alone_in_a_text_is_a_fraction_of_the_flops(text: str) -> None:
    """Claim: texts say what numbers say."""
    assert parse_budget(text) == parse_budget(0.5) == parse_budget({"flops": "0.5"})


@pytest.mark.parametrize("text", ["2", "50", "0", "0%", "150%", "1.2.3", "nan", "", "-0.5"])
def test_a_text_that_is_no_fraction_is_refused(text: str) -> None:
    """Claim: a number above 1 alone is no amount, and is refused as a number is."""
    with pytest.raises(BudgetError):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "resource", "limit", "per"),
    [
        ("3 GFLOP", "flops", 3e9, "step"),
        ("3 gflops per run", "flops", 3e9, "run"),
        ("4 GiB", "memory", 4 * 2**30, "step"),
        ("5 mJ", "energy", 0.005, "step"),
        ("5 MJ per run", "energy", 5e6, "run"),
    ],
)
def test_a_unit_that_says_the_resource_is_enough(text: str, resource: str, limit: float, per: str) -> None:
    """Claim: FLOPs, bytes and joules need no word for the resource; milli and mega are told apart."""
    found = parse_budget(text)
    assert (found.resource, found.limit, found.per, found.relative) == (resource, limit, per, False)


def test_a_period_may_be_named_in_words() -> None:
    """Claim: "per step" is what a budget is without it, and a mapping takes "per run" as it takes "/run"."""
    for same, as_ in (
        ("4 MFLOPs per step", "4 MFLOPs"),
        ("50% flops PER STEP", 0.5),
        ("8 ms latency per step", "8 ms latency"),
        ("50% per run", "50% flops per run"),
        ({"flops": 0.5, "flops per run": "60%"}, {"flops": 0.5, "flops/run": "60%"}),
        ({"flops per step": 0.5}, 0.5),
        ({" flops per run ": 0.5}, {"flops/Run": 0.5}),
    ):
        assert parse_budget(same) == parse_budget(as_)
    with pytest.raises(BudgetError, match="of the whole run, as flops/run"):
        parse_budget({"flops": "4 MFLOPs per run"})


@pytest.mark.parametrize("budget", ["150%", "1.5", "150% params", {"params": "150%"}, "120% flops per run"])
def test_a_share_above_the_dense_model_is_refused_as_it_was_written(budget: object) -> None:
    """Claim: the error quotes the text, and shows a text to write instead: no call in Python."""
    with pytest.raises(BudgetError, match=r"^the budget '1[.25].*' is more than the dense .* '50%'") as raised:
        parse_budget(budget)
    assert "Budget" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "forms"),
    [
        ("50% flops, 40% params", ["50% flops", "40% params"]),
        ("50% flops and 8 ms latency", ["50% flops", "8 ms latency"]),
    ],
)
def test_several_budgets_in_one_text_are_taken_apart(text: str, forms: list[str]) -> None:
    """Claim: the error shows each of them, and every form that it shows is a budget."""
    with pytest.raises(BudgetError) as caught:
        parse_budget(text)
    shown = re.findall(r"'([^']*)'", str(caught.value))
    assert shown == [text, *forms] and all(isinstance(parse_budget(form), Budget) for form in forms)


@pytest.mark.parametrize(("word", "names"), [("time", "latency or inference"), ("vram", "memory"), ("size", "params")])
def test_a_word_of_users_is_answered_by_the_resource_it_means(word: str, names: str) -> None:
    """Claim: a mapping with a word that is no resource gets the resources that the word may mean."""
    with pytest.raises(BudgetError, match=f"unknown resource '{word}': did you mean {names}"):
        parse_budget({word: "50%"})
