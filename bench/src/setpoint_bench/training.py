"""The training of one cell, a turn of a few steps at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

import setpoint
from setpoint.distillation import Teacher
from setpoint.resources.joules import find_energy_meter
from setpoint.spending.meter import Stopwatch
from setpoint_bench.counter import step_flops
from setpoint_bench.course import Course, Outcome
from setpoint_bench.environment import environment
from setpoint_bench.fingerprint import fingerprint
from setpoint_bench.joules import Joules
from setpoint_bench.method import Method
from setpoint_bench.own_random import OwnRandom
from setpoint_bench.results import FILE, HISTORY, LEDGER, MODEL, Result, exact
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.task import BenchError, Score, Split

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

    task: SimpleTask
    method: Method
    budget: float | None
    seed: int
    split: Split = "test"

    @property
    def name(self) -> str:
        budget = "" if self.budget is None else f"-{exact(self.budget)}"
        return f"{self.task.name}-{self.method.name}{budget}-seed{self.seed}"


@dataclass(frozen=True)
class Progress:
    """How far a cell is."""

    step: int
    total_steps: int
    loss: float | None = None
    score: Score | None = None


def train(cell: Cell, out: Path, needed: Mapping[str, Result] | None = None) -> Generator[Progress, None, Result]:
    """Train one cell, a turn of a few steps at a time; the generator returns the result.

    The result does not depend on what else runs between the turns: data, weights and augmentation
    draw from generators of the cell's own.

    Raises:
        BenchError: for a budget that the method cannot meet, or a result or model that it needs and is not there.
    """
    folder = out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    run = begin(cell, out, needed or {})
    partial = folder / f"{HISTORY}.partial"  # an interrupted repetition leaves the finished run's history alone
    with partial.open("w", encoding="utf-8") as history:
        while run.step < run.task.steps:
            run.turn(min(STEPS_PER_TURN, run.task.steps - run.step))
            history.write(json.dumps(run.row("train", Score(run.loss))) + "\n")
            if run.validation_due():
                run.validate()
                history.write(json.dumps(run.row("validation", run.score)) + "\n")
            history.flush()
            yield Progress(run.step, run.task.steps, run.loss, run.score)
        outcome = run.finish(folder)
        final = run.judge(cell.split)
        history.write(json.dumps(run.row(cell.split, final)) + "\n")
    partial.replace(folder / HISTORY)
    return run.result(final, outcome)


def begin(cell: Cell, out: Path, needed: Mapping[str, Result]) -> Run:
    """The run of a cell before its first step, after a few warm-up steps of another model of its size.

    Raises:
        BenchError: as `train` does.
    """
    random = OwnRandom(cell.seed)
    with OwnRandom(cell.seed).drawing():
        course = _course(cell, needed)
        warm_up(course.task, course.widths)
    with random.drawing():
        return Run(cell, course, random, out, needed)


def _course(cell: Cell, needed: Mapping[str, Result]) -> Course:
    """The method's course, once all that it needs is there."""
    missing = [name for name in cell.method.needs if name not in needed]
    if missing:
        raise BenchError(
            f"{cell.method.name} needs a finished run of {', '.join(missing)} with the same task, budget and seed: "
            f"run --methods {','.join((*missing, cell.method.name))}"
        )
    for name in cell.method.needs:
        if not math.isfinite(needed[name].value):
            raise BenchError(f"{name} diverged in its training ({needed[name].value}): nothing can continue it")
    return cell.method.course(cell.task.for_seed(cell.seed), cell.budget or 1.0, needed)


def load_finished(model: nn.Module, name: str, out: Path, needed: Mapping[str, Result]) -> nn.Module:
    """The model with what a finished run has trained.

    Raises:
        BenchError: its file is gone.
    """
    path = out / needed[name].folder / MODEL
    if not path.exists():
        raise BenchError(
            f"{path} is missing, the trained model of {name}: delete that run's line from {out / FILE} and run the "
            f"method again into {out}"
        )
    return setpoint.load(path, into=model)


def _taught(cell: Cell, course: Course, out: Path, needed: Mapping[str, Result]) -> SimpleTask:
    """The course's task, with the teacher in its loss if there is one, which draws no random numbers of the run's."""
    if not course.taught_by:
        return course.task
    task = cell.task.for_seed(cell.seed)
    with torch.random.fork_rng():
        model = load_finished(task.build(dense_widths(task)), course.taught_by, out, needed)
    if task.data != course.task.data:
        model = nn.Sequential(course.task.data.as_in(task.data), model)  # type: ignore[attr-defined]
    teacher = Teacher(model, alpha=course.alpha, temperature=course.temperature)
    return replace(course.task, teacher=teacher)


def warm_up(task: SimpleTask, widths: Mapping[str, int]) -> None:
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
    """The state of one cell's training: model, optimizer, pruner, clocks and counts."""

    def __init__(self, cell: Cell, course: Course, random: OwnRandom, out: Path, needed: Mapping[str, Result]) -> None:
        self.cell, self.course, self.random = cell, course, random
        earlier = [needed[name] for name in dict.fromkeys((course.goes_on_from, course.taught_by)) if name]
        self.earlier_steps = sum(each.steps for each in earlier)
        self.earlier_flops = sum(each.train_flops for each in earlier)
        self.earlier_seconds = sum(each.seconds for each in earlier)
        self.earlier_joules = [each.energy_j for each in earlier]
        self.training, self.evaluation = Stopwatch(synchronize=True), Stopwatch(synchronize=True)
        self.energy = Joules(find_energy_meter([course.task.device])[0])
        self.model: nn.Module = course.task.build(course.widths)
        if course.goes_on_from:
            load_finished(self.model, course.goes_on_from, out, needed)
        self.task = _taught(cell, course, out, needed)
        self.batches = self.task.batches(cell.seed)
        with self.energy, self.training:
            self.optimizer, self.pruner = cell.method.begin(self.task, self.model, cell.budget or 1.0, self.batches)
        self.schedule = self.task.schedule(self.optimizer)
        self.widths = dict(course.widths if self.pruner is None else self.pruner.widths)
        self.flops_per_step = step_flops(self.model, self.task.example())
        self.step, self.flops, self.loss = 0, 0.0, float("nan")
        self.score: Score | None = None

    def turn(self, steps: int) -> None:
        """Train some steps by the clock; losses reach the host once, at the end."""
        losses: list[Tensor] = []
        with self.random.drawing():
            while len(losses) < steps:
                with self.energy, self.training:
                    self._train(steps, losses)
                self._count_anew()
        self.loss = float(torch.stack(losses).mean())

    def _train(self, steps: int, losses: list[Tensor]) -> None:
        """Train until there are `steps` losses or the model has been resized."""
        while len(losses) < steps:
            losses.append(self._train_step())
            self.step += 1
            self.flops += self.flops_per_step
            if self.pruner is not None and self.pruner.widths != self.widths:
                return

    def _train_step(self) -> Tensor:
        """One optimizer step, written as a user would."""
        inputs, targets = next(self.batches)
        loss = self.task.loss(self.model, inputs, targets)
        torch.autograd.backward(loss)
        if self.pruner is not None:
            self.pruner.observe(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.detach()

    def _count_anew(self) -> None:
        """Count the FLOPs of a step of the model as it is, if its widths have changed."""
        if self.pruner is not None and self.pruner.widths != self.widths:
            self.widths = dict(self.pruner.widths)
            self.flops_per_step = step_flops(self.model, self.task.example())

    def validation_due(self) -> bool:
        """Whether the last turn has passed a step at which to validate, or was the last of all."""
        every = self.task.steps_per_validation
        return self.step // every > (self.step - STEPS_PER_TURN) // every or self.step == self.task.steps

    def validate(self) -> None:
        self.score = self.judge("validation")

    def judge(self, split: Split) -> Score:
        """Score the model on a split, by a clock of its own."""
        with self.random.drawing(), self.evaluation:
            return self.task.evaluate(self.model, split)

    def row(self, split: str, score: Score | None) -> dict[str, object]:
        values = {} if score is None else {key: value for key, value in asdict(score).items() if value is not None}
        return {
            "step": self.step + self.earlier_steps,
            "seconds": self.training.seconds + self.earlier_seconds,
            "flops": self.flops + self.earlier_flops,
            "split": split,
            **values,
        }

    def finish(self, folder: Path) -> Outcome:
        """End the pruner's work by the clock, and keep its ledger and the model."""
        outcome = Outcome(widths=self.widths, dense_widths=dense_widths(self.task))
        if self.pruner is not None:
            with self.random.drawing(), self.energy, self.training:
                outcome = self.pruner.finish()
        if self.task.teacher is not None:
            outcome = replace(outcome, overhead_flops=outcome.overhead_flops + self.task.teacher.flops)
        self.flops_per_step = step_flops(self.model, self.task.example())
        if outcome.ledger is not None:
            outcome.ledger.save(folder / LEDGER)
        setpoint.save(self.model, folder / MODEL)
        return outcome

    def _energy_j(self) -> float | None:
        """Joules of the run, those of the runs before it included; None where a part is unknown."""
        parts = [self.energy.energy_j, *self.earlier_joules]
        return None if None in parts else sum(part or 0.0 for part in parts)

    def result(self, final: Score, outcome: Outcome) -> Result:
        value = final.accuracy if self.task.metric == "accuracy" else final.loss
        assert value is not None, "a task whose metric is accuracy measures it"
        theoretical = outcome.theoretical_train_flops
        return Result(
            task=self.cell.task.name,
            method=self.cell.method.name,
            budget=self.cell.budget,
            seed=self.cell.seed,
            metric=self.task.metric,
            value=value,
            split=self.cell.split,
            final_flops=float(self.flops_per_step),
            dense_flops=outcome.dense_flops,
            claimed_flops=outcome.claimed_flops,
            final_params=sum(parameter.numel() for parameter in self.model.parameters()),
            train_flops=self.flops + outcome.overhead_flops + self.earlier_flops,
            seconds=self.training.seconds + self.earlier_seconds,
            evaluation_seconds=self.evaluation.seconds,
            overhead_seconds=outcome.overhead_seconds,
            overhead_flops=outcome.overhead_flops,
            resizes=outcome.resizes,
            budget_met=outcome.budget_met,
            steps=self.step + self.earlier_steps,
            widths=outcome.widths,
            dense_widths=outcome.dense_widths,
            environment=environment(self.task),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            folder=self.cell.name,
            family=self.cell.method.family,
            theoretical_flops=outcome.theoretical_flops,
            theoretical_train_flops=None if theoretical is None else theoretical + self.earlier_flops,
            density=outcome.density,
            energy_j=self._energy_j(),
            break_even_step=outcome.break_even_step,
            unit=self.task.unit,
            fingerprint=fingerprint(self.cell.task),
            notes="; ".join(filter(None, (self.course.notes, outcome.notes))),
        )
