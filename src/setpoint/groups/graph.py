"""The exported graph, walked once: every node is visited with the rule of its op."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

import setpoint.groups.rules  # noqa: F401 - registers the rules
from setpoint.groups.build import OwnDim
from setpoint.groups.export import has_floats, known, shape_of
from setpoint.groups.walk import Value, Walk, finish, module_of, op_name, plain_path, rule_for


def walk_graph(
    model: nn.Module, program: Any, opaque_calls: Mapping[str, str], **fields: Any
) -> tuple[Walk, list[OwnDim]]:
    """Visit every node of the graph once; what the rules record, and the dims of all parameters and buffers.

    Args:
        fields: other fields of the `Walk`.
    """
    attention = nn.MultiheadAttention  # or what stands in for its forward
    modules = {name for name, module in model.named_modules() if isinstance(module, attention)}
    opaque = {name for name in modules if type(model.get_submodule(name)).forward is attention.forward}
    walk = Walk(**fields, opaque=frozenset(opaque), opaque_calls=opaque_calls)
    dims: list[OwnDim] = []
    env: dict[fx.Node, Any] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    own: dict[int, Value] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            walk.node, walk.module = node, module_of(node)
            env[node] = _input(model, walk, node, specs.get(node.name), own, dims)
    for value in _values(run(walk, program.graph_module, env)):
        walk.freeze_all(value, "output of the network")
    return walk, dims


def run(walk: Walk, graph: fx.GraphModule, env: dict[fx.Node, Any], *, backward: bool = True) -> Any:
    """Visit every node of a graph whose inputs are known, and return its outputs; nodes that nothing reads run too."""
    read = read_by_outputs(graph.graph)
    reached = read_by_outputs(graph.graph, but=detaches) if backward else set()
    for node in graph.graph.nodes:
        walk.node, walk.module = node, module_of(node)
        if node.op == "get_attr":
            env[node] = getattr(graph, str(node.target), None)
        elif node.op == "output":
            walk.unread, walk.backward = False, True
            return fx.map_arg(node.args[0], lambda n: env[n])
        elif node.op != "placeholder":
            _count_call(walk, node)
            walk.unread, walk.backward = node not in read, node in reached
            env[node] = _visit(walk, node, env)
            if detaches(node):
                env[node] = pytree.tree_map_only(Value, lambda value: replace(value, grad=False), env[node])
    return None


def detaches(node: fx.Node) -> bool:
    """Whether no gradient goes through a node: `x.detach()`, or a block under `torch.no_grad()`."""
    name = op_name(node.target)
    return name in ("detach", "detach_") or (name == "wrap_with_set_grad_enabled" and not node.args[0])


def read_by_outputs(graph: fx.Graph, but: Callable[[fx.Node], bool] = lambda node: False) -> set[fx.Node]:
    """Nodes that the outputs depend on, and all nodes that write into a tensor; not through those that are left out."""
    read: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or _writes(node) or node in read:
            read.update(() if but(node) else node.all_input_nodes, {node})
    return read


def _writes(node: fx.Node) -> bool:
    """Whether an op writes into its first tensor, as `add_` does."""
    name = op_name(node.target)
    return name.endswith("_") and not name.startswith("_")


def _count_call(walk: Walk, node: fx.Node) -> None:
    """Number the call within the running forward of its module, submodules' calls included, those in attention not."""
    name = {"split_with_sizes": "split", "_unsafe_view": "view"}.get(walk.op, walk.op)
    if name == "slice" and shape_of(node.meta["val"]) == shape_of(node.all_input_nodes[0].meta["val"]):
        return  # the shim does not number slices of everything, as `:` is
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    keys = list(stack)
    opaque = [place for place, (path, _) in enumerate(stack.values()) if plain_path(path) in walk.opaque]
    for key in keys[opaque[-1] if opaque else 0 :]:
        walk.num_calls[key, name] = walk.num_calls.get((key, name), 0) + 1
    walk.call = f"{name}#{walk.num_calls[keys[-1], name] - 1}"


def _input(model: nn.Module, walk: Walk, node: fx.Node, spec: Any, own: dict[int, Value], dims: list[OwnDim]) -> Any:
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


def _blank(fake: Any) -> Any:
    if isinstance(fake, torch.Tensor):
        return Value(tuple(shape_of(fake)), (None,) * fake.ndim)
    return tuple(map(_blank, fake)) if isinstance(fake, (list, tuple)) else None


def _visit(walk: Walk, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """What a node gives: a `Value`, several, or a number."""
    args: Any
    kwargs: Any
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    fake = node.meta.get("val")
    if walk.op == "getitem":
        return args[0][args[1]] if isinstance(args[0], (tuple, list)) else None
    if isinstance(fake, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return known(fake)  # a size that the data decides, or a number worked out from one
    graphs = [position for position, arg in enumerate(args) if isinstance(arg, fx.GraphModule)]
    if walk.op.startswith("wrap") and len(graphs) == 1:  # a block that only changes the mode (autocast, no gradients)
        graph, inputs = args[graphs[0]], args[graphs[0] + 1 :]
        places = [inner for inner in graph.graph.nodes if inner.op == "placeholder"]
        backward = walk.backward and not detaches(node)
        return run(walk, graph, dict(zip(places, inputs, strict=True)), backward=backward)
    inputs, out = _values((args, kwargs)), _blank(fake)
    if out is None and (walk.unread or not inputs):
        return None  # a check without a result
    result, reason = _ruled(walk, node, out, args, kwargs, inputs)
    if reason:
        if inputs and any(map(has_floats, node.all_input_nodes)):  # integers and masks cost no FLOPs
            walk.unknown.add(walk.op)
        for value in inputs:
            walk.freeze_all(value, reason)
    if out is None:
        return fake if isinstance(fake, (int, float, bool)) else None
    walk.flow.append((walk.module, inputs, _values(result)))
    if _writes(node) and isinstance(result, Value):
        _hand_up(walk, node, result, env)
    return result


def _ruled(
    walk: Walk, node: fx.Node, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: list[Value]
) -> tuple[Any, str]:
    """What the rule of the node's op gives, else values without labels; and why no rule covers the call, or ""."""
    function = rule_for(node.target)
    if function is None:
        return finish(walk, walk.guess(out, inputs), out, inputs), "no rule knows this op"
    try:
        result = function(walk, out, *args, **{key: value for key, value in kwargs.items() if key != "out"})
        finished = finish(walk, result, out, inputs)
        written = kwargs.get("out")
        if isinstance(written, Value) and isinstance(finished, Value):
            assert finished.shape == written.shape, "the result is written into a tensor of another shape"
            for left, right in zip(finished.labels, written.labels, strict=True):
                walk.unite(left, right)
        return finished, ""
    except (AssertionError, IndexError, TypeError, ValueError, AttributeError) as error:
        # A rule that meets a call which it was not written for guesses nothing: all that the call touches stays.
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return finish(walk, walk.guess(out, inputs), out, inputs), f"the op's rule does not cover this call ({why})"


def _hand_up(walk: Walk, node: fx.Node, written: Value, env: dict[fx.Node, Any]) -> None:
    view = node.args[0]
    while isinstance(view, fx.Node) and isinstance(env.get(view), Value):
        old = env[view]
        env[view] = replace(
            old, weight=old.weight and written.weight, grad=old.grad or written.grad, zero=old.zero and written.zero
        )
        walk.flow.append((walk.module, [old, written], [env[view]]))
        returns = view.target._schema.returns if isinstance(view.target, torch._ops.OpOverload) else ()
        view = view.args[0] if returns and returns[0].alias_info is not None and view.args else None
