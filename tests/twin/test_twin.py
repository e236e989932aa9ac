"""The flagship: a shrunk model and optimizer behave exactly as their masked twin, for groups found by tracing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groups.zoo import MODELS
from setpoint.actuator.cut import plan_cut
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import take
from setpoint.checkpoint.model_file import load, save
from setpoint.groups.group import Group, random_keep
from setpoint.groups.trace import find_groups

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    # Some gradients are zero but for round-off (a bias before batch norm, a key's bias): an eps above
    # round-off keeps these two from blowing it up to full steps in random directions.
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True, eps=1e-4),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, eps=1e-4),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, guard: Callable[[], None]) -> Tensor:
    """One step on a fixed quadratic loss; `guard` runs around the optimizer."""
    optimizer.zero_grad()
    output = model(*inputs)
    target = torch.linspace(-1, 1, output[0].numel(), dtype=output.dtype).view_as(output[0])
    (output - target).square().mean().backward()
    guard()
    optimizer.step()
    guard()
    return output.detach()


@cache
def groups_of(name: str) -> tuple[Group, ...]:
    """Lossless groups of a model; they depend on its structure alone."""
    build, example = MODELS[name]
    return tuple(group for group in find_groups(build(), example()) if group.lossless)


def double(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_shrunk_equals_masked(name: str, optimizer: str, tmp_path: Path) -> None:
    """In float64, after warm-up steps, a cut at random widths and five further steps, also through save and
    load: outputs of every step, weights, buffers and optimizer state equal the masked twin's to 1e-10.
    """
    build, example = MODELS[name]
    model, inputs = build().double(), double(example())
    groups = groups_of(name)
    of_model = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(3):
        train(model, of_model, inputs, lambda: None)
    twin = copy.deepcopy(model)
    of_twin = OPTIMIZERS[optimizer](twin.parameters())
    of_twin.load_state_dict(copy.deepcopy(of_model.state_dict()))
    keep = random_keep(groups)

    def masked() -> None:
        mask(twin, of_twin, groups, keep)

    masked()
    shrink(model, of_model, groups, keep)
    for step in range(5):
        if step == 3:
            save(model, tmp_path / "small.safetensors")
            loaded = load(tmp_path / "small.safetensors", into=build().double())
            torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=0, atol=0)
            twin(*inputs)  # a forward pass moves batch norm's buffers in both
        small, full = train(model, of_model, inputs, lambda: None), train(twin, of_twin, inputs, masked)
        torch.testing.assert_close(small, full, rtol=1e-10, atol=1e-10)
    cut = plan_cut(groups, keep)
    full_tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())
    for tensor_name, small in (*model.named_parameters(), *model.named_buffers()):
        expected = take(full_tensors[tensor_name], cut.dims().get(tensor_name, {}))
        torch.testing.assert_close(small.detach(), expected, rtol=1e-10, atol=1e-10)
        for key, value in of_model.state.get(small, {}).items():
            if isinstance(value, Tensor) and value.shape == small.shape:
                state = of_twin.state[full_tensors[tensor_name]][key]
                torch.testing.assert_close(value, take(state, cut.dims().get(tensor_name, {})), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_single_precision_stays_close_to_the_twin(name: str) -> None:
    """In float32 the first outputs and gradients after a cut are within 1e-4 of the masked twin's."""
    build, example = MODELS[name]
    model, inputs = build(), example()
    groups = groups_of(name)
    twin = copy.deepcopy(model)
    keep = random_keep(groups, seed=3)
    mask(twin, None, groups, keep)
    shrink(model, None, groups, keep)
    small, full = model(*inputs), twin(*inputs)
    torch.testing.assert_close(small, full, rtol=1e-4, atol=1e-4)
    small.square().mean().backward()
    full.square().mean().backward()
    cut = plan_cut(groups, keep)
    for (tensor_name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, take(b.grad, cut.dims().get(tensor_name, {})), rtol=1e-4, atol=1e-4)
