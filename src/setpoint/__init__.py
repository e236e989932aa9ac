"""Setpoint: prune PyTorch models while they train, to a budget held by a feedback controller.

Two rings of names: what a run uses, and what tunes it. All else is imported from its folder (docs/architecture.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from setpoint.actuator.shrink import shrink
from setpoint.attach import attach
from setpoint.checkpoint import load, save
from setpoint.controller.priced import PricedController
from setpoint.controller.schedule import Schedule
from setpoint.cost.budget import Budget
from setpoint.cost.price import Price
from setpoint.cost.tolerance import Tolerance
from setpoint.errors import SetpointError
from setpoint.groups.trace import find_groups
from setpoint.host.fsdp import unsharded
from setpoint.ledger import Ledger
from setpoint.loop.loop import Loop
from setpoint.loop.run_file import load_run, save_run
from setpoint.loop.summary import Summary
from setpoint.sensor.taylor import TaylorSensor

if TYPE_CHECKING:
    from setpoint.regrowth.regrowing import Regrowing
    from setpoint.states.hankel import HankelSensor
    from setpoint.weights.find import find_weights
    from setpoint.weights.masking import Masking

_LEAVES = {
    "HankelSensor": "setpoint.states.hankel",
    "Masking": "setpoint.weights.masking",
    "Regrowing": "setpoint.regrowth.regrowing",
    "find_weights": "setpoint.weights.find",
}
"""Names that are imported when somebody asks for them: not every run needs these folders."""


_MOVED = dict(
    pair.split("=")
    for pair in """
    BudgetError=errors CheckpointError=errors CostError=errors DeviceError=errors ExampleError=errors ExportError=errors
    GroupError=errors LoopError=errors OptimizerError=errors PathError=errors RankError=errors StateSpaceError=errors
    VerificationError=errors Group=groups.group SizeBinding=groups.group Slice=groups.group Reading=sensor.reading
    StateSpaceLayer=groups.state_space Sensor=sensor.reading MagnitudeSensor=sensor.magnitude SensorChain=sensor.chain
    SelectiveSensor=states.selective WeightTaylorSensor=weights.taylor Cost=cost.cost Controller=controller.plan
    Observation=controller.plan Plan=controller.plan PenaltyController=controller.penalty Entry=entry
    TolerantController=controller.tolerant GatedController=gates.gated Explanation=loop.explain
    Reserve=regrowth.reserve regrow=regrowth.regrow to_semi_structured=weights.semi_structured
""".split()
)
"""Where names are that `setpoint` had in version 0.1."""

_RENAMED = {"Reference": "Schedule", "whole": "unsharded"}


def __getattr__(name: str) -> Any:
    if name in _LEAVES:
        return getattr(import_module(_LEAVES[name]), name)
    hint = f": use setpoint.{_RENAMED[name]}" if name in _RENAMED else ""
    hint = f": use `from setpoint.{_MOVED[name]} import {name}`" if name in _MOVED else hint
    raise AttributeError(f"module 'setpoint' has no attribute {name!r}{hint}")


__all__ = [
    "Budget",
    "HankelSensor",
    "Ledger",
    "Loop",
    "Masking",
    "Price",
    "PricedController",
    "Regrowing",
    "Schedule",
    "SetpointError",
    "Summary",
    "TaylorSensor",
    "Tolerance",
    "attach",
    "find_groups",
    "find_weights",
    "load",
    "load_run",
    "save",
    "save_run",
    "shrink",
    "unsharded",
]
