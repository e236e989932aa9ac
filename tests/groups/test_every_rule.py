"""Every rule: a row for each, and for each elementwise op whether zero stays zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import setpoint.groups.rules  # noqa: F401
from groups.test_rules import MOVES, PRODUCTS, Function, Weighted
from setpoint.actuator.verify import failing_groups
from setpoint.groups.rules.elementwise import _ZERO_KEEPING
from setpoint.groups.trace import find_groups
from setpoint.groups.walk import _RULES

aten = torch.ops.aten
Op = Callable[[nn.Module, Tensor], Tensor]

ROWS = torch.tensor([0, 2, 1, 3, 0, 1, 2, 3])


def _image(y: Tensor) -> Tensor:
    """Twelve channels of 4 x 4 positions."""
    return y[:, :, None, None] * torch.linspace(1, 2, 16).view(1, 1, 4, 4).to(y)


def _cell(kind: str) -> Op:
    def run(m: nn.Module, y: Tensor) -> Tensor:
        state = torch.zeros(len(y), 7).to(y)
        weights = m.w, m.h
        if kind == "lstm_cell":
            return torch.lstm_cell(y, (state, state), *weights)[0]
        step: Tensor = getattr(torch, kind)(y, state, *weights)
        return step

    return run


def _sequence(kind: str) -> Op:
    def run(m: nn.Module, y: Tensor) -> Tensor:
        state = torch.zeros(1, len(y), 7).to(y)
        start: Any = (state, state) if kind == "lstm" else state
        weights = [m.w, m.h]
        outputs = getattr(torch, kind)(y[:, None], start, weights, False, 1, 0.0, True, False, True)[0]
        return torch.as_tensor(outputs[:, 0])

    return run


def _attention(m: nn.Module, y: Tensor) -> Tensor:
    x = y.view(2, 4, 3, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).reshape(8, 12)


# name: (op on twelve neurons, outputs, parameters, units of the lossless groups).
MORE: dict[str, tuple[Op, int, dict[str, tuple[int, ...]], list[int]]] = {
    "embedding": (lambda m, y: y + F.embedding(ROWS, m.w), 12, {"w": (4, 12)}, [12]),
    "index": (lambda m, y: y[ROWS], 12, {}, [12]),
    "index_select": (lambda m, y: y.index_select(0, ROWS), 12, {}, [12]),
    "index_add": (lambda m, y: torch.zeros_like(y).index_add(0, ROWS, y), 12, {}, [12]),
    "index_add_": (lambda m, y: torch.zeros_like(y).index_add_(0, ROWS, y), 12, {}, [12]),
    "scatter_add_": (lambda m, y: torch.zeros_like(y).scatter_add_(0, ROWS[:, None].expand_as(y), y), 12, {}, [12]),
    "scatter_reduce": (
        lambda m, y: torch.zeros_like(y).scatter_reduce(0, ROWS[:, None].expand_as(y), y, "sum"), 12, {}, [12]),
    "written into a part": (lambda m, y: _filled(y), 12, {}, [12]),
    "data": (lambda m, y: y + torch.arange(8).to(y)[:, None], 12, {}, [12]),
    "constant": (lambda m, y: y * torch.ones(8, 12).to(y), 12, {}, [12]),
    "broadcast_tensors": (lambda m, y: torch.mul(*torch.broadcast_tensors(y, m.w)), 12, {"w": (1, 12)}, [12]),
    "batch norm": (lambda m, y: F.batch_norm(y, None, None, m.w, m.w, True), 12, {"w": (12,)}, [12]),
    "instance norm": (lambda m, y: F.instance_norm(_image(y)).mean((2, 3)), 12, {}, [12]),
    "group norm": (lambda m, y: F.group_norm(y, 3), 12, {}, [3]),
    "layer norm": (lambda m, y: F.layer_norm(y, (12,)), 12, {}, []),
    "rms norm": (lambda m, y: F.rms_norm(y, (12,)), 12, {}, []),
    "mean over data": (lambda m, y: _image(y).mean((2, 3)), 12, {}, [12]),
    "mean over units": (lambda m, y: y - y.mean(1, keepdim=True), 12, {}, []),
    "norm over units": (lambda m, y: y / torch.linalg.vector_norm(y, dim=1, keepdim=True), 12, {}, [12]),
    "max over data": (lambda m, y: _image(y).amax((2, 3)), 12, {}, [12]),
    "max over units": (lambda m, y: y - y.max(1, keepdim=True)[0], 12, {}, []),
    "pooling": (lambda m, y: F.avg_pool2d(_image(y), 4).flatten(1), 12, {}, [12]),
    "col2im": (lambda m, y: F.fold(F.unfold(_image(y), 2, stride=2), 4, 2, stride=2).mean((2, 3)), 12, {}, [12]),
    "conv_transpose2d": (
        lambda m, y: F.conv_transpose2d(_image(y), m.w).mean((2, 3)), 7, {"w": (12, 7, 2, 2)}, [12, 7]),
    "fft": (lambda m, y: torch.fft.irfft(torch.fft.rfft(_image(y)), n=4).mean((2, 3)), 12, {}, [12]),
    "pairs": (
        lambda m, y: torch.view_as_real(torch.view_as_complex(torch.stack([y, -y], -1)) * 1j)[..., 0], 12, {}, [12]),
    "attention": (_attention, 12, {}, [3]),
    "lstm": (_sequence("lstm"), 7, {"w": (28, 12), "h": (28, 7)}, [12, 7]),
    "gru": (_sequence("gru"), 7, {"w": (21, 12), "h": (21, 7)}, [12, 7]),
    "lstm_cell": (_cell("lstm_cell"), 7, {"w": (28, 12), "h": (28, 7)}, [12, 7]),
    "gru_cell": (_cell("gru_cell"), 7, {"w": (21, 12), "h": (21, 7)}, [12, 7]),
    "rnn_tanh_cell": (_cell("rnn_tanh_cell"), 7, {"w": (7, 12), "h": (7, 7)}, [12, 7]),
    "power over units": (lambda m, y: y / (1 + y.pow(2).sum(1, keepdim=True)), 12, {}, [12]),
    "negative power over units": (lambda m, y: y * (1 + y.pow(-2).sum(1, keepdim=True)), 12, {}, []),
    "clamp over units": (lambda m, y: y * y.clamp(min=0).sum(1, keepdim=True), 12, {}, [12]),
    "clamp away from zero": (lambda m, y: y * y.clamp(max=-1).sum(1, keepdim=True), 12, {}, []),
    "clamp_min over units": (lambda m, y: y * y.clamp_min(0.5).sum(1, keepdim=True), 12, {}, []),
    "masked with zero": (lambda m, y: y * y.masked_fill(y > 0, 0.0).sum(1, keepdim=True), 12, {}, [12]),
    "masked with one": (lambda m, y: y * y.masked_fill(y > 0, 1.0).sum(1, keepdim=True), 12, {}, []),
    "where zero": (lambda m, y: y * torch.where(y > 0, y, 0.0).sum(1, keepdim=True), 12, {}, [12]),
    "where one": (lambda m, y: y * torch.where(y > 0, y, 1.0).sum(1, keepdim=True), 12, {}, []),
    "inverse norm over units": (lambda m, y: y * torch.linalg.vector_norm(y, -1, 1, keepdim=True), 12, {}, []),
    "summed distance": (lambda m, y: y * F.mse_loss(y, 2 * y, reduction="sum"), 12, {}, [12]),
    "mean distance": (lambda m, y: y * F.mse_loss(y, 2 * y), 12, {}, []),
    "distances": (lambda m, y: F.smooth_l1_loss(y, 2 * y, reduction="none"), 12, {}, [12]),
    "embedding_bag": (lambda m, y: y + F.embedding_bag(ROWS.view(8, 1), m.w), 12, {"w": (4, 12)}, [12]),
    "broadcast key": (lambda m, y: y * m.w.expand(8, 12), 12, {"w": (1, 12)}, [12]),
}  # fmt: skip


def _filled(y: Tensor) -> Tensor:
    """A tensor of zeros, into whose parts values are written."""
    out = torch.zeros(8, 12).to(y)
    out[:4] = y[:4]
    out[4:].add_(y[4:])
    return out


@pytest.mark.parametrize("name", MORE)
def test_units_through_more_ops(name: str) -> None:
    """The groups on both sides of the op are found, and their cut equals the masked twin."""
    op, outputs, shapes, num_units = MORE[name]
    torch.manual_seed(0)
    model = Weighted(op, outputs, **{key: torch.randn(shape) for key, shape in shapes.items()})
    example = (torch.randn(8, 5),)
    groups = tuple(group for group in find_groups(model, example) if group.lossless)
    assert sorted(group.num_units for group in groups) == sorted(num_units)
    assert not groups or failing_groups(model, example, groups) == ()


# Rules whose op is tested elsewhere, and where.
ELSEWHERE = {
    "_grouped_matmul": "test_rules.py::test_rows_of_experts",
    "_of_custom_function": "test_values.py::test_what_a_custom_function_touches_stays",
    "_of_opaque_call": "test_partial.py",
    "_diagonal_scan": "test_state_space.py, which cuts states and reads of an LRU against its masked twin",
}


def test_every_rule_has_a_row() -> None:
    """Each rule function is called by the graph of some row of the tables, or is listed with the place of its test."""
    seen: set[str] = set()
    graphs = [(Function(f), (torch.zeros(shape),)) for f, shape, _ in MOVES.values()]
    for op, outputs, shapes, _ in (*PRODUCTS.values(), *MORE.values()):
        model = Weighted(op, outputs, **{key: torch.ones(shape) for key, shape in shapes.items()})
        graphs.append((model, (torch.zeros(8, 5),)))
    for model, example in graphs:
        program = torch.export.export(model, example, strict=False)
        for module in program.graph_module.modules():
            for node in getattr(module, "graph", torch.fx.Graph()).nodes:
                if node.target in _RULES:
                    seen.add(_RULES[node.target].__name__)
    own = {f.__name__ for op, f in _RULES.items() if f.__module__.startswith("setpoint.") and "docs" not in str(op)}
    assert own - seen - set(ELSEWHERE) == set()


@pytest.mark.parametrize("name", [name for name in _ZERO_KEEPING.split() if hasattr(aten, name)])
def test_zero_stays_zero(name: str) -> None:
    """What the rules call zero-keeping gives exactly 0 where all of its tensors are 0; a divisor is not 0."""
    packet = getattr(aten, name)
    first = next(each for each in ("Tensor", "dtype", packet.overloads()[0]) if each in packet.overloads())
    dtype = torch.float32
    if name.startswith(("logical", "bitwise")):
        dtype = torch.bool
    elif name in ("imag", "_conj"):
        dtype = torch.complex64
    args: list[Any] = []
    for argument in getattr(packet, first)._schema.arguments:
        if argument.has_default_value() or argument.kwarg_only:
            continue
        if str(argument.type) == "Tensor":
            args.append(torch.ones(4, 4) if name.startswith("div") and args else torch.zeros(4, 4, dtype=dtype))
        else:
            args.append(torch.float32 if argument.name == "dtype" else {"float": 0.5, "bool": True}[str(argument.type)])
    assert torch.count_nonzero(getattr(packet, first)(*args)) == 0
