"""A sweep: which models, in which order, with what record."""

from __future__ import annotations

import pytest

from setpoint_bench.coverage import Verdict
from setpoint_bench.sweep import chosen_models, summary
from setpoint_bench.task import BenchError

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
