"""The league: which cells it runs in which order, that it chooses rates on validation data, and that it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from league import METHODS, RATES, Entry, League, at_rate, entries

from setpoint_bench.method import method_named
from setpoint_bench.results import HISTORY, load_results
from setpoint_bench.tasks.digits import digits

TASK = digits(epochs=1, width=4).with_steps(4)


def test_the_order_makes_an_early_stop_useful() -> None:
    """Claim: of a budget all methods come seed by seed; what no budget changes comes once a seed."""
    found = entries(
        ["setpoint-at-once", "dense"], lengths=[1], budgets=[0.5, 0.25], seeds=[0, 1], costs=["steps", "flops"]
    )
    assert [(each.budget, each.seed, each.method) for each in found][:5] == [
        (0.5, 0, "setpoint-at-once+taught"),
        (0.5, 0, "dense+taught"),
        (0.5, 0, "setpoint-at-once+taught+long"),
        (0.5, 1, "setpoint-at-once+taught"),
        (0.5, 1, "dense+taught"),
    ]
    assert [each.budget for each in found if each.method.startswith("dense")] == [0.5, 0.5]
    (plain,) = entries(["cubic"], lengths=[4], budgets=[0.5], seeds=[3], starts=["trained"], teacher=False)
    assert plain == Entry(4, 0.5, 3, "cubic+trained")


@pytest.mark.parametrize("name", METHODS)
def test_each_method_takes_a_teacher_a_start_and_a_rate(name: str) -> None:
    """Claim: of each method there is one that is taught, starts trained and has another rate, and it needs dense."""
    method = method_named(at_rate(f"{name}+taught+trained", 0.5))
    assert method.needs[0] == "dense" and method.name == f"{name}+taught+trained@learning_rate=0.5"


def test_rates_are_chosen_on_validation_data_and_runs_are_not_repeated(tmp_path: Path) -> None:
    """Claim: the first seed runs at each rate, all seeds at the one that validates best; a second call runs nothing."""
    planned = entries(["small"], lengths=[1], budgets=[0.75], seeds=[0, 1])
    League(TASK, tmp_path, [0.5, 2.0], first=0).play(planned)
    (row,) = json.loads((tmp_path / RATES).read_text())
    results = load_results(tmp_path / "x1")
    scores = {}
    for rate in (0.5, 2.0):
        (result,) = (each for each in results if each.method == at_rate("small+taught", rate) and each.seed == 0)
        history = [json.loads(line) for line in (tmp_path / "x1" / result.folder / HISTORY).read_text().splitlines()]
        scores[rate] = max((each["step"], each["accuracy"]) for each in history if each["split"] == "validation")[1]
    assert [scores[0.5], scores[2.0]] == [each["accuracy"] for each in row["validation"].values()]
    assert scores[row["chosen"]] == max(scores.values())
    ran = sorted((each.method, each.seed) for each in results)
    chosen = at_rate("small+taught", row["chosen"])
    assert ran == sorted(
        [
            *(("dense", seed) for seed in (0, 1)),
            *((at_rate("small+taught", rate), 0) for rate in (0.5, 2.0)),
            (chosen, 1),
        ]
    )
    League(TASK, tmp_path, [0.5, 2.0], first=0).play(planned)
    assert load_results(tmp_path / "x1") == results
