"""Stages: the models that a run trained, one after the other, kept without their weights so that they can be timed."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

FILE = "stages.pt"


@dataclass(frozen=True, eq=False)
class Stage:
    """A stretch of a run in which no tensor changed its shape.

    Args:
        num_steps: optimizer steps in it.
        model: the model, its parameters on the meta device.
    """

    num_steps: int
    model: nn.Module


def hollow(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters have shapes and strides but no values; buffers keep theirs."""
    empty = {
        id(each): nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=each.requires_grad)
        for each in model.parameters()
    }
    return copy.deepcopy(model, empty)


def filled(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a hollow model on a device, with fresh weights of a usual size: only their shapes matter for time."""
    fresh: dict[int, object] = {}
    for each in model.parameters():
        weight = torch.empty_like(each, device=device)
        if weight.dim() > 1:
            weight.normal_(std=1 / math.sqrt(weight[0].numel()))
        else:
            weight.fill_(1.0)
        fresh[id(each)] = nn.Parameter(weight, requires_grad=each.requires_grad)
    return copy.deepcopy(model, fresh).to(device)


def save_stages(folder: Path, stages: Sequence[Stage]) -> None:
    """Write the stages of a run into its folder; a model whose code cannot be found by name leaves no file."""
    path = folder / FILE
    unfinished = path.with_name(path.name + ".tmp")
    try:
        torch.save([(stage.num_steps, stage.model) for stage in stages], unfinished)
        torch.load(unfinished, weights_only=False)
        unfinished.replace(path)
    except (pickle.PickleError, AttributeError, ImportError, TypeError):
        path.unlink(missing_ok=True)
    finally:
        unfinished.unlink(missing_ok=True)


def load_stages(folder: Path) -> tuple[Stage, ...]:
    """The stages of a run, none where it has left none or their code has moved since.

    The file is a pickle: open only folders that you wrote.
    """
    path = folder / FILE
    if not path.exists():
        return ()
    try:
        found = torch.load(path, weights_only=False)
    except ModuleNotFoundError:
        return ()
    return tuple(Stage(num_steps, model) for num_steps, model in found)
