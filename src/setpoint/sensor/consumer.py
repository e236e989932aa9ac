"""A consumer: a layer whose weights read the units of a group, as one linear map of the part of its input that is data.

Positions that only fill a batch up are found by `Padding`.
"""

import inspect
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from types import MethodType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from setpoint.distributed import plain_kind, unsharded_tensor
from setpoint.groups.group import Group, Slice


class Hook:
    """Calls a function from a hook; none on a copy of the module, after unpickling, or while code is traced.

    A method is called as long as its object lives: a model must not keep alive what nobody reads any more.
    """

    def __init__(self, call: Callable[..., None] | None = None, *given: Any) -> None:
        self._call, self._given = call and weakly(call), given

    def __call__(self, *args: Any) -> None:
        if self._call is not None and not (torch.compiler.is_compiling() or torch._C._is_tracing()):
            self._call(*self._given, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


def weakly(call: Callable[..., None]) -> Callable[..., None]:
    """The function; a method only as long as its object lives."""
    known = weakref.WeakMethod(call) if isinstance(call, MethodType) else lambda: call

    def call_if_alive(*args: Any) -> None:
        if (alive := known()) is not None:
            alive(*args)

    return call_if_alive


class Padding:
    """Hooks that note the positions which are data, `real`, of each forward until `remove`.

    They are those of the last `attention_mask` with a place for each position that a module took; masks of pairs of
    query and key change nothing. Where a module is given None, nothing is padding.
    """

    def __init__(self, model: nn.Module) -> None:
        self.real: Bool[Tensor, "batch positions"] | None = None
        self._handles = [model.register_forward_pre_hook(Hook(lambda *_: self._note(None)))]
        for module in model.modules():
            names = _mask_arguments(getattr(type(module), "forward", None))
            if names:
                self._handles.append(module.register_forward_pre_hook(Hook(self._look, names), with_kwargs=True))

    def _look(
        self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        # In cross attention the mask is of the keys, which are another sequence.
        crossing = given.get("encoder_hidden_states") is not None and "encoder_attention_mask" not in names
        if not crossing and given.get("key_value_states") is None:
            self._note(given.get("attention_mask"))

    def _note(self, mask: Any) -> None:
        if mask is None:
            self.real = None
        elif isinstance(mask, Tensor) and mask.dim() == 2:
            self.real = mask != 0

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.real = None


@lru_cache(maxsize=4096)
def _mask_arguments(forward: Callable[..., Any] | None) -> tuple[str, ...]:
    """The arguments of a class's forward, without `self`, if a mask is among them."""
    try:
        names = tuple(inspect.signature(forward).parameters)[1:]  # type: ignore[arg-type]
    except (TypeError, ValueError):  # scripted code has no plain function
        return ()
    return names if "attention_mask" in names else ()


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer `y = W x` in which each unit of a group owns equally many columns of W.

    A *column* is a channel of the input; of a convolution, a channel at one offset of the kernel. A unit owns several
    where it has several channels (a head, a channel that was flattened) or the kernel several offsets. A *row* is one
    position at which the layer is applied: a token, or the patch under a kernel.
    """

    group: str  # its name
    layer: str  # qualified name
    channels: Int[np.ndarray, "units each"]  # of the layer's input, by unit
    num_offsets: int = 1  # of the kernel

    @property
    def num_units(self) -> int:
        return int(self.channels.shape[0])

    @property
    def num_columns(self) -> int:
        """Columns that one unit owns."""
        return int(self.channels.shape[1]) * self.num_offsets

    @property
    def columns(self) -> Int[np.ndarray, " all_columns"]:
        """The columns of all units, one unit's after the other's."""
        return (self.channels[..., None] * self.num_offsets + np.arange(self.num_offsets)).ravel()

    def weight(self, model: nn.Module) -> Float[Tensor, "columns outputs"]:
        """The layer's weights for the units, one unit's columns after the other's; of shards, a collective call."""
        layer = model.get_submodule(self.layer)
        columns = by_column(layer, unsharded_tensor(layer.weight.detach()))  # type: ignore[operator]
        return columns[self._channels(columns)].flatten(0, 1)

    def _channels(self, like: Tensor) -> Tensor:
        return torch.from_numpy(self.channels.ravel()).to(like.device)


Layers = Mapping[int, Sequence[tuple[str, nn.Module]]]  # name and layer by the id of the weight: several if it is tied


def layers_by_weight(model: nn.Module) -> Layers:
    """All layers of a model that have a weight."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "weight", None), nn.Parameter):
            found.setdefault(id(layer.weight), []).append((name, layer))
    return found


def parameter_named(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of a qualified name, None where a buffer has it, without a look at all others."""
    owner, _, key = name.rpartition(".")
    return model.get_submodule(owner)._parameters.get(key)


def find_consumers(group: Group, model: nn.Module, layers: Layers | None = None) -> tuple[Consumer, ...]:
    """Every layer that reads the units of a group; none where one of its readers is not such a layer."""
    layers = layers_by_weight(model) if layers is None else layers
    found: list[Consumer] = []
    for place in group.slices:
        if place.role != "consume":
            continue
        weight, channels = parameter_named(model, place.tensor), _channels_by_unit(group, place)
        if weight is None or channels is None:
            return ()
        readers = [name for name, layer in layers.get(id(weight), ()) if input_dim(layer) == place.dim]
        if not readers:
            return ()
        num_offsets = math.prod(weight.shape[2:])
        found += [Consumer(group.name, name, channels, num_offsets) for name in readers]
    return tuple(found)


def _channels_by_unit(group: Group, place: Slice) -> Int[np.ndarray, "units each"] | None:
    """None where units have unlike numbers of channels: they would need matrices of unlike sizes in an elimination."""
    counts = np.bincount(place.index[place.index >= 0], minlength=group.num_units)
    if group.kind != "unit" or not len(counts) or counts.min() < 1 or (counts != counts[0]).any():
        return None
    order = np.argsort(place.index, kind="stable")
    return order[len(order) - int(counts.sum()) :].reshape(group.num_units, -1)


def input_dim(layer: nn.Module) -> int | None:
    """The dim of the weight along which the channels of the layer's input lie; None for a layer that is not known."""
    kind, weight = plain_kind(layer), getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return 0
    # Torch's own attention has an `out_proj` whose weight it multiplies with itself, without calling the layer.
    if isinstance(layer, nn.Linear) and kind.__name__ != "NonDynamicallyQuantizableLinear":
        return 1 if tuple(weight.shape) == (layer.out_features, layer.in_features) else None
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or layer.groups > 1 or layer.padding_mode != "zeros":
        return None
    plain = kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    # A subclass may pad by itself, which a kernel of one offset does not show.
    return 1 if plain or math.prod(layer.kernel_size) == 1 else None


def by_column(layer: nn.Module, weight: Tensor) -> Float[Tensor, "channels offsets outputs"]:
    """A layer's weight with the channels of its input first and its outputs last, as a view."""
    inputs_first = weight.transpose(0, 1) if input_dim(layer) == 1 else weight
    return inputs_first.flatten(2).movedim(1, -1) if weight.dim() > 2 else inputs_first[:, None]


def from_columns(layer: nn.Module, columns: Float[Tensor, "channels offsets outputs"]) -> Tensor:
    """The weight that `by_column` makes these columns of."""
    like: Any = layer.weight
    channels, _, outputs = columns.shape
    inputs_first = columns.movedim(-1, 1).reshape(channels, outputs, *like.shape[2:])
    return inputs_first.transpose(0, 1) if input_dim(layer) == 1 else inputs_first


def input_rows(
    layer: nn.Module, x: Tensor, count: int, real: Bool[Tensor, "batch positions"] | None = None
) -> Float[Tensor, "rows channels offsets"]:
    """The layer's input at up to `count` positions, picked evenly: tokens, or patches under a kernel.

    `real`, the tokens that are no padding, is without effect on an input of another number of tokens, or of patches.
    """
    if not isinstance(layer, nn.modules.conv._ConvNd):
        tokens = x.detach().reshape(-1, x.shape[-1])
        if real is not None and real.numel() == len(tokens):
            tokens = tokens[real.flatten().to(x.device)]
        return tokens[_picked(len(tokens), count).to(x.device), :, None]
    images = x.detach() if x.dim() == layer.weight.dim() else x.detach()[None]
    sizes: Any = images.shape[2:]
    spans = np.multiply(layer.dilation, np.subtract(layer.kernel_size, 1))  # from a kernel's first pixel to its last
    zeros = spans if layer.padding == "same" else np.multiply(0 if layer.padding == "valid" else layer.padding, 2)
    starts = np.broadcast_to(zeros // 2, spans.shape)  # zeros in front of the image; the others are behind it
    lengths = (np.add(sizes, zeros) - spans - 1) // layer.stride + 1
    total = len(images) * math.prod(lengths.tolist())
    image, *places = np.unravel_index(_picked(total, count).numpy(), (len(images), *lengths))
    offsets = np.array(list(product(*map(range, layer.kernel_size))), dtype=np.int64)
    inside, index = np.ones((len(image), len(offsets)), dtype=bool), [image[:, None]]
    for dim, place in enumerate(places):
        at = (place * layer.stride[dim] - starts[dim])[:, None] + offsets[:, dim] * layer.dilation[dim]
        inside &= (at >= 0) & (at < sizes[dim])
        index.append(at.clip(0, sizes[dim] - 1))
    pixels: list[Any] = [torch.from_numpy(along).to(x.device) for along in index]
    patches = images[(pixels[0], slice(None), *pixels[1:])]
    return torch.where(torch.from_numpy(inside).to(x.device)[..., None], patches, 0).transpose(1, 2)


@lru_cache(maxsize=256)
def _picked(total: int, count: int) -> Int[Tensor, " picked"]:
    """Up to `count` of so many positions, without random numbers."""
    if total <= count:
        return torch.arange(total)
    # Multiples of the golden ratio, modulo 1, lie evenly and in step with nothing: equal distances would show always
    # the same pixels of an image.
    return ((torch.arange(1, count + 1, dtype=torch.float64) * 0.6180339887498949) % 1.0 * total).long()
