"""Setpoint: prune PyTorch models while they train, to a budget held by a feedback controller."""

from setpoint.actuator.shrink import shrink
from setpoint.attach import attach
from setpoint.checkpoint import load, save
from setpoint.controller.gates import GatedController
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
from setpoint.groups.trace import find_groups
from setpoint.host.fsdp import whole
from setpoint.ledger import Entry, Ledger
from setpoint.loop.explain import Explanation
from setpoint.loop.loop import Loop
from setpoint.loop.run_file import load_run, save_run
from setpoint.loop.summary import Summary
from setpoint.regrowth.regrow import regrow
from setpoint.regrowth.reserve import Reserve
from setpoint.sensor.chain import SensorChain
from setpoint.sensor.hankel import HankelSensor
from setpoint.sensor.magnitude import MagnitudeSensor
from setpoint.sensor.random import RandomSensor
from setpoint.sensor.reading import Reading, Sensor
from setpoint.sensor.selective import SelectiveSensor
from setpoint.sensor.taylor import TaylorSensor
from setpoint.ssm import StateSpaceLayer
from setpoint.weights.exchanging import ExchangingController
from setpoint.weights.find import find_weights
from setpoint.weights.semi_structured import to_semi_structured
from setpoint.weights.taylor import WeightTaylorSensor

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
