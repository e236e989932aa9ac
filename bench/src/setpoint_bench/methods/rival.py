"""Living rivals: other libraries cut a model once, before the first step, through their own public API."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn

from setpoint.actuator.tensors import named_tensors
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import find_groups
from setpoint.spending.meter import Stopwatch
from setpoint_bench.counter import step_flops
from setpoint_bench.course import AlreadyCut, Batches, Begun, Course, Outcome
from setpoint_bench.methods.torch_pruning import bind_sizes, closed_layers, read_widths
from setpoint_bench.results import Result
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.task import BenchError

NEAR = 0.995
"""Of the limit: a cut that leaves this much or more is near enough."""


@dataclass(frozen=True, eq=False)
class Given:
    """What a library may look at.

    Args:
        task: for its loss and example.
        groups: what Setpoint would cut.
        batches: of the training.
    """

    task: SimpleTask
    groups: tuple[Group, ...]
    batches: list[tuple[Tensor, Tensor]]


Cut = Callable[[nn.Module, float, Given], None]


@final
@dataclass(frozen=True)
class Rival:
    """One cut of a library before the first step, at the share that comes closest to the budget from below.

    The search for that share is free; the cut and what it looks at count.

    Args:
        cut: removes a share of what the library counts, in place.
        package: its name on PyPI.
        module: its name in Python.
        num_batches: that it may look at.
        num_tries: cuts of copies in the search.
        gradients: whether the cut reads gradients, which are summed over the batches.
        from_budget: whether the first share that is tried is what the budget says; else it is one half.
    """

    name: str
    cut: Cut
    package: str
    module: str
    paper: str
    num_batches: int = 10
    num_tries: int = 10
    gradients: bool = False
    from_budget: bool = False
    learning_rate: float = 1.0
    family: str = "open-loop"
    sized: bool = True
    needs: tuple[str, ...] = ()

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        return Course(task.with_learning_rate_factor(self.learning_rate), dense_widths(task))

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        """Cut the model, and make an optimizer for what is left.

        Raises:
            BenchError: the library is not installed or fails on this model, or no share meets the budget.
        """
        watch, example = Stopwatch(synchronize=True), task.example()
        dense = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
        groups = tuple(group for group in find_groups(model, example) if group.lossless)
        given = Given(task, groups, list(islice(batches, self.num_batches)))
        dense_flops = float(step_flops(model, example))
        with watch:
            for inputs, targets in given.batches if self.gradients else ():
                torch.autograd.backward(task.loss(model, inputs, targets))
        share = self._share(model, given, budget * dense_flops, 1 - budget if self.from_budget else 0.5)
        with watch:
            self._cut(model, share, given)
        model.zero_grad(set_to_none=True)
        bind_sizes(model, groups, dense)
        final_flops = float(step_flops(model, example))
        outcome = Outcome(
            widths=read_widths(model, groups),
            dense_widths=widths_of(groups),
            dense_flops=dense_flops,
            overhead_flops=self.num_batches * dense_flops if self.gradients else 0.0,
            overhead_seconds=watch.seconds,
            resizes=1,
            budget_met=final_flops <= budget * dense_flops,
            notes=f"share cut {share:.4f}",
        )
        return task.optimizer(model), AlreadyCut(outcome)

    def _share(self, model: nn.Module, given: Given, limit: float, first: float) -> float:
        """The share whose cut costs most within the limit, by halving."""
        low, high, middle, best = 0.0, 1.0, first, (0.0, 0.0)
        least = float("inf")
        for _ in range(self.num_tries):
            twin = copy.deepcopy(model)
            for own, original in zip(twin.parameters(), model.parameters(), strict=True):
                own.grad = original.grad
            try:
                self._cut(twin, middle, given)
                flops = float(step_flops(twin, given.task.example()))
            except BenchError:
                if not (best[0] or low):
                    raise
                high, middle = middle, (low + middle) / 2  # too much for it, since less was not
                continue
            least = min(least, flops)
            if flops <= limit:
                best, high = max(best, (flops, middle)), middle
                if flops >= NEAR * limit:
                    break
            else:
                low = middle
            middle = (low + high) / 2
        if not best[0]:
            dense = step_flops(model, given.task.example())
            raise BenchError(
                f"{self.package} cannot bring this model to {limit / dense:.4g} of the dense FLOPs: the least it "
                f"reached is {least / dense:.4g}"
            )
        return best[1]

    def _cut(self, model: nn.Module, share: float, given: Given) -> None:
        modes = {module: module.training for module in model.modules()}
        layout = torch.channels_last if any(_is_last(each) for each in model.parameters()) else torch.contiguous_format
        try:
            with redirect_stdout(sys.stderr):
                self.cut(model, share, given)
        except BenchError:
            raise
        except Exception as error:  # what it raises on a model that it does not follow is anything
            told = " ".join(str(error).split())
            raise BenchError(f"{self.package} fails on this model ({type(error).__name__}: {told:.300})") from error
        for module, training in modes.items():
            module.training = training
        model.to(memory_format=layout)  # type: ignore[call-overload]


def _is_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def package(name: str, on_pypi: str) -> Any:
    """A module of a library.

    Raises:
        BenchError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise BenchError(f"this method needs {on_pypi} ({error}): pip install setpoint-bench[rivals]") from error


# fasterai.


def fasterai(model: nn.Module, share: float, given: Given, *, context: str) -> None:
    """`fasterai.prune.Pruner`, its default criterion, the size of the weights; what is not cut elsewhere is left."""
    pruner = package("fasterai.prune.pruner", "fasterai").Pruner
    large_final = package("fasterai.core.criteria", "fasterai").large_final
    (example,) = given.task.example()
    pruner(
        model,
        max(share, 1e-6),
        context,
        large_final,
        ignored_layers=closed_layers(model, given.groups),
        example_inputs=example,
    ).prune_model()


# torch-kirigami.


def kirigami(model: nn.Module, share: float, given: Given) -> None:
    """`torch_kirigami.pruning.Pruner` by Taylor scores, all candidates ranked together, to a budget of parameters."""
    graphs, pruning = package("torch_kirigami", "torch-kirigami"), package("torch_kirigami.pruning", "torch-kirigami")
    (example,) = given.task.example()
    graph = graphs.DependencyGraph.build(model.eval(), args=(example[:2],))
    pruner = pruning.Pruner(model, graph=graph)
    budget = pruning.ParameterBudget.from_ratio(model, share)
    pruner.prune(pruner.discover_candidates(), budget=budget, strategy=pruning.Greedy(pruning.WeightTaylor()))


# ModelOpt.


def fastnas(model: nn.Module, share: float, given: Given) -> None:
    """`modelopt.torch.prune.prune(mode="fastnas")` to a share of its own count of FLOPs.

    Its search scores widths by the loss on training batches.
    """
    prune = package("modelopt.torch.prune", "nvidia-modelopt").prune
    task = given.task

    @torch.no_grad()
    def score(candidate: nn.Module) -> float:
        return -sum(float(task.loss(candidate, *batch)) for batch in given.batches)

    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    (example,) = task.example()
    config = {"score_func": score, "data_loader": [x for x, _ in given.batches], "collect_func": lambda x: x}
    prune(model, "fastnas", {"flops": f"{100 * (1 - share):.3f}%"}, example.contiguous(), config)


_FASTERAI = "fasterai", "fasterai", "fasterai, https://github.com/FasterAI-Labs/fasterai"
_KIRIGAMI = "torch-kirigami", "torch_kirigami", "torch-kirigami, https://github.com/ZaberKo/torch-kirigami"
_MODELOPT = "nvidia-modelopt", "modelopt", "FastNAS of ModelOpt, https://github.com/NVIDIA/Model-Optimizer"
RIVALS = (
    Rival("fasterai-first", partial(fasterai, context="local"), *_FASTERAI),
    Rival("fasterai-first-global", partial(fasterai, context="global"), *_FASTERAI),
    Rival("kirigami-first", kirigami, *_KIRIGAMI, gradients=True, num_tries=6),
    Rival("fastnas-first", fastnas, *_MODELOPT, num_batches=2, num_tries=4, from_budget=True),
)
"""The libraries' own cuts; what does not run on a model says why."""
