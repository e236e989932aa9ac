"""Resizes a model in training many times, and compares it with its masked twin and with its own use of memory.

python tests/faults/resized.py --count 2000
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import setpoint
from setpoint.groups.group import Group, widths_of
from setpoint.regrowth.reserve import Reserve, regrow

Store = dict[tuple[str, str], Tensor]

# Adam would divide differences of round-off by moments of nearly zero.
SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}


def tensors_of(model: nn.Module, optimizer: Optimizer) -> Store:
    """All that units lie in: parameters, buffers and moments, by name and part."""
    found = {(name, ""): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, parameter in model.named_parameters():
        for part, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[name, part] = value
    return found


def box(groups: tuple[Group, ...], active: dict[str, np.ndarray], name: str, shape: torch.Size) -> tuple[Tensor, ...]:
    """Index of the entries of a full tensor whose units are all active."""
    kept = [np.ones(length, dtype=bool) for length in shape]
    for group in groups:
        for part in group.slices:
            if part.tensor == name and part.dim is not None:
                kept[part.dim] &= np.append(active[group.name], True)[part.index]
    return tuple(torch.from_numpy(each) for each in np.ix_(*map(np.flatnonzero, kept)))


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> float:
    """One step of training."""
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


class Twin:
    """The full model; entries of units that are away rest in a store and are zero in the model around each step."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, groups: tuple[Group, ...]) -> None:
        self.model, self.groups = copy.deepcopy(model), groups
        self.optimizer = torch.optim.SGD(self.model.parameters(), **SGD)
        self.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        self.active = {group.name: np.ones(group.num_units, dtype=bool) for group in groups}
        self.store = {key: tensor.detach().clone() for key, tensor in self.tensors().items()}

    def tensors(self) -> Store:
        return tensors_of(self.model, self.optimizer)

    def live(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        """The active entries."""
        return tensor.detach()[box(self.groups, self.active, key[0], tensor.shape)]

    def change(self, active: dict[str, np.ndarray]) -> None:
        """Other units are active from now on."""
        for key, tensor in self.tensors().items():
            self.store[key][box(self.groups, self.active, key[0], tensor.shape)] = self.live(key, tensor)
            inside = box(self.groups, active, key[0], tensor.shape)
            with torch.no_grad():
                tensor.zero_()
                tensor[inside] = self.store[key][inside]
        self.active = active

    def step(self, x: Tensor, y: Tensor) -> float:
        """One step, after which entries that are away are zero again."""
        loss = step(self.model, self.optimizer, x, y)
        with torch.no_grad():
            for key, tensor in self.tensors().items():
                inside = box(self.groups, self.active, key[0], tensor.shape)
                values = tensor[inside].clone()
                tensor.zero_()
                tensor[inside] = values
        return loss


def memory() -> tuple[int, int]:
    """Bytes in tensors that are alive, and objects."""
    gc.collect()
    objects = gc.get_objects()
    alive = sum(each.numel() * each.itemsize for each in objects if issubclass(type(each), Tensor))
    return alive, len(objects)


def resident_bytes() -> int:
    """What the system has given to this process; 0 where it does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def main() -> None:
    """Resize `--count` times, and say how far model and twin are apart and how much memory has grown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    count = parser.parse_args().count
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 2)
    )
    x, chance = torch.randn(32, 4), np.random.default_rng(0)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs()], 1)
    groups = setpoint.find_groups(model, (x,))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    step(model, optimizer, x, y)
    twin, reserve, now = Twin(model, optimizer, groups), Reserve.of(model, groups), groups
    apart, marks = 0.0, []
    for number in range(count):
        active = {name: units.copy() for name, units in twin.active.items()}
        if number % 2 == 0:
            keep: dict[str, Any] = {}
            for name, width in widths_of(now).items():
                keep[name] = chance.random(width) < 0.7
                keep[name][chance.integers(width)] = True
                active[name][np.flatnonzero(active[name])[~keep[name]]] = False
            reserve = reserve.rest(model, optimizer, keep)
            now = setpoint.shrink(model, optimizer, now, keep)
        else:
            grow = {name: origins[chance.random(len(origins)) < 0.7] for name, origins in reserve.origins().items()}
            now, reserve = regrow(model, optimizer, now, reserve, grow)
            for name, origins in grow.items():
                active[name][origins] = True
        twin.change(active)
        losses = step(model, optimizer, x, y), twin.step(x, y)
        apart = max(apart, abs(losses[0] - losses[1]))
        live, full = tensors_of(model, optimizer), twin.tensors()
        apart = max(
            apart,
            *(float((live[key].detach() - twin.live(key, full[key])).abs().max()) for key in live if live[key].numel()),
        )
        if number in (count // 5, count - 1):
            # Everything is there, so both marks are of models of one size.
            now, reserve = regrow(model, optimizer, now, reserve, reserve.origins())
            twin.change({name: np.ones(len(units), dtype=bool) for name, units in twin.active.items()})
            live, full = {}, {}
            for each in (optimizer, twin.optimizer):
                each.zero_grad()
            marks.append((*memory(), resident_bytes()))
    (bytes_before, objects_before, resident_before), (bytes_after, objects_after, resident_after) = marks
    grown = resident_after - resident_before
    print(
        f"{count} resizes: at most {apart:.1e} from the twin; tensors {bytes_before} -> {bytes_after} bytes, "
        f"objects {objects_before} -> {objects_after}, process {grown / 2**20:+.1f} MiB; loss {losses[0]:.4f}"
    )
    steady = bytes_after <= bytes_before and objects_after <= objects_before + 50 and grown < 32 * 2**20
    sys.exit(not (steady and apart < 1e-10))


if __name__ == "__main__":
    main()
