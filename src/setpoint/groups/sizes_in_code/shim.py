"""The size shim: a module's own forward, with the sizes it writes out corrected by place.

Python code such as `x.view(B, T, self.n_head, C // self.n_head)` computes sizes from numbers that a cut changes. The
shim runs the same forward and replaces, at the places that need it, the size given to the n-th `view` (reshape, split,
...) by the actual number of units. It is part of the module: it survives deepcopy, pickle and `torch.compile`.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from setpoint.errors import PathError

_PIECES = ("sizes", "split_size", "split_size_or_sections", "split_sizes", "chunks")
_PLACE = re.compile(r"(\w+)#(\d+)\[(\d+)\](?:=(\d+))?")

Sizes = Mapping[int, int]
"""Sizes of one call, by argument."""

Calls = Mapping[tuple[str, int], Sizes]
"""Sizes of calls, by function name and number of the call."""


def _num_dims(item: Any) -> int:
    if item is None or isinstance(item, bool):
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _saving_hooks() -> Any:
    """Hooks on saved tensors and the gradient mode: they change inside a checkpoint, whose code backward runs again."""
    if torch.compiler.is_compiling():
        return None
    return torch._C._autograd._top_saved_tensors_default_hooks(True), torch.is_grad_enabled()


_OTHER_PATH = (
    "the forward does not take the path of the example. Attach with an example that takes the path of training (the "
    "same optional inputs, no layer skipped at random)"
)

_FUNCTIONS: dict[str, list[Any]] = {
    "view": [torch.Tensor.view],
    "reshape": [torch.Tensor.reshape, torch.reshape],
    "expand": [torch.Tensor.expand],
    "repeat": [torch.Tensor.repeat],
    "tile": [torch.Tensor.tile, torch.tile],
    "repeat_interleave": [torch.Tensor.repeat_interleave, torch.repeat_interleave],
    "unflatten": [torch.Tensor.unflatten, torch.unflatten],
    "split": [torch.Tensor.split, torch.split, torch.split_with_sizes, torch.Tensor.split_with_sizes],
    "chunk": [torch.Tensor.chunk, torch.chunk],
    "layer_norm": [F.layer_norm, torch.layer_norm],
    "group_norm": [F.group_norm, torch.group_norm],
    **{f"{kind}{n}d": [getattr(torch, f"{kind}{n}d")] for kind in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "zeros": [torch.zeros],
    "ones": [torch.ones],
    "full": [torch.full],
    "new_zeros": [torch.Tensor.new_zeros],
}

_FIRST = {"zeros": 0, "ones": 0, "full": 0, "unflatten": 2, **{name: 6 for name in _FUNCTIONS if name[:4] == "conv"}}
"""Which argument of a function is the first size, where that is not number 1; of a convolution the number of groups."""

_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}

NAMES = {function: name for name, functions in _FUNCTIONS.items() for function in functions}
"""Torch functions whose sizes can be corrected, and the name of each in a place."""

COUNTED = {*NAMES.values(), "slice"}
"""Names of the calls that are numbered."""


class CallSizes(TorchFunctionMode):
    """Corrects the sizes of numbered calls while a forward runs.

    A live size that is neither the right one nor the one of the code at the example shows another call: a PathError.

    Args:
        written: the sizes that the code gives there, where these are known to be constant.
        changed: collects the places whose live size was wrong, with that size.
    """

    def __init__(self, sizes: Calls, written: Calls | None = None, changed: dict[str, int] | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        self.written = written or {}
        self.changed = changed
        self.numbers: dict[str, int] = {}
        self.hooks = _saving_hooks()
        self.narrowing: list[int] = []
        """Numbers of the slices that took a part only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXING:
            return func(args[0], self._indices(args[0], args[1]), *args[2:], **kwargs)
        name = NAMES.get(func)
        # `view(dtype)` gives no size.
        if name is None or (name == "view" and len(args) == 2 and isinstance(args[1], torch.dtype)):
            return func(*args, **kwargs)
        number = self.numbers.get(name, 0)
        self.numbers[name] = number + 1
        wanted = self.sizes.get((name, number))
        if wanted is None:
            return func(*args, **kwargs)
        if name in ("split", "chunk"):
            return self._pieces(func, name, number, wanted, args, kwargs)
        if name.startswith("conv") and len(args) <= _FIRST[name]:
            self._note(name, number, 0, kwargs.get("groups", 1), wanted[0])
            return func(*args, **{**kwargs, "groups": wanted[0]})
        return self._sized(func, name, number, wanted, args, kwargs)

    def _note(self, name: str, number: int, argument: int, live: int, wanted: int, given: int | None = None) -> None:
        """Check and collect a live size that differs; `given` is the code's number where that is another."""
        if live == wanted:
            return
        given = live if given is None else given
        written = self.written.get((name, number), {}).get(argument, given)
        if name == "slice" and argument not in self.sizes[name, number]:
            written = 0  # only its end is corrected, so the code began it with the first unit
        if given != written:
            raise PathError(
                f"{name} number {number} of this forward is given {given} where the code gave {written} when the "
                f"groups were found, and {wanted} are left: {_OTHER_PATH}"
            )
        if self.changed is not None:
            self.changed[f"{name}#{number}[{argument}]"] = given
        elif _saving_hooks() != self.hooks:
            raise RuntimeError(
                f"{name} inside a checkpoint needs another size than the code gives it, and backward would run that "
                "code again by itself: checkpoint the call of a whole submodule instead"
            )

    def _indices(self, x: Tensor, index: Any) -> Any:
        """The index with its slices corrected; each slice other than `:` has a number."""
        items = list(index) if isinstance(index, tuple) else [index]
        if not any(isinstance(item, slice) and item != slice(None) for item in items):
            return index
        dim = 0
        for position, item in enumerate(items):
            if item is Ellipsis:
                dim = x.dim() - sum(_num_dims(later) for later in items[position + 1 :])
                continue
            if isinstance(item, slice) and item != slice(None):
                items[position] = self._slice(item, int(x.shape[dim]))
            dim += _num_dims(item)
        return tuple(items) if isinstance(index, tuple) else items[0]

    def _slice(self, item: slice, length: int) -> slice:
        number = self.numbers.get("slice", 0)
        self.numbers["slice"] = number + 1
        first, stop, step = item.indices(length)
        live = len(range(first, stop, step))
        if live < length:
            self.narrowing.append(number)
        wanted = self.sizes.get(("slice", number))
        if wanted is None:
            return item
        start = wanted.get(0, 0)
        begin, end = item.start or 0, length if item.stop is None else item.stop
        plain = begin >= 0 and end >= 0  # then these are the code's numbers, not yet clipped to what is left
        self._note("slice", number, 1, live, wanted[1], int(end - begin) if plain else None)
        self._note("slice", number, 0, first, start, int(begin) if plain else None)
        return slice(start, start + wanted[1])

    def _sized(self, func: Any, name: str, number: int, wanted: Sizes, args: Any, kwargs: Any) -> Any:
        first = _FIRST.get(name, 1)
        if len(args) <= first:
            return func(*args, **kwargs)
        packed = isinstance(args[first], (tuple, list))
        sizes = list(args[first] if packed else args[first:])
        for argument, size in wanted.items():
            if argument >= len(sizes):
                raise PathError(f"{name} number {number} of this forward has {len(sizes)} sizes: {_OTHER_PATH}")
            if sizes[argument] != -1:
                self._note(name, number, argument, int(sizes[argument]), size)
                sizes[argument] = size
        if packed:
            return func(*args[:first], type(args[first])(sizes), *args[first + 1 :], **kwargs)
        return func(*args[:first], *sizes, **kwargs)

    def _pieces(self, func: Any, name: str, number: int, wanted: Sizes, args: Any, kwargs: Any) -> Any:
        given: dict[str, Any] = {**kwargs, **dict(zip(("input", "sizes", "dim"), args, strict=False))}
        x = next(given[key] for key in ("input", "self", "tensor") if key in given)
        dim = int(given.get("dim", 0))
        spec = next(given[key] for key in _PIECES if key in given)
        length = int(x.shape[dim])
        if isinstance(spec, (list, tuple)):
            live = [int(size) for size in spec]
        else:
            step = -(-length // int(spec)) if name == "chunk" else int(spec)
            live = [min(step, length - start) for start in range(0, length, step)]
        right = [wanted[piece] for piece in range(len(wanted))]
        if right == live:
            return func(*args, **kwargs)
        written = None if isinstance(spec, (list, tuple)) else int(spec) if name == "split" else 0
        for piece, size in enumerate(right):
            self._note(name, number, piece, live[piece] if piece < len(live) else 0, size, written)
        # Always by sizes: neither `chunk` nor a split by one size can give uneven pieces.
        return torch.split(x, right, dim)


class SizedForward:
    """Calls a module's own forward with the sizes of some calls corrected, by place: "view#2[1]" or "view#2[1]=64"."""

    def __init__(self, module: nn.Module, sizes: dict[str, int]) -> None:
        self.module = module
        self.resize(sizes)

    def resize(self, sizes: dict[str, int]) -> None:
        """Correct these places from now on, also in a call that has begun and not reached its forward yet."""
        self.sizes = sizes
        self.calls, self.written = parse(sizes)

    @property
    def __signature__(self) -> inspect.Signature:  # frameworks look at the names of a model's inputs
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with CallSizes(self.calls, self.written):
            return type(self.module).forward(self.module, *args, **kwargs)


_VIEW = torch.ops.aten.view.default

HEADS = "heads#0[0]"
"""The place of the number of heads of an `nn.MultiheadAttention`."""


class HeadsForward:
    """The forward of an `nn.MultiheadAttention` that has fewer heads than its embedding has room for: `sizes[HEADS]`.

    It scales as the dense module does, and makes no call that the shims of modules around it would number: they see
    none of torch's own forward. Everything else is as documented for `nn.MultiheadAttention`.
    """

    def __init__(self, module: nn.MultiheadAttention, sizes: dict[str, int]) -> None:
        self.module = module
        self.sizes = sizes

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output, and the attention weights if `need_weights`."""
        module, batched = self.module, query.dim() == 3
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        inputs = [query, key, value]
        if not batched:
            inputs = [x.unsqueeze(0) for x in inputs]
        elif not module.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = self._projected(*inputs)
        if key_padding_mask is not None:
            key_padding_mask = (key_padding_mask if batched else key_padding_mask.unsqueeze(0))[:, None, None, :]
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = _VIEW(attn_mask, [len(q), -1, *attn_mask.shape[1:]])
        added = [self._added(mask, q, k) for mask in (attn_mask, key_padding_mask) if mask is not None]
        mask = sum(added[1:], added[0]).to(q.dtype) if added else None
        dropout_p, scale, weights = module.dropout if module.training else 0.0, module.head_dim**-0.5, None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * scale
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout_p) if dropout_p else weights
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)
        out = F.linear(heads.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
        if not batched:
            return out.squeeze(0), weights
        return (out if module.batch_first else out.transpose(0, 1)), weights

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys and values, shape (batch, heads, positions, head size), with the extra positions of keys."""
        module, num_heads = self.module, self.sizes[HEADS]
        packed = module.in_proj_weight
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        weights = separate if packed is None else packed.tensor_split(3)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.tensor_split(3)
        results: list[Tensor] = []
        for x, weight, bias, extra in zip(inputs, weights, biases, (None, module.bias_k, module.bias_v), strict=True):
            y = F.linear(x, weight, bias)
            if extra is not None:
                y = torch.cat([y, extra.broadcast_to(len(y), *extra.shape[1:])], 1)
            # The ATen op, not `Tensor.view`, which would be a numbered call.
            y = _VIEW(y, [*y.shape[:2], num_heads, y.shape[2] // max(num_heads, 1)]).transpose(1, 2)
            if module.add_zero_attn and len(results) > 0:
                y = F.pad(y, (0, 0, 0, 1))
            results.append(y)
        return results

    def _added(self, mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """A mask as it is added to the scores; extra positions of keys are never masked."""
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
        return F.pad(mask, (0, k.shape[-2] - mask.shape[-1]))


def parse(sizes: Mapping[str, int]) -> tuple[Calls, Calls]:
    """The right sizes, and the constants of the code where a place has one.

    >>> parse({"view#2[1]": 8, "view#3[0]=64": 32})
    ({('view', 2): {1: 8}, ('view', 3): {0: 32}}, {('view', 3): {0: 64}})
    """
    calls: dict[tuple[str, int], dict[int, int]] = {}
    written: dict[tuple[str, int], dict[int, int]] = {}
    for place, size in sizes.items():
        match = _PLACE.fullmatch(place)
        assert match, f"not a call place: {place}"
        call = match[1], int(match[2])
        calls.setdefault(call, {})[int(match[3])] = size
        if match[4] is not None:
            written.setdefault(call, {})[int(match[3])] = int(match[4])
    return calls, written


def set_call_sizes(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Correct these places in the module's forward from now on; without places it gets its plain forward again."""
    if isinstance(module, nn.MultiheadAttention):
        # Where this is False, torch's layers skip their fused path, which does not allow fewer heads.
        module._qkv_same_embed_dim = not sizes and module.in_proj_weight is not None
        if sizes:
            module.__dict__["forward"] = HeadsForward(module, dict(sizes))
            return
    corrected = module.__dict__.get("forward")
    if sizes and isinstance(corrected, SizedForward):
        corrected.resize(dict(sizes))
    elif sizes:
        module.__dict__["forward"] = SizedForward(module, dict(sizes))
    else:
        module.__dict__.pop("forward", None)


def get_call_sizes(module: nn.Module) -> dict[str, int]:
    """The corrected places of a module's forward; empty if it runs as written."""
    forward = module.__dict__.get("forward")
    return dict(forward.sizes) if isinstance(forward, (SizedForward, HeadsForward)) else {}
