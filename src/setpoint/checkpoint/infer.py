"""Infer: the sizes that go with the shapes of a cut model's tensors, where nothing else says them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool
from torch import nn

from setpoint.actuator.cut import Cut, SizePlace, plan_cut
from setpoint.actuator.model_shapes import Shapes, at_dense_shapes
from setpoint.actuator.tensors import is_persistent, named_tensors
from setpoint.errors import CheckpointError, GroupError
from setpoint.groups.example import Example
from setpoint.groups.group import Group, Place, Slice
from setpoint.groups.sizes_in_code.shim import COUNTED
from setpoint.groups.trace import trace


@dataclass(frozen=True)
class Inferred:
    """What shapes tell.

    Args:
        sizes: of the layers that PyTorch and transformers have.
        unsure: names of the modules whose own code may write sizes that no shape tells, such as a number of heads.
    """

    sizes: Mapping[SizePlace, int]
    unsure: tuple[str, ...]


def infer(model: nn.Module, shapes: Shapes) -> Inferred:
    """The sizes of layers, each from the shape of its own tensors in the dense `model` and as they are to be."""
    sizes: dict[SizePlace, int] = {}
    unsure: list[str] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        own = {key: shape for key, shape in inside.items() if "." not in key}
        found = _layer_sizes(module, own) if own else {}
        # A class of the user's may write any size; only its source tells whether it does.
        if found is None or (inside and (_writes_sizes(module.__class__) or module._non_persistent_buffers_set)):
            unsure.append(name)
        sizes.update({(name, place): size for place, size in (found or {}).items()})
    return Inferred(sizes, tuple(unsure))


def _layer_sizes(module: nn.Module, shapes: Shapes) -> dict[str, int] | None:
    """Sizes of one layer by the new shapes of its own tensors; None where these do not tell."""
    weight = shapes.get("weight") or shapes.get("running_mean") or shapes.get("bias")
    if weight is None or "parametrizations" in module._modules:
        return None
    if isinstance(module, nn.Linear) and len(weight) == 2:
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, nn.Linear):
        return {"out_features": weight[0]}
    if isinstance(module, nn.modules.conv._ConvNd) and len(weight) > 1:
        return _conv_sizes(module, weight)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": weight[0]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(weight) == 1:
        return {"normalized_shape[0]": weight[0]}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": weight[0], "embedding_dim": weight[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and len(weight) == 2:  # transformers' linear layer
        return {"nf": weight[1], "nx": weight[0]} if hasattr(module, "nx") else {"nf": weight[1]}
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


@cache
def _writes_sizes(kind: Hashable) -> bool:
    """Whether the forward of a class outside of torch calls anything that is given sizes, or cannot be read."""
    assert isinstance(kind, type)
    if kind.__module__.startswith("torch.nn."):
        return kind in (nn.MultiheadAttention, nn.Unflatten, nn.GroupNorm, nn.PixelShuffle)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in COUNTED and not all(map(_follows, node.args)):
                return True
        if isinstance(node, ast.Slice) and (node.lower or node.upper):
            return True
    return False


def _follows(size: ast.expr) -> bool:
    """Whether a size in code is -1, 1, or one that is asked of a tensor: it is right at any width."""
    if isinstance(size, ast.UnaryOp):
        size = size.operand
    if isinstance(size, ast.Constant):
        return size.value == 1
    if isinstance(size, ast.Subscript):
        return isinstance(size.value, ast.Attribute) and size.value.attr == "shape"
    return isinstance(size, ast.Call) and isinstance(size.func, ast.Attribute) and size.func.attr == "size"


def cut_to(model: nn.Module, shapes: Shapes, example: Example) -> Cut:
    """The cut of the dense model that leads to these shapes, by its groups.

    Which units were kept is not known: it takes the first ones. The model may be dense or cut, and is as before.

    Raises:
        CheckpointError: for shapes that no cut of this model's groups leads to.
    """
    # Shapes say how narrow a layer is only in comparison with the dense model, which the groups describe.
    with at_dense_shapes(model):
        groups = trace(model, example).groups
        dense = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    try:
        # A buffer that no state dict holds follows the others, and says nothing.
        known = {name: shape for name, shape in dense.items() if name in parameters or is_persistent(model, name)}
        cut = plan_cut(groups, kept_of(groups, {**known, **shapes}))
    except GroupError as error:
        raise CheckpointError(f"the state dict is of another model, or was not cut by units: {error}") from error
    for name, shape in shapes.items():
        dims = {dim: int(cut.entries[name, dim].sum()) for dim in range(len(shape)) if (name, dim) in cut.entries}
        if tuple(dims.get(dim, length) for dim, length in enumerate(dense[name])) != shape:
            raise CheckpointError(
                f"the state dict is of another model, or was not cut by units: {name!r} has shape {shape} there and "
                f"{dense[name]} in the dense model, and no cut of its groups leads from one to the other"
            )
    return cut


def kept_of(groups: tuple[Group, ...], shapes: Shapes) -> dict[str, Bool[np.ndarray, " _units"]]:
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
