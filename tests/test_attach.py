"""What attach refuses, and that it touches nothing then."""

import copy
import math
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import setpoint
from setpoint.errors import BudgetError, ExampleError, ExportError, GroupError, LoopError, OptimizerError
from setpoint.groups.trace import trace
from setpoint.sensor.magnitude import MagnitudeSensor

HALF = setpoint.Budget.fraction(0.5, of="flops")


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def _attach(model: nn.Module, optimizer: Any, budget: setpoint.Budget = HALF, **options: Any) -> setpoint.Loop:
    return setpoint.attach(model, optimizer, budget, **{"example": (torch.zeros(4, 6),), "total_steps": 10, **options})


@contextmanager
def _untouched(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Check that model, optimizers with a step behind them, and hooks are as before."""
    for each in optimizers:
        for parameter in (p for settings in each.param_groups for p in settings["params"]):
            parameter.grad = torch.ones_like(parameter)
        each.step()
    before = copy.deepcopy(model.state_dict())
    states = [copy.deepcopy(each.state_dict()) for each in optimizers]
    hooks = [(len(each._optimizer_step_pre_hooks), len(each._optimizer_step_post_hooks)) for each in optimizers]
    mode = [each.training for each in model.modules()]
    yield
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for kept, each in zip(states, optimizers, strict=True):
        leaves, others = tree_leaves(kept), tree_leaves(each.state_dict())
        assert any(isinstance(leaf, Tensor) for leaf in leaves), "an optimizer without state shows nothing"
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others, strict=True))
    assert hooks == [(len(o._optimizer_step_pre_hooks), len(o._optimizer_step_post_hooks)) for o in optimizers]
    assert mode == [each.training for each in model.modules()]


class Branching(nn.Module):
    """A forward whose path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _mlp()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.inner(x)
        return self.inner(-x)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (setpoint.Budget.fraction(0.001, of="flops"), "cannot be reached.*still needs .*Ask for at least"),
        (setpoint.Budget.total(3, of="params"), "cannot be reached.*params"),
        (setpoint.Budget.fraction(0.01, of="memory"), "cannot be reached.*bytes.*Ask for at least"),
        (setpoint.Budget.total(1e-9, of="latency"), r"cannot be reached.* ms \(.*(Ask for at least|hold the model to)"),
        (
            setpoint.Budget.total(60, of="latency"),
            r"60 s per step is .* times .*ask for less than .*without a unit, it is in seconds",
        ),
        (setpoint.Budget.fraction(0.5, of="params", per="run"), "no budget per run of 'params'.*per='step'"),
    ],
)
def test_refuses_budgets_it_cannot_hold(budget: setpoint.Budget, words: str) -> None:
    """Out of reach or not available in this version: the error says what to ask for instead."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with _untouched(model, optimizer), pytest.raises(BudgetError, match=words):
        _attach(model, optimizer, budget)


def test_the_cheapest_reachable_budget_is_reached() -> None:
    """What the error names as the least to ask for is accepted and met."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.raises(BudgetError) as caught:
        _attach(model, optimizer, setpoint.Budget.fraction(0.001, of="flops"))
    least = str(caught.value).split("Ask for at least '")[1].partition("'")[0]
    with _attach(model, optimizer, least, total_steps=40) as loop:
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
    assert loop.summary is not None and loop.summary.budget_met


def test_asks_for_the_steps_of_a_run() -> None:
    """Claim: a call without total_steps, or with it by place, says what to give."""
    call: Any = setpoint.attach
    for budget in ((0.5,), (0.5, 40)):
        with pytest.raises(TypeError, match=r"needs total_steps=.*such as epochs \* len\(loader\)"):
            call(nn.Linear(2, 2), None, *budget)


@pytest.mark.parametrize("total_steps", [0, -5, True])
def test_refuses_a_run_without_steps(total_steps: int) -> None:
    """The run must have a positive whole number of steps."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with (
        _untouched(model, optimizer),
        pytest.raises(ValueError, match=r"total_steps must be a positive integer.*such as epochs \* len\(loader\)"),
    ):
        _attach(model, optimizer, total_steps=total_steps)


def test_refuses_optimizers_of_other_models() -> None:
    """An optimizer that trains none of the model is named, also as one of several."""
    model, other = _mlp(), _mlp()
    own, foreign = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), torch.optim.Adam(other.parameters())
    with _untouched(model, own, foreign):
        for optimizers in (foreign, [own, foreign]):
            with pytest.raises(OptimizerError, match="Adam holds"):
                _attach(model, optimizers)
        with pytest.raises(OptimizerError, match="at least one"):
            _attach(model, [])


def test_refuses_optimizers_that_cannot_follow() -> None:
    """An optimizer whose state depends on the shape is refused before anything is done."""
    model = _mlp()
    optimizer = torch.optim.Adafactor(model.parameters())
    with _untouched(model, optimizer), pytest.raises(OptimizerError, match="Adafactor"):
        _attach(model, optimizer)


@pytest.mark.parametrize(
    "example",
    [
        (torch.zeros(4, 5),),
        (torch.zeros(4, 6), torch.zeros(4)),
        {"nonsense": torch.zeros(4, 6)},
        (torch.zeros(4, 6).long(),),
    ],
)
def test_refuses_examples_that_do_not_fit(example: Any) -> None:
    """Wrong shape, number, name or type of inputs is an ExampleError."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with _untouched(model, optimizer), pytest.raises(ExampleError):
        _attach(model, optimizer, example=example)


def test_refuses_an_example_on_another_device() -> None:
    """The error names both devices."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with _untouched(model, optimizer), pytest.raises(ExampleError, match="meta.*cpu"):
        _attach(model, optimizer, example=(torch.zeros(4, 6, device="meta"),))


def test_refuses_control_flow_that_depends_on_data() -> None:
    """The error names the line of the user's forward."""
    model = Branching()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with _untouched(model, optimizer), pytest.raises(ExportError, match=r"test_attach\.py.*if x\.sum"):
        _attach(model, optimizer)


def test_refuses_a_second_loop_on_one_model() -> None:
    """A model has one loop at a time; a failed attach leaves the first at work, and afterwards there is room."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loop = _attach(model, optimizer)
    with _untouched(model, optimizer), pytest.raises(LoopError, match=r"finish\(\) or detach\(\)"):
        _attach(model, optimizer)
    loop.finish()
    _attach(model, optimizer).detach()


def test_refuses_wrappers_for_several_devices() -> None:
    """DataParallel and its like are refused by name."""
    model = nn.DataParallel(_mlp())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with _untouched(model, optimizer), pytest.raises(LoopError, match="DataParallel is not supported"):
        _attach(model, optimizer)


def test_refuses_a_model_in_which_nothing_can_go() -> None:
    """The error names what was not pruned, and why."""
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with _untouched(model, optimizer), pytest.raises(GroupError, match="can be pruned: .*output"):
        _attach(model, optimizer)


def test_refuses_groups_of_another_model() -> None:
    """Groups must be those of the model as it is now."""
    model, other = _mlp(), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    groups = setpoint.find_groups(other, (torch.zeros(4, 6),))
    with _untouched(model, optimizer), pytest.raises(GroupError, match="not one of this model's"):
        _attach(model, optimizer, groups=groups)


def test_only_the_given_groups_are_pruned() -> None:
    """With `groups` the others are not pruned, and the budget still counts the whole model."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    one = trace(model, (torch.zeros(4, 6),)).groups[:1]
    dense = sum(each.numel() for each in model.parameters())
    with _attach(model, optimizer, setpoint.Budget.fraction(0.6, of="params"), groups=one, total_steps=40) as loop:
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
    assert set(loop.widths) == {one[0].name}
    assert loop.summary is not None and loop.summary.budget_met
    assert sum(each.numel() for each in model.parameters()) <= 0.6 * dense


def test_frozen_outgoing_weights_keep_their_group_whole() -> None:
    """A group that the sensor cannot read is left out, and the ledger's header says why."""
    model = _mlp()
    for frozen in (model[0].weight, model[0].bias, model[2].weight):  # so that no gradient comes to the units either
        frozen.requires_grad_(False)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.1)
    loop = _attach(model, optimizer, setpoint.Budget.fraction(0.9, of="flops"))
    read = {each.tensor for group in loop.groups for each in group.slices if each.role == "consume"}
    assert read == {"4.weight"}
    assert any("TaylorSensor cannot read it" in reason for reason in loop.ledger.header["frozen"].values())
    loop.detach()


def test_groups_that_fail_verification_are_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named in one warning and in the ledger's header; `verify=False` asks no question."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    names = [group.name for group in setpoint.find_groups(model, (torch.zeros(4, 6),))]
    monkeypatch.setattr(sys.modules["setpoint.actuator.verify"], "failing_groups", lambda *_: (names[0],))
    budget = setpoint.Budget.fraction(0.9, of="flops")
    with pytest.warns(UserWarning, match=f"not pruned.*: {names[0]}") as warned:
        loop = _attach(model, optimizer, budget)
    assert len(warned) == 1
    assert list(loop.widths) == names[1:]
    assert "did not behave like masking" in loop.ledger.header["frozen"][names[0]]
    loop.detach()
    loop = _attach(model, optimizer, budget, verify=False)
    assert list(loop.widths) == names
    assert loop.finish().overhead_flops == 0
    monkeypatch.undo()


class Normed(nn.Module):
    """A neuron layer followed by a LayerNorm over its neurons: zero is not absent there."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


def test_lossy_groups_need_leave() -> None:
    """A group in which zero is not absent is pruned only with `allow_lossy`."""
    model = Normed()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.raises(GroupError, match="allow_lossy=True"):
        _attach(model, optimizer)
    with _attach(model, optimizer, allow_lossy=True, total_steps=40) as loop:
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
    assert loop.summary is not None and loop.summary.budget_met
    assert model.norm.normalized_shape == (model.up.out_features,)
    assert model.up.out_features < 16


def test_samples_default_to_the_examples_leading_dim() -> None:
    """`num_samples` of the default sensor is the batch of the example."""
    model = _mlp()
    loop = _attach(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    assert loop.sensor.num_samples == 4
    loop.detach()


def test_keyword_examples_work() -> None:
    """An example may be a dict of keyword inputs."""
    model = Normed()
    loop = _attach(
        model,
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        example={"x": torch.zeros(4, 6)},
        allow_lossy=True,
    )
    assert loop.sensor.num_samples == 4
    loop.detach()


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf, 1.5])
def test_a_budget_must_make_sense(limit: float) -> None:
    """0, negative, NaN, infinite, or over 1 as a fraction: refused when the budget is written down."""
    with pytest.raises(BudgetError):
        setpoint.Budget.fraction(limit, of="flops")
    with pytest.raises(BudgetError, match="unknown resource"):
        setpoint.Budget.fraction(0.5, of="patience")


class TwoHeads(nn.Module):
    """Two heads on one trunk, one of which runs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        y = self.trunk(x).relu()
        out: Tensor = self.second(y) if second else self.first(y)
        return out


def test_weights_that_the_example_leaves_out_are_named() -> None:
    """A head that reads prunable units but is not reached draws a warning with its name."""
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"does not reach second\.weight"):
        setpoint.attach(
            model, optimizer, setpoint.Budget.fraction(0.5, of="flops"), example=(torch.randn(4, 8),), total_steps=9
        ).finish()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"actuator": "2:4"}, r"actuator is Masking\(...\)"),
        ({"actuator": setpoint.Masking}, r"actuator is Masking\(...\)"),
        ({"actuator": re.compile("2:4")}, r"actuator is Masking\(...\)"),
        ({"controller": setpoint.PricedController}, r"is a class: give an object, PricedController\(...\)"),
        ({"sensor": setpoint.TaylorSensor}, r"is a class: give an object, TaylorSensor\(...\)"),
        ({"actuator": setpoint.Regrowing(), "budget": setpoint.Price(0.02, of="flops")}, "brings nothing back"),
    ],
    ids=["text", "class of an actuator", "other object", "class of a controller", "class of a sensor", "of no use"],
)
def test_parts_that_cannot_be_used_are_refused(settings: dict[str, Any], words: str) -> None:
    """Claim: a class, a text or an object of another kind is refused with what to write; the model stays free."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer, example = torch.optim.SGD(model.parameters(), lr=0.1), (torch.randn(8, 4),)
    budget = setpoint.Budget.fraction(0.5, of="flops")
    with pytest.raises(LoopError, match=words):
        setpoint.attach(model, optimizer, **{"budget": budget, **settings}, example=example, total_steps=10)
    setpoint.attach(model, optimizer, budget, example=example, total_steps=10).detach()


def test_a_state_that_cannot_follow_is_refused() -> None:
    """Claim: a sensor whose state is a dict with a number for each unit is refused before training starts."""

    class Dict(MagnitudeSensor):
        def init(self, groups: Any, model: nn.Module) -> Any:
            return {"sums": {group.name: np.zeros(group.num_units) for group in groups}}

    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer, example = torch.optim.SGD(model.parameters(), lr=0.1), (torch.randn(8, 4),)
    with pytest.raises(LoopError, match="make the state a frozen dataclass"):
        setpoint.attach(
            model,
            optimizer,
            setpoint.Budget.fraction(0.5, of="flops"),
            example=example,
            total_steps=10,
            sensor=Dict(),
        )


def in_threads(*calls: Any) -> list[Any]:
    """What each call returns or raises, all begun at once, each in a thread of its own."""
    barrier, found = threading.Barrier(len(calls)), [None] * len(calls)

    def run(number: int) -> None:
        barrier.wait()
        try:
            found[number] = calls[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return found


def test_two_threads_attach_to_one_model() -> None:
    """Of two threads that attach to a model at once one gets its loop, and the other is refused by name."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    once = partial(_attach, model, optimizer, verify=False)
    results = in_threads(once, once)
    assert sorted(type(each).__name__ for each in results) == ["Loop", "LoopError"]
    (loop,) = (each for each in results if isinstance(each, setpoint.Loop))
    (error,) = (each for each in results if isinstance(each, LoopError))
    assert "has a loop already" in str(error)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    loop.detach()


def test_threads_begin_without_an_example() -> None:
    """Loops that begin at their first step, in threads of their own at once, do so one after the other; discovery in
    another thread waits, too.
    """

    def begin(seed: int) -> dict[str, int]:
        model = _mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        loop = _attach(model, optimizer, example=None)
        for step in range(2):
            model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed + step))).square().mean().backward()
            optimizer.step()
        loop.detach()
        return loop.dense_widths

    find = partial(setpoint.find_groups, _mlp(), (torch.zeros(4, 6),))
    *widths, groups = in_threads(*(partial(begin, seed) for seed in range(3)), find)
    assert widths == [{"0": 16, "2": 16}] * 3
    assert [each.name for each in groups] == ["0", "2"]


def test_two_threads_attach_to_two_models() -> None:
    """Both get their loops, one after the other: the groups are those of each alone, and random states stay."""
    models = [_mlp(), nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 2))]
    before = torch.get_rng_state()
    loops = in_threads(*(partial(_attach, m, torch.optim.SGD(m.parameters(), lr=0.1)) for m in models))
    assert [getattr(each, "widths", each) for each in loops] == [{"0": 16, "2": 16}, {"0": 24}]
    assert torch.equal(torch.get_rng_state(), before)
    for each in loops:
        each.detach()


def test_a_hook_that_looks_at_values_is_no_obstacle() -> None:
    """Claim: a user's hook that asks for values, which an export does not have, stays, and the model is pruned."""
    model, seen = _mlp(), list[np.ndarray]()
    model[1].register_forward_hook(lambda module, given, output: seen.append(output.detach().numpy()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with _attach(model, optimizer) as loop:
        for _ in range(10):
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
    assert loop.summary.budget_met and len(model[1]._forward_hooks) == 1 and len(seen) >= 10


class StoresItsLoss(nn.Module):
    """Its forward returns nothing that a loss could be made of."""

    def __init__(self, returns: Any) -> None:
        super().__init__()
        self.net, self.returns = _mlp(), returns

    def forward(self, x: Tensor) -> Any:
        """Store a loss."""
        self.loss = self.net(x).square().mean()
        return self.returns


@pytest.mark.parametrize("returns", [None, "done", torch.tensor(3)], ids=["nothing", "a text", "an integer"])
def test_a_forward_whose_output_is_not_seen_is_refused(returns: Any) -> None:
    """Claim: trials and costs go by backward passes from the output, so a forward without one is refused by name."""
    model = StoresItsLoss(returns)
    optimizer = torch.optim.Adam(model.parameters())
    with _untouched(model, optimizer), pytest.raises(ExportError, match="returns no tensor of floats.*return the loss"):
        _attach(model, optimizer)


def test_blocks_may_be_integers_of_numpy() -> None:
    """Claim: groups of a user's own may count in NumPy's integers."""
    model = _mlp()
    found = setpoint.find_groups(model, (torch.zeros(4, 6),))
    groups = [replace(each, multiple_of=np.int64(4), min_units=np.int32(4)) for each in found]
    loop = _attach(model, torch.optim.SGD(model.parameters(), lr=0.1), groups=groups)
    assert [each.multiple_of for each in loop.groups] == [4, 4]
    loop.detach()


class FailsAtFirst(setpoint.PricedController):
    """A controller that cannot begin."""

    def init(self, groups: Any) -> Any:
        """It fails."""
        raise ValueError("not today")


@pytest.mark.parametrize("given", [True, False], ids=["with an example", "at the first step"])
def test_a_controller_that_cannot_begin_leaves_no_hook(given: bool) -> None:
    """Claim: what a sensor reads through is off the model where the controller fails as the loop begins."""
    model = _mlp()
    model[2].weight.requires_grad_(False)  # a frozen weight is read through a hook
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    parts = {"controller": FailsAtFirst()}
    with pytest.raises(ValueError, match="not today"):
        loop = _attach(model, optimizer, example=(torch.zeros(4, 6),) if given else None, **parts)
        model(torch.randn(4, 6)).square().mean().backward()
        try:
            optimizer.step()
        finally:
            loop.detach()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_generators_of_devices_that_the_model_is_not_on_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: trials of a model on the CPU seed no generator of a GPU, whose state they would not put back."""
    seeded = list[int]()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = _mlp()
    _attach(model, torch.optim.SGD(model.parameters(), lr=0.1)).detach()
    assert seeded == []
