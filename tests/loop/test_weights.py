"""Single weights in the loop: masks that hold exactly, meet their budget in theory, change by exchange, and resume."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import setpoint
from loop.test_regrowth import Scripted, data
from loop.test_state import Run, check_resumes
from setpoint.controller.penalty import PenaltyController
from setpoint.errors import BudgetError, CheckpointError, GroupError, LoopError, OptimizerError, SetpointError
from setpoint.report.page import entries_table, units
from setpoint.report.record import facts
from setpoint.weights.controller import DropAndGrowController
from setpoint.weights.find import Pattern, find_weights
from setpoint.weights.masking import Masking
from setpoint_bench.report.folder import read_record
from setpoint_bench.weight_flops import weight_flops

STEPS = 24


class Net(nn.Module):
    """A convolutional net with batch norm and a residual block, of few weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + self.inner(x)).mean((2, 3)))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
}


def few() -> DropAndGrowController:
    """The default controller, with three cuts on the way down."""
    return DropAndGrowController(setpoint.PricedController(setpoint.Schedule(num_cuts=3)))


def started(
    pattern: str = "unstructured",
    budget: Any = None,
    make: Any = OPTIMIZERS["adamw"],
    total_steps: int = STEPS,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, setpoint.Loop]:
    """A net on which the pattern fits nearly everywhere, its optimizer, and a loop on its single weights."""
    options.setdefault("controller", few())
    torch.manual_seed(0)
    model = Net().to(memory_format=options.pop("memory_format", torch.contiguous_format))
    optimizer = make(model.parameters())
    loop = setpoint.attach(
        model,
        optimizer,
        budget or setpoint.Budget.fraction(0.6, of="flops"),
        example=(data(0)[0],),
        total_steps=total_steps,
        **{"actuator": Masking(pattern), "groups": find_weights(model, pattern), **options},
    )
    return model, optimizer, loop


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, number: int, masks: dict[str, Tensor] | None = None
) -> float:
    """One step with clipping; with masks, gradients are zeroed by hand."""
    x, y = data(number)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    for name, mask in (masks or {}).items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        grad[~mask] = 0
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss.item()


def shaped(optimizer: torch.optim.Optimizer, weight: Tensor) -> list[Tensor]:
    """What the optimizer remembers of each entry of a weight."""
    state = optimizer.state[weight].values()
    return [value for value in state if isinstance(value, Tensor) and value.shape == weight.shape]


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        *(pytest.param(make, "unstructured", id=name) for name, make in OPTIMIZERS.items()),
        pytest.param(OPTIMIZERS["adamw-fused"], "2:4", id="adamw-fused-2:4"),
    ],
)
def test_the_model_is_the_one_whose_weights_are_zeroed_and_frozen_by_hand(make: Any, pattern: str) -> None:
    """Claim: bit for bit the losses, weights and moments of a model without Setpoint, in which someone zeroes the same
    weights and their moments at the same steps and their gradients before clipping; masked weights, gradients and
    moments are zero after every step.
    """
    model, optimizer, loop = started(pattern, make=make)
    torch.manual_seed(0)
    twin = Net()
    by_hand = make(twin.parameters())
    masks = loop.masks
    for number in range(STEPS):
        assert step(model, optimizer, number) == step(twin, by_hand, number, masks)
        before, masks = masks, loop.masks
        for name, mask in masks.items():
            weight, own = twin.get_parameter(name), model.get_parameter(name)
            for each in (weight.data, *shaped(by_hand, weight)):
                each[before[name] & ~mask] = 0
            assert own.grad is not None and not own.grad[~mask & ~before[name]].any()
            for mine, theirs in zip((own, *shaped(optimizer, own)), (weight, *shaped(by_hand, weight)), strict=True):
                assert not mine.detach()[~mask].any()
                assert torch.equal(mine.detach(), theirs.detach())
    summary = loop.finish()
    assert summary.budget_met and summary.regrown_units > 0, summary.reason
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(("resource", "fraction"), [("flops", 0.1), ("params", 0.1), ("params", 0.8)])
def test_an_unstructured_budget_is_met_to_a_weight(resource: str, fraction: float) -> None:
    """Claim: never over the budget, and not even the cheapest weight of the last cut could be given back; what is
    spent equals an independent count of the active weights, and Summary, ledger and masks agree.
    """
    model, optimizer, loop = started(budget=setpoint.Budget.fraction(fraction, of=resource))
    for number in range(STEPS):
        step(model, optimizer, number)
    summary = loop.finish()
    assert summary.budget_met, summary.reason
    counted = weight_flops(model, (data(0)[0],))
    active = {name: int(mask.sum()) for name, mask in loop.masks.items()}
    params = sum(p.numel() for p in model.parameters()) - sum(int((~mask).sum()) for mask in loop.masks.values())
    spent = {"flops": counted.at(active), "params": params}
    assert summary.widths == active == loop.ledger[-1].widths
    assert summary.spent == pytest.approx(spent) and summary.theoretical_flops == spent["flops"]
    assert (summary.final_params, summary.final_flops, summary.resizes) == (params, counted.total, 0)
    settled = next(entry for entry in loop.ledger if entry.step == 7)
    before = next(entry for entry in reversed(loop.ledger[:]) if entry.step < 7)
    per_weight = counted.per_weight() if resource == "flops" else dict.fromkeys(active, 1)
    cheapest = min(per_weight[name] for name in active if settled.widths[name] < before.widths[name])
    assert spent[resource] <= summary.limit[resource] < spent[resource] + cheapest


@pytest.mark.parametrize(("pattern", "fraction"), [("2:4", 0.75), ("1:4", 0.5), ("3:4", 0.9), ("4:8", 0.75)])
def test_a_pattern_holds_in_every_block(pattern: str, fraction: float) -> None:
    """Claim: all blocks of M neighbouring inputs keep equally many weights, N at least, after every step; tensors that
    do not divide stay dense; within the budget, and no tensor could have back what it lost at the last cut.
    """
    form = Pattern.named(pattern)
    model, optimizer, loop = started(pattern, setpoint.Budget.fraction(fraction, of="params"))
    names = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    assert list(loop.masks) == [name for name in names if model.get_parameter(name).shape[1] % form.block == 0]
    for number in range(STEPS):
        step(model, optimizer, number)
        for name, mask in loop.masks.items():
            weight = model.get_parameter(name).detach()
            blocks = mask.unfold(1, form.block, form.block)
            kept = blocks.sum(-1)
            assert (kept == kept.flatten()[0]).all() and kept.flatten()[0] >= form.kept
            assert not weight[~mask].any()
    summary = loop.finish()
    assert summary.budget_met and summary.spent["params"] <= summary.limit["params"]
    settled = next(entry for entry in loop.ledger if entry.step == 7)
    before = next(entry for entry in reversed(loop.ledger[:]) if entry.step < 7)
    lost = [group for group in find_weights(model, pattern) if settled.widths[group.name] < before.widths[group.name]]
    assert all(summary.spent["params"] + group.multiple_of > summary.limit["params"] for group in lost)
    came, went = (
        sum(sum(each.values()) for each in events)
        for events in ([entry.num_grown for entry in loop.ledger], [entry.num_dropped for entry in loop.ledger])
    )
    assert 0 < came == went - sum(int((~mask).sum()) for mask in loop.masks.values())


@pytest.mark.filterwarnings("ignore:a step gives the model")
def test_an_exchange_brings_back_what_the_gradient_asks_for() -> None:
    """Claim: at a decision, `share` of a tensor's active weights go and as many come in, with the value zero: those
    masked so far whose gradients, over both backward passes of the step, are largest; the ledger counts both.
    """
    half = {"inner.0.weight": list(range(0, 576, 2))}
    controller = DropAndGrowController(Scripted({3: half, 6: {}}, last=20, regrow=False), fraction=0.2)
    model, optimizer, loop = started(controller=controller)
    for number in range(6):
        twin, before = copy.deepcopy(model), loop.masks["inner.0.weight"]
        twin.zero_grad()
        optimizer.zero_grad()
        for part in (0, 1):
            x, y = data(2 * number + part)
            for each in (model, twin):
                nn.functional.cross_entropy(each(x), y).backward()
        optimizer.step()
    after, count = loop.masks["inner.0.weight"], int(controller.share(6, STEPS) * 288)
    gradient = twin.get_parameter("inner.0.weight").grad
    assert gradient is not None and int(before.sum()) == 288
    largest = gradient.abs().masked_fill(before, -1).flatten().topk(count).indices
    assert sorted((after & ~before).flatten().nonzero().flatten().tolist()) == sorted(largest.tolist())
    assert int((before & ~after).sum()) == count > 20
    assert not model.get_parameter("inner.0.weight").detach()[after & ~before].any()
    assert loop.ledger[-1].num_dropped == loop.ledger[-1].num_grown == {"inner.0.weight": count}


def foreign(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """The backward pass of another loss, whose gradients are thrown away."""
    (1000 * model(data(number + 100)[0])).square().mean().backward()
    optimizer.zero_grad(set_to_none=number % 2 == 0)


def overflow(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """A step that a GradScaler skips."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(data(number)[0]).sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:a step gives the model")
@pytest.mark.parametrize("others", [foreign, overflow])
def test_gradients_that_were_thrown_away_exchange_nothing(others: Any) -> None:
    """Claim: with a backward pass ahead of each step whose gradients are thrown away, or a step that a GradScaler
    skips, a run exchanges the same weights, and ends with the same ones to the bit.
    """
    runs = []
    for extra in (None, others):
        model, optimizer, loop = started()
        for number in range(STEPS):
            if extra is not None:
                extra(model, optimizer, number)
            step(model, optimizer, number)
        runs.append((model, loop))
        assert loop.finish().regrown_units > 0
    (model, loop), (other, of_other) = runs
    assert [entry.num_grown for entry in loop.ledger] == [entry.num_grown for entry in of_other.ledger]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_resumes_bit_for_bit() -> None:
    """Claim: losses, weights, moments, averaged copy, masks, ledger and Summary are those of the uninterrupted run,
    from before the first mask, just ahead of an exchange, between decisions and after the landing.
    """

    def start(pattern: str, verify: bool = True) -> Run:
        options = {"actuator": Masking(pattern), "groups": find_weights(Net(), pattern)}
        return Run(few, split=True, model=Net, budget=0.7, total_steps=STEPS, verify=verify, **options)

    for pattern, at in (("unstructured", [3, 9, STEPS]), ("2:4", [12])):
        check_resumes(lambda pattern=pattern, **options: start(pattern, **options), at, STEPS)
    file = start("2:4").saved()
    with pytest.raises(CheckpointError, match="its pattern are 2:4, here they are unstructured"):
        start("unstructured").load(file)


def test_masks_go_on_inside_an_optimizers_state_bit_for_bit() -> None:
    """Claim: with resume=True a run with an example goes on to the bit, whatever is loaded first; without an example
    masks would be there only after the first backward pass, which is refused before anything is changed.
    """

    def start(example: Any) -> tuple[nn.Module, torch.optim.Optimizer, setpoint.Loop]:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        settings = {"example": example, "resume": True, "actuator": Masking()}
        return model, optimizer, setpoint.attach(model, optimizer, 0.5, total_steps=STEPS, **settings)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            x, y = data(step)
            nn.functional.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    whole, its_optimizer, loop = start((data(0)[0],))
    saved = {}
    for step in range(STEPS):
        saved[step] = copy.deepcopy((whole.state_dict(), its_optimizer.state_dict()))
        steps(whole, its_optimizer, step, step + 1)
    assert loop.finish().regrown_units > 0
    for step in (1, 6, 7, 11, 23):
        parts = start((data(0)[0],))
        for number in (0, 1) if step % 2 else (1, 0):
            parts[number].load_state_dict(copy.deepcopy(saved[step][number]))
        steps(*parts[:2], step, STEPS)
        assert all(map(torch.equal, whole.state_dict().values(), parts[0].state_dict().values())), step
    late, optimizer, _ = start(None)
    late.load_state_dict(saved[11][0])
    optimizer.load_state_dict(saved[11][1])
    with pytest.raises(CheckpointError, match=r"gradients of this step are not: give attach an example=\(x,\)"):
        steps(late, optimizer, 11, 12)
    assert all(torch.equal(saved[11][0][name], weight) for name, weight in late.named_parameters())


def test_everybody_is_told_that_hardware_gets_no_faster(tmp_path: Path) -> None:
    """Claim: Summary, ledger and report say so; FLOPs that were computed stay dense, theoretical ones stand beside."""
    model, optimizer, loop = started()
    for number in range(STEPS):
        step(model, optimizer, number)
    summary = loop.finish()
    words = "dense hardware does not get faster"
    assert (
        all(words in summary.sources[name] for name in ("flops", "params"))
        and words in loop.ledger.header["modelled"]["flops"]
    )
    assert summary.final_flops == summary.dense_flops and summary.train_flops >= STEPS * summary.dense_flops
    assert summary.theoretical_train_flops is not None and summary.break_even_step is None
    assert STEPS * summary.limit["flops"] < summary.theoretical_train_flops < STEPS * summary.dense_flops
    loop.ledger.save(tmp_path / "ledger.jsonl")
    record = read_record(tmp_path, "run", [])
    assert record is not None and words in facts(record)["FLOPs"] and not units(record).traces
    assert re.search(r"inner\.0\.weight: \d+", entries_table(record, "flops"))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"actuator": "2:4"}, LoopError, r"actuator is Masking\(...\) or Regrowing\(...\)"),
        (
            {"actuator": Masking("2:4"), "groups": None},
            GroupError,
            r"stem\.weight \(8, 2, 3, 3\).*find_weights\(model, '2:4'\)",
        ),
        ({"actuator": Masking("2:4"), "groups": find_weights(Net())}, GroupError, "is none of find_weights"),
        ({"actuator": None}, GroupError, "holds single weights"),
        ({"budget": setpoint.Budget.fraction(0.5, of="latency")}, BudgetError, "save no latency"),
        ({"budget": setpoint.Budget.fraction(0.5, of="memory")}, BudgetError, "save no memory"),
        ({"budget": setpoint.Budget.fraction(0.5, of="flops", per="run")}, BudgetError, "in theory only"),
        ({"budget": setpoint.Tolerance(loss=0.1)}, BudgetError, "no single weights"),
        ({"budget": setpoint.Budget.fraction(0.01, of="params")}, BudgetError, "at least .*% params"),
        ({"controller": setpoint.PricedController(regrow=True)}, LoopError, "DropAndGrowController"),
        ({"sensor": setpoint.TaylorSensor(16)}, LoopError, "reads whole units"),
        ({"make": lambda p: torch.optim.Adafactor(p)}, OptimizerError, "Adafactor"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[SetpointError], words: str) -> None:
    """Claim: a clear error at attach, with model, optimizer and hooks as they were."""
    torch.manual_seed(0)
    model = Net()
    make = options.pop("make", OPTIMIZERS["adamw"])
    optimizer = make(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {"actuator": Masking(), "groups": find_weights(model), "example": (data(0)[0],), "total_steps": STEPS}
    budget = options.pop("budget", setpoint.Budget.fraction(0.5, of="flops"))
    with pytest.raises(error, match=words):
        setpoint.attach(model, optimizer, budget, **{**given, **options})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    setpoint.attach(
        model,
        OPTIMIZERS["adamw"](model.parameters()),
        budget=setpoint.Budget.fraction(1.0, of="flops"),
        example=(data(0)[0],),
        total_steps=4,
        actuator=Masking(),
    ).detach()


@pytest.mark.parametrize("pattern", ["4:2", "blocks"])
def test_an_unknown_pattern_is_refused(pattern: str) -> None:
    """Claim: when it is written down, by name."""
    with pytest.raises(GroupError, match=f"unknown pattern '{pattern}'"):
        Masking(pattern)


def test_a_price_decides_how_many_stay() -> None:
    """Claim: with a Price the number of weights follows from the exchange rate: the dearer, the fewer."""
    left = []
    for rate in (0.0, 0.05, 1.0):
        price = setpoint.Price(rate, of="params")
        controller = DropAndGrowController(PenaltyController(price, setpoint.Schedule(num_cuts=2)))
        model, optimizer, loop = started(budget=price, controller=controller, total_steps=20)
        for number in range(20):
            step(model, optimizer, number)
        summary = loop.finish()
        assert summary.budget_met, summary.reason
        left.append(summary.final_params)
    assert left[0] > left[1] > left[2]


def test_a_budget_of_one_is_invisible() -> None:
    """Claim: bit-identical to a run without Setpoint, with the global random state as it was."""
    model, optimizer, loop = started(budget=setpoint.Budget.fraction(1.0, of="flops"))
    torch.manual_seed(0)
    twin = Net()
    other = OPTIMIZERS["adamw"](twin.parameters())
    state = torch.get_rng_state()
    for number in range(STEPS):
        assert step(model, optimizer, number) == step(twin, other, number)
    assert loop.finish().budget_met and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_changed_budget_and_the_end() -> None:
    """Claim: the budget may be changed before the freeze; after finish nothing is held any more, and a copy that was
    given stays masked as the model is.
    """
    torch.manual_seed(0)
    model = Net()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    loop = setpoint.attach(
        model,
        optimizer,
        setpoint.Budget.fraction(0.5, of="params"),
        example=(data(0)[0],),
        total_steps=STEPS,
        actuator=Masking(),
        copies=(ema,),
    )
    for number in range(STEPS):
        step(model, optimizer, number)
        ema.update_parameters(model)
        if number == 4:
            loop.budget = setpoint.Budget.fraction(0.3, of="params")
            with pytest.raises(BudgetError, match="in theory only"):
                loop.budget = setpoint.Budget.fraction(0.3, of="flops", per="run")
    with pytest.raises(GroupError, match="counted, not listed"):
        loop.explain("head.weight", 0)
    masks, summary = loop.masks, loop.finish()
    assert summary.budget_met and summary.limit["params"] == 0.3 * sum(p.numel() for p in model.parameters())
    for name, mask in masks.items():
        assert not ema.get_parameter(f"module.{name}").detach()[~mask].any()
        assert np.array_equal(loop.origin[name], np.flatnonzero(mask.numpy()))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    step(model, optimizer, 41)
    assert any(model.get_parameter(name).detach()[~mask].any() for name, mask in masks.items())


def test_gradients_that_others_set_are_masked_too() -> None:
    """Claim: noise added to gradients, in place or as new tensors, after the backward pass reaches no masked weight and
    none of its moments.
    """
    model, optimizer, loop = started(total_steps=12)
    for number in range(12):
        x, y = data(number)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for place, parameter in enumerate(model.parameters()):
            assert parameter.grad is not None
            noise = torch.randn_like(parameter)
            parameter.grad = parameter.grad + noise if (number + place) % 2 else parameter.grad.add_(noise)
        optimizer.step()
        for name, mask in loop.masks.items():
            weight = model.get_parameter(name)
            assert all(not each.detach()[~mask].any() for each in (weight, *shaped(optimizer, weight)))
    loop.finish()
    assert not all(bool(mask.all()) for mask in loop.masks.values())


def test_a_plan_that_breaks_the_pattern_changes_nothing() -> None:
    """Claim: a controller that drops one weight under 2:4 gets an error at that step; the run can go on."""
    model, optimizer, loop = started("2:4", controller=Scripted({3: {"inner.2.weight": [5]}}, last=20, regrow=False))
    for number in range(2):
        step(model, optimizer, number)
    with pytest.raises(GroupError, match="blocks of 4 in 'inner.2.weight' with different numbers"):
        step(model, optimizer, 2)
    assert all(mask.all() for mask in loop.masks.values()) and model.get_parameter("inner.2.weight").detach().all()
    step(model, optimizer, 3)
    assert loop.step == 4 and len(loop.ledger) == 1


def test_weights_that_someone_changes_are_found() -> None:
    """Claim: a run whose masked weights were overwritten after the last step has not met its budget, and says which."""
    model, optimizer, loop = started(total_steps=8)
    for number in range(8):
        step(model, optimizer, number)
    with torch.no_grad():
        model.get_parameter("inner.0.weight").fill_(1.0)
    summary = loop.finish()
    assert not summary.budget_met and "'inner.0.weight' are not zero" in summary.reason


def test_muon_is_no_optimizer_for_single_weights() -> None:
    """Claim: matrices that Muon trains are not pruned by name, since its step mixes all weights of a matrix."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    muon, rest = torch.optim.Muon([model[0].weight], lr=0.01), torch.optim.AdamW([model[2].weight])
    budget = setpoint.Budget.fraction(0.8, of="params")
    x = torch.randn(4, 8)
    loop = setpoint.attach(model, (muon, rest), budget, example=(x,), total_steps=10, actuator=Masking())
    assert list(loop.widths) == ["2.weight"]
    assert "Muon steps by the whole matrix" in loop.ledger.header["frozen"]["0.weight"]
    loop.detach()
