"""How a loop begins: with an example or without, anew or with the state that a framework has saved."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import setpoint
import setpoint.cost.budget
from golden.models import mlp
from setpoint.actuator.tensors import named_tensors
from setpoint.errors import CheckpointError, LoopError, NotBegunError
from setpoint.loop.resume import check_same_run

STEPS = 40


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The data of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)


class Run:
    """A training run of an MLP with AdamW and a scheduler, as any framework would keep it."""

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        torch.manual_seed(seed)
        self.model = setpoint.resumable(mlp(6, 24, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        gradual = setpoint.PricedController()
        self.settings, self.step = {"total_steps": STEPS, "resume": True, "controller": gradual, **settings}, 0

    def attach(self) -> setpoint.Loop:
        """Attach as one line in a script does."""
        self.loop = setpoint.attach(self.model, self.optimizer, 0.5, **self.settings)
        return self.loop

    def train(self, until: int) -> None:
        """Train on."""
        while self.step < until:
            x, y = batch(self.step)
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.step += 1

    def saved(self) -> Any:
        """What a framework saves, through a file without foreign pickles."""
        file = io.BytesIO()
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")}
        torch.save({**parts, "step": self.step}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, state: Any, *parts: str) -> None:
        """Load these in this order."""
        for part in parts:
            getattr(self, part).load_state_dict(state[part])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]

    def everything(self) -> tuple[Any, ...]:
        """Weights, moments, and what was decided."""
        tensors = {name: tensor.clone() for name, tensor in named_tensors(self.model).items()}
        moments = copy.deepcopy(self.optimizer.state_dict()["state"])
        entries = [(each.step, dict(each.widths), dict(each.dropped), each.reason) for each in self.loop.ledger]
        return tensors, moments, entries, self.loop.widths, self.loop.step, self.loop.price


def same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Whether two runs are the same to the bit."""
    tensors = left[0].keys() == right[0].keys() and all(torch.equal(each, right[0][n]) for n, each in left[0].items())
    moments = all(torch.equal(v, right[1][n][k]) for n, state in left[1].items() for k, v in state.items())
    return tensors and moments and left[2:] == right[2:]


ORDERS = [("model", "optimizer", "attach"), ("attach", "model", "optimizer"), ("attach", "optimizer", "model")]
WAYS = [
    pytest.param(
        order,
        at,
        example,
        marks=[pytest.mark.slow] * ((n + n // 2 + n // 8) % 3 > 0),
        id=f"{'-'.join(order)}, after {at}, {'' if example else 'no '}example",
    )
    for n, (order, at, example) in enumerate(product(ORDERS, (1, 4, 11, 25), (True, False)))
]


@pytest.mark.parametrize(("order", "at", "example"), WAYS)
def test_a_run_goes_on_bit_for_bit_from_what_a_framework_saved(order: Any, at: int, example: bool) -> None:
    """Claim: in whatever order states are loaded, before, between and after cuts, the run ends
    as the one that was not interrupted.
    """
    settings = {"example": (batch(0)[0],)} if example else {}
    whole = Run(**settings)
    whole.attach()
    whole.train(at)
    state = whole.saved()
    whole.train(STEPS)
    again = Run(seed=1, **settings)
    names = [part for part in order if part != "attach"]
    if order[0] == "attach":
        again.attach()
        again.load(state, *names)
    else:
        again.load(state, *names)
        again.attach()
    again.train(STEPS)
    assert same(again.everything(), whole.everything())
    assert whole.loop.finish().budget_met and again.loop.finish().budget_met


def test_without_an_example_the_run_is_the_same() -> None:
    """Claim: the first batch of training does what an example does: same plans, same weights, and no random number."""
    runs = [Run(resume=False, example=(batch(0)[0],)), Run(resume=False)]
    for run in runs:
        run.attach()
        state = torch.get_rng_state()
        run.train(STEPS)
        assert torch.equal(torch.get_rng_state(), state)
    assert same(runs[0].everything(), runs[1].everything())


def _train(model: nn.Module, inputs: Any, loop: setpoint.Loop, optimizer: Any, steps: int, passes: int = 1) -> None:
    for _ in range(steps):
        for _ in range(passes):
            (model(**inputs) if isinstance(inputs, dict) else model(*inputs)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_accumulation_is_seen() -> None:
    """Claim: FLOPs are those of an optimizer step: with three backward passes a step, three times those of one."""
    found = []
    for passes in (1, 3):
        torch.manual_seed(0)
        model = mlp(6, 24, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        loop = setpoint.attach(model, optimizer, "50% flops", total_steps=20)
        _train(model, (torch.randn(8, 6),), loop, optimizer, 20, passes)
        found.append(loop.finish())
    assert found[1].dense_flops == 3 * found[0].dense_flops
    assert found[1].final_flops == 3 * found[0].final_flops and found[1].budget_met


def _wrong_shape(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(RuntimeError):
        model(x[:, :2])


def _evaluated(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)
    model.eval()(x)
    model.train()


def _looked_at(model: nn.Module, x: Tensor) -> None:
    model(x[:1])


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("before", [_wrong_shape, _evaluated, _looked_at], ids=["raised", "evaluated", "one row"])
def test_calls_that_are_no_training_do_not_count(before: Callable[..., None], passes: int) -> None:
    """Claim: a call that raises, without gradients, in eval mode or of one row changes neither FLOPs nor example."""
    found = []
    for ahead in (before, lambda model, x: None):
        torch.manual_seed(0)
        model, x = mlp(6, 24, 3), torch.randn(8, 6)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        loop = setpoint.attach(model, optimizer, "50% flops", total_steps=20)
        ahead(model, x)
        _train(model, (x,), loop, optimizer, 20, passes)
        found.append(loop.finish())
    assert found[0].dense_flops == found[1].dense_flops and found[0].final_flops == found[1].final_flops


def test_one_batch_is_held() -> None:
    """Claim: of all batches until the first step only the first stays alive."""
    model = mlp(6, 24, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = setpoint.attach(model, optimizer, "50% flops", total_steps=20)
    alive = []
    for rows in range(1, 17):
        x = torch.randn(rows, 6)
        alive.append(weakref.ref(x.untyped_storage()))
        model(x).square().mean().backward()
        del x
    gc.collect()
    assert sum(each() is not None for each in alive) == 1
    optimizer.step()
    assert loop.groups
    loop.detach()


def test_all_calls_of_a_step_count() -> None:
    """Claim: both calls of a step count, also where no gradient goes through one of them."""
    torch.manual_seed(0)
    model, single, x = mlp(6, 24, 3), mlp(6, 24, 3), torch.randn(8, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = setpoint.attach(model, optimizer, 1.0, total_steps=5)
    for _ in range(5):
        (model(x) - model(x).detach() + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer = torch.optim.SGD(single.parameters(), 0.01)
    once = setpoint.attach(single, optimizer, 1.0, total_steps=5)
    _train(single, (x,), once, optimizer, 5)
    assert loop.finish().dense_flops == 2 * once.finish().dense_flops


@pytest.mark.parametrize("late", [False, True], ids=["after the step", "before the backward pass"])
def test_steps_that_a_scaler_skips_do_not_count(late: bool) -> None:
    """Claim: FLOPs of a run whose first steps overflow, so that its GradScaler skips them, are those of any other."""
    found = []
    for scale in (2.0**10, 2.0**127):
        torch.manual_seed(0)
        model, scaler = mlp(6, 24, 3), torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        loop = setpoint.attach(model, optimizer, "50% flops", total_steps=20)
        made = skipped = 0
        while made < 20:
            loss = 64 * model(8 * torch.ones(8, 6)).square().mean()
            if late:
                optimizer.zero_grad()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            if not late:
                optimizer.zero_grad()
            done = scaler.get_scale() >= before
            made, skipped = made + done, skipped + (not done)
        found.append((skipped, loop.finish().dense_flops))
    assert found[0][0] == 0 < found[1][0] and found[0][1] == found[1][1]


def test_autocast_and_keywords_are_noted() -> None:
    """Claim: what is traced is the forward as it was called, with its keywords and under its autocast."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.seen = nn.Linear(6, 24), nn.Linear(24, 2), set[torch.dtype]()

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            h = self.a(x)
            if type(h) is Tensor:
                self.seen.add(h.dtype)
            return self.b(torch.relu(h)) * scale

    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=20)
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(torch.randn(8, 6), scale=2.0)
        out.float().square().mean().backward()
        optimizer.step()
    assert model.seen == {torch.bfloat16} and loop.finish().budget_met


class Coder(nn.Module):
    """A model without a forward of its own: the training loop calls its parts, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(6, 24, 4), mlp(4, 24, 6)
        self.loss = nn.MSELoss()

    def step(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        return self.loss(self.decoder(code), x) + self.decoder(code.detach()).square().mean()


@pytest.mark.parametrize("passes", [1, 3])
def test_a_model_of_which_parts_are_called(passes: int) -> None:
    """Claim: each part is pruned inside, as often as it is called in a step; what goes from one to the other stays."""
    model = Coder()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=20)
    x = torch.randn(8, 6)
    for _ in range(20):
        for _ in range(passes):
            model.step(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    summary = loop.finish()
    flops = {part: find_flops(getattr(Coder(), part), inputs) for part, inputs in (("encoder", 6), ("decoder", 4))}
    assert summary.budget_met and summary.dense_flops == passes * (flops["encoder"] + 2 * flops["decoder"])
    assert model.encoder[0].out_features < 24 and model.decoder[0].out_features < 24
    assert model.encoder[-1].out_features == model.decoder[0].in_features == 4
    assert not any(each._forward_pre_hooks for each in model.modules()) and "forward" not in vars(model)


def find_flops(part: nn.Module, inputs: int) -> float:
    """Training FLOPs of one pass."""
    optimizer = torch.optim.SGD(part.parameters(), 0.01)
    example = (torch.randn(8, inputs, requires_grad=inputs == 4),)
    with setpoint.attach(part, optimizer, 1.0, example=example, total_steps=1) as loop:
        part(*example).sum().backward()
        optimizer.step()
    assert loop.summary is not None
    return loop.summary.dense_flops


@pytest.mark.parametrize("attached", [True, False], ids=["attached before", "attached after"])
def test_a_wrapper_that_was_there_before_the_load_follows(attached: bool, tmp_path: Any) -> None:
    """Claim: DistributedDataParallel around a dense model, into which a cut state is loaded, goes on bit for bit."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        whole = Run()
        whole.model = nn.parallel.DistributedDataParallel(whole.model)
        whole.attach()
        whole.train(8)
        state = whole.saved()
        whole.train(STEPS)
        again = Run(seed=1)
        again.model = nn.parallel.DistributedDataParallel(again.model)
        if attached:
            again.attach()
        again.load(state, "model", "optimizer")
        if not attached:
            again.attach()
        again.train(STEPS)
        assert same(again.everything(), whole.everything())
        assert whole.loop.finish().budget_met and again.loop.finish().budget_met
    finally:
        torch.distributed.destroy_process_group()


def test_a_loop_that_waits_says_so() -> None:
    """Claim: before the first step there is nothing to ask; evaluations and steps of other models do not begin it."""
    torch.manual_seed(0)
    model = mlp(6, 24, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=20)
    with pytest.raises(NotBegunError, match="the loop begins at the first optimizer step"):
        _ = loop.widths
    assert not hasattr(loop, "ledger")
    with pytest.raises(LoopError, match="has a loop already"):
        setpoint.attach(model, optimizer, 0.5, total_steps=20)
    with torch.no_grad():
        model(torch.randn(3, 6))
    loop.detach()
    again = setpoint.attach(model, optimizer, 0.5, total_steps=20)
    with pytest.raises(LoopError, match="stepped before the model was called in training"):
        optimizer.step()
    optimizer.step()  # the loop is off
    again.detach()
    good = setpoint.attach(model, optimizer, 0.5, total_steps=20)
    _train(model, (torch.randn(8, 6),), good, optimizer, 20)
    assert good.finish().budget_met


def test_finish_before_the_first_step_changes_nothing() -> None:
    """Claim: it is refused, the loop stays attached and finishes later; a `with` statement takes it off."""
    torch.manual_seed(0)
    model = mlp(6, 24, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=20)
    with pytest.raises(NotBegunError, match="no optimizer step was made.*check that the loader has batches"):
        loop.finish()
    _train(model, (torch.randn(8, 6),), loop, optimizer, 20)
    assert "step 20 of 20" in repr(loop) and loop.finish().budget_met
    other = mlp(6, 24, 3)
    for _ in range(2):  # the second attach finds no loop
        with (
            pytest.raises(NotBegunError),
            setpoint.attach(other, torch.optim.SGD(other.parameters(), 0.01), 0.5, total_steps=20),
        ):
            pass


def test_states_that_do_not_go_together_are_refused() -> None:
    """Claim: no loop's state, or damage, is refused in words."""
    run = Run()
    run.attach()
    run.train(25)
    state = run.saved()
    alone = Run(seed=1, example=(batch(0)[0],))
    alone.load(state, "model")
    with pytest.raises(CheckpointError, match="no state of a loop has come with its optimizer"):
        alone.attach()
    damaged = Run(seed=1, example=(batch(0)[0],))
    state["optimizer"]["param_groups"][0]["setpoint"][100] += 1
    damaged.load(state, "model", "optimizer")
    with pytest.raises(CheckpointError):
        damaged.attach()


def test_the_length_of_a_bill_is_not_to_be_set() -> None:
    """Claim: the error of another length tells nobody with a bill to set `loop.total_steps`, which is refused there."""
    facts = {"budgets": [("flops", 0.5, "step", True), ("flops", 1.0, "run", True)], "total_steps": 200}
    with pytest.raises(CheckpointError, match="here they are 200: attach with 100$"):
        check_same_run({**facts, "total_steps": 100}, facts)


def test_a_run_is_made_longer_as_the_error_says() -> None:
    """Claim: attached with the old length, a resumed run takes the new one, and meets its budget at the end of that."""
    short = Run(example=(batch(0)[0],))
    short.attach()
    short.train(10)
    state = short.saved()
    again = Run(seed=1, example=(batch(0)[0],))
    again.load(state, "model", "optimizer")
    again.attach().total_steps = 2 * STEPS
    again.train(2 * STEPS)
    summary = again.loop.finish()
    assert summary.budget_met and summary.steps == summary.total_steps == 2 * STEPS


@pytest.mark.parametrize("example", [True, False], ids=["example", "no example"])
def test_a_cut_model_with_the_optimizer_of_a_dense_one_is_refused(example: bool) -> None:
    """Claim: a state that has loaded moments of other shapes is named before anything is stepped or cut."""
    cut, dense = Run(), Run()
    cut.attach()
    cut.train(STEPS)
    cut.loop.finish()
    x, y = batch(0)
    nn.functional.cross_entropy(dense.model(x), y).backward()
    dense.optimizer.step()
    optimizer = torch.optim.AdamW(cut.model.parameters(), 1e-2)
    optimizer.load_state_dict(dense.optimizer.state_dict())
    before = copy.deepcopy(cut.model.state_dict())
    settings = {"example": (x,)} if example else {}
    with pytest.raises(CheckpointError, match=r"exp_avg'\] of shape \(24, 6\) for '0.weight' of shape"):
        setpoint.attach(cut.model, optimizer, 0.3, total_steps=STEPS, **settings)
        nn.functional.cross_entropy(cut.model(x), y).backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in cut.model.state_dict().items())
    good = torch.optim.AdamW(cut.model.parameters(), 1e-2)
    setpoint.attach(cut.model, good, 0.3, total_steps=STEPS, **settings).detach()


@pytest.mark.parametrize("example", [True, False], ids=["example", "no example"])
def test_a_refused_state_leaves_nothing_behind(example: bool) -> None:
    """Claim: after a state of a run of another length was refused, no loop is at work, and the right length goes on."""
    settings = {"example": (batch(0)[0],)} if example else {}
    whole = Run(**settings)
    whole.attach()
    whole.train(11)
    state = whole.saved()
    whole.train(STEPS)
    again = Run(seed=1, **{**settings, "total_steps": STEPS + 10})
    again.load(state, "model", "optimizer")
    before = copy.deepcopy(again.model.state_dict())
    words = r"its total_steps are 40, .* 50: attach with 40, and set loop.total_steps = 50"
    with pytest.raises(CheckpointError, match=words):
        again.attach()
        again.train(12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.model.state_dict().items())
    again.settings["total_steps"] = STEPS
    again.optimizer.zero_grad()
    again.attach()
    again.train(STEPS)
    assert same(again.everything(), whole.everything())


def _reshaped(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg"] = torch.zeros(3, 3)


def _shorter(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


@pytest.mark.parametrize("forge", [_reshaped, _shorter])
def test_an_optimizers_state_is_taken_with_the_loops_or_not_at_all(forge: Callable[[dict[str, Any]], None]) -> None:
    """Claim: where the loop's state fits and the rest does not, model, loop and optimizer are as before the load, and
    the whole state goes on from there.
    """
    settings = {"example": (batch(0)[0],)}
    whole = Run(**settings)
    whole.attach()
    whole.train(25)
    state, forged = whole.saved(), whole.saved()
    forge(forged["optimizer"])
    again = Run(seed=1, **settings)
    again.attach()
    before, shown = again.everything(), str(again.model)
    with pytest.raises(CheckpointError):
        again.optimizer.load_state_dict(forged["optimizer"])
    assert same(again.everything(), before) and str(again.model) == shown
    again.load(state, "optimizer", "model")
    again.train(STEPS)
    whole.train(STEPS)
    assert same(again.everything(), whole.everything())


Sizes = Sequence[tuple[int, ...]]  # of the batches of a step


def _beside(
    example: tuple[int, ...], steps: Sequence[Sizes], budget: Any = 0.5, training: bool = True
) -> tuple[list[str], nn.Module, Any]:
    """What is warned of in a run of these steps with an example of this shape, the model and the summary."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)).train(training)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    given = {"example": (torch.randn(example),)} if example else {}
    loop = setpoint.attach(model, optimizer, budget, total_steps=20, controller=setpoint.PricedController(), **given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(20):
            for size in steps[min(step, len(steps) - 1)]:
                model(torch.randn(size)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            copy.deepcopy(model), pickle.dumps(model)
    return [str(each.message) for each in caught], model, loop.finish()


@pytest.mark.parametrize("budget", [0.5, "50% flops per run"])
@pytest.mark.parametrize(
    ("example", "step", "times"), [((8, 6), 4 * [(8, 6)], 4), ((1, 6), [(32, 6)], 32), ((8, 6), 2 * [(8, 6)], 2)]
)
def test_a_micro_batch_as_example_is_warned_of(example: Any, step: Sizes, times: int, budget: Any) -> None:
    """Claim: once, where a step gives the model at least twice the example, with the factor; without an example, which
    is the remedy, and with a step's rows as example FLOPs are right, and nothing is said; hooks go.
    """
    said, model, few = _beside(example, [step], budget)
    assert len([each for each in said if f"gives the model {times} times what the example has" in each]) == 1
    assert not model._forward_pre_hooks and not model._forward_hooks
    for remedy in ((), (sum(size[0] for size in step), 6)):
        said, _, whole = _beside(remedy, [step], budget)
        assert not said and whole.dense_flops == times * few.dense_flops


@pytest.mark.parametrize("training", [True, False], ids=["training mode", "eval mode"])
@pytest.mark.parametrize("third", [4 * [(8, 6)], [(8, 6)]], ids=["whole", "short"])
def test_eval_mode_a_short_step_and_other_compiled_code_hide_no_micro_batch(
    monkeypatch: pytest.MonkeyPatch, training: bool, third: Sizes
) -> None:
    """Claim: a model that trains in eval mode, an epoch's short last step as the third, and code that was compiled
    elsewhere in the process leave the warning as it is, and given once.
    """
    monkeypatch.setattr("setpoint.loop.calls.anything_compiled", lambda: True)
    whole = 4 * [(8, 6)]
    said, model, _ = _beside((8, 6), [whole, whole, third, whole], training=training)
    assert len([each for each in said if "gives the model 4 times what the example has" in each]) == 1
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_model_that_is_compiled_in_place_is_not_looked_at() -> None:
    """Claim: its hooks are not called, also where Dynamo has made no graph of it: warnings are errors."""
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    model.compile(backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=200, example=(torch.randn(8, 6),))
    for _ in range(3):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    loop.detach()


@pytest.mark.parametrize(
    ("example", "steps"),
    [
        ((8, 6), [[(8, 6)], [(12, 6)]]),
        ((8, 6), [[(8, 6)], [(3, 6)]]),
        ((8, 6), [[(8, 6)], [(8, 6), (5, 6)], [(8, 6)]]),
        ((8, 6), [[(8, 6)], [(40, 6)], [(8, 6)]]),
        ((4, 5, 6), [[(4, 50, 6)]]),
    ],
    ids=["larger", "last", "half", "one outlier", "lengths"],
)
def test_batches_that_vary_are_not_warned_of(example: Any, steps: Any) -> None:
    """Claim: less than twice the rows, one larger step, smaller ones and longer texts give no warning."""
    assert not _beside(example, steps)[0]


def test_skipped_steps_nested_calls_and_evaluations_are_no_larger_steps() -> None:
    """Claim: what a GradScaler skips between two steps, calls from inside of a call, what a checkpoint computes again,
    and calls without gradients or in eval mode do not count: warnings are errors.
    """

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(6, 24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if len(x) <= 4 else torch.cat([self(x[:4]), self(x[4:])])

    torch.manual_seed(0)
    model, x = Halves(), torch.randn(8, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=20, example=(x,))
    for _ in range(5):
        for _ in range(3):  # the last one steps
            optimizer.zero_grad()
            checkpoint(model, x, use_reentrant=False).square().mean().backward()
            _evaluated(model, x)
        optimizer.step()
    loop.detach()
