"""A task: a family of models, data, and a recipe that every method is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol, final, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn

from setpoint.distillation import Teacher
from setpoint.groups.untouched import in_mode
from setpoint_bench.family import Family
from setpoint_bench.recipe import Recipe, autocast, best_device, product_dtype
from setpoint_bench.task import PLAIN, BenchError, Dimension, Metric, Score, Split, fits_a_folder

Criterion = Callable[[Tensor, Tensor], Tensor]
Views = Callable[[Tensor], Sequence[Tensor]]


@runtime_checkable
class Data(Protocol):
    """Where a task's examples come from. A value: equal data have equal hashes."""

    def __hash__(self) -> int: ...

    @property
    def num_train(self) -> int | None:
        """Examples in one pass over the training data; None where there are no passes."""
        ...

    def example(self, batch: int) -> Tensor:
        """Inputs shaped like one training batch, drawn from no global random state."""
        ...

    def batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless training batches of inputs and targets, in an order fixed by the seed."""
        ...

    def split(self, split: Split) -> tuple[Tensor, Tensor]:
        """All inputs and targets of a split that no training batch is drawn from."""
        ...


def unaltered(inputs: Tensor) -> Sequence[Tensor]:
    """The inputs, in the one view that there is of them."""
    return (inputs,)


def cross_entropy(scores: Shaped[Tensor, "... classes"], targets: Shaped[Tensor, " ..."]) -> Tensor:
    """Mean cross-entropy over all targets, in nats."""
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten())


def smoothed_cross_entropy(scores: Shaped[Tensor, "... classes"], targets: Shaped[Tensor, " ..."]) -> Tensor:
    """Mean cross-entropy with label smoothing 0.1.

    Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016.
    """
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten(), label_smoothing=0.1)


@final
@dataclass(frozen=True)
class SimpleTask:
    """A family of models, trained on data by a recipe: all that a method and the runner ask of a task.

    The model is built from its widths alone, so that dense, small and pruned models are of one family. Everything
    random follows from the seed, and no data order depends on the method.

    Args:
        name: name in result files.
        family: the models, by width.
        data: what they are trained and judged on.
        recipe: how they are trained.
        criterion: batch-mean loss of scores and targets, for judging.
        training_criterion: the same for training; by default `criterion`.
        metric: which field of a score is reported; accuracy is the share of targets with the highest score.
        device: where model and batches lie.
        scratch_learning_rate: peak for narrower models that start from fresh weights, relative to the recipe's, which
            is for the dense model: other than 1 where that starts from trained ones, or where another suits them.
        views: makes of a batch of inputs the batches of which the mean score judges them, such as images and their
            mirror images; training is as it is without.
        evaluation_batch: inputs that are judged at once.
        neighbour: name of the task of another pretrained model, the rival of a cut one, on the same data.
        teacher: whose logits a model learns as well, in `loss`.

    >>> import torch
    >>> from setpoint_bench.family import ByFactor
    >>> from setpoint_bench.tensors import Tensors
    >>> points = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    >>> inside = (points.square().sum(1) < 0.6).long()
    >>> def build(factor):
    ...     width = max(1, round(64 * factor))
    ...     return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
    >>> data = Tensors(train=(points, inside), test=(points[:50], inside[:50]))
    >>> task = SimpleTask("disc", ByFactor(build), data, Recipe(steps=100, batch=32))
    >>> task.with_steps(30).steps
    30
    """

    name: str
    family: Family
    data: Data
    recipe: Recipe
    criterion: Criterion = cross_entropy
    training_criterion: Criterion | None = None
    metric: Metric = "accuracy"
    device: torch.device = field(default_factory=best_device)
    scratch_learning_rate: float = 1.0
    views: Views = unaltered
    evaluation_batch: int = 500
    neighbour: str = ""
    teacher: Teacher | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not fits_a_folder(self.name):
            raise BenchError(f"a task named {self.name!r} cannot be part of a folder's name: {PLAIN}")
        if self.metric not in get_args(Metric):
            raise BenchError(f"unknown metric {self.metric!r}: use {' or '.join(get_args(Metric))}")

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        return self.family.dimensions

    @property
    def unit(self) -> str:
        """Unit of the loss: "nats" where the criterion is known to be a cross-entropy, else ""."""
        known = (cross_entropy, smoothed_cross_entropy, F.cross_entropy, F.nll_loss)
        return "nats" if self.criterion in known or isinstance(self.criterion, nn.CrossEntropyLoss) else ""

    @property
    def steps(self) -> int:
        return self.recipe.steps

    def num_samples(self) -> int:
        """Classes to tell in one training batch; examples, where targets are no classes."""
        _, targets = next(self.data.batches(self.recipe.batch, seed=0))
        return len(targets) if targets.is_floating_point() else targets.numel()

    @property
    def steps_per_validation(self) -> int:
        return self.recipe.steps_per_validation

    @property
    def product_dtype(self) -> torch.dtype:
        return product_dtype(self.device) if self.recipe.mixed else torch.float32

    @property
    def dtype(self) -> str:
        return str(self.product_dtype).removeprefix("torch.")

    def with_steps(self, steps: int) -> SimpleTask:
        """The same task in a run of so many steps, its schedule stretched or compressed."""
        return replace(self, recipe=replace(self.recipe, steps=steps))

    def with_epochs(self, epochs: int) -> SimpleTask:
        """The same task in a run of so many passes over the training data, in whole batches.

        Raises:
            BenchError: the data know no passes.
        """
        if self.data.num_train is None:
            raise BenchError(f"{self.name} has no epochs: give its length as --steps N")
        return self.with_steps(epochs * max(1, self.data.num_train // self.recipe.batch))

    def with_learning_rate_factor(self, factor: float) -> SimpleTask:
        return replace(self, recipe=replace(self.recipe, learning_rate=factor * self.recipe.learning_rate))

    def for_seed(self, seed: int) -> SimpleTask:
        """The task as a run of this seed sees it: where the data are in folds, the seed says which one tests."""
        in_folds = getattr(self.data, "folds", 0)
        return replace(self, data=self.data.with_fold(seed % in_folds)) if in_folds else self  # type: ignore[attr-defined]

    def neighbour_task(self) -> SimpleTask:
        """The neighbour at this task's length, on the same fold.

        Raises:
            BenchError: the task has none.
        """
        from setpoint_bench.catalogue import task_named  # which makes tasks

        if not self.neighbour:
            raise BenchError(f"{self.name} names no pretrained neighbour: leave the method out of --methods")
        found = task_named(self.neighbour, steps=self.steps, data=getattr(self.data, "folder", None))
        return found.for_seed(getattr(self.data, "fold", 0))

    def from_scratch(self) -> SimpleTask:
        """The same task with the learning rate for narrower models of fresh weights."""
        return self.with_learning_rate_factor(self.scratch_learning_rate)

    def build(self, widths: Mapping[str, int], device: torch.device | None = None) -> nn.Module:
        """A fresh model of these widths, initialised from the global random state."""
        with device or self.device:
            return self.family.build(widths)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.recipe.optimizer(model)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return self.recipe.schedule(optimizer)

    def example(self) -> tuple[Tensor, ...]:
        return (self.data.example(self.recipe.batch).to(self.device),)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in self.data.batches(self.recipe.batch, seed):
            yield inputs.to(self.device), targets.to(self.device)

    def autocast(self) -> AbstractContextManager[object]:
        return autocast(self.device, self.product_dtype)

    def scores(self, model: nn.Module, inputs: Shaped[Tensor, "batch ..."]) -> Tensor:
        with self.autocast():
            scores: Tensor = model(inputs)
        return scores.float()

    def loss(
        self, model: nn.Module, inputs: Shaped[Tensor, "batch ..."], targets: Shaped[Tensor, "batch ..."]
    ) -> Tensor:
        own = self.scores(model, inputs)
        loss = (self.training_criterion or self.criterion)(own, targets)
        if self.teacher is None:
            return loss
        with self.autocast():
            taught = self.teacher.logits(inputs)
        return self.teacher.loss(loss, own, taught.float())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> Score:
        """Mean criterion over a split and, if that is the metric, accuracy; the model's mode is restored."""
        inputs, targets = self.data.split(split)
        if not len(targets):
            raise BenchError(f"the {split} split of {self.name} is empty: there is nothing to score")
        if self.metric == "accuracy" and targets.is_floating_point():
            raise BenchError(f'{self.name} has targets that are no classes: give it metric="loss"')
        loss, right = 0.0, 0
        with in_mode(model, training=False):
            parts = (torch.split(each, self.evaluation_batch) for each in (inputs, targets))
            for x, y in zip(*parts, strict=True):
                x, y = x.to(self.device), y.to(self.device)
                scores = torch.stack([self.scores(model, view) for view in self.views(x)]).mean(0)
                loss += float(self.criterion(scores, y)) * len(y)
                if self.metric == "accuracy":
                    right += int((scores.argmax(-1) == y).sum())
        return Score(loss / len(targets), right / targets.numel() if self.metric == "accuracy" else None)


def dense_widths(task: SimpleTask) -> dict[str, int]:
    return {name: dimension.dense for name, dimension in task.dimensions.items()}
