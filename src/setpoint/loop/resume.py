"""Resume: all that a loop remembers, as plain data, and how a freshly attached loop takes it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from setpoint.actuator.optimizer_state import check_state
from setpoint.errors import CheckpointError
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
