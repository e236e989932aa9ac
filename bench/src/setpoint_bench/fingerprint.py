"""A fingerprint: what tells a task from another one of the same name, for a folder that compares like with like."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import get_args

import torch
from torch import Tensor

from setpoint_bench.own_random import OwnRandom
from setpoint_bench.simple_task import SimpleTask, dense_widths, unaltered
from setpoint_bench.task import Split
from setpoint_bench.tensors import Characters, Tensors


@cache
def fingerprint(task: SimpleTask) -> str:
    """Sixteen hexadecimal digits that change with the dense model, the recipe and the data; not with steps or device.

    Of the model its modules and shapes count, of the recipe also what it does with fresh weights, of functions their
    names, of the data the first training batch, and of tensors also what they are judged on: whole numbers one by one,
    others by shape, and mean and deviation to a few digits, in which machines agree.

    Args:
        task: to be told from others of its name; its data are read.

    Raises:
        BenchError: the data are not there.
    """
    with OwnRandom(0).drawing():
        model = task.build(dense_widths(task), torch.device("meta"))
        optimizers = [task.optimizer(model)]
        if (scratch := task.from_scratch()) != task:
            optimizers.append(scratch.optimizer(model))
        inputs, targets = next(task.batches(seed=0))
    parts = [
        re.sub(r" at 0x[0-9a-f]+", "", str(model)),
        *(f"{name} {tuple(each.shape)}" for name, each in model.named_parameters()),
    ]
    for optimizer in optimizers:
        parts += [type(optimizer).__name__]
        parts += [
            str({key: value for key, value in each.items() if key != "params"}) for each in optimizer.param_groups
        ]
    parts += [_batch(inputs), _batch(targets), task.metric]
    if isinstance(task, SimpleTask):
        recipe = [(each.name, getattr(task.recipe, each.name)) for each in fields(task.recipe) if each.name != "steps"]
        if isinstance(task.data, Characters):
            parts.append("scored on whole splits")  # rows from before were scored on 256 windows
        if isinstance(task.data, Tensors):
            parts += [_batch(each) for split in get_args(Split) for each in task.data.split(split)]
        if task.views is not unaltered:
            parts.append(f"scored in views {_name(task.views)}")
        parts += [str(recipe), _name(task.criterion), _name(task.training_criterion or task.criterion)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _batch(tensor: Tensor) -> str:
    """What a tensor is known by."""
    tensor = tensor.cpu()
    told = f"{tuple(tensor.shape)} {tensor.dtype}"
    if tensor.is_floating_point() or tensor.is_complex():
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        mean, deviation = float(values.double().mean()), float(values.double().std(correction=0))
        return f"{told} {mean / (deviation or 1.0):.3f} {deviation:.4g}"
    return f"{told} {hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()}"


def _name(function: Callable[..., object]) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))
