"""Fit: a model takes the shapes of a state or a file, or for a while its dense ones; sizes follow from shapes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.cut import Cut, SizePlace, plan_cut
from setpoint.actuator.in_state_dict import carry_sizes
from setpoint.actuator.model_shapes import ModelShapes, Shapes, apply_sizes, by_every_name, check_sizes, note_cut
from setpoint.actuator.tensors import in_format, is_persistent, named_tensors, shapes_by_name, swap
from setpoint.errors import CheckpointError, GroupError
from setpoint.groups.example import Example
from setpoint.groups.group import Group, Place, Slice
from setpoint.groups.trace import trace


@torch.no_grad()
def fit(
    model: nn.Module,
    shapes: Shapes,
    sizes: Mapping[SizePlace, int],
    values: Mapping[str, Tensor],
    dense: Shapes | None = None,
) -> ExitStack:
    """Give a model other shapes, all or nothing; what is returned puts everything back when it is closed.

    Tensors keep their identity, device and memory format. What is not named gets its dense shape and size. A
    CheckpointError names what this model does not have, or what had another shape when it was built.

    Args:
        shapes: by name; those of tensors that are as when the model was built do not matter.
        sizes: by module and place, the integers that go with them.
        values: by name, new contents; other tensors that change hold zeros until a state is loaded.
        dense: shapes before the first cut, by name, where they are known.
    """
    known, tensors = ModelShapes.of(model), named_tensors(model)
    full = known.full(model)
    before = {name: shape for name, shape in by_every_name(dense or {}, tensors).items() if name in tensors}
    for name, shape in shapes.items():
        built, said = full.get(name), f"the state was made for another model: {name!r} has shape {shape} there"
        if built is None:
            raise CheckpointError(f"the state was made for another model: this one has no {name!r}")
        if dense is not None and shape != built != before.get(name, shape):
            raise CheckpointError(
                f"{said}, {before.get(name, shape)} before any cut, and here it was built with {built}: build the "
                "model as it was built for that run"
            )
        if len(shape) != len(built) or any(new > old for new, old in zip(shape, built, strict=True)):
            raise CheckpointError(f"{said} and {built} in the dense model, which can only become narrower")
    try:
        check_sizes(model, sizes)
    except GroupError as error:
        raise CheckpointError(f"the state was made for another model: {error}") from error
    changed = {name: shape for name, shape in shapes.items() if shape != full[name] or name in before}
    shapes = by_every_name(changed, tensors)
    after = {name: shapes.get(name, full[name]) for name in {**known.dense, **shapes}}
    every_size = {**known.dense_sizes, **sizes}  # what the state does not set is dense again
    with ExitStack() as undo:
        note_cut(model, after, every_size, undo, before)
        carry_sizes(model)
        for name in dict.fromkeys([*after, *values]):
            tensor = tensors.get(name)
            if tensor is None:  # of a head that this model does not have
                continue
            if name in values:
                swap(tensor, in_format(values[name].detach().to(tensor.device, copy=True), tensor), undo)
            elif tuple(tensor.shape) != after[name]:
                swap(tensor, in_format(tensor.new_zeros(after[name]), tensor), undo)
        apply_sizes(model, every_size, undo)
        torch.clear_autocast_cache()  # which holds weights of the old shapes by identity
        return undo.pop_all()


@contextmanager
def at_dense_shapes(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> Iterator[None]:
    """Inside, every tensor that was cut has its dense shape and holds zeros, and the model's sizes are the dense ones.

    At the end everything is as it was before: values, gradients, sizes and optimizer state, which is set aside
    meanwhile, whatever was done to them inside.
    """
    tensors, known = named_tensors(model), ModelShapes.of(model)
    with ExitStack() as undo, torch.no_grad():
        # Only the model is changed and not its record: by that it counts as dense inside.
        apply_sizes(model, known.dense_sizes, undo)
        for name, shape in known.dense.items():
            tensor = tensors[name]
            if tuple(tensor.shape) == shape:
                continue
            for optimizer in optimizers:
                if tensor in optimizer.state:
                    undo.callback(optimizer.state.__setitem__, tensor, optimizer.state.pop(tensor))
            swap(tensor, in_format(tensor.new_zeros(shape), tensor), undo)
        with torch.enable_grad():  # `no_grad` is for the swaps here and for those of `undo`
            yield


def infer_sizes(model: nn.Module, shapes: Shapes) -> tuple[dict[SizePlace, int], tuple[str, ...]]:
    """The sizes of PyTorch's own layers, each from the new shapes of its tensors, and the names of other modules.

    The code of these may write sizes that no shape tells, such as a number of heads.
    """
    sizes: dict[SizePlace, int] = {}
    unsure: list[str] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        own = {key: shape for key, shape in inside.items() if "." not in key}
        found = _layer_sizes(module, own) if own else {}
        if found is None or (inside and not type(module).__module__.startswith("torch.")):
            unsure.append(name)
        sizes.update({(name, place): size for place, size in (found or {}).items()})
    return sizes, tuple(unsure)


_LAYERS: tuple[tuple[Any, dict[str, int]], ...] = (  # which dim of a layer's weight each of its sizes is
    (nn.Linear, {"out_features": 0, "in_features": 1}),
    (nn.modules.batchnorm._NormBase, {"num_features": 0}),
    ((nn.LayerNorm, nn.RMSNorm), {f"normalized_shape[{dim}]": dim for dim in range(4)}),
    ((nn.Embedding, nn.EmbeddingBag), {"num_embeddings": 0, "embedding_dim": 1}),
    (nn.PReLU, {"num_parameters": 0}),
)


def _layer_sizes(module: nn.Module, shapes: Shapes) -> dict[str, int] | None:
    """Sizes of one layer by the new shapes of its own tensors; None where these do not tell."""
    weight = shapes.get("weight") or shapes.get("running_mean") or shapes.get("bias")
    if weight is None or "parametrizations" in module._modules:
        return None
    if isinstance(module, nn.modules.conv._ConvNd) and len(weight) > 1:
        return _conv_sizes(module, weight)
    for kinds, dims in _LAYERS:
        if isinstance(module, kinds):
            return {place: weight[dim] for place, dim in dims.items() if dim < len(weight)}
    return None


def _conv_sizes(module: nn.modules.conv._ConvNd, weight: tuple[int, ...]) -> dict[str, int] | None:
    first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
    dense = (getattr(module, first), getattr(module, second) // module.groups)
    if module.groups == 1 or weight[0] == dense[0]:
        return {first: weight[0], second: weight[1] * module.groups}
    if dense[1] == weight[1] == 1 and weight[0] * module.groups % dense[0] == 0:  # depthwise: groups go with channels
        groups = weight[0] * module.groups // dense[0]
        return {first: weight[0], second: groups, "groups": groups}
    return None


def cut_to(model: nn.Module, shapes: Shapes, example: Example) -> Cut:
    """The cut of the dense model that leads to these shapes, by its groups; a CheckpointError if none does.

    Which units were kept is not known: it takes the first ones. The model may be dense or cut, and is as before.
    """
    # Shapes say how narrow a layer is only in comparison with the dense model, which the groups describe.
    with at_dense_shapes(model):
        groups = trace(model, example).groups
        dense = shapes_by_name(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    try:
        # A buffer that no state dict holds follows the others, and says nothing.
        known = {name: shape for name, shape in dense.items() if name in parameters or is_persistent(model, name)}
        cut = plan_cut(groups, _kept_units(groups, {**known, **shapes}))
    except GroupError as error:
        raise CheckpointError(f"the state dict is of another model, or was not cut by units: {error}") from error
    # By identity: a tied tensor has several names, of which the cut has one.
    tensors = named_tensors(model)
    left = {(id(tensors[name]), dim): int(kept.sum()) for (name, dim), kept in cut.entries.items()}
    for name, shape in shapes.items():
        if tuple(left.get((id(tensors[name]), dim), length) for dim, length in enumerate(dense[name])) != shape:
            raise CheckpointError(
                f"the state dict is of another model, or was not cut by units: {name!r} has shape {shape} there and "
                f"{dense[name]} in the dense model, and no cut of its groups leads from one to the other"
            )
    return cut


def _kept_units(groups: tuple[Group, ...], shapes: Shapes) -> dict[str, Bool[np.ndarray, " _units"]]:
    """The first units of each group, as many as shapes leave: each dim is an equation in the widths of its groups."""
    parts: dict[Place, list[tuple[int, Slice]]] = {}
    for number, group in enumerate(groups):
        for place in group.slices:
            if place.dim is not None and place.tensor in shapes:
                parts.setdefault((place.tensor, place.dim), []).append((number, place))
    rows, left = np.zeros((len(parts), len(groups))), np.zeros(len(parts))
    for row, ((tensor, dim), slices) in enumerate(parts.items()):
        entries = {number: int((place.index >= 0).sum()) for number, place in slices}
        for number, count in entries.items():
            rows[row, number] = count / groups[number].num_units
        left[row] = shapes[tensor][dim] - (len(slices[0][1].index) - sum(entries.values()))
    # Least squares: a tensor in which two groups meet gives one equation for both, and some widths have several.
    widths = np.linalg.lstsq(rows, left, rcond=None)[0] if parts else np.array([g.num_units for g in groups])
    return {g.name: np.arange(g.num_units) < round(float(width)) for g, width in zip(groups, widths, strict=True)}


# Without an example: whether shapes can be those of a cut, as far as shapes alone tell. A cut takes whole groups: what
# one layer makes narrower, others read narrower. So a last layer keeps its outputs, which nothing reads, and a first
# one its inputs. Nobody knows which layer reads which, so only what no model can be like is found here.

_ALONG = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU)
_ROLES = ("fixed", "along", "made", "read", "unknown")
"""Of a dim: never cut; of another layer's width; a layer makes it, or reads it; in code that may do either."""


@dataclass(frozen=True)
class _Width:
    """A dim that is narrower than in the dense model."""

    tensor: str
    owner: str  # the layer, or the tensor where the role is unknown
    dim: int
    dense: int
    now: int
    role: str  # one of _ROLES

    def is_like(self, other: "_Width") -> bool:
        """Whether one may be the other, or several of it: positions that were flattened, gates that were fused."""
        multiple = not (self.dense % other.dense and other.dense % self.dense)
        return self.owner != other.owner and multiple and self.dense * other.now == self.now * other.dense

    @property
    def once(self) -> "_Width":
        """What it is several of, as heads that share their keys read these several times."""
        times = gcd(self.dense, self.now)
        return replace(self, dense=self.dense // times, now=self.now // times)

    @property
    def lost(self) -> int:
        return self.dense - self.now

    def may_hold(self, other: "_Width") -> bool:
        """Whether the other may be a part of it: of what was concatenated, or is split."""
        fits = self.dense > other.dense and self.now >= other.now and self.lost >= other.lost
        return fits and self.owner != other.owner


def misfit(model: nn.Module, dense: Shapes, shapes: Shapes) -> str | None:
    """What is wrong with shapes that no cut of the dense model can have; None where they may be those of a cut.

    Shapes that are wider than the dense ones are not looked at: `fit` refuses them.
    """
    if any(
        len(dense[name]) != len(shape) or any(map(int.__gt__, shape, dense[name])) for name, shape in shapes.items()
    ):
        return None
    widths, in_layer = [], dict[tuple[str, str, int], tuple[int, int]]()
    for name in named_tensors(model):
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        for dim, (before, now) in enumerate(zip(dense.get(name, ()), shapes.get(name, ()), strict=True)):
            role = _role(module, key, dim)
            if role in ("made", "along"):  # a layer's bias is as long as its weight has outputs
                place = (path, role, 0 if role == "made" else dim)
                if in_layer.setdefault(place, (before, now)) != (before, now):
                    return f"the tensors of {path!r} do not belong together: {name!r} has shape {shapes[name]}"
            if before != now:
                widths.append(_Width(name, name if role == "unknown" else path, dim, before, now, role))
    fixed, along, made, read, unknown = ([w for w in widths if w.role == role] for role in _ROLES)

    def alone(some: Iterable[_Width], *others: _Width) -> list[_Width]:
        return [width for width in some if not any(map(width.is_like, others))]

    # Two that nothing reads may meet each other: queries and keys.
    not_read = alone(made, *read, *made, *unknown)
    not_made = alone([*read, *along], *made, *unknown)
    open_ones = alone(unknown, *made, *read)  # others of their kind do not explain what they are
    # What was concatenated, or is split, is like none of its parts.
    wholes, parts = [*not_made, *unknown], [*made, *unknown]
    wrong = [width for width in not_read if not any(whole.may_hold(width.once) for whole in wholes)]
    others = [*not_made, *alone(open_ones, *unknown)]
    wrong += [width for width in others if not any(width.may_hold(part.once) for part in parts)]
    if not fixed and not wrong:
        return None
    first = [*fixed, *wrong][0]
    why = {"made": "no layer reads fewer", "fixed": "no cut drops these"}.get(first.role, "no layer makes fewer")
    there = f"{first.tensor!r} has {first.now} entries along dim {first.dim} in the state, {first.dense} in the model"
    whose = "the state is of another model, or a part of one; if not, shrink_to(model, state, example=(x,)) first"
    return f"{there}, and {why}: {whose}"


def _role(module: nn.Module, key: str, dim: int) -> str:
    if isinstance(module, _ALONG):
        return "along"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and key == "weight":
        return "made" if dim == 1 else "fixed"
    is_conv = isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1
    if not (is_conv or isinstance(module, nn.Linear)) or key not in ("weight", "bias"):
        return "unknown"
    makes = int(bool(getattr(module, "transposed", False))) if key == "weight" else 0
    return "made" if dim == makes else "read" if dim < 2 else "fixed"
