"""Trace: a model's exported graph, reduced to its groups and to the products that cost FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from setpoint.groups.bind import bind
from setpoint.groups.build import OwnDim, build
from setpoint.groups.count import forward_flops
from setpoint.groups.export import Example, export
from setpoint.groups.group import Group, Size, widths_of
from setpoint.groups.product import solve
from setpoint.groups.walk import Value, Walk, finish, op_name, rule_for


@dataclass(frozen=True)
class Contraction:
    """One matrix product or convolution of the forward pass.

    Its forward costs `coefficient * prod(sizes)` FLOPs (2 per multiply-add); the backward pass costs
    as much again for each operand that needs a gradient.

    Args:
        module: qualified name of the module whose forward holds it.
        op: ATen name.
        coefficient: 2 x everything that no width changes (batch, positions, kernel).
        sizes: the lengths that follow widths.
        num_gradients: how many operands need a gradient: 0, 1 or 2.
    """

    module: str
    op: str
    coefficient: float
    sizes: tuple[Size, ...]
    num_gradients: int


@dataclass(frozen=True)
class Frozen:
    """Something that stays whole, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Trace:
    """What tracing a model yields: groups, contractions, and what was frozen, by name."""

    groups: tuple[Group, ...]
    contractions: tuple[Contraction, ...]
    frozen: tuple[Frozen, ...]


def trace(model: nn.Module, example: Example) -> Trace:
    """Export `model` on `example`: groups as `find_groups` gives them, with what they cost and what is frozen."""
    program = export(model, example)
    walk, dims = _walk(model, program)
    solve(walk.atoms, walk.products)
    products = [labels for contract in walk.contracts for _, labels in contract.dims if labels is not None]
    units, groups = bind(model, example, _output_shapes(program), walk, build(walk.atoms, dims, products), dims)
    contractions = tuple(
        Contraction(
            contract.module,
            contract.op,
            contract.coefficient,
            tuple(units.size(length, labels) for length, labels in contract.dims),
            contract.num_gradients,
        )
        for contract in walk.contracts
    )
    return Trace(groups, contractions + _uncounted(model, example, groups, contractions), _frozen(walk.atoms.frozen))


def _output_shapes(program: Any) -> list[torch.Size]:
    """Shapes of the tensors that the model returns."""
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    return [node.meta["val"].shape for node in output.args[0] if isinstance(node, fx.Node)]


def _uncounted(
    model: nn.Module, example: Example, groups: tuple[Group, ...], contractions: tuple[Contraction, ...]
) -> tuple[Contraction, ...]:
    """FLOPs inside ops that no rule knows, as a cost that no width changes; trained at two products each."""
    widths = widths_of(groups)
    known = sum(each.coefficient * math.prod(size.at(widths) for size in each.sizes) for each in contractions)
    total = forward_flops(model, example)
    if total is None or total <= known:
        return ()
    return (Contraction("", "ops without a rule", float(total - known), (), 2),)


def find_groups(model: nn.Module, example: Example) -> tuple[Group, ...]:
    """Units of `model` that can be dropped, and everything that goes with each.

    Args:
        model: any `nn.Module` that `torch.export` can follow; it is not touched.
        example: a tuple of positional inputs, or a dict of keyword inputs.

    Raises:
        ExampleError: the model does not accept the example.
        ExportError: the forward cannot be exported; the message names the line.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(group.name, group.num_units, group.what) for group in find_groups(model, (torch.zeros(1, 4),))]
    [('0', 8, 'neuron')]
    """
    return trace(model, example).groups


def _frozen(entries: Sequence[tuple[np.ndarray, str, str]]) -> tuple[Frozen, ...]:
    return tuple(dict.fromkeys(Frozen(place, reason) for _, place, reason in entries))


def _walk(model: nn.Module, program: Any) -> tuple[Walk, list[OwnDim]]:
    """Visit every node of the graph once, with its rule."""
    # Registering the rules looks up hundreds of ops, which `import setpoint` need not wait for.
    import setpoint.groups.rules  # noqa: F401

    walk = Walk()
    dims: list[OwnDim] = []
    env: dict[fx.Node, Any] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    own: dict[int, Value] = {}
    numbers: dict[tuple[str, str], int] = {}
    for node in program.graph.nodes:
        walk.node, walk.module = node, _module_of(node)
        if node.op == "placeholder":
            env[node] = _input(model, walk, node, specs.get(node.name), own, dims)
        elif node.op == "get_attr":
            env[node] = None
        elif node.op == "output":
            for value in _values(fx.map_arg(node.args, lambda n: env[n])):
                walk.freeze_all(value, "it reaches the model's output")
        else:
            _count_call(walk, node, numbers)
            env[node] = _visit(walk, node, env)
    return walk, dims


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return _plain_path(path)


def _plain_path(path: str) -> str:
    """Module path in the user's model: without the wrapper, and without the number of a repeated call."""
    path = path.split("@")[0]
    return "" if path in ("", "model") else path.removeprefix("model.")


def _count_call(walk: Walk, node: fx.Node, numbers: dict[tuple[str, str], int]) -> None:
    """Number the call within the running forward of its module, calls of submodules included."""
    name = {"split_with_sizes": "split", "_unsafe_view": "view"}.get(op_name(node.target), op_name(node.target))
    keys = list((node.meta.get("nn_module_stack") or {"": ("", None)}).keys())
    for key in keys:
        numbers[key, name] = numbers.get((key, name), 0) + 1
    walk.call_index = numbers[keys[-1], name] - 1 if keys else 0


def _input(model: nn.Module, walk: Walk, node: fx.Node, spec: Any, own: dict[int, Value], dims: list[OwnDim]) -> Any:

    from torch.export.graph_signature import InputKind

    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        return fake
    shape = tuple(int(size) for size in fake.shape)
    if spec is None or spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
        is_input = spec is not None and spec.kind is InputKind.USER_INPUT
        return Value(shape, (None,) * len(shape), weight=not is_input, grad=is_input and fake.requires_grad)
    name = str(spec.target).removeprefix("model.")
    tensor = _tensor(model, name)
    if id(tensor) not in own:
        labels = tuple(walk.atoms.fresh(size) if size > 1 else None for size in shape)
        own[id(tensor)] = Value(shape, labels, weight=True, grad=tensor.requires_grad)
        dims.extend(OwnDim(name, dim, of) for dim, of in enumerate(labels) if of is not None)
    return own[id(tensor)]


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, key = name.rpartition(".")
    result: torch.Tensor = getattr(model.get_submodule(owner), key)
    return result


def _values(argument: Any) -> list[Value]:

    if isinstance(argument, Value):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [value for part in argument for value in _values(part)]
    if isinstance(argument, dict):
        return [value for part in argument.values() for value in _values(part)]
    return []


def _shape_of(fake: Any) -> Any:

    if isinstance(fake, torch.Tensor):
        return Value(tuple(int(size) for size in fake.shape), (None,) * fake.ndim)
    if isinstance(fake, (list, tuple)):
        return tuple(_shape_of(part) for part in fake)
    return None


def _visit(walk: Walk, node: fx.Node, env: dict[fx.Node, Any]) -> Any:

    args: Any
    kwargs: Any
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    if op_name(node.target) == "getitem":
        return args[0][args[1]] if isinstance(args[0], tuple) else None
    inputs = _values((args, kwargs))
    fake = node.meta.get("val")
    out = _shape_of(fake)
    function = rule_for(node.target)
    if function is None:
        for value in inputs:
            walk.freeze_all(value, "no rule knows this op")
        result = None
    elif out is None and not inputs:
        return None
    else:
        result = function(walk, out, *args, **kwargs)
    if out is None:
        return fake if isinstance(fake, (int, float, bool)) else None
    return finish(walk, result, out, inputs)
