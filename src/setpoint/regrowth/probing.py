"""Probing: resting units take part in an ordinary training step of the user with outgoing weights at zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from setpoint.actuator.cut import cut_groups
from setpoint.actuator.model_shapes import apply_sizes
from setpoint.actuator.tensors import named_tensors
from setpoint.distributed import is_sharded_tensor
from setpoint.groups.group import Group
from setpoint.regrowth.accumulated import RunningSum
from setpoint.regrowth.regrow import Grow, enlarge, new_sizes, with_units
from setpoint.regrowth.reserve import Key, Reserve, corner
from setpoint.regrowth.sentinel import Sentinels
from setpoint.sensor.units import UnitSum

Place = tuple[dict[str, Any], str, Tensor]
"""A table of a module's parameters, a key in it, and what is there."""


@dataclass(frozen=True, eq=False)
class _Wide:
    """A tensor as it is while units are present."""

    live: Tensor  # the model's own tensor
    base: Tensor  # the wide tensor, outgoing weights of present units at zero; live entries are filled in
    index: tuple[Tensor, ...]  # where the live entries lie in it
    weights: tuple[tuple[str, Tensor, UnitSum], ...]  # by group, resting outgoing weights (else 0), their sums by unit


class Probing:
    """Resting units present in every training forward of a model, from `start` to `stop`.

    Parameters, buffers and sizes of the modules are replaced by wide ones when a forward pass in training mode with
    gradients begins, and restored as soon as it ends. The wide tensors are computed from the live ones within the
    graph, so the live parameters get exactly the gradients of an unprobed step. Nothing else ever sees the resting
    units: neither the optimizer, nor clipping, nor an evaluation or a checkpoint in between. Running statistics of live
    units are kept, those of resting ones are not. Outputs and gradients equal those of the shrunk model up to the order
    of summation. Dropout draws more random numbers.

    With `dL/dw` at the zeroed outgoing weights of a unit and `w` the resting ones, the loss falls by `gain = -sum(w *
    dL/dw)` to first order when the unit is regrown. Gradients that are scaled or clipped after the backward pass have
    another scale than the sensor's; `Sentinels.factor` gives the ratio.

    Where `fully_shard` has sharded the model, a parameter is replaced while it is unsharded, as `brackets` tell. An
    interrupt in the middle of a forward pass leaves wide tensors in place until `stop`.

    Args:
        grow: by group, origins of the units to be present.
        in_training: present in training mode only; False for a trial of a model in eval mode.
        brackets: modules that are unsharded for their forward pass, with the places of their unsharded parameters;
            beside each is its sharded parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        reserve: Reserve,
        grow: Grow,
        in_training: bool = True,
        brackets: Sequence[tuple[nn.Module, Sequence[Place]]] = (),
    ) -> None:
        self.num_forwards = 0
        """Forward passes in which the units were present."""
        self._model, self._in_training = model, in_training
        active = with_units(reserve, grow)
        self._groups = cut_groups(reserve.groups, active)
        self._arrived = {
            name: np.flatnonzero(~reserve.active[name][active[name]]) for name, origins in grow.items() if len(origins)
        }
        self._wide = {id(each.live): each for each in _widened(model, reserve, grow, self._groups, self._arrived)}
        tables: Any = [table for module in model.modules() for table in (module._parameters, module._buffers)]
        places = [(t, key, tensor) for t in tables for key, tensor in t.items() if id(tensor) in self._wide]
        self._places = [each for each in places if not is_sharded_tensor(each[2])]
        self._brackets = brackets
        self._whole: dict[nn.Module, list[Place]] = {}
        # Calls stay corrected, since a forward that has begun is the corrected one.
        counts = reserve.counts(active)
        self._sizes = {at: counts[at] for at in new_sizes(model, reserve, active, grow)}
        self._gains: dict[tuple[int, str], RunningSum] = {}
        self._means: dict[str, Tensor] | None = None
        self._sentinels = Sentinels(model.parameters())
        self._undo: ExitStack | None = None
        self._handles: list[Any] = []

    def start(self) -> None:
        """Make the units present in training forwards from now on."""
        self._handles = [
            register_module_forward_pre_hook(self._ahead),
            register_module_forward_hook(self._behind, always_call=True),
        ]
        self._sentinels.start()
        # These run inside `fully_shard`'s hooks: after it has unsharded, and (prepended) before it shards again.
        for module, parameters in self._brackets:
            self._handles += [
                module.register_forward_pre_hook(partial(self._whole_begins, parameters)),
                module.register_forward_hook(self._whole_ends, prepend=True, always_call=True),
            ]

    def stop(self) -> None:
        """Make them absent again, and remove the hooks; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._sentinels.stop()
        for total in self._gains.values():
            total.stop()
        self._restore()

    def share(self, mean: Callable[[Float64[np.ndarray, " n"]], Float64[np.ndarray, " n"]]) -> None:
        """Replace what this rank has seen of its own samples by the mean over ranks; unseen counts as zero.

        Gains are linear in gradients, so their mean is that for the loss of all samples. All ranks call this in probed
        steps.
        """
        units = {group.name: group.num_units for group in self._groups}
        shapes: dict[Any, Any] = {id(p): p.shape for p in self._sentinels.parameters} | {
            each: (units[each],) for each in self._arrived
        }
        seen: dict[Any, Tensor] = {**self._sentinels.left(), **self._totals()}
        own = {key: seen.get(key, torch.zeros(shape, dtype=torch.float64)) for key, shape in shapes.items()}
        there = np.array([key in seen for key in own], np.float64)
        anywhere, *means = np.split(
            mean(np.concatenate([there, *(each.cpu().numpy().ravel() for each in own.values())])),
            np.cumsum([len(own), *(each.numel() for each in own.values())])[:-1],
        )
        device = next((p.device for p in self._sentinels.parameters), None)
        found = {
            key: torch.from_numpy(values).view(shapes[key]).to(device)
            for key, values, share in zip(own, means, anywhere, strict=True)
            if share
        }
        self._sentinels.arrived = {key: each for key, each in found.items() if key not in self._arrived}
        self._means = {key: each for key, each in found.items() if key in self._arrived}

    def gains(self, grad_scale: Tensor | None = None) -> dict[str, Float64[np.ndarray, " present"]] | None:
        """Gain of each present unit, in the order of their origins; None without a backward pass, or with a NaN in it.

        Call it when all gradients of the step are ready, before the optimizer moves the weights; `grad_scale` is what
        they are still multiplied by. Only backward passes count whose gradients are still there: none that a GradScaler
        skipped.
        """
        factor = self._sentinels.factor(self._sentinels.gradients())
        gains = self._totals() if self._means is None else self._means
        if factor is None or not gains:
            return None
        factor = factor if grad_scale is None else factor / grad_scale
        found = {}
        for name, came_back in self._arrived.items():
            total = gains.get(name)
            values = np.zeros(len(came_back)) if total is None else (factor * total).cpu().numpy()[came_back]
            if not np.isfinite(values).all():
                return None
            found[name] = values
        return found

    def _totals(self) -> dict[str, Tensor]:
        """By group, the gains of the backward passes that count, over all weights."""
        found: dict[str, Tensor] = {}
        for (_, name), gain in self._gains.items():
            if (total := gain.total()) is not None:
                found[name] = found[name] + total if name in found else total
        return found

    def _ahead(self, module: nn.Module, args: Any) -> None:
        if module is not self._model or self._undo is not None or not torch.is_grad_enabled():
            return
        if self._in_training and not module.training:
            return
        if any(table.get(key) is not tensor for table, key, tensor in self._places):
            return  # run with other tensors than the model's own, as torch.func.functional_call does
        undo = ExitStack()
        try:
            wide = {id(tensor): self._filled(self._wide[id(tensor)], tensor) for _, _, tensor in self._places}
            for table, key, tensor in self._places:
                undo.callback(self._put_back, table, key, tensor)
                table[key] = wide[id(tensor)]
            apply_sizes(module, self._sizes, undo)
        except BaseException:
            undo.close()
            raise
        self._undo = undo
        self.num_forwards += 1

    def _behind(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._model:
            self._restore()

    def _whole_begins(self, parameters: Sequence[Place], module: nn.Module, _: Any) -> None:
        """Put wide tensors in the place of a module's parameters, which are unsharded from now on."""
        if self._undo is None:
            return
        sentinels = {id(each): each for each in self._sentinels.parameters}
        for table, key, parameter in parameters:
            live = table[key]
            if id(parameter) in sentinels:
                self._sentinels.watch(sentinels[id(parameter)], live)
            if id(parameter) in self._wide:
                self._whole.setdefault(module, []).append((table, key, live))
                table[key] = self._filled(self._wide[id(parameter)], live)

    def _whole_ends(self, module: nn.Module, *_: Any) -> None:
        """Put the live tensors back, before they are sharded again."""
        for table, key, live in self._whole.pop(module, []):
            table[key] = live

    def _restore(self) -> None:
        for module in tuple(self._whole):
            self._whole_ends(module)
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def _put_back(self, table: dict[str, Any], key: str, tensor: Tensor) -> None:
        wide, table[key] = table[key], tensor
        if not isinstance(tensor, nn.Parameter):
            with torch.no_grad():
                # The forward has updated the wide buffer: running statistics of live units are kept.
                tensor.copy_(wide[self._wide[id(tensor)].index])

    def _filled(self, wide: _Wide, tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            for name, *_ in wide.weights:
                if (id(wide.live), name) not in self._gains:
                    self._gains[id(wide.live), name] = RunningSum(wide.live)
            return _Embed.apply(tensor, wide.base, wide.index, partial(self._note, wide))  # type: ignore[no-any-return, no-untyped-call]
        filled = wide.base.to(tensor.dtype, copy=True)
        filled[wide.index] = tensor
        return filled

    def _note(self, wide: _Wide, gradient: Tensor) -> None:
        for name, weights, sums in wide.weights:
            lost = sums.add_up(sums.select(weights) * sums.select(gradient).to(weights.dtype)).double()
            self._gains[id(wide.live), name].bring(-lost)


class _Embed(torch.autograd.Function):
    """A live parameter filled into its wide base; `note` gets the gradient of the wide one."""

    @staticmethod
    def forward(
        ctx: Any, live: Tensor, base: Tensor, index: tuple[Tensor, ...], note: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.index, ctx.note = index, note
        wide = base.to(live.dtype, copy=True)  # which a mixed-precision policy may have chosen
        wide[index] = live.detach()
        return wide

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.note(gradient.detach())
        return gradient[ctx.index], None, None, None


def _widened(
    model: nn.Module, reserve: Reserve, grow: Grow, groups: tuple[Group, ...], grown: Mapping[str, Any]
) -> list[_Wide]:
    """Every tensor in which present units lie."""
    tensors, names = named_tensors(model), reserve.names(grow)
    reserve = reserve.gathered(names)
    active = with_units(reserve, grow)
    live, larger = reserve.boxes(reserve.active), reserve.boxes(active)
    known = reserve.outlines()
    found = []
    for name in sorted(names):
        tensor = tensors[name]
        # Live entries are filled in later, so a sharded tensor need not be gathered here.
        like = (
            torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) if is_sharded_tensor(tensor) else tensor
        )
        base = enlarge(reserve, Key("model", name), like, known[name], live[name], larger[name])
        weights = []
        for group in groups:
            for part in group.slices if group.name in grown else ():
                if part.tensor != name or part.role != "consume" or part.dim is None:
                    continue
                entries = torch.from_numpy(np.flatnonzero(np.isin(part.index, grown[group.name]))).to(base.device)
                wide = torch.promote_types(base.dtype, torch.float32)
                resting = torch.zeros(base.shape, dtype=wide, device=base.device)
                resting.index_copy_(part.dim, entries, base.index_select(part.dim, entries).to(wide))
                weights.append((group.name, resting, UnitSum.of(part, group.num_units, base.device), part.dim, entries))
        for *_, dim, entries in weights:
            # Only now: a second group's resting weights may lie in the same entries, and are read above.
            base.index_fill_(dim, entries, 0)
        index = corner(base, {dim: live[name][dim][kept] for dim, kept in larger[name].items()})
        found.append(_Wide(tensor, base, index, tuple((each, kept, sums) for each, kept, sums, *_ in weights)))
    return found
