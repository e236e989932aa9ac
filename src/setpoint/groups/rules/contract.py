"""Matrix products and convolutions: the contracted dim reads units, the output dim starts new ones."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from setpoint.groups.rules.elementwise import unite_broadcast
from setpoint.groups.walk import DimLabels, Value, Walk, op_name, rule

aten = torch.ops.aten


def num_gradients(*operands: Value) -> int:
    """Number of operands that need a gradient."""
    return sum(operand.grad for operand in operands)


def contract_dim(walk: Walk, left: Value, left_dim: int, right: Value, right_dim: int) -> DimLabels:
    """Labels of a dim that is summed over in both operands; a weight's atoms are marked as reading it."""
    a, b = left.labels[left_dim], right.labels[right_dim]
    for operand, labels in ((left, a), (right, b)):
        if operand.weight and not _measures(left, right):
            walk.atoms.mark("consume", labels)
        if not left.weight and not right.weight:
            walk.atoms.mark("contract", labels)
    if not (left.zero and not walk.copies(a)) and not (right.zero and not walk.copies(b)):
        walk.lossy(a, "a sum runs over this dim, where dropped units are not zero")
    return walk.unite(a, b, "input of the network, or other data")


def _measures(left: Value, right: Value) -> bool:
    """Whether a product of weights measures a matrix (a spectral norm): no layer reads units there."""
    return left.weight and right.weight and min(left.ndim, right.ndim) == 1


def _add_bias(walk: Walk, labels: DimLabels, bias: Value | None) -> DimLabels:
    return labels if bias is None else walk.unite(labels, bias.labels[-1])


@rule(aten.linear.default)
def _linear(walk: Walk, out: Value, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """`y[..., o] = sum_i x[..., i] w[o, i] + b[o]`."""
    inner = contract_dim(walk, x, -1, weight, -1)
    outer = weight.labels[0]
    walk.atoms.mark("produce", outer)
    outer = _add_bias(walk, outer, bias)
    dims = [*zip(x.shape[:-1], x.labels[:-1], strict=True), (weight.shape[0], outer), (x.shape[-1], inner)]
    walk.contract(1, dims, num_gradients(x, weight))
    rows = any(labels is not None for labels in x.labels[:-1])
    written = weight.zero and (bias is None or bias.zero)
    return Value(out.shape, (*x.labels[:-1], outer), zero=written and (not rows or (x.zero and bias is None)))


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default)
@rule(aten.dot.default, aten.vdot.default)
def _matmul(walk: Walk, out: Value, left: Value, right: Value) -> Value:
    """`y[..., m, n] = sum_k a[..., m, k] b[..., k, n]`, batch dims broadcast."""
    right_inner = right.ndim - 2 if right.ndim > 1 else 0
    inner = contract_dim(walk, left, left.ndim - 1, right, right_inner)
    batch_ndim = max(left.ndim, right.ndim, 2) - 2
    batch = unite_broadcast(
        walk, [Value(left.shape[:-2], left.labels[:-2]), Value(right.shape[:-2], right.labels[:-2])], batch_ndim
    )
    if not left.weight and not right.weight:
        for labels in batch:
            walk.atoms.mark("batch", labels)
    rows = [(left.shape[-2], left.labels[-2])] if left.ndim > 1 else []
    columns = [(right.shape[-1], right.labels[-1])] if right.ndim > 1 else []
    for operand, dims in ((left, rows), (right, columns)):
        if operand.weight and dims and not _measures(left, right):
            walk.atoms.mark("produce", dims[0][1])
    batch_dims = list(zip(out.shape[: len(batch)], batch, strict=True))
    walk.contract(1, [*batch_dims, *rows, *columns, (left.shape[-1], inner)], num_gradients(left, right))
    # Along a batch dim one zero operand is enough; along rows or columns it must be their own operand.
    zero = left.zero or right.zero or all(labels is None for labels in batch)
    for operand, dims in ((left, rows), (right, columns)):
        zero = zero and (operand.zero or all(labels is None for _, labels in dims))
    return Value(out.shape, (*batch, *(labels for _, labels in (*rows, *columns))), zero=zero)


@rule(aten.addmm.default, aten.baddbmm.default)
def _addmm(walk: Walk, out: Value, bias: Value, left: Value, right: Value, **kwargs: Any) -> Value:
    """`bias + left @ right`."""
    product = _matmul(walk, out, left, right)
    labels = unite_broadcast(walk, [product, bias], out.ndim)
    rows = any(own is not None for own in product.labels[:-1])
    return Value(out.shape, labels, zero=product.zero and bias.zero and (bias.ndim == out.ndim or not rows))


@rule(aten._grouped_mm.default, "transformers::grouped_mm_fallback")
def _grouped_matmul(
    walk: Walk,
    out: Value,
    left: Value,
    right: Value,
    offs: Any = None,
    bias: Value | None = None,
    *args: Any,
    **kw: Any,
) -> Value | None:
    """`y[s] = a[s] @ b[expert of s]`: rows of `a` sorted by expert, one matrix for each expert."""
    if left.ndim != 2 or right.ndim != 3 or bias is not None:
        for value in (left, right, *([bias] if bias is not None else [])):
            walk.freeze_all(value, "a grouped product of another form than rows by one matrix an expert")
        return None
    walk.freeze(right.labels[0], "experts are chosen by data")
    inner = contract_dim(walk, left, 1, right, 1)
    if right.weight:
        walk.atoms.mark("produce", right.labels[2])
    for labels in right.labels[1:]:
        walk.atoms.mark("aligned", labels)
    dims = [(left.shape[1], inner), (right.shape[2], right.labels[2])]
    walk.contract(left.shape[0], dims, num_gradients(left, right))
    return Value(out.shape, (left.labels[0], right.labels[2]), zero=right.zero)


@rule(aten.einsum.default)
def _einsum(walk: Walk, out: Value, equation: str, operands: Sequence[Value], **kwargs: Any) -> Value:
    """Letters that meet unite; a letter missing from the output is summed over. An ellipsis stands for leading dims."""
    terms, output = _spelled_out(equation, operands)
    letters: dict[str, DimLabels] = {}
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, labels, size in zip(term, operand.labels, operand.shape, strict=True):
            _mark_letter(walk, operand, letter in output, labels, operands)
            if sizes.get(letter, 1) > 1 and size > 1:
                letters[letter] = walk.unite(letters[letter], labels)
            elif size >= sizes.get(letter, 0):
                letters[letter], sizes[letter] = labels, size
    _mark_batch(walk, terms, operands, output, letters)
    if len(operands) > 1:
        # More than two operands are multiplied pairwise, in an order that torch chooses: this is an upper bound.
        walk.contract(1, [(sizes[letter], letters[letter]) for letter in letters], num_gradients(*operands))
    zero = all(
        any(v.zero for term, v in zip(terms, operands, strict=True) if letter in term)
        for letter in output
        if letters[letter] is not None
    )
    return Value(out.shape, tuple(letters[letter] for letter in output), zero=zero)


def _spelled_out(equation: str, operands: Sequence[Value]) -> tuple[list[str], str]:
    """Terms and output of an equation, with a letter for every dim."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    longest = max(v.ndim - len(term.replace("...", "")) for term, v in zip(terms, operands, strict=True))
    dots = "".join(free[:longest]) if "..." in inputs else ""

    def full(term: str, ndim: int) -> str:
        num = ndim - len(term.replace("...", ""))
        return term.replace("...", dots[len(dots) - num :] if num else "")

    if not arrow:
        named = inputs.replace(",", "").replace("...", "")
        output = ("..." if dots else "") + "".join(sorted(c for c in set(named) if named.count(c) == 1))
    return [full(term, v.ndim) for term, v in zip(terms, operands, strict=True)], output.replace("...", dots)


def _mark_letter(walk: Walk, operand: Value, kept: bool, labels: DimLabels, operands: Sequence[Value]) -> None:
    """Mark whether an operand's dim writes units, reads them, or is summed over."""
    if operand.weight:
        walk.atoms.mark("produce" if kept else "consume", labels)
    elif not kept:
        if not any(value.weight for value in operands):
            walk.atoms.mark("contract", labels)
        if not any(value.zero for value in operands):
            walk.lossy(labels, "a sum runs over this dim, where dropped units are not zero")


def _mark_batch(
    walk: Walk, terms: Sequence[str], operands: Sequence[Value], output: str, letters: Mapping[str, DimLabels]
) -> None:
    """Mark the dims that both activations and the output share as batch dims, as heads are."""
    if len(operands) == 2 and not any(operand.weight for operand in operands):
        for letter in set(terms[0]) & set(terms[1]) & set(output):
            walk.atoms.mark("batch", letters[letter])


def _tie_groups(
    walk: Walk, num_groups: int, inputs: DimLabels, shared_in: DimLabels, outputs: np.ndarray, shared_out: DimLabels
) -> None:
    """Tie the channels of a grouped convolution, whose weight holds those of one group along its `shared` dims."""
    groups = walk.atoms.fresh(num_groups)
    for labels, shared in ((inputs, shared_in), (outputs, shared_out)):
        if labels is None:
            walk.freeze(groups, "the channels of a grouped convolution are data")
        elif len(labels) == num_groups:
            walk.atoms.unite(labels, groups)
        else:
            within = walk.atoms.fresh(len(labels) // num_groups)
            walk.atoms.unite(labels, walk.product((groups, within)).ravel())
            if shared is not None:
                walk.atoms.unite(shared, within)
    walk.attributes[walk.module, "groups"] = groups
    read, written = (shared_in, outputs) if shared_out is None else (inputs, shared_out)
    walk.grouped.append((groups, read, written))
    assert walk.node is not None
    walk.literal(op_name(walk.node.target), 0, num_groups, groups)


def _convolution(
    walk: Walk, out: Value, x: Value, weight: Value, bias: Value | None, num_groups: int, transposed: bool
) -> Value:
    batched = x.ndim == weight.ndim
    channel = int(batched)
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    for labels in x.labels[channel + 1 :]:
        walk.freeze(labels, "a kernel slides over this dim")
    outputs = weight.labels[out_dim]
    if transposed and num_groups > 1:
        outputs = walk.atoms.fresh(out.shape[channel])
    elif outputs is None:
        outputs = walk.atoms.fresh(weight.shape[out_dim])
        walk.freeze(outputs, "filters are data")
    if num_groups == 1:
        inputs = contract_dim(walk, x, channel, weight, in_dim)
        walk.atoms.mark("produce", outputs)
        flop_dims = [(weight.shape[out_dim], outputs), (weight.shape[in_dim], inputs)]
    else:
        if transposed:
            # The weight is (in, out / groups, ...): its first dim follows the input, its second the outputs of a group.
            shared, own = weight.labels[1], weight.labels[0]
            _tie_groups(walk, num_groups, own, None, outputs, shared)
            inputs = walk.unite(x.labels[channel], own)
        else:
            inputs = x.labels[channel]
            _tie_groups(walk, num_groups, inputs, weight.labels[1], outputs, None)
        flop_dims = [(weight.shape[0], weight.labels[0]), (weight.shape[1], weight.labels[1])]
    walk.atoms.mark("conv", outputs)
    walk.attributes[walk.module, "out_channels"] = outputs
    if inputs is not None:
        walk.attributes[walk.module, "in_channels"] = inputs
    outer = _add_bias(walk, outputs, bias)
    spatial = (x if transposed else out).shape[channel + 1 :]
    batch = x.shape[0] if batched else 1
    walk.contract(math.prod(spatial) * math.prod(weight.shape[2:]) * batch, flop_dims, num_gradients(x, weight))
    passed: tuple[DimLabels, ...] = (outer, *(None,) * len(spatial))
    zero = weight.zero and (bias is None or bias.zero)
    return Value(out.shape, (x.labels[0], *passed) if batched else passed, zero=zero)


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
@rule(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv(walk: Walk, out: Value, x: Value, weight: Value, bias: Value | None = None, *args: Any, **kw: Any) -> Value:
    """Channels are contracted, kernel and space are data."""
    num_groups = kw.get("groups", args[3] if len(args) > 3 else 1)
    transposed = op_name(walk.node.target).startswith("conv_transpose")  # type: ignore[union-attr]
    return _convolution(walk, out, x, weight, bias, num_groups, transposed)


@rule(aten.convolution.default)
def _general_convolution(
    walk: Walk, out: Value, x: Value, weight: Value, bias: Value | None, *args: Any, **kw: Any
) -> Value:
    return _convolution(walk, out, x, weight, bias, args[5], transposed=args[3])
