"""Coverage: a slice of every family passes, and a wrong cut is caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from setpoint.groups.group import Group
from setpoint.groups.trace import Trace, trace
from setpoint_bench import coverage
from setpoint_bench.coverage import Verdict, check
from setpoint_bench.sweep import chosen_models, suite_named, summary
from setpoint_bench.task import BenchError
from setpoint_bench.zoo import timm_model

SLICES = {
    "torchvision": ("resnet18", "squeezenet1_1"),
    "timm": ("test_resnet", "test_vit", "test_convnext", "test_efficientnet"),
    "transformers": ("bert", "gpt2", "llama", "t5"),
    "plain": tuple(suite_named("plain")),
}


LONG = (
    "resnet18",
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "bert",
    "t5",
    "lstm_2_layers_both_directions",
    "gru_2_layers_both_directions",
)


@pytest.mark.parametrize(
    ("suite", "model"),
    [
        pytest.param(suite, model, marks=[pytest.mark.slow] * (model in LONG))
        for suite, models in SLICES.items()
        for model in models
    ],
)
def test_models_of_every_family_pass(suite: str, model: str) -> None:
    """Half of the units of all groups can go, and the rest trains on like its masked twin to 1e-10."""
    if suite != "plain":
        pytest.importorskip(suite)
    build = partial(timm_model, model) if suite == "timm" else suite_named(suite)[model]
    verdict = check(model, build)
    assert verdict.passed, verdict.reason
    assert verdict.error <= coverage.TOLERANCE
    assert verdict.num_groups >= 1
    assert verdict.num_units > verdict.num_groups
    assert 0 < verdict.prunable_params_share <= 1
    assert verdict.seconds > 0


def build() -> tuple[nn.Module, Any]:
    """A small network, with its example."""
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)), (torch.randn(4, 5),)


def with_slice(monkeypatch: pytest.MonkeyPatch, change: Callable[[Group], Group]) -> Verdict:
    """The verdict on the small network, its groups changed."""

    def changed(model: nn.Module, example: Any) -> Trace:
        found = trace(model, example)
        return dataclasses.replace(found, groups=tuple(change(group) for group in found.groups))

    assert check("right", build).passed
    monkeypatch.setattr(coverage, "trace", changed)
    return check("wrong", build)


def test_a_slice_that_is_off_by_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that reads its neighbour's column is caught by the numbers."""

    def shifted(group: Group) -> Group:
        places = [
            dataclasses.replace(place, index=np.roll(place.index, 1)) if place.role == "consume" else place
            for place in group.slices
        ]
        return dataclasses.replace(group, slices=tuple(places))

    verdict = with_slice(monkeypatch, shifted)
    assert not verdict.passed
    assert "differs from its masked twin" in verdict.reason
    assert verdict.error > 1e-3


def test_a_lossy_group_that_is_called_lossless_fails() -> None:
    """Where zero is not absent, here in a LayerNorm over the units, the numbers tell."""

    def normalised() -> tuple[nn.Module, Any]:
        return nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.Linear(12, 3)), (torch.randn(4, 5),)

    verdict = check("normalised", normalised)
    assert not verdict.passed
    assert "no lossless group" in verdict.reason
    model, example = normalised()
    groups = tuple(dataclasses.replace(group, lossless=True) for group in trace(model, example).groups)
    assert coverage._twin_error(model, example, groups, coverage.halves(groups)) > 1e-3


def test_a_cut_that_forgets_the_optimizer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that the optimizer no longer holds are noticed."""

    def forgetful(model: nn.Module, optimizer: torch.optim.Optimizer, groups: Any, keep: Any) -> None:
        real(model, optimizer, groups, keep)
        optimizer.param_groups[0]["params"].pop()

    real = coverage.shrink
    monkeypatch.setattr(coverage, "shrink", forgetful)
    assert "the optimizer does not hold" in check("forgetful", build).reason


GOOD = Verdict("a", True, "", 1.0, 2, 20, 100, 0.5, 0.75, 1e-16)
BETTER = Verdict("b", True, "", 3.0, 2, 20, 100, 1.0, 1.0, 1e-16)
BAD = Verdict("c", False, "it [broke]")


def test_the_summary_has_the_promised_form() -> None:
    """Counts over all models, medians over those that passed, failures by name with their reason."""
    found = summary("plain", [GOOD, BETTER, BAD])
    assert list(found)[:6] == [
        *("suite", "passed", "total", "prunable_params_share_median", "seconds_median", "failures"),
    ]
    assert found == {
        "suite": "plain",
        "passed": 2,
        "total": 3,
        "prunable_params_share_median": 0.75,
        "seconds_median": 2.0,
        "failures": [{"model": "c", "reason": "it [broke]"}],
        "prunable_outside_embeddings_median": 0.875,
    }
    assert summary("plain", [BAD])["seconds_median"] is None


@pytest.mark.parametrize(
    ("suite", "models", "message"),
    [
        ("tensorflow", None, "choose one of torchvision, timm, transformers, plain"),
        ("plain", ["gated_mpl"], "did you mean gated_mlp"),
        ("plain", ["zzz"], "it has unet"),
    ],
)
def test_unknown_names(suite: str, models: list[str] | None, message: str) -> None:
    """Unknown suites and models are errors that name what there is."""
    with pytest.raises(BenchError, match=message):
        chosen_models(suite, models)
