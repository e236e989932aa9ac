"""What acts beside a loop, or on its plans, in the ablation: by hand, each does what it says and leaves no trace."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import setpoint
from setpoint.controller.plan import Observation, Plan
from setpoint.controller.priced import PricedController
from setpoint.cost.cost import Cost
from setpoint.cost.flops import flops_cost
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import trace
from setpoint_bench.baselines.group_lasso import lasso_norms
from setpoint_bench.counter import forward_flops
from setpoint_bench.distillation import Distillation
from setpoint_bench.fading import Fading
from setpoint_bench.lasso import Lasso
from setpoint_bench.leave_outs import LeaveOuts
from setpoint_bench.looped import Looped
from setpoint_bench.method import ABLATION_METHODS, Setpoint, method_named
from setpoint_bench.revised import RevisedController
from setpoint_bench.silenced import outgoing, without
from setpoint_bench.switch_offs import SwitchOffs
from setpoint_bench.task import BenchError, dense_widths
from setpoint_bench.tasks.digits import digits
from setpoint_bench.training import Cell, train

TASK = digits(width=16).with_steps(100)


@dataclass
class Stage:
    """A dense model, its optimizer, a loop that does nothing by itself before the run is half over, and batches."""

    budget: float = 0.5
    controller: PricedController | RevisedController | None = None
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = TASK.build(dense_widths(TASK))
        self.optimizer = TASK.optimizer(self.model)
        self.batches = TASK.batches(0)

    def attach(self) -> setpoint.Loop:
        """The loop."""
        return setpoint.attach(
            self.model,
            self.optimizer,
            setpoint.Budget.fraction(self.budget, of="flops"),
            example=TASK.example(),
            total_steps=TASK.steps,
            controller=self.controller,
        )

    def step(self, *companions: Distillation | SwitchOffs) -> None:
        """One step of training."""
        loss = TASK.loss(self.model, *next(self.batches))
        torch.autograd.backward(loss)
        for each in companions:
            each.observe(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("method", ABLATION_METHODS, ids=lambda method: method.name)
def test_variants_meet_the_budget(method: Setpoint, tmp_path: Path) -> None:
    """Every variant of the ablation trains to its end and lands at the FLOPs asked for."""
    training = train(Cell(TASK.with_steps(50), method, 0.5, 0), tmp_path)
    while True:
        try:
            next(training)
        except StopIteration as end:
            result = end.value
            break
    assert result.landed and 0.42 * result.dense_flops < result.final_flops <= 0.5 * result.dense_flops
    assert np.isfinite(result.value)


def test_the_penalty_is_timed_as_the_method_s_own() -> None:
    """The lasso's seconds grow with every step that it takes part in, and end up in the outcome's overhead."""
    stage = Stage()
    loop = stage.attach()
    lasso = Lasso(loop, stage.model, stage.optimizer, 0.2)
    looped, told = Looped(loop, lasso), 0.0
    for _ in range(3):
        loss = TASK.loss(stage.model, *next(stage.batches))
        torch.autograd.backward(loss)
        looped.observe(loss)
        stage.optimizer.step()
        assert lasso.seconds > told
        told = lasso.seconds
    outcome = looped.finish()
    assert outcome.overhead_seconds == pytest.approx(loop.summary.overhead_seconds + told)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_the_penalty_joins_the_gradient_under_sgd_alone(rule: str) -> None:
    """Under AdamW gradients stay those of the loss, and units shrink beside the optimizer."""
    task = replace(TASK, recipe=replace(TASK.recipe, rule=rule, weight_decay=0.0))
    model = task.build(dense_widths(task))
    optimizer = task.optimizer(model)
    loop = setpoint.attach(
        model, optimizer, setpoint.Budget.fraction(0.5, of="flops"), example=task.example(), total_steps=50
    )
    lasso = Lasso(loop, model, optimizer, 0.5)
    loss = task.loss(model, *next(task.batches(0)))
    torch.autograd.backward(loss)
    lasso.observe(loss)
    told = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    twin = copy.deepcopy(model)
    alone = task.optimizer(twin)
    for mine, its in zip(twin.parameters(), model.parameters(), strict=True):
        mine.grad = None if its.grad is None else its.grad.clone()
    alone.step()
    optimizer.step()
    now = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    same = all(torch.equal(one, other) for one, other in zip(told, now, strict=True))
    assert same == (rule == "adamw")
    assert float(lasso_norms(model, loop.groups)) < float(lasso_norms(twin, loop.groups))


def test_distillation_is_the_gradient_of_its_loss() -> None:
    """Every fourth step after the first cut has the gradient of (1 - w) loss + w T^2 KL, by autograd."""
    stage = Stage()
    loop = stage.attach()
    taught = Distillation(loop, stage.model, stage.optimizer, TASK, weight=0.3)
    while loop.widths == taught.dense:
        stage.step(taught)
    assert taught.flops == 0
    for _ in range(4):
        batch, told = next(stage.batches), taught.flops
        alike = copy.deepcopy(stage.model)
        alike._forward_hooks.clear()
        loss = TASK.loss(alike, *batch)
        if taught.steps % 4 == 0:
            wanted = F.log_softmax(taught.teacher(batch[0]).float() / 2, -1)
            got = F.log_softmax(alike(batch[0]).float() / 2, -1)
            loss = 0.7 * loss + 0.3 * 4 * F.kl_div(got, wanted, reduction="batchmean", log_target=True)
        torch.autograd.backward(loss)
        torch.autograd.backward(TASK.loss(stage.model, *batch))
        assert (taught.flops > told) == (taught.steps % 4 == 0)
        for mine, its in zip(stage.model.parameters(), alike.parameters(), strict=True):
            assert mine.grad is not None and its.grad is not None
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-6)
        stage.optimizer.step()
        stage.optimizer.zero_grad()
    assert taught.flops == forward_flops(taught.teacher, TASK.example())
    taught.remove()
    loop.detach()


def test_the_teacher_is_an_average_of_the_dense_weights() -> None:
    """It follows with a memory of 0.99 while the model is dense, and stays as it is once the model has been cut."""
    stage = Stage()
    loop = stage.attach()
    taught = Distillation(loop, stage.model, stage.optimizer, TASK, weight=0.5)
    name, mean = next((name, value.clone()) for name, value in taught.teacher.named_parameters())
    for _ in range(2):
        stage.step(taught)
        mean.lerp_(stage.model.get_parameter(name).detach(), 0.01)
    assert torch.equal(taught.teacher.get_parameter(name), mean)
    while loop.widths == taught.dense:
        stage.step(taught)
    last = taught.teacher.get_parameter(name).clone()
    stage.step(taught)
    assert torch.equal(taught.teacher.get_parameter(name), last)
    taught.remove()
    loop.detach()


def test_switched_off_units_take_no_part() -> None:
    """In the pass their outgoing weights are zero; after it they are back to the bit, with no gradient of their own."""
    stage = Stage()
    loop = stage.attach()
    off = SwitchOffs(loop, stage.model, stage.optimizer, share=0.5)
    before = {name: value.detach().clone() for name, value in stage.model.named_parameters()}
    loss = TASK.loss(stage.model, *next(stage.batches))
    silent = {name: value.detach().clone() for name, value in stage.model.named_parameters()}
    torch.autograd.backward(loss)
    places = list(off.places)
    off.observe(loss)
    assert places and any(not torch.equal(silent[name], before[name]) for name in before)
    assert all(torch.equal(value, before[name]) for name, value in stage.model.named_parameters())
    for weight, dim, entries in places:
        assert weight.grad is not None and not weight.grad.index_select(dim, entries).any() and weight.grad.any()
    stage.optimizer.step()
    with torch.no_grad():
        stage.model(TASK.example()[0])
    assert not off.places, "an evaluation has all units"
    off.remove()
    loop.detach()


def test_units_are_silent_until_the_landing() -> None:
    """Once the loop has landed all units take part in every step."""
    stage = Stage()
    loop = stage.attach()
    off = SwitchOffs(loop, stage.model, stage.optimizer, share=0.5)
    while not loop.landed:
        stage.step(off)
    TASK.loss(stage.model, *next(stage.batches))
    assert not off.places
    off.remove()
    loop.detach()


def observed(stage: Stage, share: float) -> tuple[Observation, Cost, tuple[Group, ...]]:
    """What a controller sees after ten steps, one that may spend only this share of the dense FLOPs from now on."""
    found, sensor = trace(stage.model, TASK.example()), setpoint.TaylorSensor(TASK.recipe.batch)
    groups = tuple(group for group in found.groups if group.lossless)
    state = sensor.init(groups, stage.model)
    for _ in range(10):
        torch.autograd.backward(TASK.loss(stage.model, *next(stage.batches)))
        state = sensor.update(state, groups, stage.model)
        stage.optimizer.step()
        stage.optimizer.zero_grad()
    cost, widths = flops_cost(found), widths_of(found.groups)
    dense = cost.total(widths)
    reading = sensor.read(state, groups, 10)
    seen = Observation(10, 10, widths, reading, {"flops": dense}, {"flops": share * dense}, {"flops": dense})
    return seen, cost, groups


def test_leave_outs_measure_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saliency is multiplied by measured / told loss of the plan's units; weights and buffers stay as they are."""
    stage = Stage()
    seen, cost, groups = observed(stage, share=0.6)
    kept = [next(stage.batches) for _ in range(2)]
    priced, reordered = PricedController(), list[dict[str, np.ndarray]]()
    plan = priced.decide(priced.init(groups), seen, cost, groups)[1]

    choose = PricedController.reordered

    def noting(*args: Any) -> Plan:
        reordered.append(args[-1])
        return choose(*args)

    monkeypatch.setattr(PricedController, "reordered", noting)
    before = copy.deepcopy(stage.model.state_dict())
    measure = LeaveOuts(TASK, stage.model, kept)
    revised = measure(priced, priced.init(groups), plan, seen, cost, groups)
    assert all(torch.equal(value, before[name]) for name, value in stage.model.state_dict().items())
    assert seen.reading is not None
    with torch.no_grad():
        dense = sum(float(TASK.loss(stage.model, *batch)) for batch in kept) / 2
        for group in groups:
            values = seen.reading.saliency[group.name]
            out = np.flatnonzero(~plan.keep[group.name]) if group.name in plan.keep else np.zeros(0, dtype=np.int64)
            out = out if len(out) else np.argsort(values)[: max(1, group.num_units // 10)]
            with without(stage.model, groups, {group.name: out}):
                risen = sum(float(TASK.loss(stage.model, *batch)) for batch in kept) / 2 - dense
            factor = np.clip(risen / values[out].sum(), 0.25, 4.0)
            np.testing.assert_allclose(reordered[0][group.name], factor * values, rtol=1e-3)
    passes = (len(groups) + 1) * 2
    assert revised.flops == plan.flops + passes * forward_flops(stage.model, TASK.example())
    assert revised.drops() and revised.price == plan.price


def test_fading_units_lose_their_outgoing_weights() -> None:
    """Units that the next decision would take lose all but a twentieth until then, and no other weight is touched."""
    stage = Stage(budget=0.3)
    fading = Fading(stage.model, stage.optimizer)
    stage.controller = RevisedController(fading)
    loop = stage.attach()
    beside = fading.beside(loop)
    while not any(map(len, fading.fading.values())):
        stage.step()
    for group in stage.optimizer.param_groups:
        group["lr"] = 0.0
    chosen = {name: units.copy() for name, units in fading.fading.items()}
    places = outgoing(stage.model, loop.groups, chosen)
    touched = {id(weight): (weight, torch.zeros_like(weight, dtype=torch.bool)) for weight, _, _ in places}
    for weight, dim, entries in places:
        touched[id(weight)][1].index_fill_(dim, entries, True)
    before = {name: value.detach().clone() for name, value in stage.model.named_parameters()}
    following = next(step for step in range(loop.step + 1, TASK.steps) if PricedController().due(step, TASK.steps))
    count = following - loop.step - 1
    for _ in range(count):
        stage.step()
    left = 0.05 ** (count / (count + 1))  # the first of as many steps as there are between decisions is gone already
    for name, value in stage.model.named_parameters():
        faded = touched.get(id(value), (value, torch.zeros_like(value, dtype=torch.bool)))[1]
        torch.testing.assert_close(value.detach(), torch.where(faded, left * before[name], before[name]))
    beside.remove()
    loop.detach()


@pytest.mark.parametrize("setting", [{"distill": 1.0}, {"distill": -0.1}, {"switch_off": 1.0}, {"switch_off": -0.5}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    """A weight or share below 0, or of all there is, is refused by name."""
    (name,) = setting
    with pytest.raises(BenchError, match=f"{name} is a .*, at least 0 and below 1, got"):
        Setpoint(**setting)
    with pytest.raises(BenchError, match=f"{name} is a"):
        method_named(f"setpoint@{name}={setting[name]}")
