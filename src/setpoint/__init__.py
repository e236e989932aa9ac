"""Setpoint: prune PyTorch models while they train, to a budget held by a feedback controller.

Names that a run needs, and parts that tune it. All else is imported from its folder (docs/architecture.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from setpoint.actuator.shrink import shrink
from setpoint.attach import attach
from setpoint.controller.priced import PricedController
from setpoint.controller.schedule import Schedule
from setpoint.cost.budget import Budget, Price, Tolerance
from setpoint.errors import SetpointError
from setpoint.groups.trace import find_groups
from setpoint.ledger import Ledger
from setpoint.loop.loop import Loop
from setpoint.loop.summary import Summary
from setpoint.sensor.taylor import TaylorSensor

__version__ = "0.2.0"

if TYPE_CHECKING:
    from setpoint.checkpoint.bake import bake
    from setpoint.checkpoint.model_file import load, save
    from setpoint.checkpoint.resumable import resumable, shrink_to
    from setpoint.checkpoint.run_file import load_run, save_run
    from setpoint.host.sharded import unsharded
    from setpoint.integrations.checkpointing import enable_checkpointing
    from setpoint.one_shot.compress import compress
    from setpoint.regrowth.regrowing import Regrowing
    from setpoint.states.hankel import HankelSensor
    from setpoint.weights.find import find_weights
    from setpoint.weights.masking import Masking

_LEAVES = {
    "HankelSensor": "setpoint.states.hankel",
    "Masking": "setpoint.weights.masking",
    "Regrowing": "setpoint.regrowth.regrowing",
    "bake": "setpoint.checkpoint.bake",
    "compress": "setpoint.one_shot.compress",
    "enable_checkpointing": "setpoint.integrations.checkpointing",
    "find_weights": "setpoint.weights.find",
    "load": "setpoint.checkpoint.model_file",
    "load_run": "setpoint.checkpoint.run_file",
    "resumable": "setpoint.checkpoint.resumable",
    "save": "setpoint.checkpoint.model_file",
    "save_run": "setpoint.checkpoint.run_file",
    "shrink_to": "setpoint.checkpoint.resumable",
    "unsharded": "setpoint.host.sharded",
}
"""Names that are imported when somebody asks for them: not every run needs these folders."""


def __getattr__(name: str) -> Any:
    if name == "runtimes":
        return import_module("setpoint.runtimes")
    if name in _LEAVES:
        return getattr(import_module(_LEAVES[name]), name)
    raise AttributeError(f"module 'setpoint' has no attribute {name!r}: other names are imported from their folders")


__all__ = [
    "Budget", "HankelSensor", "Ledger", "Loop", "Masking", "Price", "PricedController",
    "Regrowing", "Schedule", "SetpointError", "Summary", "TaylorSensor", "Tolerance", "attach", "bake", "compress",
    "enable_checkpointing", "find_groups", "find_weights", "load", "load_run", "resumable",
    "save", "save_run", "shrink", "shrink_to", "unsharded",
]  # fmt: skip
