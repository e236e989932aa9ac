"""Trace: a model's exported graph, reduced to its groups and to the products that cost FLOPs."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import fx, nn

from setpoint.distributed import check_module, is_spread
from setpoint.errors import ExampleError, ExportError, LoopError
from setpoint.groups import build
from setpoint.groups.example import Example, check_python, without_cache
from setpoint.groups.group import Group, Size, widths_of
from setpoint.groups.product import solve
from setpoint.groups.states import StateSpaceLayer, find_states
from setpoint.groups.untouched import gc_paused, in_mode, one_at_a_time, preserved_rng_state
from setpoint.groups.walk import UNFOLLOWED, Walk
from setpoint.interrupts import uninterrupted
from setpoint.messages import progress

# How a reason ends why a group is not pruned of which no optimizer has the weights.
UNTRAINED = "trained by no optimizer that attach was given"


@dataclass(frozen=True)
class Contraction:
    """One matrix product or convolution: `coefficient * prod(sizes)` FLOPs forward (2 per multiply-add).

    The backward pass costs as much again for each operand that needs a gradient, and each time it is recomputed.
    """

    module: str  # qualified name of the module whose forward holds it
    coefficient: float  # 2 x the lengths that do not depend on widths (batch, positions, kernel)
    sizes: tuple[Size, ...]  # the lengths that do
    num_gradients: int  # number of operands that need a gradient: 0, 1 or 2
    recomputed: float = 0.0  # how often the backward pass computes it again, as for activation checkpoints
    blocked: tuple[tuple[str, str], ...] = ()  # places, and reasons, of what freezes its dims

    @property
    def times(self) -> float:
        """FLOPs of a step over those of its forward pass."""
        return 1 + self.num_gradients + self.recomputed

    def at(self, widths: Mapping[str, int]) -> float:
        """FLOPs of the forward pass."""
        return self.coefficient * math.prod(size.at(widths) for size in self.sizes)


@dataclass(frozen=True)
class Frozen:
    """A place that is never cut, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Trace:
    """Result of tracing a model."""

    groups: tuple[Group, ...]
    contractions: tuple[Contraction, ...]
    frozen: tuple[Frozen, ...]
    unreached: tuple[str, ...] = ()  # names of parameters that the example does not use
    no_backward: tuple[str, ...] = ()  # and of those that it uses where no backward pass comes
    unfollowed: str = ""  # what is said where a large share of the FLOPs has no units since it cannot be followed


def trace_step(model: nn.Module, example: Example, passes: int) -> Trace:
    """The trace of an optimizer step for which the model is called so many times, as where gradients accumulate.

    A model in eval mode is traced in train mode, if it runs there: only then it may have gradients or checkpoints.
    """
    traced = None
    if not any(module.training for module in model.modules()):
        with suppress(ExampleError, ExportError), in_mode(model, training=True):
            traced = trace(model, example)
    traced = traced or trace(model, example)
    contractions = (replace(product, coefficient=passes * product.coefficient) for product in traced.contractions)
    return replace(traced, contractions=tuple(contractions))


def trace(model: nn.Module, example: Example) -> Trace:
    """Export `model` on `example`: the groups of `find_groups`, with contractions and frozen places."""
    check_module(model)
    check_python(model)
    if is_spread(model):
        raise LoopError(
            "groups are found in a whole model: call find_groups before it is sharded, or inside `with "
            "setpoint.unsharded(model):` on every rank"
        )
    # The exception of a signal's handler may end the process in PyTorch's C++.
    with uninterrupted(), preserved_rng_state(model), progress("finding what can be cut"), gc_paused():
        return _trace(model, example)


def _trace(model: nn.Module, example: Example) -> Trace:
    # Imported here: an exporter, rules that look up hundreds of ops; `import setpoint` need not wait for them.
    from setpoint.groups.export import check_model, export, shape_of
    from setpoint.groups.graph import detaches, read_by_outputs, walk_graph

    example = without_cache(model, example)
    check_model(model, example)
    program, forward, refused = export(model, example)
    opaque = forward.reasons
    walk, dims = walk_graph(model, program, opaque)
    if walk.products:
        solve(walk.atoms, walk.products)
    if any(call.place.startswith(("split#", "chunk#")) for call in walk.calls):
        from setpoint.groups.sizes_in_code.bind import tie_pieces

        tie_pieces(model, walk.calls, walk.atoms)  # not before: heads are known only now
    for num_groups, read, written in walk.grouped:
        if not walk.atoms.find(num_groups).any():  # not its groups are the units, so its weight reads and writes units
            walk.atoms.mark("consume", read)
            walk.atoms.mark("produce", written)
    products = [labels for _, _, dims_of, _ in walk.contracts for _, labels in dims_of if labels is not None]
    units = build.build(walk.atoms, dims, products, build.device_type_of(model))
    unfollowed = ""
    if any(why.startswith(UNFOLLOWED) for _, _, why in walk.atoms.frozen):
        from setpoint.groups.unfollowed import share_of_unfollowed

        unfollowed = share_of_unfollowed(model, program, opaque, walk, units)
    if build.only_standard_sizes(model, walk, units):
        places = build.standard_places(model, walk, dims)
    else:
        from setpoint.groups.sizes_in_code.bind import Candidate, FakeForward, bind

        (output,) = [node for node in program.graph.nodes if node.op == "output"]
        shapes = tuple(shape_of(node.meta["val"]) for node in output.args[0] if isinstance(node, fx.Node))
        units, places = bind(Candidate(FakeForward(model, example, forward), shapes, walk, dims, units))
    groups = build.with_sizes(walk, units, places)
    if refused is not None and opaque and not groups:
        raise refused
    first = walk.atoms.first_frozen()
    contractions = []
    for module, coefficient, dims_of, num_gradients in walk.contracts:
        sizes = tuple(units.size(*dim) for dim in dims_of)
        numbers = {int(first[labels].max(initial=-1)) for _, labels in dims_of if labels is not None} - {-1}
        blocked = tuple(walk.atoms.frozen[number][1:] for number in sorted(numbers))
        contractions.append(Contraction(module, coefficient, sizes, num_gradients, blocked=blocked))
    dense = widths_of(groups)
    if walk.unknown or opaque:
        from setpoint.groups.recomputed import uncounted

        more = uncounted(model, example, sum(product.at(dense) for product in contractions))
        contractions += [Contraction("", more, (), 2)] if more else []
    if program.graph_module.meta["checkpointed"]:
        from setpoint.groups.recomputed import recomputations

        again = recomputations(model, example, [(product.module, product.at(dense)) for product in contractions])
        contractions = [replace(product, recomputed=n) for product, n in zip(contractions, again, strict=True)]
    unbalanced: dict[str, str] = {}
    if any(isinstance(module, StateSpaceLayer) or hasattr(module, "A_log") for module in model.modules()):
        groups, unbalanced = find_states(model, groups)
    targets = program.graph_signature.inputs_to_parameters
    own = {node: targets[node.name].removeprefix("model.") for node in program.graph.nodes if node.name in targets}
    unreached = tuple(name for node, name in own.items() if not node.users)
    reached = own if opaque else read_by_outputs(program.graph, but=detaches)
    no_backward = tuple(name for node, name in own.items() if node.users and node not in reached)
    frozen = _frozen(walk, opaque, unbalanced)
    return Trace(groups, tuple(contractions), frozen, unreached, no_backward, unfollowed)


def _frozen(walk: Walk, opaque: Mapping[str, str], unbalanced: Mapping[str, str]) -> tuple[Frozen, ...]:
    """Frozen places, each reason once; copies that meet data are not worth reporting."""
    copies = walk.atoms.marked("alike")
    places = [(place, why) for labels, place, why in walk.atoms.frozen if not copies[labels].all()]
    opaque = {name or "model": why for name, why in opaque.items()}
    return tuple(Frozen(*found) for found in dict.fromkeys((*opaque.items(), *places, *unbalanced.items())))


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

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(group.name, group.num_units, group.what) for group in find_groups(model, (torch.zeros(1, 4),))]
    [('0', 8, 'neuron')]
    """
    return trace(model, example).groups
