"""Resume: all that a loop remembers, as plain data, and how a freshly attached loop takes it over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from setpoint.actuator.optimizer_state import check_state
from setpoint.actuator.try_optimizer import first_states
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


def check_optimizers(host: Host, groups: tuple[Group, ...] | None = None) -> None:
    """Check that no optimizer has been loaded with the state of a smaller model, or of a larger one.

    Args:
        host: of the model.
        groups: look only at what has as many dims as a tensor that these cut: an optimizer may keep what it likes.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    names = {id(parameter): name for name, parameter in host.model.named_parameters()}
    if groups is not None:
        cut = {part.tensor for group in groups for part in group.slices}
        names = {number: name for number, name in names.items() if name in cut}
    for each in host.optimizers:
        states = [(names[id(p)], p, state) for p, state in each.state.items() if id(p) in names]
        try:
            check_state(each, [(n, p, state if groups is None else _alike(state, p)) for n, p, state in states])
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
    check_numbers(optimizer, saved)
    for own, settings in zip(optimizer.param_groups, saved["param_groups"], strict=False):  # PyTorch counts them
        _check_settings(optimizer, own, settings)
        loaded = {key: settings.get(key, value) for key, value in own.items() if key != "params"}
        firsts = first_states(optimizer, {**own, **loaded}) or first_states(optimizer, own)
        for parameter, number in zip(own["params"], settings["params"], strict=False):
            _check_kinds(optimizer, firsts, parameter, saved["state"].get(number, {}))
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


def check_groups(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Check that a state has as many parameters in each group as the optimizer.

    Raises:
        OptimizerError: when it has not.
    """
    own, other = (
        [len(settings["params"]) for settings in each] for each in (optimizer.param_groups, saved["param_groups"])
    )
    if own != other:
        raise OptimizerError(
            f"{type(optimizer).__name__} cannot load a state of other parameters: its groups have {other}, here they "
            f"have {own}"
        )


def check_numbers(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Check that a state numbers parameters, and is of these: what has no number would be dropped without a word.

    Raises:
        OptimizerError: when it does not.
    """
    numbers = [each for settings in saved["param_groups"] for each in settings["params"]]
    odd = [each for each in numbers if type(each) is not int]
    if len(numbers) == sum(len(settings["params"]) for settings in optimizer.param_groups):  # else PyTorch says so
        odd += [each for each in saved["state"] if isinstance(each, int) and each not in numbers]
    if odd or len(set(numbers)) != len(numbers):
        what = f"{odd[0]!r:.80} is none" if odd else "some occur twice"
        raise OptimizerError(
            f"{type(optimizer).__name__} cannot load a state of which the parameters are not numbered: {what}"
        )


def _check_settings(optimizer: Optimizer, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in own.items():
        if key != "params" and key in saved and not _same_kind(value, saved[key]):
            raise OptimizerError(
                f"{type(optimizer).__name__} cannot load the setting {key}={saved[key]!r:.80}, here it is {value!r:.80}"
            )


def _same_kind(own: Any, other: Any) -> bool:
    """Whether a setting could be given for another: one of None is of any kind."""
    if own is None or other is None or isinstance(own, bool):
        return own is None or other is None or isinstance(other, bool)
    if isinstance(own, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(own) == len(other) and all(map(_same_kind, own, other))
    if isinstance(own, (int, float, Tensor)):
        return _is_number(other)
    return isinstance(other, type(own))


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_kinds(
    optimizer: Optimizer, firsts: Sequence[Mapping[str, Any]], parameter: Tensor, state: Mapping[str, Any]
) -> None:
    """Check that a parameter's state is of tensors and numbers where those of a fresh optimizer are."""
    for key in {key for first in firsts for key in first} if state else ():
        found = [first[key] for first in firsts if key in first]
        number = all(_is_number(each) for each in found)
        if key not in state:
            odd = len(found) == len(firsts) and None not in found
        elif number:
            odd = not _is_number(state[key])
        else:
            tensors = all(isinstance(each, Tensor) for each in found)
            odd = tensors and (not isinstance(state[key], Tensor) or state[key].is_complex() > parameter.is_complex())
            odd = odd or (tensors and state[key].numel() == 1 < min(parameter.numel(), *(p.numel() for p in found)))
        if odd:
            what = f"{state[key]!r:.80}" if key in state else "nothing"
            raise OptimizerError(
                f"{type(optimizer).__name__} cannot go on with {what} for state[{key!r}] of a parameter of shape "
                f"{tuple(parameter.shape)}: load a state that an optimizer of this class and these settings returned"
            )


def _alike(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Of the state of a parameter that is never cut, what has as many dims: rows and columns may be kept apart."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim() == parameter.dim()}
