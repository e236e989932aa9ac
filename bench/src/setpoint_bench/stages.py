"""Stages: the models that a run trained, one after the other, as the sizes by which they are built anew and timed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from setpoint.actuator.model_shapes import ModelShapes, apply_sizes, check_sizes, note_cut
from setpoint.actuator.tensors import in_format, named_tensors, swap
from setpoint.errors import GroupError
from setpoint.ledger import replace_text
from setpoint_bench.task import BenchError, Task

FILE = "stages.jsonl"


@dataclass(frozen=True)
class Stage:
    """A stretch of a run in which no tensor changed its shape.

    Args:
        num_steps: optimizer steps in it.
        widths: of the model that the run began with, by name as in `Task.dimensions`.
        shapes: of all parameters and buffers, by name.
        sizes: what cuts have set in the model's code, by module and place.
    """

    num_steps: int
    widths: Mapping[str, int]
    shapes: Mapping[str, Sequence[int]]
    sizes: Mapping[str, Mapping[str, int]]


def stage_of(model: nn.Module, widths: Mapping[str, int]) -> Stage:
    """The stage that begins with a model as it is now; `widths` are those by which the task built it."""
    sizes: dict[str, dict[str, int]] = {}
    for (module, place), size in ModelShapes.of(model).sizes.items():
        sizes.setdefault(module, {})[place] = size
    return Stage(0, dict(widths), {name: list(each.shape) for name, each in named_tensors(model).items()}, sizes)


def built(stage: Stage, task: Task) -> nn.Module:
    """A model of a stage's sizes on the task's device; its weights are fresh, since only shapes matter for time.

    Raises:
        BenchError: the task builds another model than the stage is of.
    """
    model = task.build(stage.widths)
    tensors = named_tensors(model)
    places = {(module, place): size for module, sizes in stage.sizes.items() for place, size in sizes.items()}
    dense = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if dense.keys() != stage.shapes.keys() or any(not _within(stage.shapes[name], dense[name]) for name in dense):
        raise BenchError("the task builds another model than it did then")
    try:
        check_sizes(model, places)
    except GroupError as error:
        raise BenchError(f"the task builds another model than it did then: {error}") from error
    shapes = {name: tuple(shape) for name, shape in stage.shapes.items()}
    with ExitStack() as undo:
        note_cut(model, {name: shape for name, shape in shapes.items() if shape != dense[name]}, places, undo)
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != shapes[name]:  # of tied tensors only the first
                part = tensor.detach()[tuple(slice(length) for length in shapes[name])]
                swap(tensor, in_format(part.clone(), tensor), undo)
        apply_sizes(model, places, undo)
        undo.pop_all()
    return model


def _within(shape: Sequence[int], dense: Sequence[int]) -> bool:
    return len(shape) == len(dense) and all(0 <= own <= most for own, most in zip(shape, dense, strict=True))


def save_stages(folder: Path, stages: Iterable[Stage]) -> None:
    """Write the stages of a run into its folder."""
    replace_text(folder / FILE, "".join(json.dumps(asdict(stage)) + "\n" for stage in stages))


def load_stages(folder: Path) -> tuple[Stage, ...]:
    """The stages of a run, none where it has left none.

    Raises:
        BenchError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return ()
    try:
        return tuple(_stage(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BenchError(f"{path} is damaged: delete its run's line from results.jsonl and run it again") from error


def _stage(row: Mapping[str, Any]) -> Stage:
    shapes = {name: [_count(length) for length in shape] for name, shape in row["shapes"].items()}
    sizes = {module: _counts(each) for module, each in row["sizes"].items()}
    return Stage(_count(row["num_steps"]), _counts(row["widths"]), shapes, sizes)


def _counts(row: Mapping[str, Any]) -> dict[str, int]:
    return {name: _count(value) for name, value in row.items()}


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
