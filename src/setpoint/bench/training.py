"""The training of one cell, a turn of a few steps at a time."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

import setpoint
from setpoint.bench.counter import step_flops
from setpoint.bench.environment import environment
from setpoint.bench.method import Method
from setpoint.bench.own_random import OwnRandom
from setpoint.bench.results import HISTORY, LEDGER, MODEL, Result
from setpoint.bench.task import Score, Split, Task, dense_widths
from setpoint.loop import Loop, Summary
from setpoint.meter import Stopwatch

STEPS_PER_TURN = 10
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Cell:
    """One run to do: a method on a task, at a budget, with a seed, judged on a split.

    Args:
        task: what to train.
        method: how.
        budget: fraction of the dense FLOPs per step; None where the method has none.
        seed: seed of weights, data order and augmentation.
        split: what the reported value is measured on; the test set is for reporting only.
    """

    task: Task
    method: Method
    budget: float | None
    seed: int
    split: Split = "test"

    @property
    def name(self) -> str:
        """Name of the cell, and of its folder."""
        budget = "" if self.budget is None else f"-{self.budget:g}"
        return f"{self.task.name}-{self.method.name}{budget}-seed{self.seed}"


@dataclass(frozen=True)
class Progress:
    """How far a cell is.

    Args:
        step: optimizer steps done.
        total_steps: of how many.
        loss: mean training loss of the last few steps, None before the first.
        score: the last validation score, None before the first.
    """

    step: int
    total_steps: int
    loss: float | None = None
    score: Score | None = None


def train(cell: Cell, out: Path, needed: Mapping[str, Result]) -> Generator[Progress, None, Result]:
    """Train one cell, a turn of a few steps at a time; the generator returns the result.

    Args:
        cell: what to train.
        out: folder of the results.
        needed: results that the cell's method needs, by method.

    The result does not depend on what else runs between the turns: data, weights and augmentation
    draw from generators of the cell's own.
    """
    folder = out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    random = OwnRandom(cell.seed)
    with OwnRandom(cell.seed).drawing():
        widths = cell.method.widths(cell.task, cell.budget or 1.0)
        warm_up(cell.task, widths)
    with random.drawing():
        run = Run(cell, widths, random)
    partial = folder / f"{HISTORY}.partial"  # an interrupted repetition leaves the finished run's history alone
    with partial.open("w", encoding="utf-8") as history:
        while run.step < cell.task.steps:
            run.turn(min(STEPS_PER_TURN, cell.task.steps - run.step))
            history.write(json.dumps(run.row("train", Score(run.loss))) + "\n")
            if run.validation_due():
                run.validate()
                history.write(json.dumps(run.row("validation", run.score)) + "\n")
            history.flush()
            yield Progress(run.step, cell.task.steps, run.loss, run.score)
        summary = run.finish(folder)
        final = run.judge(cell.split)
        history.write(json.dumps(run.row(cell.split, final)) + "\n")
    partial.replace(folder / HISTORY)
    return run.result(final, summary)


def warm_up(task: Task, widths: Mapping[str, int]) -> None:
    """A few steps of a throwaway model, so that first calls are slow outside of the clock."""
    model = task.build(widths)
    optimizer = task.optimizer(model)
    batches = task.batches(seed=0)
    for _ in range(WARM_UP_STEPS):
        inputs, targets = next(batches)
        torch.autograd.backward(task.loss(model, inputs, targets))
        optimizer.step()
        optimizer.zero_grad()


class Run:
    """The state of one cell's training: model, optimizer, loop, clocks and counts."""

    def __init__(self, cell: Cell, widths: Mapping[str, int], random: OwnRandom) -> None:
        self.cell, self.task, self.random = cell, cell.task, random
        self.training, self.evaluation = Stopwatch(synchronize=True), Stopwatch(synchronize=True)
        self.model: nn.Module = self.task.build(widths)
        self.optimizer = self.task.optimizer(self.model)
        with self.training:
            self.loop: Loop | None = cell.method.attach(self.task, self.model, self.optimizer, cell.budget or 1.0)
        self.schedule = self.task.schedule(self.optimizer)
        self.batches = self.task.batches(cell.seed)
        self.widths = dict(widths if self.loop is None else self.loop.widths)
        self.dense_widths = dense_widths(self.task) if self.loop is None else dict(self.widths)
        self.flops_per_step = step_flops(self.model, self.task.example())
        self.step, self.flops, self.loss = 0, 0.0, float("nan")
        self.score: Score | None = None

    def turn(self, steps: int) -> None:
        """Train some steps by the clock; losses reach the host once, at the end."""
        losses: list[Tensor] = []
        with self.random.drawing():
            while len(losses) < steps:
                with self.training:
                    self._train(steps, losses)
                self._count_anew()
        self.loss = float(torch.stack(losses).mean())

    def _train(self, steps: int, losses: list[Tensor]) -> None:
        """Train until there are `steps` losses or the model has been resized."""
        while len(losses) < steps:
            losses.append(self._train_step())
            self.step += 1
            self.flops += self.flops_per_step
            if self.loop is not None and self.loop.widths != self.widths:
                return

    def _train_step(self) -> Tensor:
        """One optimizer step, written as a user would."""
        inputs, targets = next(self.batches)
        loss = self.task.loss(self.model, inputs, targets)
        torch.autograd.backward(loss)
        if self.loop is not None:
            self.loop.observe(loss=loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.detach()

    def _count_anew(self) -> None:
        """Count the FLOPs of a step of the model as it is, if its widths have changed."""
        if self.loop is not None and self.loop.widths != self.widths:
            self.widths = dict(self.loop.widths)
            self.flops_per_step = step_flops(self.model, self.task.example())

    def validation_due(self) -> bool:
        """Whether the last turn has passed a step at which to validate, or was the last of all."""
        every = self.task.steps_per_validation
        return self.step // every > (self.step - STEPS_PER_TURN) // every or self.step == self.task.steps

    def validate(self) -> None:
        """Score the model on the validation data."""
        self.score = self.judge("validation")

    def judge(self, split: Split) -> Score:
        """Score the model on a split, by a clock of its own."""
        with self.random.drawing(), self.evaluation:
            return self.task.evaluate(self.model, split)

    def row(self, split: str, score: Score | None) -> dict[str, object]:
        """A row of the history."""
        values = {} if score is None else {key: value for key, value in asdict(score).items() if value is not None}
        return {
            "step": self.step,
            "seconds": self.training.seconds,
            "flops": self.flops,
            "split": split,
            **values,
        }

    def finish(self, folder: Path) -> Summary | None:
        """End the loop by the clock, and keep its ledger and the small model."""
        if self.loop is None:
            return None
        with self.random.drawing(), self.training:
            summary = self.loop.finish()
        self.widths = dict(summary.widths)
        self.flops_per_step = step_flops(self.model, self.task.example())
        self.loop.ledger.save(folder / LEDGER)
        setpoint.save(self.model, folder / MODEL)
        return summary

    def result(self, final: Score, summary: Summary | None) -> Result:
        """The finished cell."""
        value = final.accuracy if self.task.metric == "accuracy" else final.loss
        assert value is not None, "a task whose metric is accuracy measures it"
        overhead_flops = 0.0 if summary is None else float(summary.overhead_flops)
        return Result(
            task=self.task.name,
            method=self.cell.method.name,
            budget=self.cell.budget,
            seed=self.cell.seed,
            metric=self.task.metric,
            value=value,
            split=self.cell.split,
            final_flops=float(self.flops_per_step),
            dense_flops=None if summary is None else float(summary.dense_flops),
            claimed_flops=None if summary is None else float(summary.final_flops),
            final_params=sum(parameter.numel() for parameter in self.model.parameters()),
            train_flops=self.flops + overhead_flops,
            seconds=self.training.seconds,
            evaluation_seconds=self.evaluation.seconds,
            overhead_seconds=0.0 if summary is None else float(summary.overhead_seconds),
            overhead_flops=overhead_flops,
            resizes=0 if summary is None else summary.resizes,
            landed=None if summary is None else summary.landed,
            steps=self.step,
            widths=self.widths,
            dense_widths=self.dense_widths,
            environment=environment(self.task),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            folder=self.cell.name,
            break_even_step=None if summary is None else summary.break_even_step,
        )
