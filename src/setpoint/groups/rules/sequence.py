"""Layers over sequences: attention, experts, recurrent networks and their single cells, diagonal recurrences."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from setpoint.groups.rules.contract import num_gradients, sum_over
from setpoint.groups.rules.elementwise import unite_broadcast
from setpoint.groups.walk import DimLabels, Value, Walk, rule

aten = torch.ops.aten


@rule(aten._grouped_mm.default, "transformers::grouped_mm_fallback")
def _grouped_matmul(
    walk: Walk, out: Value, left: Value, right: Value, offs: Any = None, bias: Any = None, *args: Any, **kw: Any
) -> Value:
    """`y[s] = a[s] @ b[expert of s]`: rows of `a` sorted by expert, one matrix for each expert."""
    assert (left.ndim, right.ndim) == (2, 3) and bias is None, "it is no product of rows by one matrix an expert"
    walk.freeze(right.labels[0], "experts are chosen by data")
    inner = sum_over(walk, (left, left.labels[1]), (right, right.labels[1]))
    if right.weight:
        walk.atoms.mark("produce", right.labels[2])
    for labels in right.labels[1:]:
        walk.atoms.mark("aligned", labels)
    dims = [(left.shape[1], inner), (right.shape[2], right.labels[2])]
    walk.contract(left.shape[0], dims, num_gradients(left, right))
    return Value(out.shape, (left.labels[0], right.labels[2]), zero=right.zero)


def _heads(walk: Walk, query: Value, key: Value, value: Value, mask: Any, grouped: bool) -> tuple[DimLabels, ...]:
    """Unite batch dims of queries, keys and values; with grouped queries several query heads share a key head."""
    values = [Value(v.shape[:-2], v.labels[:-2]) for v in (query, key, value)]
    if grouped and query.shape[-3] != key.shape[-3]:
        repeat = query.shape[-3] // key.shape[-3]
        # Each key head's atoms are repeated for its query heads: that ties these, so they are dropped together.
        for number, v in enumerate(values[1:], 1):
            heads = v.labels[-1]
            shape = (*v.shape[:-1], 1 if v.shape[-1] == 1 else query.shape[-3])
            values[number] = Value(shape, v.relabelled(-1, None if heads is None else heads.repeat(repeat)))
    if isinstance(mask, Value) and mask.ndim > 2:
        values.append(Value(mask.shape[:-2], mask.labels[:-2]))
    return unite_broadcast(walk, values, query.ndim - 2)


@rule(aten.scaled_dot_product_attention.default)
def _sdpa(
    walk: Walk, out: Value, query: Value, key: Value, value: Value, attn_mask: Any = None, *args: Any, **kwargs: Any
) -> Value:
    """`softmax(q k^T * scale) v`; the default scale depends on the head size, which is then frozen."""
    batch = _heads(walk, query, key, value, attn_mask, bool(kwargs.get("enable_gqa", False)))
    for labels in batch:
        walk.atoms.mark("batch", labels)
    inner = sum_over(walk, (query, query.labels[-1]), (key, key.labels[-1]))
    if kwargs.get("scale") is None:
        walk.freeze(inner, "the attention scale depends on the head size")
    for operand in (query, key, value):
        walk.freeze(operand.labels[-2], "attention runs over this dim")
    batch_dims = list(zip(query.shape[:-2], batch, strict=True))
    positions = query.shape[-2] * key.shape[-2]
    scores = Value(out.shape, (None,) * out.ndim, grad=query.grad or key.grad)
    walk.contract(positions, [*batch_dims, (query.shape[-1], inner)], num_gradients(query, key))
    walk.contract(positions, [*batch_dims, (value.shape[-1], value.labels[-1])], num_gradients(scores, value))
    return Value(out.shape, (*batch, None, value.labels[-1]), zero=value.zero)


_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def _recurrent(
    walk: Walk, out: tuple[Value, ...], x: Value, states: Any, parameters: Sequence[Value], *options: Any
) -> tuple[Value, ...]:
    """Gates of hidden unit u are rows u, H + u, 2H + u, ... of both matrices; u is the same unit in all layers.

    A unit whose weights are zero stays zero from a zero start: `c = sigmoid(0) tanh(0) = 0` in an LSTM, `h = (1 - z)
    tanh(0) + z 0 = 0` in a GRU. Torch has one `hidden_size` for all layers and directions: these are tied.
    """
    has_biases, num_layers, _dropout, _train, bidirectional, batch_first = options
    starts = [states] if isinstance(states, Value) else list(states)
    num_directions, per_cell = 1 + bidirectional, 4 if has_biases else 2
    assert len(parameters) == per_cell * num_layers * num_directions, "a recurrent network with projections"
    hidden = _hidden(walk, x, starts)
    positions = math.prod(x.shape[:-1])
    first = positions // x.shape[1 if batch_first else 0]  # positions of the first step, whose state is given
    given = any(start.grad for start in starts)
    inputs, reading = x.labels[-1], x.grad  # of the present layer
    for layer in _runs(parameters, per_cell * num_directions):
        for cell in _runs(layer, per_cell):
            _cell(walk, cell, inputs, hidden)
            _contract(walk, cell[0], positions, reading)
            _contract(walk, cell[1], first, starts[0].grad)
            _contract(walk, cell[1], positions - first, reading or given or any(weight.grad for weight in cell))
        inputs = None if hidden is None else np.tile(hidden, num_directions)
        reading = reading or given or any(weight.grad for weight in layer)
    zero = all(start.zero for start in starts)
    outputs = Value(out[0].shape, (*x.labels[:-1], inputs), zero=zero)
    last = (Value(part.shape, (*(None,) * (part.ndim - 1), hidden), zero=zero) for part in out[1:])
    return outputs, *last


@rule(aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
def _one_step(walk: Walk, out: Any, x: Value, states: Any, *parameters: Value | None) -> Value | tuple[Value, ...]:
    """One step of one cell, as `nn.LSTMCell` and its like take it."""
    starts = [states] if isinstance(states, Value) else list(states)
    hidden = _hidden(walk, x, starts)
    weights = [parameter for parameter in parameters if parameter is not None]
    positions = math.prod(x.shape[:-1])
    _cell(walk, weights, x.labels[-1], hidden)
    _contract(walk, weights[0], positions, x.grad)
    _contract(walk, weights[1], positions, starts[0].grad)
    zero = all(start.zero for start in starts)
    results = tuple(Value(start.shape, (*x.labels[:-1], hidden), zero=zero) for start in starts)
    return results if isinstance(out, tuple) else results[0]


def _runs(parameters: Sequence[Value], size: int) -> list[Sequence[Value]]:
    return [parameters[start : start + size] for start in range(0, len(parameters), size)]


def _hidden(walk: Walk, x: Value, starts: Sequence[Value]) -> DimLabels:
    hidden: DimLabels = walk.atoms.fresh(starts[0].shape[-1])
    for start in starts:
        hidden = walk.unite(hidden, start.labels[-1], "the first hidden state is data")
    for attribute, labels in (("hidden_size", hidden), ("input_size", x.labels[-1])):
        if labels is not None:
            walk.attributes[walk.module, attribute] = labels
    return hidden


def _cell(walk: Walk, parameters: Sequence[Value], inputs: DimLabels, hidden: DimLabels) -> None:
    """One layer in one direction: `gates = w_ih x + b_ih + w_hh h + b_hh`."""
    gates = None if hidden is None else np.tile(hidden, _GATES[walk.op.removesuffix("_cell")])
    for weight in parameters[:2]:
        walk.atoms.mark("produce", weight.labels[0])
        walk.atoms.mark("consume", weight.labels[1])
    for value in parameters:
        walk.unite(gates, value.labels[0], "the first hidden state is data")
    walk.unite(parameters[0].labels[1], inputs)
    walk.unite(parameters[1].labels[1], hidden, "the first hidden state is data")


def _contract(walk: Walk, weight: Value, positions: int, grad: bool) -> None:
    """FLOPs of a matrix that reads its input at so many positions, and whether that needs a gradient there."""
    if positions:
        walk.contract(positions, list(zip(weight.shape, weight.labels, strict=True)), weight.grad + grad)


@rule("setpoint::diagonal_scan")
def _diagonal_scan(
    walk: Walk, out: Value, u: Value, a_re: Value, a_im: Value, b_re: Value, b_im: Value, c_re: Value, c_im: Value
) -> Value:
    """States of a diagonal recurrence are written by B, carried by the eigenvalues and read by C."""
    walk.freeze(u.labels[1], "a recurrence runs over this dim")
    for inputs in (b_re, b_im):
        inner = sum_over(walk, (u, u.labels[2]), (inputs, inputs.labels[1]))
        walk.atoms.mark("produce", inputs.labels[0])
    for outputs in (c_re, c_im):
        walk.atoms.mark("consume", outputs.labels[1])
        walk.atoms.mark("produce", outputs.labels[0])
    states = b_re.labels[0]
    for other in (b_im.labels[0], a_re.labels[0], a_im.labels[0], c_re.labels[1], c_im.labels[1]):
        states = walk.unite(states, other)
    outer = walk.unite(c_re.labels[0], c_im.labels[0])
    positions = [(u.shape[0], u.labels[0]), (u.shape[1], None)]
    # A complex product with a real sequence is two real ones, and so is the real part of a complex one.
    walk.contract(2, [*positions, (b_re.shape[0], states), (u.shape[2], inner)], num_gradients(u, b_re))
    walk.contract(2, [*positions, (c_re.shape[0], outer), (b_re.shape[0], states)], 2)
    return Value(out.shape, (u.labels[0], None, outer))
