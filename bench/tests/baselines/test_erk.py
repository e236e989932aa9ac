"""The Erdos-Renyi kernel distribution against its closed form."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint_bench.baselines.erk import erk_densities

CONVS = {"first": (64, 3, 3, 3), "second": (128, 64, 3, 3), "third": (256, 128, 3, 3), "head": (10, 256)}


def test_closed_form_without_full_layers() -> None:
    """Density of a layer = scale (out + in + height + width) / (out in height width), one scale for all."""
    shapes = {name: shape for name, shape in CONVS.items() if name in ("second", "third")}
    densities = erk_densities(shapes, 0.1)
    scales = {name: densities[name] * math.prod(shape) / sum(shape) for name, shape in shapes.items()}
    total = sum(math.prod(shape) for shape in shapes.values())
    assert scales["second"] == pytest.approx(scales["third"])
    assert scales["second"] == pytest.approx(0.1 * total / sum(sum(shape) for shape in shapes.values()))


def test_full_layers_stay_full() -> None:
    """A layer that would be over full is full, and the others make up for it."""
    densities = erk_densities(CONVS, 0.1)
    assert densities["first"] == densities["head"] == 1.0
    kept = sum(densities[name] * math.prod(shape) for name, shape in CONVS.items())
    assert kept == pytest.approx(0.1 * sum(math.prod(shape) for shape in CONVS.values()))
    ratio = densities["second"] / densities["third"]
    assert ratio == pytest.approx((198 / (128 * 64 * 9)) / (390 / (256 * 128 * 9)))


@given(
    st.lists(st.lists(st.integers(1, 64), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6),
    st.floats(0.0, 1.0),
)
def test_overall_density(shapes: list[tuple[int, ...]], density: float) -> None:
    """Whatever the shapes, no layer is over full, and together they have the density asked for."""
    named = {str(number): shape for number, shape in enumerate(shapes)}
    densities = erk_densities(named, density)
    assert all(-1e-9 <= value <= 1.0 for value in densities.values())
    kept = sum(densities[name] * math.prod(shape) for name, shape in named.items())
    assert kept == pytest.approx(density * sum(map(math.prod, shapes)), rel=1e-9, abs=1e-9)


def test_a_density_is_a_fraction() -> None:
    """Anything else is an error that says what it got."""
    with pytest.raises(ValueError, match="got 1.5"):
        erk_densities(CONVS, 1.5)
