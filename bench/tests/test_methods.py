"""Methods: every one trains, counts, meets its budget and says where it comes from."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

import setpoint
from setpoint.errors import UsageError
from setpoint.groups.trace import find_groups
from setpoint.ledger import Ledger
from setpoint_bench.baselines.drop_and_grow import DropAndGrow
from setpoint_bench.baselines.scheduled import ScheduledController
from setpoint_bench.counter import step_flops
from setpoint_bench.family import ByFactor, ByWidths
from setpoint_bench.found import found_widths
from setpoint_bench.image_family import ShortFamily
from setpoint_bench.method import METHODS, Method, Setpoint, method_named
from setpoint_bench.methods.scratch import SmallFound
from setpoint_bench.recipe import Recipe
from setpoint_bench.results import MODEL, Result
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError, Dimension, dense_widths
from setpoint_bench.tasks.digits import digits
from setpoint_bench.tasks.shakespeare import VOCABULARY, GPTFamily
from setpoint_bench.tensors import Tensors
from setpoint_bench.training import Cell, train
from setpoint_bench.weight_flops import weight_flops

TASK = digits(epochs=1, width=16)
BUDGET = 0.5
QUICK = (
    "dense",
    "small",
    "small-found",
    "cubic",
    "movement",
    "l0-gates",
    "gmp",
    "magnitude-oneshot",
    "torch-pruning-taylor",
    "setpoint",
    "setpoint-weights",
)
"""One method of each way of building one; the others are trained by `make nightly`."""
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
trained = pytest.mark.parametrize(
    "method",
    [pytest.param(each, marks=[pytest.mark.slow] * (each.name not in QUICK)) for each in METHODS],
    ids=lambda method: method.name,
)
Runs = tuple[Path, Mapping[str, Result]]


class Finished(dict[str, Result]):
    """Each method's result, which is trained when it is asked for, after those that it needs."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out

    def __missing__(self, name: str) -> Result:
        method = method_named(name)
        self[name] = finish(method, self.out, {each: self[each] for each in method.needs})
        return self[name]


def finish(method: Method, out: Path, needed: Mapping[str, Result], budget: float = BUDGET) -> Result:
    """Train one cell to its end."""
    training = train(Cell(TASK, method, budget if method.sized else None, 0), out, needed)
    while True:
        try:
            next(training)
        except StopIteration as end:
            result: Result = end.value
            return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every method's result at one budget."""
    out = tmp_path_factory.mktemp("methods")
    return out, Finished(out)


@trained
def test_meets_the_budget(method: Method, runs: Runs) -> None:
    """The finished model is within the budget and near it: really, or in theory where only weights are masked."""
    results = runs[1]
    result, dense = results[method.name], results["dense"]
    if method.name == "dense":
        assert result.budget is None and result.final_flops == dense.final_flops
    elif result.theoretical_flops is not None:
        assert result.final_flops == dense.final_flops  # what this hardware realises
        assert 0.999 * BUDGET <= result.theoretical_flops / dense.final_flops <= BUDGET
        assert result.budget_met and result.density is not None and 0 < result.density < 1
    else:
        assert 0.85 * BUDGET <= result.final_flops / dense.final_flops <= BUDGET
        assert result.budget_met in (True, None)
        if result.claimed_flops is not None:
            assert result.claimed_flops == result.final_flops


def test_a_taught_run_pays_for_its_teacher(runs: Runs) -> None:
    """A method with a teacher begins with fresh weights, meets the budget, and has the dense run and the teacher's
    passes on its bill.
    """
    taught, plain, dense = (runs[1][name] for name in ("setpoint-taught", "setpoint", "dense"))
    assert taught.budget_met and taught.final_flops <= BUDGET * dense.final_flops
    assert taught.steps == plain.steps + dense.steps
    passes = taught.overhead_flops - plain.overhead_flops
    assert passes == pytest.approx(plain.steps * dense.final_flops / 3, rel=0.1)
    assert taught.train_flops >= dense.train_flops + passes + 0.9 * (plain.train_flops - plain.overhead_flops)


def test_a_dense_model_that_is_taught_pays_for_its_teacher(runs: Runs) -> None:
    """The dense model beside a teacher keeps all its units, begins with fresh weights, and has the dense run and the
    teacher's passes on its bill.
    """
    taught, dense = (runs[1][name] for name in ("dense-taught", "dense"))
    assert taught.budget is None and taught.final_flops == dense.final_flops and taught.steps == 2 * dense.steps
    assert taught.train_flops == pytest.approx(2 * dense.train_flops + dense.steps * dense.final_flops / 3, rel=0.1)
    assert taught.value != dense.value


def test_a_long_run_spends_what_the_dense_run_spends(runs: Runs) -> None:
    """A method that spends what it saves makes more steps, ends at the same size, and spends no more than the dense
    run in training. What it leaves is at most the part of the short run's overhead that does not grow with the steps,
    times the steps added, and less than a step each for the rounding of the cuts and of the length.
    """
    long, plain, dense = (runs[1][name] for name in ("setpoint-long", "setpoint", "dense"))
    assert long.budget_met and long.final_flops <= BUDGET * dense.final_flops
    assert long.steps > plain.steps
    left = dense.train_flops - long.train_flops
    assert 0 <= left <= (long.steps / plain.steps - 1) * plain.overhead_flops + 2 * dense.final_flops


@trained
def test_the_saved_model_is_the_measured_one(method: Method, runs: Runs) -> None:
    """What lies in the cell's folder loads, runs its own forward, costs what was said, and scores what was said."""
    out, results = runs
    result = results[method.name]
    widths = dense_widths(TASK)
    if method.name.startswith("small"):
        widths = method.course(TASK, BUDGET, results).widths  # type: ignore[assignment]
    model = setpoint.load(out / result.folder / MODEL, into=TASK.build(widths))
    assert step_flops(model, TASK.example()) == result.final_flops
    assert TASK.evaluate(model, "test").accuracy == pytest.approx(result.value)
    if result.density is not None:
        flops = weight_flops(model, TASK.example())
        assert result.theoretical_flops == flops.at(
            {name: int(model.get_parameter(name).count_nonzero()) for name in flops.sizes}
        )


@methods
def test_is_a_value_with_a_source(method: Method) -> None:
    """It has the protocol's parts, is hashable, goes to another process whole, and cites a paper if it is not ours."""
    assert isinstance(method, Method)
    assert hash(method) == hash(replace(method))  # type: ignore[type-var]
    assert pickle.loads(pickle.dumps(method)) == method
    assert method.family in ("dense", "small", "post-training", "open-loop", "sparse", "setpoint")
    ours = method.family == "setpoint" or method.name in ("dense", "small", "small-long")
    assert ours or method.paper
    assert set(method.needs) <= {each.name for each in METHODS}


PRUNING = [each for each in METHODS if each.family not in ("dense", "small")]
FIRSTS = {each.family: each.name for each in reversed(PRUNING)}
"""Of each family its first method: a family builds its methods alike."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(each.name, marks=[pytest.mark.slow] * (FIRSTS[each.family] != each.name)) for each in PRUNING],
)
def test_follows_fixed_filters(name: str) -> None:
    """A network that begins with fixed filters, as `cifar10`'s does, is brought to the budget too."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(96, 3, 16, 16, generator=generator), torch.randint(10, (96,), generator=generator)
    recipe = Recipe(steps=12, batch=8)
    task = SimpleTask("filters", ShortFamily((16, 16, 24)), Tensors(train=noise, test=noise), recipe)
    model, batches = task.build(dense_widths(task)), task.batches(0)
    dense = step_flops(model, task.example())
    optimizer, pruner = method_named(name).begin(task, model, BUDGET, batches)
    assert pruner is not None
    for inputs, targets in islice(batches, task.steps):
        loss = task.loss(model, inputs, targets)
        torch.autograd.backward(loss)
        pruner.observe(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    outcome = pruner.finish()
    assert outcome.budget_met and outcome.widths != outcome.dense_widths
    assert outcome.theoretical_flops is not None or step_flops(model, task.example()) <= BUDGET * dense


@pytest.mark.parametrize("name", ["cubic", "movement", "movement-global", "l0-gates"])
def test_narrows_a_transformer(name: str, tmp_path: Path) -> None:
    """Claim: heads and neurons of a GPT under AdamW are brought to the budget, at the FLOPs that are counted."""
    tokens = torch.randint(VOCABULARY, (64, 16), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(steps=30, batch=8, rule="adamw", learning_rate=1e-3)
    family = GPTFamily(layers=2, heads=4, window=16, head_dim=8)
    data = Tensors(train=(tokens, tokens.roll(-1, 1)), test=(tokens[:8], tokens[:8].roll(-1, 1)))
    task = SimpleTask("letters", family, data, recipe, metric="loss")
    training = train(Cell(task, method_named(name), BUDGET, 0), tmp_path)
    while True:
        try:
            next(training)
        except StopIteration as end:
            result: Result = end.value
            break
    dense, widths, before = result.dense_flops, result.widths, result.dense_widths
    assert dense is not None and result.budget_met and result.claimed_flops == result.final_flops
    assert 0.85 * BUDGET * dense <= result.final_flops <= BUDGET * dense
    kinds = ("c_fc",) if name == "l0-gates" else ("c_fc", "attn")  # gates need not close any head
    assert all(any(widths[group] < before[group] for group in before if kind in group) for kind in kinds)
    assert result.final_flops * task.steps < result.train_flops - result.overhead_flops < dense * task.steps


def test_gates_cost_a_dense_step_until_the_cut(runs: Runs) -> None:
    """Claim: steps with gates count as dense ones, the others as those of the cut model, and gates come on top."""
    result, dense = runs[1]["l0-gates"], runs[1]["dense"]
    with_gates = round(0.6 * TASK.steps)
    steps = with_gates * dense.final_flops + (TASK.steps - with_gates) * result.final_flops
    assert result.train_flops - result.overhead_flops == pytest.approx(steps)
    assert result.overhead_flops > 0 and result.resizes == 1


def test_post_training_counts_the_dense_run(runs: Runs) -> None:
    """Steps, FLOPs and seconds are the dense run's and the fine-tuning's together."""
    results = runs[1]
    dense, tuned = results["dense"], round(0.25 * TASK.steps)
    for name in ("magnitude-oneshot", "torch-pruning-taylor"):
        result = results[name]
        assert result.steps == TASK.steps + tuned
        assert result.seconds > dense.seconds
        tuning = result.train_flops - dense.train_flops - result.overhead_flops
        assert tuned * result.final_flops <= tuning <= tuned * dense.final_flops
    masked = results["magnitude-oneshot"]
    assert masked.theoretical_flops is not None
    assert masked.theoretical_train_flops == pytest.approx(dense.train_flops + tuned * masked.theoretical_flops)
    batches = 10
    assert results["torch-pruning-taylor"].overhead_flops == batches * dense.final_flops


def test_small_long_spends_what_setpoint_spent(runs: Runs) -> None:
    """Its training FLOPs are Setpoint's whole, to half a step, and its model is the small one."""
    results = runs[1]
    long, small = results["small-long"], results["small"]
    assert long.final_flops == small.final_flops and long.steps > small.steps
    assert abs(long.train_flops - results["setpoint"].train_flops) <= long.final_flops / 2


def test_small_found_has_setpoints_widths(runs: Runs) -> None:
    """It is as expensive as the pruned model, tensor by tensor of its shape, and freshly initialised at that width."""
    out, results = runs
    pruned = setpoint.load(out / results["setpoint"].folder / MODEL, into=TASK.build(dense_widths(TASK)))
    widths = found_widths(TASK, results["setpoint"].widths)
    built = TASK.build(widths)
    assert [p.shape for p in built.parameters()] == [p.shape for p in pruned.parameters()]
    assert results["small-found"].final_flops == results["setpoint"].final_flops
    assert "not counted" in results["small-found"].notes
    long = results["small-found-long"]
    assert long.final_flops == results["setpoint"].final_flops and long.steps > results["small-found"].steps
    assert abs(long.train_flops - results["setpoint"].train_flops) <= long.final_flops / 2


def test_small_found_refuses_what_it_cannot_build(runs: Runs) -> None:
    """A group that no dimension sets is an error that names it."""
    with pytest.raises(BenchError, match="no dimension for the width of mystery"):
        found_widths(TASK, {"mystery": 3})


def test_small_found_asks_only_for_widths_that_can_be_built() -> None:
    """A dimension in steps of four is tried a step narrower: its model may exist at no width between."""

    def net(width: int) -> nn.Module:
        assert width % 4 == 0
        return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))

    inputs = torch.zeros(20, 2), torch.zeros(20).long()
    family = ByWidths({"width": Dimension(16, 4)}, lambda widths: net(widths["width"]))
    task = SimpleTask("own", family, Tensors(train=inputs, test=inputs), Recipe(steps=1, batch=4))
    (group,) = find_groups(task.build(dense_widths(task)), task.example())
    assert found_widths(task, {group.name: 8}) == {"width": 8}


def test_small_found_on_a_task_of_ones_own() -> None:
    """A family with a name for each width can be built as wide as it was pruned; one by a factor says what to do."""

    def net(first: int, second: int) -> nn.Module:
        return nn.Sequential(nn.Linear(2, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 2))

    inputs = torch.zeros(20, 2), torch.zeros(20).long()
    data, recipe = Tensors(train=inputs, test=inputs), Recipe(steps=1, batch=4)
    named = {"first": Dimension(32), "second": Dimension(32)}
    task = SimpleTask("own", ByWidths(named, lambda widths: net(widths["first"], widths["second"])), data, recipe)
    groups = [group.name for group in find_groups(task.build(dense_widths(task)), task.example())]
    assert found_widths(task, dict(zip(groups, (20, 7), strict=True))) == {"first": 20, "second": 7}
    factor = SimpleTask("own", ByFactor(lambda factor: net(round(32 * factor), round(32 * factor))), data, recipe)
    with pytest.raises(BenchError, match="no dimension for the width of .*ByWidths in place of ByFactor"):
        found_widths(factor, dict(zip(groups, (20, 7), strict=True)))


def test_needs_are_said(tmp_path: Path) -> None:
    """A method whose needed run is missing says which, and a missing model says where it looked."""
    with pytest.raises(BenchError, match="small-found needs a finished run of setpoint"):
        finish(SmallFound(), tmp_path, {})


def test_a_missing_model_is_said(runs: Runs, tmp_path: Path) -> None:
    """A post-training method whose dense model is gone says where it looked."""
    with pytest.raises(BenchError, match="model.safetensors is missing, the trained model of dense"):
        finish(method_named("magnitude-oneshot"), tmp_path, {"dense": runs[1]["dense"]})


@pytest.mark.parametrize(
    "name", [pytest.param("torch-pruning-norm", marks=pytest.mark.slow), "small", "cubic", "setpoint"]
)
def test_a_budget_out_of_reach_says_the_least(name: str, runs: Runs) -> None:
    """Each kind of method says what the least is that it reaches."""
    out, results = runs
    needed = {each: results[each] for each in method_named(name).needs}
    with pytest.raises(setpoint.SetpointError, match="narrowest costs|least it reaches|still needs"):
        finish(method_named(name), out, needed, budget=0.0005)


def test_settings_by_name() -> None:
    """`rigl@density=0.1` is RigL at that density, whatever the budget; unknown settings and values are errors."""
    sparse = method_named("rigl@density=0.1")
    assert sparse.name == "rigl@density=0.1" and not sparse.sized and method_named("rigl").sized
    assert method_named("small-long@learning_rate=0.5").learning_rate == 0.5  # type: ignore[attr-defined]
    oneshot = method_named("magnitude-oneshot@density=0.1@share=0.5")
    assert not oneshot.sized and oneshot.share == 0.5 and method_named("magnitude-oneshot").sized  # type: ignore[attr-defined]
    assert method_named("rigl@period=200").rule == DropAndGrow("gradient", period=200)  # type: ignore[attr-defined]
    assert method_named("cubic@end=0.3").controller == ScheduledController(end=0.3)  # type: ignore[attr-defined]
    assert method_named("setpoint-early@settle=0.2").controller.schedule.settle == 0.2  # type: ignore[attr-defined]
    late = method_named("cubic@begin=0.8@end=0.9").controller  # type: ignore[attr-defined]
    assert late == ScheduledController(begin=0.8, end=0.9)  # set one by one, it would end before it begins
    tuned = method_named("set@learning_rate=2").course(TASK, 0.5, {}).task
    assert isinstance(tuned, SimpleTask) and tuned.recipe.learning_rate == 2 * TASK.recipe.learning_rate
    with pytest.raises(BenchError, match="above 0 and finite"):
        method_named("filter-oneshot@share=inf")
    with pytest.raises(BenchError, match="is a whole number, got '2.5'"):
        method_named("rigl@period=2.5")
    with pytest.raises(BenchError, match="gmp@end=7 cannot be"):
        method_named("gmp@end=7")
    with pytest.raises(BenchError, match=r"unknown setting 'colour' of rigl: it has @density=NUMBER, @end=NUMBER"):
        method_named("rigl@colour=3")
    with pytest.raises(BenchError, match="is a number, got 'much'"):
        method_named("rigl@density=much")
    for rate in ("0", "-1", "nan", "inf"):
        with pytest.raises(BenchError, match=f"relative to the task's and above 0, got {rate}"):
            method_named(f"small-long@learning_rate={rate}")
    with pytest.raises(BenchError, match="dense, small, small-long"):
        method_named("magic")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("None", "make returned NoneType, which has no name, sized, .*begin: return a"),
        ("Setpoint('a b')", "Setpoint with the name 'a b', which cannot name a folder"),
        ("Bare(5)", "Bare with the name 5, which cannot name a folder"),
        ("Setpoint('cubic')", "Setpoint with the name cubic, which a method of Setpoint's has: give it another"),
        ("Bare('mine', needs='dense')", "Bare that needs 'dense': give names of methods in a tuple"),
        ("Bare('mine', needs=('magic',))", "unknown method 'magic'"),
        ("Loose()", "Loose, which is no value: make it a frozen dataclass without lists"),
        ("Setpoint(lasso=2.0)", "lasso is the penalty's share"),
        ("1 / 0", r"make raised ZeroDivisionError: division by zero \(at own.py:9"),
    ],
)
def test_own_method_that_cannot_be(body: str, message: str, tmp_path: Path) -> None:
    """What a function of the user's own returns must be a method with a name that is free and can name a folder."""
    text = f"""from setpoint_bench.method import Setpoint
class Bare:
    sized, family, paper, course, begin = True, "", "", print, print
    def __init__(self, name="bare", needs=()):
        self.name, self.needs = name, needs
class Loose(Bare):
    __hash__ = None
def make():
    return {body}
def takes(size):
    return None
"""
    (tmp_path / "own.py").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        method_named(f"{tmp_path / 'own.py'}:make")
    with pytest.raises(UsageError, match="takes must take nothing, since it is called with nothing: .*size"):
        method_named(f"{tmp_path / 'own.py'}:takes")
    with pytest.raises(
        UsageError, match="has no function 'make@lasso=0.1': only methods of Setpoint's own have settings"
    ):
        method_named(f"{tmp_path / 'own.py'}:make@lasso=0.1")


def test_density_in_place_of_a_budget(tmp_path: Path) -> None:
    """A tenth of the weights is what stays, to 0.1 %."""
    result = finish(method_named("set@density=0.1"), tmp_path, {})
    assert result.budget is None and result.density == pytest.approx(0.1, rel=1e-3)


def test_learning_rate_and_share_of_fine_tuning() -> None:
    """Fine-tuning takes its share of the steps at its share of the learning rate."""
    course = method_named("filter-oneshot@share=0.5@learning_rate=0.2").course(TASK, BUDGET, {})
    assert course.task.steps == round(0.5 * TASK.steps)
    rates = [task.optimizer(torch.nn.Linear(1, 1)).param_groups[0]["lr"] for task in (course.task, TASK)]
    assert rates[0] == pytest.approx(0.2 * rates[1])


@methods
def test_the_page_names_method_and_source(method: Method) -> None:
    """docs/methods.md has a row for the method, which ends with its paper."""
    page = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
    row = next(
        line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{method.name}` |")
    )
    assert row.split("|")[-2].strip() == method.paper


@pytest.mark.slow
def test_a_budget_of_bytes(tmp_path: Path) -> None:
    """`setpoint-memory` ends within the share of the dense model's peak bytes that was asked for, as metered."""
    result = finish(method_named("setpoint-memory"), tmp_path, {}, budget=0.6)
    ledger = Ledger.load(tmp_path / result.folder / "ledger.jsonl")
    assert result.budget_met and result.resizes > 0
    last = ledger[-1]
    assert last.spent["memory"] <= 1.01 * last.limit["memory"]


def test_a_budget_of_seconds_is_a_method() -> None:
    """`setpoint-latency` is known by name and holds the seconds of a step."""
    method = method_named("setpoint-latency")
    assert isinstance(method, Setpoint) and method.resource == "latency"
