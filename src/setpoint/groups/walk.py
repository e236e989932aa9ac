"""A walk over an exported graph: what a rule knows of a tensor, and what it may record."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from setpoint.groups.atoms import Atoms

# How the reasons begin why something is frozen that Setpoint cannot follow, and that the model may let be cut.
UNFOLLOWED = ("no rule knows this op", "the op's rule does not cover", "the custom autograd", "it cannot be exported")

DimLabels = np.ndarray | None  # atoms along one dim; None for data (batch, positions, constants), without any unit


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph, as far as groups are concerned."""

    shape: tuple[int, ...]  # its shape at the example
    labels: tuple[DimLabels, ...]  # one entry per dim
    weight: bool = False  # computed from parameters and constants only
    grad: bool = False  # needs a gradient
    zero: bool = True  # entries of a dropped unit are certainly 0, so that sums over them stay exact

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def relabelled(self, dim: int, labels: DimLabels) -> tuple[DimLabels, ...]:
        """The labels, with others along one dim."""
        return tuple(labels if d == dim % self.ndim else own for d, own in enumerate(self.labels))


@dataclass(frozen=True, eq=False)
class Call:
    """A size written out in the forward of a module, at a dim that units lie along."""

    module: str  # qualified name of the module whose own forward makes the call
    place: str  # as in `SizeBinding.place`, for example "view#2[1]"
    size: int  # the size at the example
    labels: np.ndarray  # atoms along the dim


@dataclass(frozen=True, eq=False)
class Product:
    """A dim that merges several: its cells and its factors."""

    cells: np.ndarray  # atoms of the merged dim, shape (n1, n2, ...)
    factors: tuple[np.ndarray, ...]  # atoms of each factor, of n1, n2, ... entries
    where: str  # module and op, for messages


@dataclass
class Walk:
    """State of one walk, mutable: the atoms, and everything that rules record."""

    atoms: Atoms = field(default_factory=Atoms)
    products: list[Product] = field(default_factory=list)
    # Of each matrix product or convolution its module, coefficient, dims and number of gradients, as in `Contraction`.
    contracts: list[tuple[str, float, tuple[tuple[int, DimLabels], ...], int]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    attributes: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    # Of each grouped convolution the atoms of its groups, and its weight's dims that read and write.
    grouped: list[tuple[np.ndarray, DimLabels, DimLabels]] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)  # names of the ops without a rule
    # Labels of what such an op gives, from its inputs: none.
    guess: Callable[[Any, Sequence[Value]], Any] = lambda out, inputs: None
    flow: list[tuple[str, list[Value], list[Value]]] = field(default_factory=list)  # module, inputs, results of each op
    node: fx.Node | None = None  # the node being visited
    module: str = ""  # qualified name of the module whose own forward holds the node
    call: str = ""  # which call of that forward the node is, for example "view#2"
    num_calls: dict[tuple[str, str], int] = field(default_factory=dict)  # so far, by running module and function
    unread: bool = False  # whether nothing reads the node, so that its values do not matter
    backward: bool = True  # whether a backward pass from the outputs comes to the node
    alike_atoms: set[int] = field(default_factory=set)  # of dims whose entries are copies or constants
    opaque: frozenset[str] = frozenset()  # modules that Python code around them sees as a single call
    opaque_calls: Mapping[str, str] = field(default_factory=dict)  # modules that are not followed, and why

    @property
    def op(self) -> str:
        """Short name of the present op: "view" for `aten.view.default`."""
        return "output" if self.node is None or self.node.op == "output" else op_name(self.node.target)

    @property
    def where(self) -> str:
        """Module and op of the present node, for messages."""
        return f"{self.module or 'model'}: {self.op}"

    def freeze(self, labels: DimLabels, reason: str) -> None:
        """Never drop these entries; the present op is the place."""
        self.atoms.freeze(labels, self.where, reason)

    def freeze_dims(self, value: Value, dims: Iterable[int], reason: str) -> tuple[DimLabels, ...]:
        """Freeze dims of a tensor; its labels, where these dims are data from now on."""
        frozen = {dim % max(value.ndim, 1) for dim in dims}
        for dim in sorted(frozen):
            self.freeze(value.labels[dim], reason)
        return tuple(None if dim in frozen else labels for dim, labels in enumerate(value.labels))

    def freeze_all(self, value: Value, reason: str) -> None:
        """Never drop any entry of the tensor."""
        self.freeze_dims(value, range(value.ndim), reason)

    def lossy(self, labels: DimLabels, reason: str) -> None:
        """Record that zero is not absent along this dim."""
        if labels is not None and not self.unread:
            self.atoms.lossy.append((labels, f"{reason} ({self.where})"))

    def unite(
        self, left: DimLabels, right: DimLabels, reason: str = "data of a fixed size meets this dim"
    ) -> DimLabels:
        """Labels of two united dims; a labelled dim that meets data freezes."""
        if left is None or right is None:
            self.freeze(left, reason)
            self.freeze(right, reason)
            return None
        self.atoms.unite(left, right)
        return left

    def alike(self, size: int) -> DimLabels:
        """Atoms of a dim whose entries are all alike (copies, constants): it follows any dim that it is united with."""
        if size < 2:
            return None
        labels = self.atoms.fresh(size)
        self.atoms.mark("alike", labels)
        self.alike_atoms.update(labels.tolist())
        return labels

    def copies(self, labels: DimLabels) -> bool:
        """Whether a dim holds copies or constants: its dropped entries are not zero, whatever `Value.zero` says."""
        return labels is not None and len(labels) > 0 and int(labels[0]) in self.alike_atoms

    def product(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """Cells of a merged dim: a cell is dropped if any of its factors is. Shape (n1, n2, ...)."""
        shape = tuple(len(factor) for factor in factors)
        cells = self.atoms.fresh(math.prod(shape)).reshape(shape)
        self.products.append(Product(cells, tuple(factors), self.where))
        return cells

    def contract(self, coefficient: float, dims: Sequence[tuple[int, DimLabels]], num_gradients: int) -> None:
        """Record a product of `2 * coefficient * prod(dims)` FLOPs."""
        gradients = num_gradients if self.backward and not self.unread else 0
        self.contracts.append((self.module, 2.0 * coefficient, tuple(dims), gradients))

    def literal(self, argument: int, size: int, labels: DimLabels) -> None:
        """Record a size that the module's forward writes out, at a dim with these labels."""
        if labels is not None and size > 0:
            self.calls.append(Call(self.module, f"{self.call}[{argument}]", size, labels))


Rule = Callable[..., Any]
"""A function as `rule` describes it; it may also return a `Value`, or a tuple of `Value`s for several outputs."""

_RULES: dict[Any, Rule] = {}  # by op, or by an op's name


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Register how an op carries units; also for ops from outside.

    A rule is called as `rule(walk, out, *args, **kwargs)`: `out` is a `Value` without labels that
    holds the output's shape (a tuple of them for several outputs), tensors among the arguments are
    `Value`s. It returns the labels of the output, one `DimLabels` per dim.

    An op of a library that may not be imported yet goes by its name: `@rule("transformers::grouped_mm_fallback")`.
    The example is an op that works on each entry alone, and so passes on the labels of its input.

    >>> from setpoint.groups.walk import rule
    >>> @rule(torch.ops.aten.special_i0.default)
    ... def _(walk, out, x):
    ...     return x.labels
    """

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def overloads(names: str) -> list[Any]:
    """All overloads of these ATen ops; a release of torch may lack some."""
    packets = [getattr(torch.ops.aten, name) for name in names.split() if hasattr(torch.ops.aten, name)]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


def rule_for(target: Any) -> Rule | None:
    """The rule of an op, or None: an op without one freezes what it touches."""
    found = _RULES.get(target)
    if found is None and isinstance(target, torch._ops.OpOverload):
        found = _RULES.get(str(target.name()))  # type: ignore[no-untyped-call]
    return found


def op_name(target: Any) -> str:
    """Short name of an op: "view" for `aten.view.default`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def module_of(node: fx.Node) -> str:
    """Name of the module of the user's model whose own forward holds a node."""
    stack = node.meta.get("nn_module_stack") or {}
    return plain_path(next(reversed(stack.values()))[0] if stack else "")


def plain_path(path: str) -> str:
    """Module path in the user's model: without the wrapper, and without the number of a repeated call."""
    path = path.split("@")[0]
    return "" if path in ("", "model") else path.removeprefix("model.")


def finish(walk: Walk, result: Any, out: Any, inputs: Sequence[Value]) -> Any:
    """`Value`s of what a rule returned."""
    if out is None:
        return None
    if isinstance(out, tuple):
        results = (None,) * len(out) if result is None else result
        return tuple(finish(walk, part, shape, inputs) for part, shape in zip(results, out, strict=True))
    weight, grad = all(value.weight for value in inputs), any(value.grad for value in inputs)
    if isinstance(result, Value):
        return replace(result, shape=out.shape, weight=weight or result.weight, grad=grad)
    labels = (None,) * out.ndim if result is None else result
    assert len(labels) == out.ndim, f"{walk.where}: rule gave {len(labels)} dims for {out.ndim}"
    for size, dim in zip(out.shape, labels, strict=True):
        assert dim is None or len(dim) == size, f"{walk.where}: rule gave {len(dim)} labels for a dim of {size}"
    return Value(out.shape, tuple(labels), weight, grad, zero=all(value.zero for value in inputs))
