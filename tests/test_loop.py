"""Whole runs on tiny models."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import setpoint
from setpoint.controller.plan import Controller, Observation, Plan
from setpoint.errors import GroupError, LoopError
from setpoint.groups.group import Group
from setpoint.spending.account import Segment
from setpoint.spending.metrics import break_even_step


def _mlp(width: int = 24) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))


class Residual(nn.Module):
    """A convolutional net with a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(x + self.inner(x)).mean((2, 3)))


def _data(model: nn.Module, size: int = 8) -> tuple[Tensor, Tensor]:
    shape = (size, 2, 6, 6) if isinstance(model, Residual) else (size, 6)
    x = torch.randn(shape)
    return x, (x.flatten(1)[:, :3].sum(1) > 0).long() + (x.flatten(1)[:, 3] > 1).long()


def _train(
    model: nn.Module,
    optimizers: tuple[torch.optim.Optimizer, ...],
    steps: int,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    for step in range(steps):
        x, y = _data(model)
        nn.functional.cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        after(step + 1)


def _half(of: str = "flops") -> setpoint.Budget:
    return setpoint.Budget.fraction(0.5, of=of)


def _attach(model: nn.Module, optimizer: Any, budget: setpoint.Budget | None = None, **options: Any) -> setpoint.Loop:
    options = {"total_steps": 40, "example": _data(model)[:1], **options}
    return setpoint.attach(model, optimizer, budget or _half(), **options)


def _counted(model: nn.Module) -> int:
    """FLOPs of one optimizer step by PyTorch's own counter."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model)(_data(model)[0]).sum().backward()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Script(Controller[int]):
    """A controller that drops given numbers of units at given steps, the first ones of every group."""

    drops: Mapping[int, int]
    seen: list[Observation] = field(default_factory=list)

    def init(self, groups: tuple[Group, ...]) -> int:
        return 0

    def due(self, step: int, total_steps: int) -> bool:
        return step in self.drops

    def decide(self, state: int, observation: Observation, cost: Any, groups: Any) -> tuple[int, Plan]:
        self.seen.append(observation)
        count = self.drops[max(step for step in self.drops if step <= observation.step)]
        keep = {group.name: np.arange(group.num_units) >= count for group in groups}
        price, reference = {cost.resource: 0.5}, {cost.resource: 2 * observation.spent[cost.resource]}
        last = observation.step >= max(self.drops)
        return state + 1, Plan(
            observation.step, keep, {}, price, reference, budget_met=last, reason="as the script says"
        )


@pytest.mark.parametrize("build", [_mlp, Residual])
@pytest.mark.parametrize("of", ["flops", "params"])
def test_lands_within_the_budget(build: Callable[[], nn.Module], of: str) -> None:
    """The finished model is within the limit, and no single block could be added back; PyTorch counts the same."""
    model = build()
    dense = {"flops": _counted(model), "params": sum(each.numel() for each in model.parameters())}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with _attach(model, optimizer, _half(of)) as loop:
        _train(model, (optimizer,), 40)
    summary = loop.summary
    assert summary is not None and summary.budget_met and summary.resizes > 0
    counted = {"flops": _counted(model), "params": sum(each.numel() for each in model.parameters())}
    assert summary.dense_flops == dense["flops"]
    assert summary.final_flops == summary.spent["flops"] == loop.ledger[-1].spent["flops"] == counted["flops"]
    assert summary.final_params == summary.spent["params"] == counted["params"]
    assert summary.limit == {of: 0.5 * dense[of]}
    assert summary.spent[of] <= summary.limit[of]
    cost = loop.spending.limits.cost
    for group in loop.groups:
        wider = {**summary.widths, group.name: group.num_units + group.multiple_of}
        if wider[group.name] <= summary.dense_widths[group.name]:
            assert cost.total(wider) > summary.limit[of]


def test_the_ledger_accounts_for_every_unit() -> None:
    """Units dropped according to the ledger and units alive according to `origin` are all units, each once."""
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with _attach(model, optimizer) as loop:
        _train(model, (optimizer,), 40)
    for group in loop.groups:
        gone = [unit for entry in loop.ledger for unit in entry.dropped.get(group.name, [])]
        alive = loop.origin[group.name].tolist()
        assert sorted(gone + alive) == list(range(loop.ledger.header["groups"][group.name]["num_units"]))
        assert loop.widths[group.name] == len(alive) == loop.ledger[-1].widths[group.name]
    for entry in loop.ledger:
        assert {name: len(units) for name, units in entry.dropped.items()} == {
            name: len(values) for name, values in entry.saliency.items()
        }


def test_origins_name_the_units_of_the_dense_model() -> None:
    """The rows of the finished weights are the dense model's rows at `origin`, when nothing was learned in between."""
    model = _mlp()
    rows = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with _attach(model, optimizer) as loop:
        _train(model, (optimizer,), 40)
    first = next(group.name for group in loop.groups if any(each.tensor == "0.weight" for each in group.slices))
    assert loop.widths[first] < 24
    assert torch.equal(model[0].weight, rows[torch.from_numpy(loop.origin[first])])


def test_accounts_for_every_flop() -> None:
    """Training FLOPs are the steps at their widths, plus four verification passes over half of the batch, plus sensing.

    Sensing costs three per outgoing weight and one per gradient that is only checked to be finite.
    """
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    dense = _counted(model)
    outgoing = lambda: model[2].weight.numel() + model[4].weight.numel()  # noqa: E731
    before = outgoing()
    checked = sum(p.numel() for p in model.parameters()) - before
    loop = _attach(model, optimizer, controller=Script({4: 0, 10: 8}), total_steps=20)
    _train(model, (optimizer,), 20)
    summary = loop.finish()
    small = _counted(model)
    assert summary.resizes == 1
    assert summary.overhead_flops == 2 * dense + 10 * (3 * before + checked)
    assert summary.train_flops == 10 * dense + 10 * small + summary.overhead_flops
    assert summary.overhead_flops_ratio == summary.overhead_flops / summary.train_flops
    assert list(summary.overhead) == ["attach", "sensing", "deciding", "resizing", "probing"]
    assert 0 < summary.overhead_seconds < summary.seconds


def test_the_controller_sees_the_run_as_it_is() -> None:
    """Observations hold step, widths, spending, limit and the last observed losses; entries hold what it answers."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    script = Script({3: 0, 6: 4})
    with _attach(model, optimizer, controller=script, total_steps=10) as loop:
        _train(
            model,
            (optimizer,),
            10,
            lambda step: loop.observe(loss=torch.tensor(1.0 * step, requires_grad=True), val=step / 2),
        )
        assert loop.price == 0.5
    one, two = script.seen
    assert (one.step, two.step, two.planned_steps) == (3, 6, 10)
    assert (one.loss, two.loss, one.val, two.val) == (2.0, 5.0, 1.0, 2.5)
    assert one.reading is not None and one.reading.num_steps == 3
    assert one.reading.num_samples == 8
    assert one.dense == one.spent and one.limit["flops"] == 0.5 * one.dense["flops"]
    assert [entry.step for entry in loop.ledger] == [3, 6]
    entry = loop.ledger[1]
    assert (entry.loss, entry.val, entry.reason, entry.price) == (5.0, 2.5, "as the script says", {"flops": 0.5})
    assert entry.error["flops"] == pytest.approx(entry.spent["flops"] / (2 * one.spent["flops"]) - 1)
    assert entry.dropped == {group.name: [0, 1, 2, 3] for group in loop.groups}
    assert entry.own_seconds["resizing"] > 0 and loop.ledger[0].own_seconds["resizing"] == 0


def test_explains_the_dropped_and_the_living() -> None:
    """A dropped unit's explanation quotes the ledger; a living one's the last reading; both read as sentences."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = _attach(model, optimizer, controller=Script({6: 4}), total_steps=10)
    name = loop.groups[0].name
    early = loop.explain(name, 2)
    assert early.alive and early.step is None and math.isnan(early.price)
    assert "no decision" in str(early)
    _train(model, (optimizer,), 10)
    gone, alive = loop.explain(name, 2), loop.explain(name, 7)
    assert not gone.alive and gone.step == 6
    assert gone.saliency == loop.ledger[0].saliency[name][2]
    assert gone.price == 0.5 and gone.reason == "as the script says"
    assert str(gone).startswith(f"neuron 2 of {name} was dropped at step 6: ")
    assert math.isnan(gone.worth) and "worth" not in str(gone) and "worth 2, " in str(replace(gone, worth=2.0))
    assert alive.alive and alive.origin == 7 and "is alive" in str(alive) and alive.saliency >= 0
    with pytest.raises(GroupError, match="units 0 to 23"):
        loop.explain(name, 24)
    with pytest.raises(GroupError, match="no group 'nonsense'"):
        loop.explain("nonsense", 0)
    loop.detach()


@pytest.mark.parametrize("where", ["2.weight", "0.weight", "0.bias"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradients_make_no_decision(bad: float, where: str) -> None:
    """With NaN or infinite gradients since the last reading nothing is cut; the decision is made up for later.

    The ledger says how many steps were bad. The first step with good gradients brings the decision. It
    does not matter whose gradient is bad: weights that read units, weights that none reads, biases.
    """
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    loop = _attach(model, optimizer, controller=Script({5: 4, 9: 2}), total_steps=10)
    widths = []
    for step in range(1, 11):
        x, y = _data(model)
        nn.functional.cross_entropy(model(x), y).backward()
        tensor = model.get_parameter(where)
        values = tensor.detach().clone()
        if step in (4, 5, 6):
            tensor.grad.view(-1)[0] = bad
        optimizer.step()
        if step in (4, 5, 6):  # a rate of 0 times infinity has spoilt the value
            with torch.no_grad():
                tensor.copy_(values)
        optimizer.zero_grad()
        widths.append(set(loop.widths.values()))
    assert widths == [{24}] * 6 + [{20}] * 2 + [{18}] * 2
    assert [entry.step for entry in loop.ledger] == [5, 7, 9]
    assert loop.ledger[0].dropped == {} and "NaN or infinite gradients in 2 steps" in loop.ledger[0].reason
    loop.detach()


# How a run ends.


def test_a_run_that_stops_early_misses_its_budget() -> None:
    """Ending before the landing is said in the summary, with the numbers."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = _attach(model, optimizer, total_steps=1000)
    _train(model, (optimizer,), 5)
    summary = loop.finish()
    assert (summary.budget_met, summary.steps, summary.total_steps) == (False, 5, 1000)
    assert "after 5 of 1,000 steps" in summary.reason
    assert summary.break_even_step is None
    with pytest.raises(LoopError, match="already"):
        loop.finish()
    assert loop.summary is summary


def test_more_steps_than_announced_are_counted_and_warned_of_once() -> None:
    """Steps beyond `total_steps` bring one warning and no decision, and their FLOPs count."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = _attach(model, optimizer, controller=Script({3: 1, 12: 1}), total_steps=10)
    _train(model, (optimizer,), 10)
    with pytest.warns(UserWarning, match="to have 10 steps, and this is step 11") as warned:
        _train(model, (optimizer,), 5)
    assert len(warned) == 1
    summary = loop.finish()
    assert (summary.steps, summary.resizes, len(loop.ledger)) == (15, 1, 1)
    assert summary.train_flops - summary.overhead_flops == 3 * summary.dense_flops + 12 * summary.final_flops


def test_a_model_changed_by_others_misses_its_budget() -> None:
    """If the finished model has other parameters than its widths account for, the landing is not confirmed."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = _attach(model, optimizer)
    _train(model, (optimizer,), 40)
    model.append(nn.Linear(3, 3))
    summary = loop.finish()
    assert not summary.budget_met and "changed by something other than this loop" in summary.reason


def test_detach_leaves_model_and_optimizer_free() -> None:
    """After detach (also twice) the model keeps its size, trains on, and may be attached to again."""
    model = _mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    hooks = (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks))
    loop = _attach(model, optimizer, controller=Script({2: 4, 3: 4}))
    _train(model, (optimizer,), 2)
    loop.detach()
    loop.detach()
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == hooks
    _train(model, (optimizer,), 3)
    assert (loop.step, model[0].out_features) == (2, 20)
    with _attach(model, optimizer, controller=Script({2: 5})) as again:
        _train(model, (optimizer,), 4)
    assert model[0].out_features == 15 and again.summary is not None
    assert set(again.summary.dense_widths.values()) == {20}


def test_an_exception_leaves_the_model_usable() -> None:
    """An exception in the middle of the run passes through; the model is detached as it is and trains on."""
    model = _mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def stop(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), _attach(model, optimizer, controller=Script({3: 4, 9: 4})) as loop:
        _train(model, (optimizer,), 40, stop)
    assert loop.summary is None
    _train(model, (optimizer,), 10)
    assert model[0].out_features == 20
    _attach(model, optimizer).detach()


def test_an_optimizer_that_fails_leaves_the_round_open() -> None:
    """If a step raises, it does not count; the next one is sensed and counted as usual."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = _attach(model, optimizer)
    good, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], "fast"
    with pytest.raises(TypeError):
        _train(model, (optimizer,), 1)
    assert loop.step == 0
    optimizer.param_groups[0]["lr"] = good
    _train(model, (optimizer,), 2)
    assert loop.step == 2
    loop.detach()


# What surrounds a model in training.


def test_two_optimizers_make_one_step() -> None:
    """With parameters split over two optimizers a step is done, and a cut made, when both have stepped."""
    model = _mlp()
    weights = [each for each in model.parameters() if each.dim() == 2]
    biases = [each for each in model.parameters() if each.dim() == 1]
    optimizers = (torch.optim.SGD(weights, 0.01, momentum=0.9), torch.optim.AdamW(biases, 1e-2))
    script = Script({2: 4})
    loop = _attach(model, optimizers, controller=script)
    _train(model, optimizers, 1)
    x, y = _data(model)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizers[0].step()
    assert (loop.step, model[0].out_features) == (1, 24)
    optimizers[1].step()
    assert (loop.step, model[0].out_features) == (2, 20)
    _train(model, optimizers, 3)
    assert script.seen[0].reading is not None and script.seen[0].reading.num_steps == 2
    assert optimizers[0].state[model[0].weight]["momentum_buffer"].shape == (20, 6)
    assert optimizers[1].state[model[0].bias]["exp_avg"].shape == (20,)
    loop.detach()


@pytest.mark.filterwarnings("ignore:a step gives the model")  # a critic is called three times in a step
def test_two_loops_live_side_by_side() -> None:
    """A generator and a discriminator are pruned in one process by a loop each, and keep training each other."""
    generator, critic = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 6)), _mlp()
    own, other = torch.optim.Adam(generator.parameters(), 1e-3), torch.optim.Adam(critic.parameters(), 1e-3)
    with (
        _attach(generator, own, example=(torch.randn(8, 4),)) as one,
        _attach(critic, other, setpoint.Budget.fraction(0.4, of="flops")) as two,
    ):
        for _ in range(40):
            other.zero_grad()
            (critic(torch.randn(8, 6)).mean() - critic(generator(torch.randn(8, 4)).detach()).mean()).backward()
            other.step()
            own.zero_grad()
            critic(generator(torch.randn(8, 4))).mean().backward()
            own.step()
    for loop, most in ((one, 0.5), (two, 0.4)):
        assert loop.summary is not None and loop.summary.budget_met
        assert loop.summary.final_flops_ratio <= most


def test_gradients_of_a_closure_are_sensed() -> None:
    """With `optimizer.step(closure)` the reading is that of the gradients that the closure made."""
    readings = []
    for use_closure in (False, True):
        torch.manual_seed(1)
        model = _mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        script = Script({4: 2})
        loop = _attach(model, optimizer, controller=script)
        for _ in range(4):
            x, y = _data(model)

            def closure(x: Tensor = x, y: Tensor = y, model: nn.Module = model) -> Tensor:
                model.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            if use_closure:
                assert optimizer.step(closure) is not None
            else:
                closure()
                optimizer.step()
        assert script.seen[0].reading is not None and script.seen[0].reading.num_steps == 4
        readings.append(script.seen[0].reading.saliency)
        loop.detach()
    for name in readings[0]:
        np.testing.assert_array_equal(readings[0][name], readings[1][name])


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_read_as_unscaled(fused: bool) -> None:
    """Under a GradScaler readings are those without one; a step with infinite gradients is left out."""
    readings = []
    for scaled in (False, True):
        torch.manual_seed(1)
        model = _mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        script = Script({5: 2})
        loop = _attach(model, optimizer, controller=script)
        for _ in range(5):
            x, y = _data(model)
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert script.seen[0].reading is not None
        readings.append(script.seen[0].reading.saliency)
        loop.detach()
    for name in readings[0]:
        np.testing.assert_allclose(readings[0][name], readings[1][name], rtol=1e-4, atol=1e-6)


def test_a_fused_step_that_found_infinities_is_skipped() -> None:
    """A fused optimizer that a GradScaler tells to do nothing counts as a skipped step, whatever r would be."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    loop = _attach(model, optimizer, controller=Script({1: 2, 9: 2}))
    scaler = torch.amp.GradScaler("cpu")
    x, y = _data(model)
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    model[0].bias.grad[0] = math.inf  # not an outgoing weight, so r itself is finite
    scaler.step(optimizer)
    assert "NaN or infinite gradients in 1 step " in loop.ledger[0].reason
    assert model[0].out_features == 24
    loop.detach()


# When the seconds saved have paid for the overhead.


def test_break_even_adds_up_over_segments() -> None:
    """The first step whose accumulated saving exceeds the overhead so far, over several cuts."""
    dense = Segment(10, 2.0, 5.0)
    assert break_even_step([dense, Segment(4, 1.5, 5.0), Segment(20, 1.0, 6.0)]) == 10 + 4 + 5
    assert break_even_step([dense, Segment(4, 1.5, 5.0)]) is None
    assert break_even_step([dense]) is None
