"""Setpoint: prune PyTorch models while they train, to a budget held by a feedback controller."""

from setpoint.actuator.regrow import regrow
from setpoint.actuator.reserve import Reserve
from setpoint.actuator.shrink import shrink
from setpoint.checkpoint import load, save
from setpoint.controller.plan import Controller, Observation, Plan
from setpoint.controller.priced import PricedController
from setpoint.cost.budget import Budget
from setpoint.cost.cost import Cost
from setpoint.errors import (
    BudgetError,
    CheckpointError,
    ExampleError,
    ExportError,
    GroupError,
    LoopError,
    OptimizerError,
    SetpointError,
    VerificationError,
)
from setpoint.groups.group import Group, SizeBinding, Slice
from setpoint.groups.trace import find_groups
from setpoint.ledger import Entry, Ledger
from setpoint.loop import Explanation, Loop, Summary, attach, load_run, save_run
from setpoint.sensor.magnitude import MagnitudeSensor
from setpoint.sensor.reading import Reading, Sensor
from setpoint.sensor.taylor import TaylorSensor

__all__ = [
    "Budget",
    "BudgetError",
    "CheckpointError",
    "Controller",
    "Cost",
    "Entry",
    "ExampleError",
    "Explanation",
    "ExportError",
    "Group",
    "GroupError",
    "Ledger",
    "Loop",
    "LoopError",
    "MagnitudeSensor",
    "Observation",
    "OptimizerError",
    "Plan",
    "PricedController",
    "Reading",
    "Reserve",
    "Sensor",
    "SetpointError",
    "SizeBinding",
    "Slice",
    "Summary",
    "TaylorSensor",
    "VerificationError",
    "attach",
    "find_groups",
    "load",
    "load_run",
    "regrow",
    "save",
    "save_run",
    "shrink",
]
