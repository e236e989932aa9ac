"""Settings of controllers that are out of range are refused where they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from setpoint.controller.penalty import PenaltyController
from setpoint.controller.priced import Gains, PricedController
from setpoint.controller.schedule import Schedule
from setpoint.controller.tolerant import TolerantController
from setpoint.cost.budget import Price, Tolerance


def _penalty(**settings: Any) -> PenaltyController:
    return PenaltyController(Price(1.0, of="flops"), **settings)


def _tolerant(**settings: Any) -> TolerantController:
    return TolerantController(Tolerance(loss=0.1), **settings)


NAN = float("nan")
REFUSED: list[tuple[Callable[..., object], dict[str, Any]]] = [
    *((PricedController, {"hysteresis": value}) for value in (1.0, -0.1)),
    *((PricedController, {"slew": value}) for value in (0.0, 1.1, NAN)),
    (PricedController, {"deadband": 1.0}),
    (PricedController, {"dwell": -1}),
    (PricedController, {"min_density": 1.5}),
    (PricedController, {"allocation": "random"}),
    (PricedController, {"probe_steps": 0}),
    (PricedController, {"returns": -1}),
    *((Schedule, {"warmup": value}) for value in (-0.1, NAN)),
    (Schedule, {"warmup": 0.3, "settle": 0.3}),
    (Schedule, {"settle": 0.9}),
    (Schedule, {"land": 1.1}),
    (Schedule, {"num_cuts": 0}),
    # Outside of this region the feedback overshoots.
    *((Gains, {"kp": kp, "ki": ki}) for kp, ki in ((-0.1, 0.5), (0.1, 0.0), (0.6, 0.5), (NAN, 0.5))),
    (_penalty, {"hysteresis": 1.0}),
    (_penalty, {"slew": 0.0}),
    (_tolerant, {"stride": 1.0}),
    (_tolerant, {"stride": 0.02}),
]


# By hand: the text of a function holds its address, and then each worker of pytest-xdist collects other tests.
IDS = [f"{make.__name__.strip('_')}-{settings}" for make, settings in REFUSED]


@pytest.mark.parametrize(("make", "settings"), REFUSED, ids=IDS)
def test_settings_out_of_range_are_refused(make: Callable[..., object], settings: dict[str, Any]) -> None:
    """Each is an error that names what was given."""
    with pytest.raises((ValueError, TypeError)):
        make(**settings)
