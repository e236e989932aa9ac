"""Setpoint: prune PyTorch models while they train, to a budget held by a feedback controller."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from setpoint.actuator.regrow import regrow
from setpoint.actuator.reserve import Reserve
from setpoint.actuator.semi_structured import to_semi_structured
from setpoint.actuator.sharding import whole
from setpoint.actuator.shrink import shrink
from setpoint.checkpoint import load, save
from setpoint.controller.exchanging import ExchangingController
from setpoint.controller.penalty import PenaltyController
from setpoint.controller.plan import Controller, Observation, Plan
from setpoint.controller.priced import PricedController
from setpoint.controller.reference import Reference
from setpoint.controller.tolerant import TolerantController
from setpoint.cost.budget import Budget
from setpoint.cost.cost import Cost
from setpoint.cost.price import Price
from setpoint.cost.tolerance import Tolerance
from setpoint.errors import (
    BudgetError,
    CheckpointError,
    CostError,
    DeviceError,
    ExampleError,
    ExportError,
    GroupError,
    LoopError,
    OptimizerError,
    PathError,
    RankError,
    SetpointError,
    StateSpaceError,
    VerificationError,
)
from setpoint.groups.group import Group, SizeBinding, Slice
from setpoint.groups.state_space import StateSpaceLayer
from setpoint.groups.trace import find_groups
from setpoint.groups.weights import find_weights
from setpoint.ledger import Entry, Ledger
from setpoint.loop import Explanation, Loop, Summary, attach, load_run, save_run
from setpoint.sensor.chain import SensorChain
from setpoint.sensor.magnitude import MagnitudeSensor
from setpoint.sensor.random import RandomSensor
from setpoint.sensor.reading import Reading, Sensor
from setpoint.sensor.taylor import TaylorSensor
from setpoint.sensor.weight_taylor import WeightTaylorSensor

if TYPE_CHECKING:
    from setpoint.gates.gated import GatedController
    from setpoint.states.hankel import HankelSensor
    from setpoint.states.selective import SelectiveSensor

_LEAVES = {
    "GatedController": "setpoint.gates.gated",
    "HankelSensor": "setpoint.states.hankel",
    "SelectiveSensor": "setpoint.states.selective",
}
"""Names that are imported when somebody asks for them: not every run needs these folders."""


def __getattr__(name: str) -> Any:
    if name not in _LEAVES:
        raise AttributeError(f"module 'setpoint' has no attribute {name!r}")
    return getattr(import_module(_LEAVES[name]), name)


__all__ = [
    "Budget",
    "BudgetError",
    "CheckpointError",
    "Controller",
    "Cost",
    "CostError",
    "Entry",
    "ExampleError",
    "ExchangingController",
    "Explanation",
    "ExportError",
    "GatedController",
    "Group",
    "GroupError",
    "HankelSensor",
    "Ledger",
    "Loop",
    "LoopError",
    "MagnitudeSensor",
    "Observation",
    "DeviceError",
    "OptimizerError",
    "PathError",
    "PenaltyController",
    "Plan",
    "Price",
    "PricedController",
    "RandomSensor",
    "RankError",
    "Reading",
    "Reference",
    "Reserve",
    "SelectiveSensor",
    "Sensor",
    "SensorChain",
    "SetpointError",
    "SizeBinding",
    "Slice",
    "StateSpaceError",
    "StateSpaceLayer",
    "Summary",
    "TaylorSensor",
    "Tolerance",
    "TolerantController",
    "VerificationError",
    "WeightTaylorSensor",
    "attach",
    "find_groups",
    "find_weights",
    "load",
    "load_run",
    "regrow",
    "save",
    "save_run",
    "shrink",
    "to_semi_structured",
    "whole",
]
