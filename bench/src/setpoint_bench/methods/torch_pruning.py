"""The library Torch-Pruning (Fang et al.): its group pruners, which cut a model once, before the first step."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from setpoint.actuator.model_shapes import apply_sizes, note_cut
from setpoint.actuator.tensors import named_tensors
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import find_groups
from setpoint.spending.meter import Stopwatch
from setpoint_bench.counter import step_flops
from setpoint_bench.course import AlreadyCut, Batches, Begun, OneModel, Outcome
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError

Criterion = Literal["norm", "taylor"]
SEARCH_STEPS = 7
COARSE = tuple(1.0 - 0.5**halvings for halvings in range(1, 8))
"""The ratios that are tried first."""
FINE = (0.5, 0.6, 0.7, 0.75, 0.8, 0.825, 0.85, 0.875, 0.9, 0.925, 0.95, 0.975)
"""Those that are tried where none of them meets the budget."""
LEAST_OF_A_LAYER = 0.1
"""Where a layer keeps less than this it is tried whether it keeps more where heads are cut by less."""
NEAR_ENOUGH = 0.99
"""Below this share of the limit it is tried whether more is left where heads are cut by less."""


@final
@dataclass(frozen=True)
class TorchPruning(OneModel):
    """One cut by `BasePruner`, at the ratio that comes closest to the budget from below, found on copies.

    The search is free, and so is finding out which layers to leave alone; the cut and what it is ranked by count.

    The library chooses, couples and cuts; it is told what its documentation asks the user for: which layers to
    leave alone (those whose outputs no lossless group of Setpoint's holds, so that both prune the same dims), the
    number of heads, and that heads go as a whole. Sizes that attention modules keep in attributes are set
    afterwards, as its examples do.

    Args:
        criterion: "norm" for `GroupMagnitudeImportance`, as in the library's group-norm pruner without its own sparse
            training; "taylor" for `GroupTaylorImportance`.
        even: whether every group is cut by the same ratio; else all groups are ranked together.
        num_batches: batches whose gradients Taylor adds up.

    References:
        Fang, Ma, Song, Mi, Wang: "DepGraph: Towards Any Structural Pruning", CVPR 2023. Molchanov, Mallya, Tyree,
        Frosio, Kautz: "Importance Estimation for Neural Network Pruning", CVPR 2019.
    """

    name: str
    criterion: Criterion
    even: bool
    num_batches: int = 10
    family: str = field(default="open-loop", kw_only=True)

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        """Cut the model, and make an optimizer for what is left.

        Raises:
            BenchError: the library is not installed or fails on this model, or no ratio meets the budget.
        """
        watch = Stopwatch(synchronize=True)
        example, calibration = task.example(), 0.0
        dense_flops = float(step_flops(model, example))
        groups = tuple(group for group in find_groups(model, example) if group.lossless)
        with watch:
            if self.criterion == "taylor":
                for inputs, targets in islice(batches, self.num_batches):
                    torch.autograd.backward(task.loss(model, inputs, targets))
                calibration = self.num_batches * dense_flops
        ratio, most_heads = self._ratios(model, groups, example, budget * dense_flops)
        with watch:
            if ratio:
                self._cut(model, groups, example, ratio, most_heads)
            model.zero_grad(set_to_none=True)
        final = float(step_flops(model, example))
        outcome = Outcome(
            widths=read_widths(model, groups),
            dense_widths=widths_of(groups),
            dense_flops=dense_flops,
            overhead_flops=calibration,
            overhead_seconds=watch.seconds,
            resizes=1,
            budget_met=final <= budget * dense_flops,
            notes=f"pruning ratio {ratio:.4f}" + (f", of heads at most {most_heads:.2f}" if most_heads < 1 else ""),
        )
        return task.optimizer(model), AlreadyCut(outcome)

    def _ratios(
        self, model: nn.Module, groups: tuple[Group, ...], example: tuple[Tensor, ...], limit: float
    ) -> tuple[float, float]:
        """The ratio whose cut costs most within the limit, and the most that heads are cut by: 1 where no less."""
        tried: list[float] = []

        def cut(ratio: float, most_heads: float) -> tuple[float, float]:
            twin = copy.deepcopy(model)
            for own, original in zip(twin.parameters(), model.parameters(), strict=True):
                own.grad = original.grad
            self._cut(twin, groups, example, ratio, most_heads)
            tried.append(float(step_flops(twin, example)))
            widths = read_widths(twin, groups)
            least = min((widths[each.name] / each.num_units for each in groups), default=1.0)
            return tried[-1], min(LEAST_OF_A_LAYER, round(least, 2))

        def flops(ratio: float, most_heads: float) -> float:
            return cut(ratio, most_heads)[0]

        def best(caps: Iterable[float], ratios: Iterable[float]) -> tuple[float, float, float, float] | None:
            found = []
            for most_heads in caps:
                ratio = self._met((min(highest, each) for each in ratios), partial(flops, most_heads=most_heads), limit)
                if ratio is not None:
                    left, least = cut(ratio, most_heads)
                    found.append((least, left, -ratio, most_heads))
                    if least >= LEAST_OF_A_LAYER and left >= NEAR_ENOUGH * limit:
                        break
            return max(found, default=None)

        dense = step_flops(model, example)
        if dense <= limit:
            return 0.0, 1.0
        highest = _highest(group.num_units for group in groups if group.what != "head")
        heads = [group.num_units for group in groups if group.what == "head"]
        # The library leaves a layer whole rather than take its last unit, so too high a ratio takes less, not more.
        # Of a few heads that are ranked over all layers that happens soon: so it is tried where they stop, and the rest
        # goes on. A head is a large block, too: where many go the cut may end far below the limit.
        # Ranked over all layers neurons go from one first, too: its `max_pruning_ratio` bounds what a layer has lost
        # before a cut, not what the cut leaves.
        found = best(_quarters(heads), COARSE)
        if found is None or found[0] < LEAST_OF_A_LAYER:
            found = max(filter(None, (found, best(_singly(heads), FINE))), default=None)
        if found is None:
            raise BenchError(
                f"Torch-Pruning cannot bring this model to {limit / dense:.4g} of the dense FLOPs: the "
                f"least it reaches is {min(tried) / dense:.4g}; ask for at least that budget"
            )
        *_, ratio, most_heads = found
        return -ratio, most_heads

    @staticmethod
    def _met(ratios: Iterable[float], flops: Callable[[float], float], limit: float) -> float | None:
        """The lowest ratio that meets the limit, between the first of these that does and the one before it."""
        low = 0.0
        for high in ratios:
            if flops(high) <= limit:
                for _ in range(SEARCH_STEPS):
                    middle = (low + high) / 2
                    low, high = (low, middle) if flops(middle) <= limit else (middle, high)
                return high
            low = high
        return None

    def _cut(
        self,
        model: nn.Module,
        groups: tuple[Group, ...],
        example: tuple[Tensor, ...],
        ratio: float,
        most_heads: float,
    ) -> None:
        """Cut by this ratio, heads by no more than theirs, in place."""
        library = _library()
        modes = {module: module.training for module in model.modules()}
        dense = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
        closed = closed_layers(model, groups)
        importance = library.importance
        kind = importance.GroupMagnitudeImportance if self.criterion == "norm" else importance.GroupTaylorImportance
        # The library cannot see inside of fused attention, so it traces the written-out form.
        with taken_apart(model, groups) as heads, warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            try:
                library.pruner.BasePruner(
                    model,
                    example,
                    importance=kind(),
                    global_pruning=not self.even,
                    pruning_ratio=ratio,
                    max_pruning_ratio=1.0 if self.even else 0.9,
                    head_pruning_ratio=min(most_heads, _head_ratio(ratio, heads.values(), whole=self.even)),
                    ignored_layers=closed,
                    num_heads=heads,
                    prune_num_heads=True,
                    prune_head_dims=False,
                ).step()
            except Exception as error:  # what it raises on a model that it does not follow is anything
                raise BenchError(
                    f"the library Torch-Pruning fails on this model ({type(error).__name__}: {error}): leave its "
                    "methods out of --methods"
                ) from error
        for module, training in modes.items():  # it traces in evaluation mode, and leaves the model in it
            module.training = training
        bind_sizes(model, groups, dense)


def closed_layers(model: nn.Module, groups: Iterable[Group]) -> list[nn.Module]:
    """Layers whose outputs no group of Setpoint's holds, which another library is told to leave alone."""
    written = {
        piece.tensor.rpartition(".")[0]
        for group in groups
        for piece in group.slices
        if piece.role == "produce" and piece.dim == 0
    }
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    return [each for name, each in model.named_modules() if isinstance(each, layers) and name not in written]


def _highest(units: Iterable[int]) -> float:
    """The highest ratio that leaves a unit in each layer, give or take rounding."""
    return max(0.0, 1.0 - 1.0 / min(units, default=1000) - 1e-6)


def _quarters(heads: Sequence[int]) -> list[float]:
    """The most that heads are cut by, from no limit down to none by quarters of a layer's."""
    fewest = min(heads, default=0)
    caps = sorted({gone for quarter in range(4) if (gone := quarter * fewest // 4) <= fewest - 2}, reverse=True)
    return [1.0, *(gone / fewest for gone in caps)]


def _singly(heads: Sequence[int]) -> list[float]:
    """The same from one head left in each layer down to none, one by one: they are ranked over all layers."""
    return [gone / sum(heads) for gone in range(sum(heads) - len(heads), 0, -1)]


def _head_ratio(ratio: float, heads: Collection[int], *, whole: bool) -> float:
    """The ratio for heads, one of which stays everywhere.

    Where each layer loses `whole` heads by itself, the ratio is rounded down to them: the library would round up,
    and land far below the budget.
    """
    if not heads:
        return 0.0
    least = min(heads)
    return max(0.0, min(math.floor(ratio * least) / least - 1e-9 if whole else ratio, _highest(heads)))


def _library() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise BenchError("this method needs Torch-Pruning: pip install setpoint-bench") from error
    return torch_pruning


def read_widths(model: nn.Module, groups: tuple[Group, ...]) -> dict[str, int]:
    """Units that each group still has, read off the length of the first weight, or fixed filters, that write them."""
    tensors = named_tensors(model)
    widths = {}
    for group in groups:
        piece = next(piece for piece in group.slices if piece.role == "produce" and piece.dim is not None)
        assert piece.dim is not None
        length, before = tensors[piece.tensor].shape[piece.dim], len(piece.index)
        of_group = int((piece.index >= 0).sum())
        widths[group.name] = (of_group - (before - length)) * group.num_units // of_group
    return widths


def bind_sizes(model: nn.Module, groups: tuple[Group, ...], dense: dict[str, tuple[int, ...]]) -> None:
    """Set the sizes that the library does not know, and note all of them, so that the model can be saved."""
    widths = read_widths(model, groups)
    sizes: dict[tuple[str, str], int] = {}
    for group in groups:
        for size in group.sizes:
            gone = int((size.index >= 0).sum()) * (group.num_units - widths[group.name]) // group.num_units
            place = (size.module, size.place)
            sizes[place] = sizes.get(place, len(size.index)) - gone
    now = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    cut = {name: shape for name, shape in dense.items() if now[name] != shape}
    with ExitStack() as undo:
        note_cut(model, {name: now[name] for name in cut}, sizes, undo, dense=cut)
        apply_sizes(model, sizes, undo)
        undo.pop_all()


@final
class Apart(nn.Module):
    """What a fused layer does, by one layer for each of its equal parts.

    >>> fused, x = nn.Linear(4, 6), torch.ones(2, 4)
    >>> torch.allclose(Apart(fused, 3)(x), fused(x))
    True
    """

    def __init__(self, fused: nn.Linear, num_parts: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        gradients = [None] * num_parts if fused.weight.grad is None else fused.weight.grad.chunk(num_parts)
        biases = [None] * num_parts if fused.bias is None else fused.bias.detach().chunk(num_parts)
        for weight, bias, gradient in zip(fused.weight.detach().chunk(num_parts), biases, gradients, strict=True):
            part = nn.Linear(fused.in_features, len(weight), bias is not None, device=weight.device, dtype=weight.dtype)
            part.weight = nn.Parameter(weight.clone())
            part.weight.grad = None if gradient is None else gradient.clone()
            if bias is not None:
                part.bias = nn.Parameter(bias.clone())
            self.parts.append(part)

    def forward(self, x: Float[Tensor, "... features"]) -> Float[Tensor, "... outputs"]:
        return torch.cat([part(x) for part in self.parts], -1)

    @torch.no_grad()
    def put_back_into(self, fused: nn.Linear) -> None:
        """Give the parts' weights, whatever their size is now, to the fused layer."""
        fused.weight = nn.Parameter(torch.cat([part.get_parameter("weight") for part in self.parts]))
        if fused.bias is not None:
            fused.bias = nn.Parameter(torch.cat([part.get_parameter("bias") for part in self.parts]))
        fused.out_features, fused.in_features = fused.weight.shape


@contextmanager
def taken_apart(model: nn.Module, groups: Iterable[Group]) -> Iterator[dict[nn.Module, int]]:
    """Layers that make heads and their number of heads; inside, fused ones are taken apart.

    Torch-Pruning follows a split along features only where each part has a layer of its own.

    Args:
        model: changed in place; at the end each fused layer is back, with what its parts have become.
        groups: the model's groups.
    """
    heads: dict[nn.Module, int] = {}
    apart: list[tuple[str, nn.Linear, Apart]] = []
    for group in groups:
        for piece in group.slices:
            owner, _, kind = piece.tensor.rpartition(".")
            if group.what != "head" or piece.role != "produce" or kind != "weight":
                continue
            layer, parts = model.get_submodule(owner), _num_parts(piece.index)
            if parts > 1 and isinstance(layer, nn.Linear):
                apart.append((owner, layer, Apart(layer, parts)))
                model.set_submodule(owner, apart[-1][2])
                heads.update(dict.fromkeys(apart[-1][2].parts, group.num_units))
            else:
                heads[layer] = group.num_units
    try:
        yield heads
    finally:
        for owner, fused, taken in apart:
            taken.put_back_into(fused)
            model.set_submodule(owner, fused)


def _num_parts(index: np.ndarray) -> int:
    """How many times over the table lists the units: 3 for queries, keys and values in one layer."""
    for parts in (3, 2):
        if len(index) % parts == 0 and np.array_equal(index, np.tile(index[: len(index) // parts], parts)):
            return parts
    return 1
