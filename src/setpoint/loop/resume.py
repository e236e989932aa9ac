"""Resume: all that a run remembers, as plain data, and how a freshly attached loop takes it over."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from setpoint.actuator.actuator import Actuator
from setpoint.actuator.optimizer_check import check_state
from setpoint.checkpoint.plain import plain, restored, rng_state, set_rng_state, to_tensors
from setpoint.controller.plan import Plan
from setpoint.errors import CheckpointError, as_written
from setpoint.groups.group import widths_of
from setpoint.ledger import Ledger
from setpoint.loop.control import Control, RunState
from setpoint.loop.losses import Losses
from setpoint.spending.checks import run_facts
from setpoint.spending.spending import Spending

FORMAT = 2  # version of the state's form
AGAIN = "build the model again, dense, and attach with the arguments of that run"


def check_format(state: Mapping[str, Any]) -> None:
    if state["format"] != FORMAT:
        # Version 0.1 wrote format 1; models that it saved still load.
        then = "finish that run with setpoint==0.1.0" if state["format"] == 1 else "upgrade Setpoint"
        raise CheckpointError(f"the state has format {state['format']!r}, and this reads {FORMAT}: {then}")


def check_same_run(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise a CheckpointError that names the first fact in which two runs differ."""
    for name, value in own.items():
        found, advice = saved.get(name), AGAIN
        if found == value:
            continue
        if name == "total_steps":
            billed = any(per == "run" for _, _, per, _ in own["budgets"])
            change = "" if billed else f", and set loop.total_steps = {value} once it has begun"
            advice = f"attach with {found}{change}"
        raise CheckpointError(
            f"the state is of another run: its {name} are {_short(found, value)}, here they are "
            f"{_short(value, found)}: {advice}"
        )


def _short(value: Any, other: Any) -> str:
    """Of two dicts what differs, budgets in words; of anything else the value."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: item for key, item in value.items() if other.get(key) != item}
    if isinstance(value, list):
        value = ", ".join(
            f"{f'{100 * item[1]:g} %' if item[3] else f'{item[1]:g}'} {item[0]} per {item[2]}"
            if isinstance(item, (list, tuple))
            else str(item)
            for item in value
        )
    return f"{value:.120}" if isinstance(value, str) else f"{value!r:.120}"


def _saved_parts(control: Control, actuator: Actuator) -> dict[str, Actuator | Losses | Ledger | Spending]:
    """What remembers something by itself."""
    return {"actuator": actuator, "losses": control.losses, "ledger": control.ledger, "spending": control.spending}


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """With a digest of all the rest, by which a value that was damaged is found wherever it stands."""
    from setpoint.checkpoint.model_file import digest  # late: only a run that is saved needs it

    content = {name: value for name, value in state.items() if name != "sha256"}
    return {**content, "sha256": digest({}, to_tensors(content))}


def state_of(control: Control) -> dict[str, Any]:
    state = {
        "format": FORMAT,
        "run": {**control.facts, **run_facts(control.spending)},
        "now": plain(control.state, "the run's progress"),
        "sensor": plain(control.sensor_state, "the sensor's state"),
        "controller": plain(control.controller_state, "the controller's state"),
        **{name: part.state_dict() for name, part in _saved_parts(control, control.actuator).items()},
        "rng_state": {"rank": control.host.ranks.own, **rng_state()},
    }
    return sealed(state)


def load_state(control: Control, state: Mapping[str, Any]) -> None:
    """Take over the state of another run; the control changes only once all of it was checked."""
    with as_written("this is no state that loop.state_dict() returned, or it"):
        actuator, now, controller_state = _checked(control, state)
    control.actuator, control.state, control.controller_state = actuator, now, controller_state
    for name, part in _saved_parts(control, actuator).items():
        part.load_state_dict(state[name])
    # What points at the model is found again in the smaller one.
    sensor, model = control.sensor, control.host.model
    live = sensor.init(control.groups, model)
    control.sensor_state = restored(state["sensor"], live, "the sensor's state", control.host.device)
    control.spending.account.sensing_flops = sensor.flops(control.groups, model)
    control.spending.prepare(False)
    if not actuator.by_unit:  # units that visit are in the state
        due = control.controller.due(control.step + 1, control.spending.planned_steps)
        actuator.prepare(control.step, due=due, open_still=not now.budget_met)
    rng = state["rng_state"]  # None where a framework keeps it itself
    if rng and int(rng["rank"]) == control.host.ranks.own:  # ranks that all drew the same were no several draws
        set_rng_state(rng)


def _checked(control: Control, state: Mapping[str, Any]) -> tuple[Actuator, RunState, Any]:
    check_format(state)
    check_same_run(state["run"], {**control.facts, **run_facts(control.spending)})
    if (own := sealed(state)["sha256"]) != state.get("sha256", own):  # states of earlier versions have none
        raise CheckpointError(
            "the loop's state is damaged, or was changed by hand: its digest does not match its contents; get it again"
        )
    for optimizer in control.host.optimizers:
        check_state(optimizer, control.host.model, control.dense)
    actuator, device = control.actuator, control.host.device
    if state["actuator"]["kind"] != actuator.kind and control.revocable is not None:
        actuator = control.revocable()  # as the first cut of a run whose loss is watched makes it
    groups = actuator.check(state["actuator"])
    restored(state["sensor"], control.sensor.init(groups, control.host.model), "the sensor's state", device)
    controller_state = restored(state["controller"], control.controller.init(groups), "the controller's state", device)
    by_unit = {name: np.zeros(width) for name, width in widths_of(groups).items()}
    plan = None if state["now"]["plan"] is None else Plan(0, {})
    like = RunState(plan=plan, saliency=by_unit, worth=by_unit)
    now = restored(state["now"], like, "the run's progress", torch.device("cpu"))
    return actuator, now, controller_state
