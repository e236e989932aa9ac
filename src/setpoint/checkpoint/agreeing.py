"""Agreement: whether sizes and shapes that a file brings for a model go together, before any of them is taken over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from setpoint.actuator.cut import SizePlace
from setpoint.actuator.shrink import named_tensors
from setpoint.errors import CheckpointError, GroupError
from setpoint.groups.place import is_call, read_size
from setpoint.groups.shim import HEADS, get_call_sizes, largest_size

Shape = tuple[int, ...]
Equations = Iterator[tuple[str, float, float]]
"""What is equal in a layer: in words, and both sides; NaN, which equals nothing, where one is not known."""

_GATES = {"LSTM": 4, "GRU": 3}


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer as it is, or as it would be with other shapes and sizes.

    Args:
        sizes: that are to be set; None for the layer as it is.
        read: collects the places that are asked for.
    """

    name: str
    module: nn.Module
    shapes: Mapping[str, Shape]
    sizes: Mapping[SizePlace, int] | None = None
    read: set[str] = field(default_factory=set)

    def size(self, place: str, *, computes: bool = False) -> float:
        """The integer at a place; one that the layer does not compute with may stay as it was, and says nothing."""
        self.read.add(place)
        if self.sizes is not None and ((self.name, place) in self.sizes or not computes):
            return self.sizes.get((self.name, place), math.nan)
        if is_call(place):
            return get_call_sizes(self.module).get(place, math.nan)
        try:
            return read_size(self.module, place)
        except GroupError:
            return math.nan

    def length(self, tensor: str, dim: int = 0) -> float:
        """The length of a dim of a tensor."""
        shape = self.shapes.get(f"{self.name}.{tensor}" if self.name else tensor, ())
        return shape[dim] if dim < len(shape) else math.nan


def _linear(layer: _Layer) -> Equations:
    yield "out_features", layer.size("out_features"), layer.length("weight")
    yield "in_features", layer.size("in_features"), layer.length("weight", 1)
    yield "the rows of weight", layer.length("bias"), layer.length("weight")


def _conv(layer: _Layer) -> Equations:
    conv, groups = layer.module, layer.size("groups", computes=True)
    assert isinstance(conv, nn.modules.conv._ConvNd)
    first, second = ("in_channels", "out_channels") if conv.transposed else ("out_channels", "in_channels")
    across = layer.length("weight", 1) * groups
    yield first, layer.size(first), layer.length("weight")
    yield second, layer.size(second), across
    yield f"the remainder of {first} by groups", 0, layer.length("weight") % max(groups, 1)
    yield "out_channels", layer.length("bias"), across if conv.transposed else layer.length("weight")
    for dim, size in enumerate(conv.kernel_size, start=2):
        yield "kernel_size", size, layer.length("weight", dim)


def _batch_norm(layer: _Layer) -> Equations:
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        yield "num_features", layer.size("num_features"), layer.length(tensor)
        yield f"the length of {tensor}", layer.length("weight"), layer.length(tensor)
        yield f"the length of {tensor}", layer.length("running_mean"), layer.length(tensor)


def _group_norm(layer: _Layer) -> Equations:
    groups = layer.size("num_groups", computes=True)
    yield "num_channels", layer.size("num_channels"), layer.length("weight")
    yield "the remainder of num_channels by num_groups", 0, layer.length("weight") % max(groups, 1)
    yield "the length of bias", layer.length("weight"), layer.length("bias")


def _shape_norm(layer: _Layer) -> Equations:
    norm = layer.module
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
    for dim in range(len(norm.normalized_shape)):
        place = f"normalized_shape[{dim}]"
        for tensor in ("weight", "bias"):
            yield place, layer.size(place, computes=True), layer.length(tensor, dim)


def _embedding(layer: _Layer) -> Equations:
    yield "num_embeddings", layer.size("num_embeddings"), layer.length("weight")
    yield "embedding_dim", layer.size("embedding_dim"), layer.length("weight", 1)


def _prelu(layer: _Layer) -> Equations:
    yield "num_parameters", layer.size("num_parameters"), layer.length("weight")


def _recurrent(layer: _Layer) -> Equations:
    module = layer.module
    kind = getattr(module, "mode", type(module).__name__.removesuffix("Cell"))
    gates, proj = _GATES.get(str(kind), 1), layer.size("proj_size", computes=True) or math.nan
    hidden, inputs = (layer.size(place, computes=True) for place in ("hidden_size", "input_size"))
    out = hidden if math.isnan(proj) else proj
    directions = 2 if getattr(module, "bidirectional", False) else 1
    for tensor in module._parameters:
        yield f"the rows of {tensor}", proj if "_hr" in tensor else gates * hidden, layer.length(tensor)
        deep = tensor.removesuffix("_reverse") not in ("weight_ih", "weight_ih_l0")
        columns = {"weight_ih": directions * out if deep else inputs, "weight_hh": out, "weight_hr": hidden}
        if tensor[:9] in columns:
            yield f"the columns of {tensor}", columns[tensor[:9]], layer.length(tensor, 1)


def _attention(layer: _Layer) -> Equations:
    attention = layer.module
    assert isinstance(attention, nn.MultiheadAttention)
    heads = layer.size(HEADS, computes=True)
    inner = attention.head_dim * (attention.num_heads if math.isnan(heads) else heads)
    yield "the columns of out_proj by heads", inner, layer.length("out_proj.weight", 1)
    for tensor in ("in_proj_weight", "in_proj_bias"):
        yield f"the rows of {tensor} by heads", 3 * inner, layer.length(tensor)
    for part in "qkv":
        yield f"the rows of {part}_proj_weight by heads", inner, layer.length(f"{part}_proj_weight")
        yield f"the length of bias_{part} by heads", inner, layer.length(f"bias_{part}", 2)


_KINDS: tuple[tuple[tuple[type[nn.Module], ...], Callable[[_Layer], Equations]], ...] = (
    ((nn.Linear,), _linear),
    ((nn.modules.conv._ConvNd,), _conv),
    ((nn.modules.batchnorm._NormBase,), _batch_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _shape_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    ((nn.PReLU,), _prelu),
    ((nn.RNNBase, nn.RNNCellBase), _recurrent),
    ((nn.MultiheadAttention,), _attention),
)


def check_agreement(model: nn.Module, shapes: Mapping[str, Shape], sizes: Mapping[SizePlace, int]) -> None:
    """Check that a model can have these shapes and sizes: what is equal in PyTorch's own layers must stay equal.

    What is not equal in the model as it is, as in a layer with weights of another kind, says nothing. Of a size that
    has a name in the model's own code nothing is known but that it becomes no larger.

    Args:
        shapes: of every tensor, by name, as it is to be.
        sizes: what is to be set, by module and place; all other sizes stay.

    Raises:
        CheckpointError: naming the first layer or place that does not go with them.
    """
    for (name, place), size in sizes.items():
        _check_place(model, name, place, size)
    _check_pieces(sizes)
    live = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    for name, module in model.named_modules():
        equations = next((found for kinds, found in _KINDS if isinstance(module, kinds)), None)
        if equations is None:
            continue
        now, then = _Layer(name, module, live), _Layer(name, module, shapes, sizes)
        for (_, *before), (what, one, other) in zip(equations(now), equations(then), strict=True):
            if before[0] == before[1] and one != other and not math.isnan(one):
                raise CheckpointError(
                    f"the file was made for another model: {what} of {name or 'the model'!r} would be {one} and {other}"
                )
        odd = {place for owner, place in sizes if owner == name} - now.read
        if odd and type(module).__module__.startswith("torch.nn."):
            raise CheckpointError(
                f"the file was made for another model: {min(odd)!r} of {name or 'the model'!r}, a "
                f"{type(module).__name__}, is no size that a cut changes"
            )


def _check_place(model: nn.Module, name: str, place: str, size: int) -> None:
    try:
        module = model.get_submodule(name)
        most = largest_size(module, place) if is_call(place) else read_size(module, place)
    except (AttributeError, GroupError) as error:
        raise CheckpointError(f"the file was made for another model: {error}") from error
    if size > most:
        raise CheckpointError(
            f"the file was made for another model: it sets {name}.{place} to {size}, more than the model has; "
            "`into` must be the dense model that was shrunk"
        )


def _check_pieces(sizes: Mapping[SizePlace, int]) -> None:
    """Check that of a split into pieces the sizes of all are known."""
    pieces: dict[tuple[str, str], set[str]] = {}
    for name, place in sizes:
        call, _, argument = place.partition("=")[0].removesuffix("]").partition("[")
        if call.partition("#")[0] in ("split", "chunk"):
            pieces.setdefault((name, call), set()).add(argument)
    for (name, call), found in pieces.items():
        if found != set(map(str, range(len(found)))):
            raise CheckpointError(
                f"the file was made for another model: not all pieces of {call} of {name!r} have a size"
            )
