"""Resume: all that a loop remembers, as plain data, and how a freshly attached loop takes it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from setpoint.actuator.actuator import Actuator
from setpoint.actuator.optimizer_state import check_state
from setpoint.checkpoint.plain import plain, restored
from setpoint.errors import CheckpointError
from setpoint.groups.group import Group, widths_of
from setpoint.groups.rng import check_rng_state, rng_state, set_rng_state
from setpoint.host.host import Host
from setpoint.loop.control import Control
from setpoint.loop.state import RunState

FORMAT = 2
"""Version of the state's form, its entry "format"."""

AGAIN = "build the model anew, dense, and attach with the arguments of the run that is to go on"


@runtime_checkable
class Part(Protocol):
    """What a loop is made of and remembers by itself."""

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain tensors, numbers and strings."""
        ...

    def check(self, state: Mapping[str, Any]) -> Any:
        """Check that a state fits, before anything is changed."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken; it was checked."""
        ...


def _saved_parts(control: Control, actuator: Actuator) -> dict[str, Part]:
    """What remembers something by itself."""
    return {"actuator": actuator, "losses": control.losses, "ledger": control.ledger, "spending": control.spending}


def _facts(control: Control) -> dict[str, Any]:
    """What must be the same in two runs of which one goes on with the other."""
    return {**control.facts, **control.spending.facts()}


def state_of(control: Control) -> dict[str, Any]:
    """All that a run remembers, in plain tensors, numbers and strings."""
    return {
        "format": FORMAT,
        "run": _facts(control),
        "now": control.state.state_dict(),
        "sensor": plain(control.sensor_state, "the sensor's state"),
        "controller": plain(control.controller_state, "the controller's state"),
        **{name: part.state_dict() for name, part in _saved_parts(control, control.actuator).items()},
        "rng_state": {"rank": control.host.ranks.own, **rng_state()},
    }


def load_state(control: Control, state: Mapping[str, Any]) -> None:
    """Take over the state of another run; the control changes only once all of it was checked."""
    try:
        actuator, now, controller_state = _checked(control, state)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"this is not a state that loop.state_dict() returned, or a damaged one: {error!r}"
        ) from error
    control.actuator, control.state, control.controller_state = actuator, now, controller_state
    for name, part in _saved_parts(control, actuator).items():
        part.load_state_dict(state[name])
    # What points at the model is found again in the smaller one.
    sensor, model = control.sensor, control.host.model
    live = sensor.init(control.groups, model)
    control.sensor_state = restored(state["sensor"], live, "the sensor's state", control.host.device)
    control.spending.account.sensing_flops = sensor.flops(control.groups, model)
    control.spending.prepare(False)
    if not actuator.by_unit:  # masks are kept for the coming step; a probe of units has begun anew already
        due = control.controller.due(control.step + 1, control.spending.planned_steps)
        actuator.prepare(control.step, due=due, open_still=not now.budget_met)
    rng = state["rng_state"]  # None where a framework keeps it itself
    if rng and int(rng["rank"]) == control.host.ranks.own:  # ranks that all drew the same were no several draws
        set_rng_state(rng)


def _checked(control: Control, state: Mapping[str, Any]) -> tuple[Actuator, RunState, Any]:
    """What a state leads to; nothing is changed yet."""
    check_format(state)
    check_same_run(state["run"], _facts(control))
    check_optimizers(control.host, control.dense)
    actuator, device = control.actuator, control.host.device
    if state["actuator"]["kind"] != actuator.kind and control.revocable is not None:
        actuator = control.revocable()  # as the first cut of a run whose loss is watched makes it
    parts = _saved_parts(control, actuator)
    groups = actuator.check(state["actuator"])
    for name in ("losses", "ledger", "spending"):
        parts[name].check(state[name])
    restored(state["sensor"], control.sensor.init(groups, control.host.model), "the sensor's state", device)
    fresh = control.controller.init(groups)
    controller_state = restored(state["controller"], fresh, "the controller's state", device)
    if state["rng_state"] is not None:
        check_rng_state(state["rng_state"])
    return actuator, RunState.of(state["now"], widths_of(groups)), controller_state


def check_format(state: Mapping[str, Any]) -> None:
    """Check that a state is of this version.

    Raises:
        CheckpointError: for any other.
    """
    if state["format"] == 1:
        raise CheckpointError(
            "the state has format 1, of Setpoint 0.1, and this Setpoint reads format 2: finish that run with "
            "setpoint==0.1.0, or begin it anew. Its finished models still load (setpoint.load)"
        )
    if state["format"] != FORMAT:
        raise CheckpointError(f"the state has format {state['format']!r}, and this reads {FORMAT}: upgrade Setpoint")


def check_same_run(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a run can go on with another one's state.

    Raises:
        CheckpointError: naming the first fact that differs.
    """
    for name, value in own.items():
        if (found := saved.get(name)) != value:
            advice = AGAIN
            if name == "total_steps":
                billed = any(per == "run" for _, _, per, _ in own["budgets"])
                change = "" if billed else f", and set loop.total_steps = {value} once it has begun"
                advice = f"attach with {found}{change}"
            theirs, ours = (_short(each, other) for each, other in ((found, value), (value, found)))
            raise CheckpointError(
                f"the state is of another run: its {name} are {theirs}, here they are {ours}: {advice}"
            )


def _short(value: Any, other: Any) -> str:
    """What differs, of two dicts; else the value."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: each for key, each in value.items() if other.get(key) != each}
    if isinstance(value, list) and all(isinstance(each, (list, tuple)) and len(each) == 4 for each in value):
        value = [  # budgets
            f"{f'{100 * limit:g} %' if share else f'{limit:g}'} {resource} per {per}"
            for resource, limit, per, share in value
        ]
    text = ", ".join(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def check_optimizers(host: Host, groups: tuple[Group, ...]) -> None:
    """Check that no optimizer has been loaded with the state of a smaller model, or of a larger one.

    Raises:
        CheckpointError: naming the first tensor of these groups whose state does not fit.
    """
    for optimizer in host.optimizers:
        check_state(optimizer, _cut_parameters(host, groups), optimizer.state)


def check_loading(host: Host, groups: tuple[Group, ...], optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Called by an optimizer that is about to load a state: check that it is as large as the parameters.

    PyTorch itself checks how many parameters there are, only after its hooks were called.

    Args:
        host: of the model.
        groups: of the model, at their present widths.
        optimizer: one of the host's.
        saved: the optimizer's state dict.

    Raises:
        CheckpointError: when it is not, or has other parameters.
    """
    own, theirs = (
        [len(settings["params"]) for settings in each] for each in (optimizer.param_groups, saved["param_groups"])
    )
    if own != theirs:
        raise CheckpointError(
            f"{type(optimizer).__name__} cannot load a state of other parameters: its groups have {theirs}, here they "
            f"have {own}"
        )
    parameters = [parameter for settings in optimizer.param_groups for parameter in settings["params"]]
    numbers = [number for settings in saved["param_groups"] for number in settings["params"]]
    states = {p: saved["state"].get(number, {}) for p, number in zip(parameters, numbers, strict=True)}
    check_state(optimizer, _cut_parameters(host, groups), states)


def _cut_parameters(host: Host, groups: tuple[Group, ...]) -> dict[str, Tensor]:
    """The parameters in which units of these groups lie, by name."""
    names = {part.tensor for group in groups for part in group.slices}
    parameters = host.model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in parameters if name in names}
