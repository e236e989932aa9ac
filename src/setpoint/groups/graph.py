"""The exported graph, walked once: every node is visited with the rule of its op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import setpoint.groups.rules  # noqa: F401 - registers the rules
from setpoint.groups.build import OwnDim
from setpoint.groups.export import known, shape_of
from setpoint.groups.walk import Value, Walk, finish, module_of, op_name, plain_path, rule_for


def walk_graph(model: nn.Module, program: Any, opaque_calls: Mapping[str, str]) -> tuple[Walk, list[OwnDim]]:
    """Visit every node of the graph once; what the rules record, and the dims of all parameters and buffers."""
    attention = nn.MultiheadAttention  # or what stands in for its forward
    walk = Walk(
        opaque=frozenset(
            name
            for name, module in model.named_modules()
            if isinstance(module, attention) and type(module).forward is attention.forward
        ),
        opaque_calls=opaque_calls,
    )
    dims: list[OwnDim] = []
    env: dict[fx.Node, Any] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    own: dict[int, Value] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            walk.node, walk.module = node, module_of(node)
            env[node] = _input(model, walk, node, specs.get(node.name), own, dims)
    for value in _values(_run(walk, program.graph_module, env, {})):
        walk.freeze_all(value, "output of the network")
    return walk, dims


def _run(
    walk: Walk,
    graph: fx.GraphModule,
    env: dict[fx.Node, Any],
    numbers: dict[tuple[str, str], int],
    *,
    backward: bool = True,
) -> Any:
    """Visit every node of a graph whose inputs are known, and return its outputs; nodes that nothing reads run too."""
    read = _read(graph.graph)
    reached = _read(graph.graph, but=_detaches) if backward else set()
    for node in graph.graph.nodes:
        walk.node, walk.module = node, module_of(node)
        if node.op == "get_attr":
            env[node] = getattr(graph, str(node.target), None)
        elif node.op == "output":
            walk.unread, walk.backward = False, True
            return fx.map_arg(node.args[0], lambda n: env[n])
        elif node.op != "placeholder":
            _count_call(walk, node, numbers)
            walk.unread, walk.backward = node not in read, node in reached
            found = _visit(walk, node, env, numbers)
            env[node] = (
                pytree.tree_map_only(Value, lambda value: replace(value, grad=False), found)
                if _detaches(node)
                else found
            )
    return None


def _detaches(node: fx.Node) -> bool:
    """Whether no gradient goes through a node: `x.detach()`, or a block under `torch.no_grad()`."""
    name = op_name(node.target)
    return name in ("detach", "detach_") or (name == "wrap_with_set_grad_enabled" and not node.args[0])


def _read(graph: fx.Graph, but: Callable[[fx.Node], bool] = lambda node: False) -> set[fx.Node]:
    """Nodes that the outputs depend on, and all nodes that write into a tensor; not through those that are left out."""
    read: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        writes = op_name(node.target).endswith("_") and not op_name(node.target).startswith("_")
        if node.op == "output" or writes or node in read:
            read.update(() if but(node) else node.all_input_nodes, {node})
    return read


def _run_inner(walk: Walk, node: fx.Node, args: Sequence[Any], numbers: dict[tuple[str, str], int]) -> Any:
    """Visit the graph inside a block that only changes the mode (autocast, no gradients); None for other blocks."""
    graphs = [position for position, arg in enumerate(args) if isinstance(arg, fx.GraphModule)]
    if not op_name(node.target).startswith("wrap") or len(graphs) != 1:
        return None
    graph, inputs = args[graphs[0]], args[graphs[0] + 1 :]
    places = [inner for inner in graph.graph.nodes if inner.op == "placeholder"]
    backward = walk.backward and not _detaches(node)
    return _run(walk, graph, dict(zip(places, inputs, strict=True)), numbers, backward=backward)


def _count_call(walk: Walk, node: fx.Node, numbers: dict[tuple[str, str], int]) -> None:
    """Number the call within the running forward of its module, submodules' calls included, those in attention not."""
    if op_name(node.target) == "slice" and shape_of(node.meta["val"]) == shape_of(node.all_input_nodes[0].meta["val"]):
        return  # the shim does not number slices of everything, as `:` is
    name = {"split_with_sizes": "split", "_unsafe_view": "view"}.get(op_name(node.target), op_name(node.target))
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    keys = list(stack)
    opaque = [place for place, (path, _) in enumerate(stack.values()) if plain_path(path) in walk.opaque]
    for key in keys[opaque[-1] if opaque else 0 :]:
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
    owner, _, key = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(owner), key)
    if id(tensor) not in own:  # a tied weight has several names, and one set of atoms
        labels = tuple(walk.atoms.fresh(size) if size > 1 else None for size in shape)
        own[id(tensor)] = Value(shape, labels, weight=True, grad=tensor.requires_grad)
        dims.extend(OwnDim(name, dim, of) for dim, of in enumerate(labels) if of is not None)
    return own[id(tensor)]


def _values(argument: Any) -> list[Value]:
    if isinstance(argument, Value):
        return [argument]
    parts = argument.values() if isinstance(argument, dict) else argument if isinstance(argument, (list, tuple)) else ()
    return [value for part in parts for value in _values(part)]


def _shape_of(fake: Any) -> Any:
    if isinstance(fake, torch.Tensor):
        return Value(tuple(shape_of(fake)), (None,) * fake.ndim)
    if isinstance(fake, (list, tuple)):
        return tuple(_shape_of(part) for part in fake)
    return None


def _visit(walk: Walk, node: fx.Node, env: dict[fx.Node, Any], numbers: dict[tuple[str, str], int]) -> Any:
    args: Any
    kwargs: Any
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    if op_name(node.target) == "getitem":
        return args[0][args[1]] if isinstance(args[0], (tuple, list)) else None
    inputs = _values((args, kwargs))
    if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return known(node.meta["val"])  # a size that the data decides, or a number worked out from one
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        inner = _run_inner(walk, node, args, numbers)
        if inner is not None:
            return inner
    fake = node.meta.get("val")
    out = _shape_of(fake)
    function = rule_for(node.target)
    if out is None and (walk.unread or not inputs):
        return None  # a check without a result
    finished, reason = None, "no rule knows this op"
    if function is not None:
        try:
            named = {key: value for key, value in kwargs.items() if key != "out"}
            result, reason = function(walk, out, *args, **named), ""
            finished = None if out is None else finish(walk, result, out, inputs)
            written = kwargs.get("out")
            if isinstance(written, Value) and isinstance(finished, Value):
                assert finished.shape == written.shape, "the result is written into a tensor of another shape"
                for left, right in zip(finished.labels, written.labels, strict=True):
                    walk.unite(left, right)
        except (AssertionError, IndexError, TypeError, ValueError, AttributeError) as error:
            # A rule that meets a call which it was not written for guesses nothing: all that the call touches stays.
            reason = (
                f"the op's rule does not cover this call ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            )
    if reason:
        if inputs and any(map(_has_floats, node.all_input_nodes)):  # integers and masks cost no FLOPs
            walk.unknown.add(op_name(node.target))
        for value in inputs:
            walk.freeze_all(value, reason)
    if out is None:
        return fake if isinstance(fake, (int, float, bool)) else None
    finished = finish(walk, None, out, inputs) if finished is None else finished
    walk.flow.append((walk.module, inputs, _values(finished)))
    if op_name(node.target).endswith("_") and isinstance(finished, Value):
        _hand_up(walk, node, finished, env)
    return finished


def _has_floats(node: fx.Node) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
    return any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors)


def _hand_up(walk: Walk, node: fx.Node, written: Value, env: dict[fx.Node, Any]) -> None:
    """Pass what is written into a view on to every tensor that it is a view of."""
    view = node.args[0]
    while isinstance(view, fx.Node) and isinstance(env.get(view), Value):
        old = env[view]
        env[view] = replace(
            old, weight=old.weight and written.weight, grad=old.grad or written.grad, zero=old.zero and written.zero
        )
        walk.flow.append((walk.module, [old, written], [env[view]]))
        returns = view.target._schema.returns if isinstance(view.target, torch._ops.OpOverload) else ()
        view = view.args[0] if returns and returns[0].alias_info is not None and view.args else None
