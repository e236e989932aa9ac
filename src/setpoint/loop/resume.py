"""Resume: all that a loop remembers, as plain data, and how a freshly attached loop takes it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from setpoint.actuator.optimizer_state import check_state
from setpoint.errors import CheckpointError, OptimizerError
from setpoint.groups.group import Group
from setpoint.host.host import Host

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
        raise CheckpointError(f"the state has format {state['format']!r}, this Setpoint reads {FORMAT}")


def check_same_run(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a run can go on with another one's state.

    Raises:
        CheckpointError: naming the first fact that differs.
    """
    for name, value in own.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"the state is of another run: its {name} are {_short(saved.get(name), value)}, here they are "
                f"{_short(value, saved.get(name))}: {AGAIN}"
            )


def _short(value: Any, other: Any) -> str:
    """What differs, of two dicts; else the value."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: each for key, each in value.items() if other.get(key) != each}
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def check_optimizers(host: Host) -> None:
    """Check that no optimizer has been loaded yet with the state of a smaller model.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    names = {id(parameter): name for name, parameter in host.model.named_parameters()}
    for each in host.optimizers:
        try:
            check_state(each, [(names[id(p)], p, state) for p, state in each.state.items() if id(p) in names])
        except OptimizerError as error:
            raise CheckpointError(str(error)) from error


def check_loading(host: Host, groups: tuple[Group, ...], optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Called by an optimizer that is about to load a state: check that it is as large as the parameters.

    Args:
        host: of the model.
        groups: of the model, dense or as they are now.
        optimizer: one of the host's.
        saved: the optimizer's state dict.

    Raises:
        OptimizerError: when it is not.
    """
    cut = {part.tensor for group in groups for part in group.slices}
    every = {id(p): name for name, p in host.model.named_parameters(remove_duplicate=False)}
    names = {number: name for number, name in every.items() if name in cut}
    parameters = [parameter for settings in optimizer.param_groups for parameter in settings["params"]]
    numbers = [each for settings in saved["param_groups"] for each in settings["params"]]
    check_state(
        optimizer,
        [
            (names[id(parameter)], parameter, saved["state"].get(each, {}))
            for parameter, each in zip(parameters, numbers, strict=False)  # PyTorch itself checks how many there are
            if id(parameter) in names
        ],
    )
    check_state(
        optimizer,
        [
            (every[id(parameter)], parameter, _alike(saved["state"].get(each, {}), parameter))
            for parameter, each in zip(parameters, numbers, strict=False)
            if id(parameter) in every.keys() - names.keys()
        ],
    )


def _alike(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Of the state of a parameter that is never cut, what has as many dims: rows and columns may be kept apart."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim() == parameter.dim()}
