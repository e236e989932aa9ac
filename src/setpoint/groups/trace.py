"""Trace: a model's exported graph, reduced to its groups and to the products that cost FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from setpoint.distributed import is_sharded
from setpoint.errors import LoopError
from setpoint.groups.atoms import Atoms
from setpoint.groups.build import OwnDim, build, device_type_of
from setpoint.groups.data_dependent import known, shape_of
from setpoint.groups.example import Example, without_cache
from setpoint.groups.export import Exported, check_model, export, module_of, plain_path
from setpoint.groups.group import Group, Size, widths_of
from setpoint.groups.partial import PartialForward
from setpoint.groups.product import solve
from setpoint.groups.rng import gc_paused, one_at_a_time, preserved_rng_state
from setpoint.groups.sizes_in_code.bind import bind, tie_pieces
from setpoint.groups.sizes_in_code.fake_forward import FakeForward
from setpoint.groups.sizes_in_code.size_probe import Candidate
from setpoint.groups.states import find_states
from setpoint.groups.walk import Value, Walk, finish, op_name, rule_for
from setpoint.progress import progress


@dataclass(frozen=True)
class Contraction:
    """One matrix product or convolution: `coefficient * prod(sizes)` FLOPs forward (2 per multiply-add).

    The backward pass costs as much again for each operand that needs a gradient.
    """

    module: str  # qualified name of the module whose forward holds it
    op: str  # ATen name
    coefficient: float  # 2 x the lengths that do not depend on widths (batch, positions, kernel)
    sizes: tuple[Size, ...]  # the lengths that do
    num_gradients: int  # number of operands that need a gradient: 0, 1 or 2


@dataclass(frozen=True)
class Frozen:
    """A place that is never cut, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Trace:
    """Result of tracing a model.

    Args:
        unreached: names of parameters that the example does not use.
    """

    groups: tuple[Group, ...]
    contractions: tuple[Contraction, ...]
    frozen: tuple[Frozen, ...]
    unreached: tuple[str, ...] = ()


def repeated(traced: Trace, passes: int) -> Trace:
    """The trace of an optimizer step for which the model is called so many times, as where gradients accumulate."""
    contractions = (replace(each, coefficient=passes * each.coefficient) for each in traced.contractions)
    return traced if passes == 1 else replace(traced, contractions=tuple(contractions))


def trace(model: nn.Module, example: Example) -> Trace:
    """Export `model` on `example`: the groups of `find_groups`, with contractions and frozen places."""
    if any(map(is_sharded, model.modules())):
        raise LoopError(
            "groups are found in a whole model: call find_groups before fully_shard, or inside `with "
            "setpoint.unsharded(model):` on every rank"
        )
    with preserved_rng_state(model), progress("finding what can be cut"), gc_paused():
        return _trace(model, example)


def _trace(model: nn.Module, example: Example) -> Trace:
    example = without_cache(model, example)
    check_model(model, example)
    exported = export(model, example)
    # Imported here: registering the rules looks up hundreds of ops, for which `import setpoint` need not wait.
    import setpoint.groups.rules  # noqa: F401

    found = _found(model, example, exported)
    groups, refused = find_states(model, found.groups)
    frozen = (*found.frozen, *(Frozen(place, why) for place, why in refused.items()))
    return replace(found, groups=groups, frozen=frozen)


def _found(model: nn.Module, example: Example, exported: Exported) -> Trace:
    """All that the graph and trials of the forward tell, but for states."""
    program, forward = exported.program, exported.forward
    walk, dims = _walk(model, program, forward)
    solve(walk.atoms, walk.products)
    tie_pieces(model, walk.calls, walk.atoms)  # not before: heads are known only now
    _mark_grouped(walk)
    products = [labels for contract in walk.contracts for _, labels in contract.dims if labels is not None]
    units = build(walk.atoms, dims, products, device_type_of(model))
    fake = FakeForward(model, example, forward)
    units, groups = bind(Candidate(fake, _output_shapes(program), walk, dims, units))
    contractions = tuple(
        Contraction(c.module, c.op, c.coefficient, tuple(units.size(n, own) for n, own in c.dims), c.num_gradients)
        for c in walk.contracts
    )
    if exported.refused is not None and forward.reasons and not groups:
        raise exported.refused
    rest = _uncounted(model, example, groups, contractions) if walk.unknown or forward.reasons else ()
    opaque = tuple(Frozen(name or "model", why) for name, why in forward.reasons.items())
    return Trace(groups, contractions + rest, (*opaque, *_frozen(walk.atoms, opaque)), tuple(_unreached(program)))


def _unreached(program: Any) -> Iterator[str]:
    targets = program.graph_signature.inputs_to_parameters
    for node in program.graph.nodes:
        if node.op == "placeholder" and not node.users and node.name in targets:
            yield targets[node.name].removeprefix("model.")


def _mark_grouped(walk: Walk) -> None:
    """Where the groups of a grouped convolution are not the units, its weight reads and writes units."""
    for groups, read, written in walk.grouped:
        if not walk.atoms.find(groups).any():
            walk.atoms.mark("consume", read)
            walk.atoms.mark("produce", written)


def _output_shapes(program: Any) -> tuple[torch.Size, ...]:
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    return tuple(shape_of(node.meta["val"]) for node in output.args[0] if isinstance(node, fx.Node))


def _uncounted(
    model: nn.Module, example: Example, groups: tuple[Group, ...], contractions: tuple[Contraction, ...]
) -> tuple[Contraction, ...]:
    """FLOPs of ops without a rule by PyTorch's own counter, as a constant cost; backward counts as two forwards."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    widths = widths_of(groups)
    known = sum(each.coefficient * math.prod(size.at(widths) for size in each.sizes) for each in contractions)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        try:
            FakeForward(model, example).run(lambda twin: counter.flop_counts.clear())
        except Exception:  # noqa: BLE001 - a foreign forward may do anything; it then goes uncounted here
            return ()
    total = int(counter.get_total_flops())
    return (Contraction("", "ops without a rule", float(total - known), (), 2),) if total > known else ()


@one_at_a_time
def find_groups(model: nn.Module, example: Example) -> tuple[Group, ...]:
    """Units of `model` that can be dropped, and all places where each lies.

    Args:
        model: any `nn.Module`; a part that `torch.export` cannot follow is not pruned. The model is not changed.
        example: a tuple of positional inputs, or a dict of keyword inputs.

    Raises:
        ExampleError: the model does not accept the example.
        ExportError: the model's own forward cannot be exported, or nothing of it; the message names the line.
        LoopError: `fully_shard` has sharded the model.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(group.name, group.num_units, group.what) for group in find_groups(model, (torch.zeros(1, 4),))]
    [('0', 8, 'neuron')]
    """
    return trace(model, example).groups


def _frozen(atoms: Atoms, known: tuple[Frozen, ...]) -> tuple[Frozen, ...]:
    """Other frozen places, each reason once; copies that meet data are not worth reporting."""
    copies = atoms.marked("alike")
    reported = [entry for entry in atoms.frozen if not copies[entry[0]].all()]
    found = dict.fromkeys(Frozen(place, reason) for _, place, reason in reported)
    return tuple(each for each in found if each not in known)


def _walk(model: nn.Module, program: Any, forward: PartialForward) -> tuple[Walk, list[OwnDim]]:
    """Visit every node of the graph once, with its rule."""
    attention = nn.MultiheadAttention  # or what stands in for its forward
    walk = Walk(
        opaque=frozenset(
            name
            for name, module in model.named_modules()
            if isinstance(module, attention) and type(module).forward is attention.forward
        ),
        opaque_calls=forward.reasons,
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
    """Visit every node of a graph whose inputs are known, and return its outputs; nodes that nothing reads run too.

    `backward` says whether a backward pass comes to the outputs.
    """
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
            detached = _detaches(node)
            env[node] = pytree.tree_map_only(Value, _without_gradient, found) if detached else found
    return None


def _detaches(node: fx.Node) -> bool:
    """Whether no gradient goes through a node: `x.detach()`, or a block under `torch.no_grad()`."""
    name = op_name(node.target)
    return name in ("detach", "detach_") or (name == "wrap_with_set_grad_enabled" and not node.args[0])


def _without_gradient(value: Value) -> Value:
    return replace(value, grad=False)


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
    if id(tensor) not in own:
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
    return any(each.is_floating_point() or each.is_complex() for each in tensors)


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
