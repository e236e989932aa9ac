"""Products of matrices: a dim that is summed over reads units, a new one starts some."""

import string
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from setpoint.groups.rules.elementwise import unite_broadcast
from setpoint.groups.walk import DimLabels, Value, Walk, rule

aten = torch.ops.aten


def num_gradients(*operands: Value) -> int:
    """Number of operands that need a gradient."""
    return sum(operand.grad for operand in operands)


def sum_over(walk: Walk, *dims: tuple[Value, DimLabels]) -> DimLabels:
    """Labels of a dim that is summed over, given the operands that have it; a weight's atoms are marked as reading."""
    for operand, labels in dims:
        if operand.weight and not _measures([value for value, _ in dims]):
            walk.atoms.mark("consume", labels)
        if not any(value.weight for value, _ in dims):
            walk.atoms.mark("contract", labels)
    if not any(operand.zero and not walk.copies(labels) for operand, labels in dims):
        walk.lossy(dims[0][1], "a sum runs over this dim, where dropped units are not zero")
    return reduce(lambda a, b: walk.unite(a, b, "input of the network, or other data"), (labels for _, labels in dims))


def _measures(operands: Sequence[Value]) -> bool:
    """Whether a product of weights measures a matrix (a spectral norm): no layer reads units there."""
    return all(value.weight for value in operands) and min(value.ndim for value in operands) == 1


def _multiply(
    walk: Walk, out: Value, terms: Sequence[str], output: str, operands: Sequence[Value], batch: str = ""
) -> Value:
    """`einsum`: dims of one letter unite, and a letter that is missing from the output is summed over.

    Letters of `batch` number matrices of their own, as heads do: a weight does not write units along them.
    """
    labels: dict[str, DimLabels] = {}
    sizes: dict[str, int] = {}
    zero, of_data = True, not any(operand.weight for operand in operands)
    for letter in dict.fromkeys((*output, *"".join(terms))):
        dims = [
            (operand, own, size)
            for term, operand in zip(terms, operands, strict=True)
            for name, own, size in zip(term, operand.labels, operand.shape, strict=True)
            if name == letter
        ]
        sizes[letter] = max(size for _, _, size in dims)
        held = [(operand, own) for operand, own, size in dims if size == sizes[letter]]  # the others are broadcast
        if letter not in output:
            labels[letter] = sum_over(walk, *held)
            continue
        labels[letter] = reduce(walk.unite, (own for _, own in held))
        for operand, own in held:
            if operand.weight and letter not in batch and not _measures(operands):
                walk.atoms.mark("produce", own)
        if of_data and (letter in batch or len(dims) == 2 == len(operands)):
            walk.atoms.mark("batch", labels[letter])
        zero = zero and (labels[letter] is None or any(operand.zero for operand, _ in held))
    if len(operands) > 1:
        # More than two operands are multiplied pairwise, in an order that torch chooses: this is an upper bound.
        walk.contract(1, [(size, labels[letter]) for letter, size in sizes.items()], num_gradients(*operands))
    return Value(out.shape, tuple(labels[letter] for letter in output), zero=zero)


def _plus(walk: Walk, product: Value, bias: Value | None) -> Value:
    if bias is None:
        return product
    rows = any(labels is not None for labels in product.labels[:-1])
    zero = product.zero and bias.zero and (bias.ndim == product.ndim or not rows)
    return Value(product.shape, unite_broadcast(walk, [product, bias], product.ndim), zero=zero)


@rule(aten.linear.default)
def _linear(walk: Walk, out: Value, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """`y[..., o] = sum_i x[..., i] w[o, i] + b[o]`."""
    walk.atoms.mark("produce", weight.labels[0])  # also where other data makes the weight
    rows = string.ascii_uppercase[: x.ndim - 1]
    return _plus(walk, _multiply(walk, out, (f"{rows}i", "oi"), f"{rows}o", (x, weight)), bias)


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default)
@rule(aten.dot.default, aten.vdot.default)
def _matmul(walk: Walk, out: Value, left: Value, right: Value) -> Value:
    """`y[..., m, n] = sum_k a[..., m, k] b[..., k, n]`, batch dims broadcast."""
    batch = string.ascii_uppercase[: max(left.ndim, right.ndim, 2) - 2]
    rows, columns = "m" * (left.ndim > 1), "n" * (right.ndim > 1)
    terms = (f"{batch}{rows}k"[-left.ndim :], f"{batch}k{columns}"[-right.ndim :])
    return _multiply(walk, out, terms, batch + rows + columns, (left, right), batch)


@rule(aten.addmm.default, aten.baddbmm.default)
def _addmm(walk: Walk, out: Value, bias: Value, left: Value, right: Value, **kwargs: Any) -> Value:
    """`bias + left @ right`."""
    return _plus(walk, _matmul(walk, out, left, right), bias)


@rule(aten.einsum.default)
def _einsum(walk: Walk, out: Value, equation: str, operands: Sequence[Value], **kwargs: Any) -> Value:
    """An ellipsis stands for leading dims; without an output the letters that occur once are it, in order."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    num_dots = [value.ndim - len(term.replace("...", "")) for term, value in zip(terms, operands, strict=True)]
    dots = "".join(free[: max(num_dots)]) if "..." in inputs else ""
    if not arrow:
        named = inputs.replace(",", "").replace("...", "")
        output = ("..." if dots else "") + "".join(sorted(c for c in set(named) if named.count(c) == 1))
    full = [term.replace("...", dots[len(dots) - num :]) for term, num in zip(terms, num_dots, strict=True)]
    return _multiply(walk, out, full, output.replace("...", dots), operands)
