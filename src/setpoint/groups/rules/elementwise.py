"""Ops that work entry by entry: they unite the dims of their operands and pass labels on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from setpoint.groups.walk import DimLabels, Value, Walk, rule

aten = torch.ops.aten

# f(0) = 0, and f(0, 0) = 0: a dropped unit stays exactly zero.
_ZERO_KEEPING = """
    abs add add_ alias asin asinh atan ceil celu clone contiguous detach detach_ div div_ dropout dropout_
    elu elu_ erf expm1 feature_dropout fix floor gelu hardswish hardswish_ hardtanh hardtanh_
    leaky_relu leaky_relu_ lift_fresh_copy mish mul mul_ neg negative positive relu relu_ relu6
    relu6_ round rsub rrelu sgn sign silu silu_ sin sinh sqrt square sub sub_ tan tanh tanh_ to trunc
    type_as _to_copy copy copy_ zero_ nan_to_num softshrink hardshrink float double half
    bfloat16 log1p logical_and bitwise_and maximum minimum real imag conj _conj resolve_conj conj_physical
    _conj_physical complex resolve_neg
""".split()  # noqa: SIM905

# Dropped units give other values than zero (a sigmoid gives one half). The weights that read them are dropped
# too, so only sums over the dim would differ.
_ZERO_BREAKING = """
    acos acosh cos cosh eq ne lt le gt ge exp exp2 exp_ fill fill_ hardsigmoid hardsigmoid_ isnan isinf
    isfinite log log10 log2 log_sigmoid logaddexp logical_not logical_or logical_xor logit masked_fill
    masked_fill_ pow pow_ reciprocal rsqrt sigmoid sigmoid_ softplus where zeros_like ones_like full_like
    empty_like rand_like randn_like clamp clamp_ clamp_min clamp_max clamp_min_ alpha_dropout threshold
    threshold_ bitwise_not bitwise_or
    floor_divide remainder fmod atan2 lerp addcmul addcdiv erfc hypot bernoulli bernoulli_ angle polar
""".split()  # noqa: SIM905


# Ops that keep zero depending on the numbers after their tensor, such as a power on its exponent.
_ZERO_KEEPING_BY_NUMBER: dict[str, Callable[..., bool]] = {
    "pow": lambda exponent: isinstance(exponent, (int, float)) and exponent > 0,
    "clamp_min": lambda low: isinstance(low, (int, float)) and low <= 0,
    "clamp_max": lambda high: isinstance(high, (int, float)) and high >= 0,
    "masked_fill": lambda where, value: isinstance(value, (int, float)) and value == 0,
    "where": lambda x, other: all(part == 0 if isinstance(part, (int, float)) else part.zero for part in (x, other)),
}
_ZERO_KEEPING_BY_NUMBER |= {f"{name}_": keeps for name, keeps in _ZERO_KEEPING_BY_NUMBER.items()}


def unite_broadcast(walk: Walk, values: Sequence[Value], ndim: int) -> tuple[DimLabels, ...]:
    """Labels of a broadcast result: along each dim, entries of all operands of full size unite."""
    result: list[DimLabels] = []
    for dim in range(ndim):
        full = [
            (value.labels[dim - ndim], value.shape[dim - ndim])
            for value in values
            if value.ndim >= ndim - dim and value.shape[dim - ndim] > 1
        ]
        labels = full[0][0] if full else None
        for other, _ in full[1:]:
            labels = walk.unite(labels, other)
        result.append(labels)
    return tuple(result)


def _carries_everywhere(value: Value, out: Value) -> bool:
    """Whether the operand spans every dim of the output that units lie along."""
    return all(
        out.shape[dim] == 1 or (value.ndim >= out.ndim - dim and value.shape[dim - out.ndim] == out.shape[dim])
        for dim in range(out.ndim)
        if out.labels[dim] is not None
    )


def _elementwise(walk: Walk, out: Value, args: Sequence[Any], zero_keeping: bool, name: str) -> Value:
    values = [arg for arg in args if isinstance(arg, Value)]
    result = Value(out.shape, unite_broadcast(walk, values, out.ndim))
    numbers = any(isinstance(arg, (int, float)) and not isinstance(arg, bool) and arg != 0 for arg in args[:2])
    spanning = [value for value in values if _carries_everywhere(value, result)]
    # A product is zero where one operand is; that operand must span all units' dims, or its zeros do not reach them.
    if name in ("mul", "mul_"):
        zero = any(value.zero for value in spanning)
    elif name in ("div", "div_"):
        zero = bool(values) and values[0] in spanning and values[0].zero
    elif name in ("add", "add_", "sub", "sub_", "rsub"):
        zero = len(spanning) == len(values) and all(value.zero for value in values) and not numbers
    elif name in ("hardtanh", "hardtanh_") and args[1:] and not args[1] <= 0 <= args[2]:
        zero = False
    elif name in _ZERO_KEEPING_BY_NUMBER and isinstance(args[0], Value) and len(args) > 1:
        first = name == "where" or (args[0] in spanning and args[0].zero)  # `where` has its condition first
        others = all(value in spanning for value in values[1:]) or name != "where"
        zero = first and others and _ZERO_KEEPING_BY_NUMBER[name](*args[1:])
    else:
        zero = zero_keeping and len(spanning) == len(values) and all(value.zero for value in values)
    return Value(out.shape, result.labels, zero=zero)


def _register(name: str, zero_keeping: bool) -> None:
    packet = getattr(aten, name, None)
    if packet is None:
        return

    def function(walk: Walk, out: Value | tuple[Value, ...], *args: Any, **kwargs: Any) -> Any:
        tensors = (*args, *(value for key, value in kwargs.items() if key != "out"))
        if isinstance(out, tuple):
            return tuple(_elementwise(walk, part, tensors, zero_keeping, name) for part in out)
        return _elementwise(walk, out, tensors, zero_keeping, name)

    rule(*(getattr(packet, overload) for overload in packet.overloads()))(function)


for _name in _ZERO_KEEPING:
    _register(_name, True)
for _name in _ZERO_BREAKING:
    _register(_name, False)


@rule(aten.clamp.default, aten.clamp_.default)
def _clamp(walk: Walk, out: Value, x: Value, min: float | None = None, max: float | None = None) -> Value:
    """Zero stays zero between bounds that hold it."""
    return Value(out.shape, x.labels, zero=x.zero and (min is None or min <= 0) and (max is None or max >= 0))


@rule(aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default)
def _distance(walk: Walk, out: Value, x: Value, y: Value, reduction: int = 1, *args: Any) -> Value:
    """Entry by entry, where zeros are no distance apart; then a mean (1) or a sum (2) over all of it."""
    each = _elementwise(walk, Value(np.broadcast_shapes(x.shape, y.shape), ()), (x, y), True, "sub")
    for labels in each.labels if reduction else ():
        if reduction == 1 or not each.zero:
            walk.lossy(
                labels,
                "a mean runs over this dim"
                if reduction == 1
                else "a sum runs over this dim, where dropped units are not zero",
            )
        walk.atoms.mark("summed", labels)
    return replace(each, labels=() if reduction else each.labels)


@rule(aten.broadcast_tensors.default)
def _broadcast_tensors(walk: Walk, out: tuple[Value, ...], tensors: Sequence[Value]) -> tuple[Value, ...]:
    labels = unite_broadcast(walk, tensors, out[0].ndim)
    return tuple(
        Value(part.shape, labels, zero=x.zero and _carries_everywhere(x, Value(part.shape, labels)))
        for part, x in zip(out, tensors, strict=True)
    )


@rule(aten.prelu.default)
def _prelu(walk: Walk, out: Value, x: Value, weight: Value) -> Value:
    """One slope for all, or one for each entry of dim 1."""
    labels = list(x.labels)
    if weight.shape != (1,) and weight.ndim and x.ndim > 1:
        labels[1] = walk.unite(labels[1], weight.labels[0])
    return Value(out.shape, tuple(labels), zero=x.zero)
