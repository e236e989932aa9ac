"""Ops that work entry by entry: they unite the dims of their operands and pass labels on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from setpoint.groups.walk import DimLabels, Value, Walk, overloads, rule

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
"""

# Dropped units give other values than zero (a sigmoid gives one half). The weights that read them are dropped
# too, so only sums over the dim would differ.
_ZERO_BREAKING = """
    acos acosh cos cosh eq ne lt le gt ge exp exp2 exp_ fill fill_ hardsigmoid hardsigmoid_ isnan isinf
    isfinite log log10 log2 log_sigmoid logaddexp logical_not logical_or logical_xor logit masked_fill
    masked_fill_ pow pow_ reciprocal rsqrt sigmoid sigmoid_ softplus where zeros_like ones_like full_like
    empty_like rand_like randn_like clamp clamp_ clamp_min clamp_max clamp_min_ alpha_dropout threshold
    threshold_ bitwise_not bitwise_or
    floor_divide remainder fmod atan2 lerp addcmul addcdiv erfc hypot bernoulli bernoulli_ angle polar
"""

# Ops that keep zero depending on the numbers after their tensor, such as a power on its exponent.
_ZERO_KEEPING_BY_NUMBER: dict[str, Callable[..., bool]] = {
    "pow": lambda exponent: isinstance(exponent, (int, float)) and exponent > 0,
    "clamp_min": lambda low: isinstance(low, (int, float)) and low <= 0,
    "clamp_max": lambda high: isinstance(high, (int, float)) and high >= 0,
    "hardtanh": lambda low=-1, high=1: low <= 0 <= high,
    "masked_fill": lambda where, value: isinstance(value, (int, float)) and value == 0,
    "where": lambda x, other: all(part == 0 if isinstance(part, (int, float)) else part.zero for part in (x, other)),
}


def unite_broadcast(walk: Walk, values: Sequence[Value], ndim: int) -> tuple[DimLabels, ...]:
    """Labels of a broadcast result: along each dim, entries of all operands of full size unite."""
    result: list[DimLabels] = []
    for dim in range(-ndim, 0):
        full = [value.labels[dim] for value in values if value.ndim >= -dim and value.shape[dim] > 1]
        labels = full[0] if full else None
        for other in full[1:]:
            labels = walk.unite(labels, other)
        result.append(labels)
    return tuple(result)


def _spans(value: Value, out: Value) -> bool:
    """Whether the operand spans every dim of the output that units lie along."""
    return all(
        out.shape[dim] == 1 or (value.ndim >= -dim and value.shape[dim] == out.shape[dim])
        for dim in range(-out.ndim, 0)
        if out.labels[dim] is not None
    )


def united(walk: Walk, out: Value, args: Sequence[Any], zero_keeping: bool, name: str) -> Value:
    """What an op of this name gives entry by entry, and whether a dropped unit stays zero."""
    values = [arg for arg in args if isinstance(arg, Value)]
    result = Value(out.shape, unite_broadcast(walk, values, out.ndim))
    spanning = [value for value in values if _spans(value, result)]
    # A product is zero where one operand is; that operand must span all units' dims, or its zeros do not reach them.
    if name == "mul":
        zero = any(value.zero for value in spanning)
    elif name == "div":
        zero = bool(values) and values[0] in spanning and values[0].zero
    elif name in _ZERO_KEEPING_BY_NUMBER and isinstance(args[0], Value):
        read = values[1:] if name == "where" else values[:1]  # `where` has its condition first
        zero = all(value in spanning for value in read) and (name == "where" or args[0].zero)
        zero = zero and _ZERO_KEEPING_BY_NUMBER[name](*args[1:])
    else:
        added = name in ("add", "sub", "rsub") and any(
            isinstance(arg, (int, float)) and not isinstance(arg, bool) and arg != 0 for arg in args[:2]
        )
        zero = zero_keeping and len(spanning) == len(values) and all(value.zero for value in values) and not added
    return replace(result, zero=zero)


def _elementwise(zero_keeping: bool) -> Callable[..., Any]:
    def function(walk: Walk, out: Value | tuple[Value, ...], *args: Any, **kwargs: Any) -> Any:
        args = (*args, *(value for key, value in kwargs.items() if key != "out"))
        name = walk.op.removesuffix("_")
        if isinstance(out, tuple):
            return tuple(united(walk, part, args, zero_keeping, name) for part in out)
        return united(walk, out, args, zero_keeping, name)

    return function


rule(*overloads(_ZERO_KEEPING))(_elementwise(zero_keeping=True))
rule(*overloads(_ZERO_BREAKING))(_elementwise(zero_keeping=False))


@rule(aten.clamp.default, aten.clamp_.default)
def _clamp(walk: Walk, out: Value, x: Value, min: float | None = None, max: float | None = None) -> Value:
    """Zero stays zero between bounds that hold it."""
    return Value(out.shape, x.labels, zero=x.zero and (min is None or min <= 0) and (max is None or max >= 0))


@rule(aten.broadcast_tensors.default)
def _broadcast_tensors(walk: Walk, out: tuple[Value, ...], tensors: Sequence[Value]) -> tuple[Value, ...]:
    """Each tensor has the dims of all."""
    united = Value(out[0].shape, unite_broadcast(walk, tensors, out[0].ndim))
    return tuple(replace(united, zero=x.zero and _spans(x, united)) for x in tensors)


@rule(aten.prelu.default)
def _prelu(walk: Walk, out: Value, x: Value, weight: Value) -> Value:
    """One slope for all, or one for each entry of dim 1."""
    shared = weight.shape == (1,) or not weight.ndim or x.ndim < 2
    labels = x.labels if shared else x.relabelled(1, walk.unite(x.labels[1], weight.labels[0]))
    return Value(out.shape, labels, zero=x.zero)
