"""The small model: at most the budget, and close to it."""

from __future__ import annotations

import pytest
import torch

from setpoint_bench.catalogue import task_named
from setpoint_bench.counter import step_flops
from setpoint_bench.simple_task import dense_widths
from setpoint_bench.sizing import fit_widths, small_widths
from setpoint_bench.task import BenchError, Dimension

META = torch.device("meta")


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        *(("digits", 0.5), ("mnist", 0.25), ("cifar10-mini", 0.25), ("shakespeare-mini", 0.25), ("smnist-196", 0.5)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("cifar10", 0.25), ("shakespeare", 0.5))),
    ],
)
def test_small_meets_the_budget(name: str, budget: float) -> None:
    """The small model costs at most the budget, and at most 2 % less, on tasks of every kind."""
    task = task_named(name)
    widths = small_widths(task, budget)
    dense = step_flops(task.build(dense_widths(task), META), task.example())
    small = step_flops(task.build(widths, META), task.example())
    assert 0.98 * budget <= small / dense <= budget
    shares = [widths[name] / dimension.dense for name, dimension in task.dimensions.items()]
    # What is left of the budget goes to single widths, most of it in cifar10-mini, whose last convolution is cheap.
    assert max(shares) - min(shares) < (0.26 if name == "cifar10-mini" else 0.2)


def test_no_block_fits_any_more() -> None:
    """What is found leaves no room for one more block of any width."""
    dimensions = {"a": Dimension(64, 8), "b": Dimension(37), "c": Dimension(20, 4)}

    def cost(widths: dict[str, int]) -> float:
        return widths["a"] * widths["b"] + 3 * widths["b"] * widths["c"]

    widths = fit_widths(dimensions, cost, 1500)
    assert cost(widths) <= 1500
    for name, dimension in dimensions.items():
        assert cost({**widths, name: widths[name] + dimension.multiple_of}) > 1500


def test_unreachable_budget() -> None:
    """A budget below the narrowest model is an error that names what that costs."""
    with pytest.raises(BenchError, match="narrowest model costs 16"):
        fit_widths({"a": Dimension(64, 4), "b": Dimension(64, 4)}, lambda widths: widths["a"] * widths["b"], 15)
