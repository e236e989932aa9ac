"""Folders of pretrained models: `setpoint.json` beside the weights says how narrow a cut model's layers are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from setpoint.actuator.carried import Carried
from setpoint.actuator.lift import was_cut
from setpoint.checkpoint.fit import dense_shapes, fill, fit
from setpoint.checkpoint.model_file import SIZES_FILE
from setpoint.distributed import unwrapped
from setpoint.errors import CheckpointError


def write_sizes(model: nn.Module, folder: Path) -> None:
    """Write the sizes of a cut model into its folder; for a model that was never cut, remove the file."""
    file, model = folder / SIZES_FILE, unwrapped(model)
    carried = Carried.of(model) if was_cut(model) else None
    if carried is None:
        file.unlink(missing_ok=True)
        return
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    plain = carried.plain()
    plain["shapes"] = {name: list(tensors[name].shape) for name in carried.dense if name in tensors}
    plain["transient"] = {
        name: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
        for name, value in carried.transient.items()
    }
    file.write_text(json.dumps(plain, indent=1), encoding="utf-8")


def read_sizes(file: Path, model: nn.Module, base: str) -> None:
    """Give a model, on the meta device or not, the shapes and sizes of a folder, whose weights are to be loaded next.

    Args:
        file: that `write_sizes` wrote.
        model: as its code builds it: of the class that was saved, or its base model, or one with a head on that.
        base: name of the base model in models with a head, such as "bert".

    Raises:
        CheckpointError: for a damaged file, or one of another model; the model is then as before.
    """
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        shapes = {str(name): tuple(map(int, shape)) for name, shape in plain["shapes"].items()}
        plain["transient"] = {
            name: torch.tensor(each["values"], dtype=getattr(torch, each["dtype"]))
            for name, each in plain["transient"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{str(file)!r} is damaged: {error!r}. Save the model anew") from error
    carried = Carried.parse(plain)
    modules = dict(model.named_modules())
    names = {name for name, _ in carried.sizes if name}
    if not names <= modules.keys():
        inside = {name.removeprefix(f"{base}.") for name in names if name.startswith(f"{base}.")}
        if inside and inside <= modules.keys():
            carried, shapes = _renamed(carried, shapes, f"{base}.", "")
        elif {f"{base}.{name}" for name in names} <= modules.keys():
            carried, shapes = _renamed(carried, shapes, "", f"{base}.")
    own = dense_shapes(model)
    if shapes and all(own.get(name) == shape for name, shape in shapes.items()):
        return  # the model's config says its widths already
    fill(model, carried.transient, fit(model, shapes, carried.sizes))


def _renamed(
    carried: Carried, shapes: Mapping[str, tuple[int, ...]], old: str, new: str
) -> tuple[Carried, dict[str, tuple[int, ...]]]:
    """With names that begin otherwise; what does not begin so belongs to a head that is not there."""

    def of(names: Mapping[str, Any]) -> dict[str, Any]:
        return {new + name.removeprefix(old): value for name, value in names.items() if name.startswith(old)}

    sizes = {
        ((new + module.removeprefix(old)).rstrip("."), place): size
        for (module, place), size in carried.sizes.items()
        if f"{module}.".startswith(old)
    }
    return replace(carried, sizes=sizes, dense=of(carried.dense), transient=of(carried.transient)), of(shapes)
