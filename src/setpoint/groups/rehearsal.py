"""A rehearsal: the live forward on copies of a model whose tensors have shapes but no data."""

from __future__ import annotations

import copy
import gc
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from setpoint.groups.example import Example, computed
from setpoint.groups.opaque import Staging
from setpoint.groups.rng import preserved_rng_state
from setpoint.groups.users_hooks import is_users


class Rehearsal:
    """Forwards of copies of a model, on the first of meta, fake and real tensors that do; the model is not touched.

    Args:
        staging: which calls of it; by default the whole model on the example.
    """

    def __init__(self, model: nn.Module, example: Example, staging: Staging | None = None) -> None:
        self.model = model
        self._staging = staging or Staging.whole(example)
        self._kinds: tuple[Any, ...] = (torch.device("meta"), FakeTensorMode(allow_non_fake_inputs=True), None)
        tensors = (*model.parameters(), *model.buffers(), *self._staging.tensors)
        self._exact = self._kinds[:2] if all(each.is_meta for each in tensors) else self._kinds[1:2]
        self._enough: dict[bool, Any] = {}
        self._stand_ins: dict[Any, dict[int, Any]] = {}

    def run(
        self,
        prepare: Callable[[nn.Module], None] = lambda twin: None,
        *,
        other_mode: bool = False,
        exactly: bool = False,
    ) -> tuple[torch.Size, ...]:
        """Shapes of what a copy returns, or what its forward raises.

        Args:
            prepare: gets each copy before it runs.
            other_mode: the copy is in train mode where the model is in eval mode, and in eval mode where it is not.
            exactly: only fake tensors are tried, which know their device, and before them the meta device for a model
                that is there.
        """
        tried = self._exact if exactly else self._kinds
        kinds = (self._enough[other_mode],) if other_mode in self._enough else tried
        with _quiet():
            for kind in kinds:
                if kind is None:
                    gc.collect(1)  # earlier copies with data must not gather while collection waits
                try:
                    shapes = self._run(kind, prepare, other_mode)
                except Exception:
                    if kind is kinds[-1]:
                        raise
                else:
                    self._enough[other_mode] = kind
                    return shapes
        raise AssertionError("the last kind of tensors either runs or raises")

    def alike(self, left: Sequence[torch.Size], right: Sequence[torch.Size], *, other_mode: bool = False) -> bool:
        """Whether two forwards returned the same shapes; where data was needed, it may have decided on sizes."""
        if self._enough.get(other_mode, "none yet") is not None:
            return tuple(left) == tuple(right)
        return [len(shape) for shape in left] == [len(shape) for shape in right]

    def _run(self, kind: Any, prepare: Callable[[nn.Module], None], other_mode: bool) -> tuple[torch.Size, ...]:
        # The memo makes deepcopy take the stand-ins for the tensors, so no data is copied.
        twin = copy.deepcopy(self.model, {**self._tensors(kind), **hook_tables(self.model)})
        staging = self._staging.with_tensors({id(x): _stand_in(x, kind) for x in self._staging.tensors})
        meta = isinstance(kind, torch.device)
        quickly: Any = nullcontext() if kind is None else _ByShape()  # type: ignore[no-untyped-call]
        with kind or nullcontext(), _taken_for_fake(meta), preserved_rng_state(self.model), quickly:
            if other_mode:
                twin.train(not self.model.training)
            prepare(twin)
            return tuple(tensor.shape for tensor in staging.play(twin))

    def _tensors(self, kind: Any) -> dict[int, Any]:
        """Stand-ins for the tensors of a copy, by id of the original; without data they serve all copies."""
        if kind in self._stand_ins:
            return self._stand_ins[kind]
        result = {key: _stand_in(tensor, kind) for key, tensor in computed(self.model).items()}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in result:
                new = _stand_in(tensor, kind)
                trained = isinstance(tensor, nn.Parameter)
                result[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if trained else new
        if kind is not None:
            self._stand_ins[kind] = result
        return result


class _ByShape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers some operations on tensors without data by a shape: torch works through their arithmetic in Python.

    Where sizes do not fit, torch answers, with its own error. It also answers for single numbers, which fake tensors
    may know.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The calls that torch makes to answer are none of the model's: no mode that takes calls down needs to see them.
        with torch._C.DisableTorchFunction():
            answer = None if kwargs else _SHAPED.get(func)
            found = answer(*args) if answer is not None and _is_without_data(args[0]) else None
            return func(*args, **(kwargs or {})) if found is None else found


def _is_without_data(x: torch.Tensor) -> bool:
    without = x.numel() > 1 if isinstance(x, FakeTensor) else x.is_meta  # a fake one asks Python whether it is
    return without and x.layout == torch.strided


def _new(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Contiguous; `new_empty` of a tensor on the meta device is worked out in Python."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _batch_norm(x: torch.Tensor, *given: Any) -> Any:
    *tensors, training, _, _ = given
    channels = x.shape[1:2]
    fits = x.is_floating_point() and all(each is None or each.shape == channels for each in tensors)
    if not channels or not fits:
        return None
    saved = channels if training else (0,)
    return torch.empty_like(x), _new(x, saved), _new(x, saved)


def _layer_norm(x: torch.Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    inner = tuple(shape)
    fits = x.is_floating_point() and all(each is None or each.shape == inner for each in (weight, bias))
    if not inner or x.shape[-len(inner) :] != inner or not fits:
        return None
    outer = (*x.shape[: x.dim() - len(inner)], *(1 for _ in inner))
    return _new(x, x.shape), _new(x, outer), _new(x, outer)


def _addmm(bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Any:
    fits = bias.dim() == 1 and left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0]
    fits = fits and bias.dtype == left.dtype == right.dtype
    return _new(left, (left.shape[0], right.shape[1])) if fits and bias.shape[0] == right.shape[1] else None


def _softmax(x: torch.Tensor, dim: int, dtype: Any = None) -> Any:
    return _new(x, x.shape) if dtype is None and -x.dim() <= dim < x.dim() else None


def _by_number(x: torch.Tensor, number: Any = 0.0) -> Any:
    """A tensor of floats stays in its type where each entry meets the same real number."""
    real = not (number.is_complex() if isinstance(number, torch.Tensor) else isinstance(number, complex))
    if not real or not x.dim() or not x.is_floating_point():
        return None
    if not _is_dense_in_some_order(x):
        return torch.empty_like(x)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _is_dense_in_some_order(x: torch.Tensor) -> bool:
    """Whether entries lie in memory without gaps or overlaps: then elementwise arithmetic keeps the strides."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _joined(left: torch.Tensor, right: Any, *_: Any) -> Any:
    """Arithmetic of two tensors of one type, of which the left has the shape of the result; or with a number."""
    if not isinstance(right, torch.Tensor) or right.dim() == 0:
        return _by_number(left, right)
    fits = left.dtype == right.dtype and left.device == right.device
    fits = fits and left.dim() >= right.dim() and left.is_contiguous()
    fits = fits and all(there in (here, 1) for here, there in zip(left.shape[::-1], right.shape[::-1], strict=False))
    return _new(left, left.shape) if fits and (right.is_contiguous() or left.shape != right.shape) else None


def _tril(x: torch.Tensor, diagonal: int = 0) -> Any:
    return _new(x, x.shape) if x.dim() > 1 and x.is_contiguous() else None


def _where(condition: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Any:
    numbers = condition.dtype == torch.bool and left.dim() == right.dim() == 0 and left.dtype == right.dtype
    return torch.empty_like(condition, dtype=left.dtype) if numbers else None


def _device(x: torch.Tensor) -> Any:
    return x.fake_device if isinstance(x, FakeTensor) else None


_SHAPED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten._safe_softmax.default: _softmax,
    torch.ops.aten.add.Tensor: _joined,
    torch.ops.aten.mul.Tensor: _joined,
    torch.ops.aten.mul.Scalar: _by_number,
    torch.ops.aten.pow.Tensor_Scalar: _by_number,
    torch.ops.aten.tanh.default: _by_number,
    torch.ops.aten.gelu.default: _by_number,
    torch.ops.aten.tril.default: _tril,
    torch.ops.aten.where.self: _where,
    torch.ops.prim.device.default: _device,
}


@contextmanager
def _taken_for_fake(meta: bool) -> Iterator[None]:
    """Inside, transformers knows that tensors on the meta device have no data, as it knows of fake ones.

    It then does not ask for their values, and fake tensors, which are several times as slow, need not be tried.
    """
    library: Any = sys.modules.get("transformers.utils.import_utils")
    before = getattr(library, "is_fake_tensor", None)
    if before is None or not meta:
        yield
        return
    library.is_fake_tensor = lambda value: before(value) or (isinstance(value, torch.Tensor) and value.is_meta)
    try:
        yield
    finally:
        library.is_fake_tensor = before


def _stand_in(tensor: torch.Tensor, kind: Any) -> torch.Tensor:
    if kind is None:
        return tensor.detach().clone()
    if isinstance(kind, torch.device):
        return tensor.detach().to(kind)
    result: torch.Tensor = kind.from_tensor(tensor.detach())
    return result


def hook_tables(model: nn.Module) -> dict[int, Any]:
    """The copy's tables of hooks, by id: without the user's, but with torch's, which compute weights (weight norm)."""
    return {
        id(table): OrderedDict((k, hook) for k, hook in table.items() if not is_users(hook))
        for module in model.modules()
        for name, table in vars(module).items()
        if isinstance(table, OrderedDict) and "_hooks" in name
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what fake tensors log about a failing forward: the next kind of tensors may do."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
