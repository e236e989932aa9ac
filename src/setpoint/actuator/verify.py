"""Verify: does a cut behave like its masked twin? Tried on copies, before the model is cut."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from setpoint.actuator.cut import Cut, Keep, plan_cut
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import named_tensors, take
from setpoint.errors import ExampleError, GroupError, VerificationError
from setpoint.groups.example import Example, inputs_of, is_dense, mapped, tensors_of, without_cache
from setpoint.groups.group import Group, random_keep
from setpoint.groups.untouched import copy_of, preserved_rng_state
from setpoint.messages import progress

_FEW = 4  # samples that a verification looks at
_LARGE = 10_000_000  # parameters
_PIECE = 1 << 18  # entries that are compared at a time
_DRAWN = 1_000_003  # random numbers for a large tensor; they repeat, but no two rows are equal, since this is a prime
_BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}  # a subclass may do anything else in training

_LEAST = 1e-3  # values below this are compared with it
_ROUNDED = 1e-6  # so are those below this share of the largest: in float64 that is the rounding of the largest
_QUICK = 1e-4  # the relative error up to which float32 is enough
# Relative error allowed, by the narrowest floating-point width that the computation went through.
_TOLERANCE = {64: 1e-9, 32: 1e-3, 16: 5e-2, 8: 5e-1}


def failing_on_few_rows(model: nn.Module, example: Example, groups: tuple[Group, ...]) -> tuple[tuple[str, ...], float]:
    """Names of the groups that fail on a few rows of the example, or on all where it must, and the share used."""
    few, share = _few_rows(example)
    with progress("trying every cut on copies"):
        try:
            return failing_groups(model, few, groups), share
        except ExampleError:
            if share == 1.0:
                raise
            return failing_groups(model, example, groups), 1.0


def failing_groups(model: nn.Module, example: Example, groups: tuple[Group, ...]) -> tuple[str, ...]:
    """Names of the groups whose cut does not behave like its masked twin; found by bisection.

    Of two copies with the same randomised weights one has the dropped entries masked, and the other is shrunk as well;
    outputs, the kept entries' gradients and the updated buffers must agree. Of a group that is not lossless only the
    shapes are checked, since zero is not absent there. Dropout is off; a model that still draws random numbers is
    compared in eval mode. Forward hooks run on the copies, too. Needs memory for about three copies of the model.

    A large model is tried in float32 first, which takes half of the memory and time of float64. If all agree to 1e-4,
    nothing else is tried; otherwise float64 decides. In float32 batch norms normalise by their running statistics.

    An ExampleError says that the model itself does not run on the example.
    """
    if sum(parameter.numel() for parameter in model.parameters()) > _LARGE and _has_plain_norms(model):
        quick = CutCheck.of(model, example, groups, dtype=torch.float32)
        # Statistics that only run may leave gradients too small for their errors to show.
        faint = any(type(module) in _BATCH_NORMS for module in model.modules()) and any(
            0 < _largest([gradient]) < _LEAST for gradient in quick.masked.gradients.values() if gradient.numel()
        )
        if not faint and replace(quick, tolerance=min(quick.tolerance, _QUICK)).passes():
            return ()
    return tuple(name for name, _ in CutCheck.of(model, example, groups).failing())


@dataclass(frozen=True, eq=False)
class CutCheck:
    """The cut to try, the copy on which it is tried, and what this copy computes.

    The copy is randomised, and the dropped units of all lossless groups are masked in it: a part of the groups is
    compared with it, too, since those that are not cut have the same entries in both.
    """

    copy: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    groups: tuple[Group, ...]
    keep: Keep
    tolerance: float
    masked: Outcome

    @classmethod
    def of(
        cls, model: nn.Module, example: Example, groups: tuple[Group, ...], dtype: torch.dtype = torch.float64
    ) -> CutCheck:
        """On a copy in this dtype, or a wider one of its own, if the model runs in it; else in its own dtypes."""
        keep = random_keep(groups)
        inputs = mapped(_lively, inputs_of(without_cache(model, example)))
        for widened in (partial(_widened, dtype=dtype), None):
            twin = randomised_copy(model, groups)
            # In float32 rounding grows to per cents where the statistics are those of a few samples.
            for module in twin.modules() if dtype != torch.float64 else ():
                if type(module) in _BATCH_NORMS:
                    module.forward = partial(_by_running_statistics, module)
            args, kwargs = inputs
            if widened is not None:
                twin._apply(widened)  # type: ignore[no-untyped-call]
                args, kwargs = mapped(widened, inputs)
            for group in groups:
                if group.lossless:
                    with suppress(GroupError):  # a group that does not fit: its cut fails, too, and says so
                        mask(twin, None, (group,), {group.name: keep[group.name]})
            check = partial(_outcome, args=args, kwargs=kwargs)
            before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
            with _Narrowest() as narrowest:
                try:
                    outcome = check(twin)
                except Exception as error:  # anything may go wrong in a foreign forward
                    failure = error
                    continue
            _put_back(twin, before)
            tolerance = _TOLERANCE[narrowest.bits]
            # Drawing random numbers is harmless unless another seed changes the result: then compare without.
            if outcome.drew and outcome.difference(check(copy_of(twin), seed=1), tolerance):
                outcome = check(twin.eval())
                _put_back(twin, before)
            return cls(twin, args, kwargs, groups, keep, tolerance, outcome)
        raise ExampleError(f"the model does not run on the example: {failure}") from failure

    def passes(self) -> bool:
        return self._fault(self._names()) is None

    def failing(self) -> Iterator[tuple[str, str]]:
        """(group name, what differs) of each group that fails."""
        candidates = self._names()
        while candidates and self._fault(candidates) is not None:
            name, why = self._bisect(candidates, [])
            yield name, why
            candidates.remove(name)

    def _names(self) -> list[str]:
        return [group.name for group in self.groups if not self.keep[group.name].all()]

    def _bisect(self, suspects: list[str], context: list[str]) -> tuple[str, str]:
        """One failing group among suspects, which fail together with the groups in context."""
        if len(suspects) == 1:
            return suspects[0], self._fault(context + suspects) or "it differs"
        left, right = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
        found = self._fault(context + left) is not None
        return self._bisect(left, context) if found else self._bisect(right, context + left)

    def _fault(self, names: list[str]) -> str | None:
        """Why these groups cannot be cut together, or None."""
        lossless = {group.name for group in self.groups if group.lossless}
        exact = [name for name in names if name in lossless]
        why = self._compare(exact, self.tolerance) if exact else None
        return self._compare(names, math.inf) if why is None and len(exact) < len(names) else why

    def _compare(self, names: list[str], tolerance: float) -> str | None:
        keep, small = {name: self.keep[name] for name in names}, copy_of(self.copy)
        try:
            shrink(small, None, self.groups, keep)
            found = _outcome(small, self.args, self.kwargs)
        except Exception as error:  # a wrong size shows up as any exception in the model's own code
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return self.masked.cut(plan_cut(self.groups, keep)).difference(found, tolerance)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one forward and backward pass left behind, and whether it drew random numbers."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    drew: bool

    def cut(self, cut: Cut) -> Outcome:
        """The kept entries only."""
        dims = cut.dims()
        gradients, buffers = (
            {name: take(tensor, dims[name]) if dims.get(name) else tensor for name, tensor in tensors.items()}
            for tensors in (self.gradients, self.buffers)
        )
        return Outcome(self.outputs, gradients, buffers, self.drew)

    def difference(self, other: Outcome, tolerance: float) -> str | None:
        """What differs by more than `tolerance` times the largest value of that tensor, or None."""
        if len(self.outputs) != len(other.outputs):
            return f"{len(other.outputs)} outputs instead of {len(self.outputs)}"
        for position, (want, got) in enumerate(zip(self.outputs, other.outputs, strict=True)):
            if why := _differ(want, got, tolerance, _largest([want]) if want.numel() else 0.0):
                return f"output {position} {why}"
        gradients, buffers = (self.gradients, other.gradients), (self.buffers, other.buffers)
        for what, (wants, gots) in (("gradient", gradients), ("buffer", buffers)):
            scales = {name: _largest([want]) for name, want in wants.items() if want.numel()}
            # Rounding in a sum that cancels, as a gradient of a bias before a norm, goes by what it is made of.
            largest = max(filter(math.isfinite, scales.values()), default=0.0)
            rounded = _ROUNDED * largest if what == "gradient" else 0.0
            for name, want in wants.items():
                if name not in gots:
                    return f"{what} of {name} is missing"
                if why := _differ(want, gots[name], tolerance, scales.get(name, 0.0), rounded):
                    return f"{what} of {name} {why}"
        return None


def _outcome(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int = 0) -> Outcome:
    with _private_chance(model, seed) as drawn, torch.enable_grad():
        outputs = [_filled(leaf) for leaf in tensors_of(model(*args, **kwargs)) if _is_float(leaf)]
        generator = torch.Generator().manual_seed(0)
        # `abs`: backward needs a real number, and an output may be complex.
        loss = sum((out * _noise(out, generator)).sum().abs() for out in outputs if out.requires_grad)
        if isinstance(loss, Tensor):
            torch.autograd.backward(loss)
        drew = drawn()
    gradients = {name: _filled(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    buffers = {name: _filled(buffer).clone() for name, buffer in model.named_buffers() if _is_float(buffer)}
    return Outcome([output.detach() for output in outputs], gradients, buffers, drew)


@torch.no_grad()
def _put_back(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def _differ(want: Tensor, got: Tensor, tolerance: float, scale: float, rounded: float = 0.0) -> str | None:
    if want.shape != got.shape:
        return f"has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    if tolerance == math.inf or not want.numel():
        return None
    # In pieces along the first dim: memory that is new for each large tensor takes longer than the arithmetic.
    pieces = (torch.split(x, max(1, _PIECE * len(x) // x.numel())) if x.dim() else (x,) for x in (want, got))
    error = _largest(left - right for left, right in zip(*pieces, strict=True))
    # NaN on both sides proves nothing, so the comparison is written to fail on it.
    fine = error <= tolerance * max(scale, rounded, _LEAST)
    return None if fine else f"differs by {error:.2g} where values reach {scale:.2g}"


def _largest(tensors: Iterable[Tensor]) -> float:
    """The largest absolute value in any of these; NaN where there is one."""
    extremes = [(tensor.abs() if tensor.is_complex() else tensor).aminmax() for tensor in tensors]
    return torch.stack([torch.maximum(-low, high) for low, high in extremes]).max().item()


def _few_rows(example: Example) -> tuple[Example, float]:
    """The first rows of a batch, if all its tensors have as many rows, and the share of the batch that they are."""
    example = dict(example) if isinstance(example, Mapping) else example
    tensors = list(tensors_of(inputs_of(example)))
    leading = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    if len(leading) != 1 or (rows := leading.pop()) <= _FEW or not all(map(is_dense, tensors)):
        return example, 1.0
    return mapped(lambda leaf: leaf[:_FEW], example), _FEW / rows


def _lively(value: Any) -> Any:
    """Noise in place of a constant float input: batch norm of a constant is round-off, and proves nothing."""
    if not (_is_float(value) and value.numel() > 1 and is_dense(value)) or bool((value != value.flatten()[0]).any()):
        return value
    return _noise(value, torch.Generator().manual_seed(1)).to(value.dtype)


@torch.no_grad()
def randomised_copy(model: nn.Module, groups: tuple[Group, ...]) -> nn.Module:
    """A copy without dropout in which no weight is zero and no two units are equal, at about the model's own scale."""
    try:
        twin = copy_of(model)
    except RuntimeError as error:
        raise VerificationError(f"the model cannot be copied, so no cut of it can be tried out: {error}") from error
    generator, start = torch.Generator().manual_seed(0), 0
    tensors = named_tensors(twin)
    # Factors near 1, read round and round.
    num_drawn = min(sum(tensor.numel() for tensor in tensors.values()), _DRAWN)
    factors = torch.randn(num_drawn, generator=generator).clamp_(-2, 2).mul_(0.3).add_(1).repeat(2)
    touched = {part.tensor for group in groups for part in group.slices}
    for name, tensor in tensors.items():
        if not (isinstance(tensor, nn.Parameter) or name in touched) or not _is_float(tensor) or not is_dense(tensor):
            continue
        scale = 0.1 if tensor.dim() < 2 else float(np.sqrt(tensor.shape[0] / max(tensor.numel(), 1)))
        flat = tensor.reshape(-1)  # a copy where the tensor is not contiguous
        for piece in torch.split(flat, _DRAWN):  # so that no large tensor is made beside it
            size = piece.real if piece.is_complex() else piece  # phases stay
            zero = piece == 0 if int(piece.count_nonzero()) < piece.numel() else None  # to count is quicker
            size.mul_(factors[start : start + len(piece)].to(size))
            start = (start + len(piece)) % max(num_drawn, 1)
            if zero is not None:
                piece.copy_(torch.where(zero, _noise(piece, generator) * scale, piece))
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))
    for module in twin.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return twin


def _by_running_statistics(norm: Any, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _has_plain_norms(model: nn.Module) -> bool:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return all(type(n) in _BATCH_NORMS and n.running_mean is not None and "forward" not in vars(n) for n in norms)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    dtype = like.dtype if like.dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
    count = like.numel()
    drawn = torch.randn(min(count, _DRAWN), generator=generator, dtype=dtype).to(like.device, like.dtype)
    return drawn.repeat(-(-count // _DRAWN))[:count].reshape(like.shape)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _filled(tensor: Tensor) -> Tensor:
    return tensor if is_dense(tensor) else tensor.to_dense()  # gradients of a sparse embedding, say


def _widened(leaf: Any, dtype: torch.dtype) -> Any:
    if not _is_float(leaf):
        return leaf
    wanted = dtype.to_complex() if leaf.is_complex() else dtype
    return leaf if leaf.dtype.itemsize >= wanted.itemsize else leaf.to(wanted)


@contextmanager
def _private_chance(model: nn.Module, seed: int) -> Iterator[Callable[[], bool]]:
    """Inside, the global generators are seeded, and autocast is off; yields whether any of them was used since."""
    devices = {parameter.device for parameter in model.parameters()}
    cuda = [torch.cuda.default_generators[device.index] for device in devices if device.type == "cuda"]
    generators = [torch.default_generator, *cuda]
    kind = min((device.type for device in devices), default="cpu")

    def state() -> list[Any]:
        return [*(one.get_state().tolist() for one in generators), random.getstate(), repr(np.random.get_state())]

    with preserved_rng_state(model), torch.autocast(kind, enabled=False):
        for generator in generators:  # `torch.manual_seed` would seed other devices, too, whose state is not put back
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = state()
        yield lambda: state() != before


class _Narrowest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the narrowest floating-point type that any operation produces."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits = 64

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in filter(_is_float, tree_leaves(result)):
            self.bits = min(self.bits, 8 * leaf.dtype.to_real().itemsize)
        return result
