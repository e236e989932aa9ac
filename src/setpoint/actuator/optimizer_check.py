"""Optimizer checks: whether a smaller parameter trains as its masked twin would, and whether a state fits a model."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from setpoint.actuator.cut import plan_cut
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import INSTEAD, state_tensors, take
from setpoint.errors import CheckpointError, OptimizerError
from setpoint.groups.group import Group, Slice
from setpoint.messages import warn


def check_trains(optimizers: Iterable[Optimizer], model: nn.Module) -> None:
    """Check that every optimizer holds at least one of the model's parameters, or raise OptimizerError."""
    ours = set(model.parameters())
    for optimizer in optimizers:
        held = _parameters(optimizer)
        if not ours & set(held):
            raise OptimizerError(
                f"{type(optimizer).__name__} holds {len(held)} tensors, but none of this model's parameters: "
                "build it from model.parameters() of the very model you attach to, after the model "
                "was moved, wrapped or copied"
            )


def check_optimizer(optimizer: Optimizer) -> None:
    """Check, by trying it on throwaway tensors, that a smaller parameter trains as its masked twin would.

    For every distinct setting in `param_groups`, an optimizer of the same class and settings takes one step. Then one
    copy is cut and another is masked, both take three more steps with the same gradients, and the kept entries must
    agree to 1e-9. An update that depends on the tensor's shape, or state of another shape (Adafactor, L-BFGS, Shampoo,
    quantised moments), shows up here whatever the class is called, as an OptimizerError.

    A class that cannot be built or stepped this way (further constructor arguments, sparse gradients only) passes;
    the shapes of its state are still checked when it is cut. So does Muon: in its Newton-Schulz iterations rows and
    columns of zeros stay zero and add nothing to the norm, and its factor for the shape is then that of the cut one.
    """
    if type(optimizer) is Muon:
        return
    tried: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        settings = _settings(optimizer, group)
        if settings in tried:
            continue
        tried.append(settings)
        device = next((parameter.device for parameter in group["params"]), torch.device("cpu"))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _try_out(type(optimizer), settings, device)


def _settings(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    names = inspect.signature(type(optimizer).__init__).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values())
    settings = {**optimizer.defaults, **{key: value for key, value in group.items() if key != "params"}}
    known = {*names, *(optimizer.defaults if takes_any else ())}
    settings = {key: value for key, value in settings.items() if key in known}
    if "lr" in settings:
        settings["lr"] = 0.01  # a warm-up starts at 0, where no step moves anything and every optimizer would pass
    return settings


_MATRIX, _VECTOR = "trial matrix", "trial vector"
# So large that whoever keeps large states in 8 bits does it here.
_SHAPES: dict[str, tuple[int, ...]] = {_MATRIX: (64, 128), _VECTOR: (64,)}
_TRIALS = ((_MATRIX, _VECTOR), (_MATRIX,), (_VECTOR,))  # some take matrices only, others vectors only
_KEEP = {"rows": np.arange(64) % 3 != 1, "columns": np.arange(128) % 4 != 2}


def _try_out(kind: type[Optimizer], settings: Mapping[str, Any], device: torch.device) -> None:
    dtype = torch.float32 if device.type == "mps" else torch.float64
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for names in _TRIALS:
        generator = torch.Generator().manual_seed(0)
        # Five draws: the weights, the gradients of the step that makes state, and those of three compared steps.
        draws = [
            {name: torch.randn(_SHAPES[name], generator=generator, dtype=dtype).to(device) for name in names}
            for _ in range(5)
        ]
        try:
            (twin, masked), (model, small) = _started(kind, settings, draws), _started(kind, settings, draws)
        except Exception:  # whatever a foreign class raises, it means that it cannot be tried out on these shapes
            continue
        rows = Group("rows", "unit", 64, tuple(Slice(name, 0, "produce", np.arange(64)) for name in names))
        columns = Group("columns", "unit", 128, (Slice(_MATRIX, 1, "consume", np.arange(128)),))
        groups = (rows, columns) if _MATRIX in names else (rows,)
        keep = {group.name: _KEEP[group.name] for group in groups}
        kept = plan_cut(groups, keep).dims()
        shrink(model, small, groups, keep)
        for gradients in draws[2:]:
            _set_gradients(twin, gradients)
            mask(twin, masked, groups, keep)
            _step(masked)
            mask(twin, masked, groups, keep)
            _set_gradients(model, {name: take(gradient, kept[name]) for name, gradient in gradients.items()})
            _step(small)
        for name, parameter in model.named_parameters():
            expected = take(twin.get_parameter(name), kept[name])
            if not torch.allclose(expected, parameter.detach(), rtol=tolerance, atol=tolerance):
                raise OptimizerError(
                    f"{kind.__name__} cannot follow a cut: its update depends on the tensor's shape (or on chance), "
                    f"so a smaller tensor would train differently: {INSTEAD}"
                )
        return


def _started(
    kind: type[Optimizer], settings: Mapping[str, Any], draws: Sequence[Mapping[str, Tensor]]
) -> tuple[nn.Module, Optimizer]:
    """Parameters and an optimizer of this kind after its first step, so that it has state."""
    model = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in draws[0].items()})
    optimizer = kind(list(model.values()), **settings)
    _set_gradients(model, draws[1])
    _step(optimizer)
    return model, optimizer


def _set_gradients(model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()


def _step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except TypeError:  # L-BFGS insists on a closure
        optimizer.step(lambda: 0.0)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_state(
    optimizer: Optimizer, model: nn.Module, groups: Iterable[Group], saved: Mapping[str, Any] | None = None
) -> None:
    """Check that state tensors have the shapes of the parameters in which the groups lie, which PyTorch does not check.

    `saved` is the state dict that the optimizer is about to load, None the state that it has. A CheckpointError names
    the first tensor that does not fit, or says that the state is of other parameters.
    """
    states: Mapping[Tensor, Mapping[str, Any]] = optimizer.state
    if any("setpoint" in settings for settings in (optimizer.param_groups if saved is None else saved["param_groups"])):
        warn(
            "the optimizer's state carries that of a run, which is not taken over, so that a new run begins: "
            "attach(..., resume=True) continues it"
        )
    if saved is not None:  # PyTorch matches parameters by their order
        own, numbers = _parameters(optimizer), [n for settings in saved["param_groups"] for n in settings["params"]]
        if len(own) != len(numbers):
            raise CheckpointError(
                f"{type(optimizer).__name__} cannot load the state of {len(numbers)} parameters: it has {len(own)}"
            )
        states = {p: saved["state"].get(number, {}) for p, number in zip(own, numbers, strict=True)}
    cut = {part.tensor for group in groups for part in group.slices}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for part, value in state_tensors(states.get(parameter, {})) if name in cut else ():
            if value.shape != parameter.shape and value.numel() != 1:
                raise CheckpointError(
                    f"{type(optimizer).__name__} would have state[{part!r}] of shape {tuple(value.shape)} for {name!r} "
                    f"of shape {tuple(parameter.shape)}: build both again, and load both states, of one checkpoint, "
                    "after attach(..., resume=True), or after loop.load_state_dict if that run was without resume"
                )
