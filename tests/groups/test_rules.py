"""Rules: for each op, which entries of its output belong to a unit of its input, and whether zero stays zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import setpoint.groups.rules  # noqa: F401
from setpoint.actuator.verify import failing_groups
from setpoint.groups.graph import run
from setpoint.groups.product import solve
from setpoint.groups.rules.elementwise import _ZERO_KEEPING
from setpoint.groups.trace import find_groups, trace
from setpoint.groups.walk import _RULES, Value, Walk, rule, rule_for

aten = torch.ops.aten
Op = Callable[[nn.Module, Tensor], Tensor]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def follow(
    function: Callable[..., Any], shapes: Sequence[tuple[int, ...]], labelled: set[int]
) -> tuple[Walk, Any, Any]:
    """Walk the graph of a function whose inputs have units along these dims of the first; atoms and output."""
    inputs = tuple(torch.zeros(shape) for shape in shapes)
    program = torch.export.export(Function(function), inputs, strict=False)
    walk = Walk()
    own = {dim: walk.atoms.fresh(shapes[0][dim]) for dim in labelled}
    places = [node for node in program.graph.nodes if node.op == "placeholder"]
    first = Value(shapes[0], tuple(own.get(dim) for dim in range(len(shapes[0]))))
    env = dict(zip(places, [first, *(Value(shape, (None,) * len(shape)) for shape in shapes[1:])], strict=True))
    output = run(walk, program.graph_module, env)
    solve(walk.atoms, walk.products)
    return walk, own, output


def dropped(walk: Walk, value: Value, roots: np.ndarray) -> np.ndarray:
    """Entries of a value that fall with these classes."""
    result = np.zeros(value.shape, dtype=bool)
    for dim, labels in enumerate(value.labels):
        if labels is not None:
            shape = [1] * value.ndim
            shape[dim] = -1
            result |= np.isin(walk.atoms.find(labels), roots).reshape(shape)
    return result


# name: (function of one tensor that moves entries about, shape, dims whose units stay free).
MOVES: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...], set[int]]] = {
    "view, split": (lambda x: x.view(2, 3, 4), (2, 12), {0, 1}),
    "view, merge": (lambda x: x.view(2, 12), (2, 3, 4), {0, 1, 2}),
    "reshape over both": (lambda x: x.permute(0, 2, 1).reshape(2, 12), (2, 3, 4), {0, 1, 2}),
    "flatten": (lambda x: x.flatten(1), (2, 3, 4, 5), {0, 1, 2, 3}),
    "unflatten": (lambda x: x.unflatten(1, (3, 4)), (2, 12), {0, 1}),
    "permute": (lambda x: x.permute(2, 0, 1), (2, 3, 4), {0, 1, 2}),
    "transpose": (lambda x: x.transpose(1, -1), (2, 3, 4), {0, 1, 2}),
    "movedim": (lambda x: x.movedim((0, 1), (2, 0)), (2, 3, 4), {0, 1, 2}),
    "t": (lambda x: x.t(), (2, 3), {0, 1}),
    "unsqueeze": (lambda x: x.unsqueeze(1), (2, 3), {0, 1}),
    "squeeze": (lambda x: x.squeeze(1), (2, 1, 3), {0, 2}),
    "expand": (lambda x: x.unsqueeze(1).expand(2, 4, 3), (2, 3), {0, 1}),
    "repeat": (lambda x: x.repeat(2, 1, 3), (2, 4), {0, 1}),
    "tile": (lambda x: x.tile(3), (2, 4), {0, 1}),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), (2, 4), {0, 1}),
    "cat": (lambda x: torch.cat([x, x], 1), (2, 4), {0, 1}),
    "stack": (lambda x: torch.stack([x, x], 1), (2, 4), {0, 1}),
    "split": (lambda x: x.split(2, 1), (2, 6), {0, 1}),
    "split in sizes": (lambda x: x.split([1, 5], 1), (2, 6), {0, 1}),
    "chunk": (lambda x: x.chunk(3, 1), (2, 6), {0, 1}),
    "unbind": (lambda x: x.unbind(1), (2, 6), {0}),
    "select": (lambda x: x[:, 3], (2, 6), {0}),
    "slice": (lambda x: x[:, 1:5], (2, 6), {0, 1}),
    "slice and nothing": (lambda x: torch.cat([x[:, 1:4], x[:, 6:]], 1), (2, 6), {0, 1}),
    "slice with a step": (lambda x: x[:, ::2], (2, 6), {0, 1}),
    "narrow": (lambda x: x.narrow(1, 2, 3), (2, 6), {0, 1}),
    "flip": (lambda x: x.flip(1), (2, 6), {0, 1}),
    "roll": (lambda x: x.roll(2, 1), (3, 6), {0}),
    "pad": (lambda x: F.pad(x, (1, 1)), (2, 6), {0}),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (2, 12, 3, 3), {0, 1}),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (2, 3, 4, 4), {0, 1}),
    "channel shuffle": (lambda x: x.view(2, 3, 4, 5).transpose(1, 2).reshape(2, 12, 5), (2, 12, 5), {0, 1, 2}),
    "unfold": (lambda x: x.unfold(1, 3, 1), (2, 6), {0}),
    "im2col": (lambda x: F.unfold(x, 2), (2, 3, 4, 4), {0, 1}),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (2, 3, 4, 4), {0, 1}),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2), (2, 3, 4, 4), {0, 1}),
    "no gradients": (lambda x: _no_grad(x), (2, 6), {0, 1}),
}  # fmt: skip


def _no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.flip(1)


@pytest.mark.parametrize("name", MOVES)
def test_labels_follow_the_entries(name: str) -> None:
    """An entry of the output falls with a unit exactly if its value came from an entry of that unit."""
    function, shape, free = MOVES[name]
    generator = np.random.default_rng(0)
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        walk, own, output = follow(function, [shape], {dim})
        roots = walk.atoms.find(own[dim])
        alive = roots[roots != 0]
        assert (dim in free) == bool(len(alive)), f"dim {dim}"
        tag = torch.arange(1, size + 1, dtype=torch.float32).view([-1 if d == dim else 1 for d in range(len(shape))])
        moved = function(tag.expand(shape).clone())
        pairs = (
            zip(output, moved, strict=True)
            if isinstance(moved, (tuple, list))
            else [(output[0] if isinstance(output, (tuple, list)) else output, moved)]
        )
        gone = generator.permutation(np.unique(alive))[: max(1, len(np.unique(alive)) // 2)]
        units = np.flatnonzero(np.isin(roots, gone)) + 1
        for value, tensor in pairs:
            real = tensor.numpy() != 0  # zero is padding
            assert (dropped(walk, value, gone) == np.isin(tensor.numpy(), units))[real].all(), f"dim {dim}"


@pytest.mark.parametrize(
    "name", [name for name, (_, shape, free) in MOVES.items() if {0, 1} <= free and 1 not in shape]
)
def test_labels_follow_the_entries_of_two_dims(name: str) -> None:
    """With units along two dims an entry falls with either; where they merge, one of the dims stays prunable."""
    function, shape, _ = MOVES[name]
    walk, own, output = follow(function, [shape], {0, 1})
    outputs = list(output) if isinstance(output, (tuple, list)) else [output]
    tags = []
    for dim in (0, 1):
        tag = torch.arange(1, shape[dim] + 1, dtype=torch.float32).view(
            [-1 if d == dim else 1 for d in range(len(shape))]
        )
        moved = function(tag.expand(shape).clone())
        tags.append(list(moved) if isinstance(moved, (tuple, list)) else [moved])
    assert any(walk.atoms.find(own[dim]).any() for dim in (0, 1))
    for dim in (0, 1):
        roots = walk.atoms.find(own[dim])
        for root in np.unique(roots[roots != 0]):
            units = [np.flatnonzero(walk.atoms.find(own[d]) == root) + 1 for d in (0, 1)]
            for value, first, second in zip(outputs, *tags, strict=True):
                want = np.isin(first.numpy(), units[0]) | np.isin(second.numpy(), units[1])
                assert (dropped(walk, value, np.asarray([root])) == want).all()


class Weighted(nn.Module):
    """A hidden layer of 12 neurons, some op, and a layer that reads what comes out."""

    def __init__(self, op: Callable[[nn.Module, Tensor], Tensor], outputs: int, **parameters: Tensor) -> None:
        super().__init__()
        self.op = op
        self.write, self.read = nn.Linear(5, 12), nn.Linear(outputs, 3)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(self.op(self, self.write(x)))
        return out


@torch.library.custom_op("setpoint_tests::experts", mutates_args=())
def _experts(rows: Tensor, weights: Tensor) -> Tensor:
    """The first half of the rows by the first matrix, the others by the second."""
    return torch.cat([part @ weight for part, weight in zip(rows.chunk(2), weights, strict=True)])


@_experts.register_fake
def _(rows: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weights.shape[2])


def _conv(y: Tensor, weight: Tensor, groups: int) -> Tensor:
    return F.conv1d(y.unsqueeze(-1), weight, groups=groups).squeeze(-1)


def _conv_transpose(y: Tensor, weight: Tensor) -> Tensor:
    return F.conv_transpose1d(y.unsqueeze(-1), weight).squeeze(-1)


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


def _filled(y: Tensor) -> Tensor:
    """A tensor of zeros, into whose parts values are written."""
    out = torch.zeros(8, 12).to(y)
    out[:4] = y[:4]
    out[4:].add_(y[4:])
    return out


# name: (op, outputs, parameters, units of each group that must be found).
OPS: dict[str, tuple[Op, int, dict[str, tuple[int, ...]], list[int]]] = {
    "matmul": (lambda m, y: y @ m.w, 7, {"w": (12, 7)}, [12, 7]),
    "addmm": (lambda m, y: torch.addmm(m.b, y, m.w), 7, {"w": (12, 7), "b": (7,)}, [12, 7]),
    "einsum": (lambda m, y: torch.einsum("bi,io->bo", y, m.w), 7, {"w": (12, 7)}, [12, 7]),
    "einsum, implicit": (lambda m, y: torch.einsum("bi,ij", y, m.w), 7, {"w": (12, 7)}, [12, 7]),
    "einsum, ellipsis": (lambda m, y: torch.einsum("...i,oi->...o", y, m.w), 7, {"w": (7, 12)}, [12, 7]),
    "einsum of three": (lambda m, y: torch.einsum("bi,io,o->bo", y, m.w, m.s), 7, {"w": (12, 7), "s": (7,)}, [12, 7]),
    "mv": (lambda m, y: torch.stack([m.w @ row for row in y]), 7, {"w": (7, 12)}, [12, 7]),
    "conv1d": (lambda m, y: _conv(y, m.w, 1), 7, {"w": (7, 12, 1)}, [12, 7]),
    "grouped conv1d": (lambda m, y: _conv(y, m.w, 3), 6, {"w": (6, 4, 1)}, [2, 4]),
    "depthwise conv1d": (lambda m, y: _conv(y, m.w, 12), 12, {"w": (12, 1, 1)}, [12]),
    "conv_transpose1d": (lambda m, y: _conv_transpose(y, m.w), 7, {"w": (12, 7, 1)}, [12, 7]),
    "prelu": (lambda m, y: F.prelu(y, m.w), 12, {"w": (12,)}, [12]),
    "one prelu": (lambda m, y: F.prelu(y, m.w), 12, {"w": (1,)}, [12]),
    "glu": (lambda m, y: F.glu(y, -1), 6, {}, [6]),
    "weight norm": (lambda m, y: F.linear(y, torch._weight_norm(m.w, m.s, 0)), 7, {"w": (7, 12), "s": (7, 1)}, [12, 7]),
    "triangle over the batch": (lambda m, y: torch.tril(y.t().unsqueeze(-1)).squeeze(-1).t(), 12, {}, [12]),
    "sum of products": (lambda m, y: ((y * y).unsqueeze(1) * m.w).sum(-1), 7, {"w": (7, 12)}, [12]),
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
    "softmax": (lambda m, y: y.softmax(-1), 12, {}, []),
    "unknown op": (lambda m, y: torch.special.i1e(y), 12, {}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_units_through_an_op(name: str) -> None:
    """The groups on both sides of the op are found, and their cut equals the masked twin."""
    op, outputs, shapes, num_units = OPS[name]
    torch.manual_seed(0)
    model = Weighted(op, outputs, **{key: torch.randn(shape) for key, shape in shapes.items()})
    example = (torch.randn(8, 5),)
    groups = tuple(group for group in find_groups(model, example) if group.lossless)
    assert sorted(group.num_units for group in groups) == sorted(num_units)
    assert not groups or failing_groups(model, example, groups) == ()


def test_rows_of_experts() -> None:
    """Of one matrix an expert, what is read and what is written are units, and experts stay; a rule by an op's name."""
    rule("setpoint_tests::experts")(rule_for(torch.ops.aten._grouped_mm.default))
    model = Weighted(lambda m, y: _experts(y, m.w), 16, w=torch.randn(2, 12, 16))
    found = trace(model, (torch.randn(8, 5),))
    slices = {(piece.tensor, piece.dim) for group in found.groups for piece in group.slices}
    assert ("w", 1) in slices and ("w", 2) in slices and ("w", 0) not in slices
    assert any("experts are chosen by data" in frozen.reason for frozen in found.frozen)


# Rules whose op is tested elsewhere, and where.
ELSEWHERE = {
    "_grouped_matmul": "test_rows_of_experts",
    "_of_custom_function": "test_values.py::test_what_a_custom_function_touches_stays",
    "_of_opaque_call": "test_partial.py",
    "_diagonal_scan": "test_state_space.py, which cuts states and reads of an LRU against its masked twin",
}


def test_every_rule_has_a_row() -> None:
    """Each rule function is called by the graph of some row of the tables, or is listed with the place of its test."""
    seen: set[str] = set()
    graphs = [(Function(f), (torch.zeros(shape),)) for f, shape, _ in MOVES.values()]
    for op, outputs, shapes, _ in OPS.values():
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
