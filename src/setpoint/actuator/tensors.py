"""Tensors: a model's by name, new contents for one, some entries of one, and the state that optimizers keep for it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from setpoint.errors import LoopError, OptimizerError
from setpoint.messages import a_type


def check_data(model: nn.Module) -> None:
    """Check that tensors have data, those of the model and new ones, or raise LoopError."""
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta and not is_lazy(tensor):  # discovery says what to do about a lazy one
            raise LoopError(
                f"{name!r} is on the meta device and has no data: give the model data first, "
                "model.to_empty(device=...) and its values, and call this then"
            )
        owner, _, last = name.rpartition(".")
        if last == "weight" and not tensor.is_floating_point() and isinstance(model.get_submodule(owner), nn.Linear):
            raise LoopError(
                f"{name!r} is quantized, in codes of {tensor.dtype} and shape {tuple(tensor.shape)}. Load the model "
                "in 16 bit, without a quantization_config, attach, save what is cut, and quantize that: adapters that "
                "were trained meanwhile fit it (docs/language-models.md)"
            )
    if torch.get_default_device().type == "meta":
        raise LoopError("the default device is meta, where nothing has a value: call torch.set_default_device('cpu')")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every name it has: a tied tensor is there once per name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return {**tensors, **dict(model.named_buffers(remove_duplicate=False))}


def shapes_by_name(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer by every name it has."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


def is_persistent(model: nn.Module, buffer: str) -> bool:
    """Whether a buffer is part of the state dict."""
    owner, _, name = buffer.rpartition(".")
    return name not in model.get_submodule(owner)._non_persistent_buffers_set


@torch.no_grad()
def swap(tensor: Tensor, new: Tensor, undo: ExitStack) -> None:
    """Let `tensor` hold the memory, shape and strides of `new`; its gradient becomes None.

    The object stays the same, so optimizers, schedulers, clip lists and hooks that hold it keep working. `undo` takes
    a callback that puts the old memory and gradient back.
    """
    old = tensor.detach()  # shares the old memory, so putting it back copies nothing
    grad = tensor.grad if tensor.is_leaf else None

    def put_back() -> None:
        swap(tensor, old, ExitStack())
        if grad is not None:
            tensor.grad = grad

    # A gradient must have its tensor's shape: it is removed before the shape changes, and set again only after the
    # old shape is back.
    undo.callback(put_back)
    if tensor.is_leaf:
        tensor.grad = None
    # Not `tensor.data = new`, which fails while an old loss keeps the graph of this tensor alive.
    if tensor.dtype == new.dtype:
        tensor.set_(new)  # type: ignore[call-overload]
    else:  # `set_` cannot change the dtype
        tensor.data = new


def take(tensor: Shaped[Tensor, " *shape"], dims: Mapping[int, Int[np.ndarray, " _kept"]]) -> Shaped[Tensor, " *small"]:
    """A copy of `tensor` with only the given entries of the given dims, in the same memory format.

    The copy owns its memory: a view would keep the old storage alive. The order of dims in memory
    (`channels_last`, `channels_last_3d`, any other permutation) stays as it was.
    """
    # `index_select` returns contiguous memory, so the dims are put in memory order first and back after it.
    source = tensor.detach()
    if source.is_sparse:  # it has no order in memory
        for dim, kept in dims.items():
            source = source.index_select(dim, torch.from_numpy(kept).to(source.device))
        return source if dims else source.clone()
    order = _order(source)
    result = source.permute(order)
    for dim, kept in dims.items():
        result = result.index_select(order.index(dim), torch.from_numpy(kept).to(source.device))
    # No dim was selected, so nothing has been copied yet.
    result = result if dims else result.clone()
    return in_format(result.permute([order.index(dim) for dim in range(source.dim())]), source)


def taken_gradient(tensor: Tensor, dims: Mapping[int, Int[np.ndarray, " _kept"]]) -> Tensor | None:
    """The same entries of a parameter's gradient, which the user's loop may read; None for one of another kind."""
    old = tensor.grad if tensor.is_leaf else None
    if type(old) is not Tensor or old.layout != torch.strided or old.shape != tensor.shape or old.dtype != tensor.dtype:
        return None
    return take(old, dims)


def in_format(tensor: Shaped[Tensor, " *small"], like: Shaped[Tensor, " *shape"]) -> Shaped[Tensor, " *small"]:
    """`tensor` laid out in memory as `like` is (channels_last, say); itself if it already is."""
    order = _order(like)
    dense = tensor.permute(order).contiguous()
    return _restride(dense.permute([order.index(dim) for dim in range(like.dim())]), like)


def _order(tensor: Tensor) -> list[int]:
    """Dims as they lie in memory, outermost first."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: -strides[dim])


def _restride(result: Tensor, like: Tensor) -> Tensor:
    """Give dims of length 1 the strides PyTorch itself would give them in `like`'s memory format.

    Kernels choose their path by strides, so a resized tensor should not differ in them from a fresh one.
    """
    channels_last = {4: [torch.channels_last], 5: [torch.channels_last_3d]}
    for memory_format in (torch.contiguous_format, *channels_last.get(like.dim(), ())):
        if like.stride() == _strides(like.shape, memory_format):
            return result.as_strided(result.shape, _strides(result.shape, memory_format))
    return result


def _strides(shape: torch.Size, memory_format: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, memory_format=memory_format, device="meta").stride()


Optimizers = Optimizer | Sequence[Optimizer] | None


def as_sequence(optimizers: Optimizers) -> tuple[Optimizer, ...]:
    if optimizers is None:
        return ()
    if isinstance(optimizers, type):
        raise OptimizerError(f"optimizer is {a_type(optimizers)}: give the optimizer itself")
    return (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)


def cut_state(
    optimizer: Optimizer, parameter: Tensor, dims: Mapping[int, Int[np.ndarray, " _kept"]], name: str
) -> dict[str, Any]:
    """The state of one parameter, cut along the same dims; new tensors, nothing is changed in place.

    Tensors of the parameter's shape are cut; scalars and whatever is not a tensor stay. An OptimizerError names a
    tensor of another shape or class, of which nothing says how it follows the cut.
    """

    def cut(value: Tensor, key: str) -> Tensor:
        # Eight-bit moments are subclasses whose blocks do not lie along the dims; a cut would mix their scales.
        if type(value) not in (Tensor, nn.Parameter, FakeTensor):
            raise OptimizerError(
                f"{type(optimizer).__name__} keeps state[{key!r}] of {name} as a {type(value).__name__}, "
                f"which cannot be cut: {INSTEAD}"
            )
        if value.shape == parameter.shape:
            return take(value, dims)
        if value.numel() == 1:  # a step count, or the like
            return value
        raise OptimizerError(
            f"{type(optimizer).__name__} keeps state[{key!r}] of shape {tuple(value.shape)} for {name} "
            f"of shape {tuple(parameter.shape)}, so the state cannot follow when the parameter is cut: {INSTEAD}"
        )

    return {key: map_tensors(value, cut, key) for key, value in optimizer.state.get(parameter, {}).items()}


INSTEAD = (
    "use an optimizer that treats every entry in the same way, such as torch.optim.AdamW, Adam or SGD, "
    "for the parameters that Setpoint may cut"
)


def map_tensors(value: Any, function: Callable[[Tensor, str], Any], key: str) -> Any:
    """`value` with `function(tensor, where)` in place of every tensor in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value, key)
    if isinstance(value, Mapping):
        return {name: map_tensors(item, function, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, function, f"{key}[{position}]") for position, item in enumerate(value)]
        # A named tuple takes its items one by one.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def state_tensors(state: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Every tensor of a parameter's state, with its place in the state."""
    found: list[tuple[str, Tensor]] = []
    for key, value in state.items():
        map_tensors(value, lambda tensor, part: found.append((part, tensor)), key)
    return found


def moments_of(optimizer: Optimizer, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """State tensors that have the parameter's shape, each with its place in the state."""
    found = state_tensors(optimizer.state.get(parameter, {}))
    return [(part, tensor) for part, tensor in found if tensor.shape == parameter.shape]
