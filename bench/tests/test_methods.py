"""Methods: every one trains, counts, meets its budget and says where it comes from."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import setpoint
from setpoint_bench.counter import step_flops
from setpoint_bench.method import METHODS, Method, Setpoint, method_named
from setpoint_bench.methods.rival import RIVALS, Rival
from setpoint_bench.methods.sparse import Masked, Sparse, highest
from setpoint_bench.recipe import Recipe
from setpoint_bench.results import MODEL, Result
from setpoint_bench.scheduled import ScheduledController
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.task import BenchError
from setpoint_bench.tasks.digits import digits
from setpoint_bench.tasks.shakespeare import VOCABULARY, GPTFamily
from setpoint_bench.tensors import Tensors
from setpoint_bench.training import Cell, train
from setpoint_bench.weight_flops import weight_flops

TASK = digits(epochs=1, width=16)
BUDGET = 0.5
QUICK = ("dense", "small", "gmp", "magnitude-oneshot", "setpoint")
"""One method of each way of building one; the others are trained by `make nightly`."""
# The dense run of five steps is refused as a teacher.
TRAINED = tuple(method for method in METHODS if method.name not in ("setpoint-from-trained", "neighbour"))
CHANGED = ("setpoint+taught", "setpoint+taught+long", "fitted-first+taught+trained", "cubic+counted")
BATTERY = (*TRAINED, *map(method_named, CHANGED))
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
trained = pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=[pytest.mark.slow] * (method.name not in QUICK)) for method in BATTERY],
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
        self[name] = finish(TASK, method, self.out, {needed: self[needed] for needed in method.needs})
        return self[name]


def finish(task: SimpleTask, method: Method, out: Path, needed: Mapping[str, Result], budget: float = BUDGET) -> Result:
    training = train(Cell(task, method, budget if method.sized else None, 0), out, needed)
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
def test_meets_the_budget_and_saves_what_was_measured(method: Method, runs: Runs) -> None:
    """The finished model is within the budget and near it: really, or in theory where only weights are masked.

    What lies in the cell's folder loads, runs its own forward, costs what was said, and scores what was said.
    """
    out, results = runs
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
        assert result.claimed_flops in (None, result.final_flops)
    widths = dense_widths(TASK)
    if method.name.startswith("small"):
        widths = method.course(TASK, BUDGET, results).widths  # type: ignore[assignment]
    model = setpoint.load(out / result.folder / MODEL, into=TASK.build(widths))
    assert step_flops(model, TASK.example()) == result.final_flops
    assert TASK.evaluate(model, "test").accuracy == pytest.approx(result.value)
    if result.density is not None:
        flops = weight_flops(model, TASK.example())
        counts = {name: int(model.get_parameter(name).count_nonzero()) for name in flops.sizes}
        assert result.theoretical_flops == flops.at(counts)


@pytest.mark.slow
def test_what_goes_on_from_other_runs_pays_for_them(runs: Runs) -> None:
    """Claim: a teacher's run and its passes are on the bill; a longer run spends what dense or Setpoint has spent.

    Of a longer run at most a step or two is left, and the part of the overhead that does not grow with the steps.
    """
    results = runs[1]
    taught, plain, dense = (results[name] for name in ("setpoint+taught", "setpoint", "dense"))
    assert taught.steps == plain.steps + dense.steps
    passes = taught.overhead_flops - plain.overhead_flops
    assert passes == pytest.approx(plain.steps * dense.final_flops / 3, rel=0.1)
    long, small_long, small = (results[name] for name in ("setpoint+taught+long", "small-long", "small"))
    left, own = 2 * dense.train_flops - long.train_flops, taught.train_flops - dense.train_flops
    assert long.steps - dense.steps == int(plain.steps * dense.train_flops / own)
    assert abs(left) <= 0.07 * dense.train_flops  # of 15 steps the gradual cuts fall at other shares
    assert small_long.final_flops == small.final_flops and small_long.steps > small.steps
    assert 0 <= plain.train_flops - small_long.train_flops <= small_long.final_flops
    both, fitted = results["fitted-first+taught+trained"], results["fitted-first"]
    assert both.steps == plain.steps + dense.steps  # the one run is start and teacher, and counts once
    assert both.final_flops == pytest.approx(fitted.final_flops, rel=0.1) and both.family == "setpoint"


def test_post_training_counts_the_dense_run(runs: Runs) -> None:
    """Steps, FLOPs and seconds are the dense run's and the fine-tuning's together."""
    dense, masked = runs[1]["dense"], runs[1]["magnitude-oneshot"]
    tuned = round(0.25 * TASK.steps)
    assert masked.steps == TASK.steps + tuned and masked.seconds > dense.seconds
    assert masked.theoretical_flops is not None
    assert masked.theoretical_train_flops == pytest.approx(dense.train_flops + tuned * masked.theoretical_flops)


@methods
def test_is_a_value_with_a_source(method: Method) -> None:
    """It has the protocol's parts, is hashable, goes to another process whole, and cites a paper if it is not ours.

    docs/methods.md has a row for it, which ends with its paper.
    """
    assert isinstance(method, Method)
    assert hash(method) == hash(replace(method))  # type: ignore[type-var]
    assert pickle.loads(pickle.dumps(method)) == method
    assert method.family in ("dense", "small", "post-training", "open-loop", "sparse", "setpoint")
    ours = method.family == "setpoint" or method.name in ("dense", "small", "small-long", "neighbour")
    assert ours or method.paper
    page = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{method.name}` |"))
    assert row.split("|")[-2].strip() == method.paper


def test_an_open_loop_narrows_a_transformer(tmp_path: Path) -> None:
    """Claim: heads and neurons of a GPT under AdamW are brought to the budget, at the FLOPs that are counted."""
    tokens = torch.randint(VOCABULARY, (64, 16), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(steps=30, batch=8, rule="adamw", learning_rate=1e-3)
    family = GPTFamily(layers=2, heads=4, window=16, head_dim=8)
    data = Tensors(train=(tokens, tokens.roll(-1, 1)), test=(tokens[:8], tokens[:8].roll(-1, 1)))
    task = SimpleTask("letters", family, data, recipe, metric="loss")
    result = finish(task, method_named("cubic"), tmp_path, {})
    dense, widths, before = result.dense_flops, result.widths, result.dense_widths
    assert dense is not None and result.budget_met and result.claimed_flops == result.final_flops
    assert 0.85 * BUDGET * dense <= result.final_flops <= BUDGET * dense
    assert all(any(widths[group] < before[group] for group in before if kind in group) for kind in ("c_fc", "attn"))
    assert result.final_flops * task.steps < result.train_flops - result.overhead_flops < dense * task.steps


def test_masks_follow_the_cubic_and_are_nested() -> None:
    """Claim: after each update every tensor has the schedule's density, and what was masked stays masked and zero."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    optimizer, method = torch.optim.SGD(model.parameters(), lr=0.1), Sparse("gmp", "", num_updates=5, density=0.25)
    pruner = Masked(model, optimizer, method, (torch.randn(4, 8),), total_steps=20, budget=1.0)
    masks = []
    for _ in range(20):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.append({name: mask.clone() for name, mask in pruner.masks.items()})
        assert all(not model.get_parameter(name)[~mask].any() for name, mask in pruner.masks.items())
    for earlier, later in zip(masks, masks[1:], strict=False):
        assert all(bool((earlier[name] | ~mask).all()) for name, mask in later.items())
    assert pruner.finish().density == pytest.approx(0.25)
    assert len({int(mask["0.weight"].sum()) for mask in masks}) == 6  # dense, and five updates
    assert highest(torch.tensor([2.0, float("nan"), 2.0, 1.0]), 1).tolist() == [True, False, False, False]


def test_missing_runs_and_models_are_named(runs: Runs, tmp_path: Path) -> None:
    """A method whose needed run is missing says which, and a missing model says where it looked."""
    with pytest.raises(BenchError, match="small-long needs a finished run of setpoint"):
        finish(TASK, method_named("small-long"), tmp_path, {})
    with pytest.raises(BenchError, match="model.safetensors is missing, the trained model of dense"):
        finish(TASK, method_named("magnitude-oneshot"), tmp_path, {"dense": runs[1]["dense"]})


def test_settings_by_name() -> None:
    """`gmp@density=0.1` is GMP at that density, whatever the budget; settings reach parts of a method, too."""
    sparse = method_named("gmp@density=0.1")
    assert sparse.name == "gmp@density=0.1" and not sparse.sized and method_named("gmp").sized
    oneshot = method_named("magnitude-oneshot@density=0.1@share=0.5")
    assert not oneshot.sized and oneshot.share == 0.5  # type: ignore[attr-defined]
    late = method_named("cubic@begin=0.8@end=0.9").controller  # type: ignore[attr-defined]
    assert late == ScheduledController(begin=0.8, end=0.9)  # set one by one, it would end before it begins
    assert method_named("setpoint-early@settle=0.2").controller.schedule.settle == 0.2  # type: ignore[attr-defined]
    tuned = method_named("gmp@learning_rate=2").course(TASK, 0.5, {}).task
    assert isinstance(tuned, SimpleTask) and tuned.recipe.learning_rate == 2 * TASK.recipe.learning_rate
    latency = method_named("setpoint-latency")
    assert isinstance(latency, Setpoint) and latency.resource == "latency"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("filter-oneshot@share=inf", "above 0 and finite"),
        ("gmp@num_updates=2.5", "is a whole number, got '2.5'"),
        ("gmp@end=7", "gmp@end=7 cannot be"),
        ("gmp@colour=3", "unknown setting 'colour' of gmp: it has @begin_at=NUMBER, @density=NUMBER"),
        ("gmp@density=much", "is a number, got 'much'"),
        ("small-long@learning_rate=nan", "relative to the task's and above 0, got nan"),
        ("magic", "dense, small, small-long"),
        ("cubic+taut", r"unknown change \+taut in .cubic\+taut.: did you mean taught.+there are \+taught, \+trained"),
    ],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    """Unknown methods, settings and values are errors that list what there is."""
    with pytest.raises(BenchError, match=message):
        method_named(name)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("None", "make returned NoneType, which has no name, sized, .*begin: return a"),
        ("Setpoint('a b')", "Setpoint with the name 'a b', which cannot name a folder"),
        ("Setpoint('cubic')", "Setpoint with the name cubic, which a method of Setpoint's has: give it another"),
        ("1 / 0", r"make raised ZeroDivisionError: division by zero \(at own.py:3"),
    ],
)
def test_own_method_that_cannot_be(body: str, message: str, tmp_path: Path) -> None:
    """What a function of the user's own returns must be a method with a name that is free and can name a folder."""
    text = f"from setpoint_bench.method import Setpoint\ndef make():\n    return {body}\n"
    (tmp_path / "own.py").write_text(text, encoding="utf-8")
    with pytest.raises(setpoint.errors.UsageError, match=message):
        method_named(f"{tmp_path / 'own.py'}:make")


@pytest.mark.parametrize("method", RIVALS, ids=lambda method: method.name)
def test_a_rival_cuts_to_the_budget_or_is_named(method: Rival, tmp_path: Path) -> None:
    """Claim: a library that is here cuts to the budget, and the model loads; another is named as pip knows it."""
    model = TASK.build(dense_widths(TASK))
    if not importlib.util.find_spec(method.module):
        with pytest.raises(BenchError, match=rf"needs {method.package} .*pip install setpoint-bench\[rivals\]"):
            method.begin(TASK, model, BUDGET, TASK.batches(0))
        return
    dense = step_flops(model, TASK.example())
    _, pruner = method.begin(TASK, model, BUDGET, TASK.batches(0))
    assert pruner is not None and 0.4 * BUDGET * dense <= step_flops(model, TASK.example()) <= BUDGET * dense
    setpoint.save(model, tmp_path / "cut.safetensors")
    twin = setpoint.load(tmp_path / "cut.safetensors", into=TASK.build(dense_widths(TASK)))
    assert torch.equal(twin.eval()(*TASK.example()), model.eval()(*TASK.example()))


def test_a_neighbour_is_trained_in_the_name_of_the_task(tmp_path: Path) -> None:
    """Claim: the other model is built, trained for as many steps and judged; its row is of the task that names it."""
    task = replace(TASK.with_steps(2), name="mine", neighbour="digits")
    with pytest.raises(BenchError, match="names no pretrained neighbour"):
        finish(TASK, method_named("neighbour"), tmp_path, {})
    dense = finish(task, method_named("dense"), tmp_path, {})
    result = finish(task, method_named("neighbour+taught"), tmp_path, {"dense": dense})
    assert (result.task, result.steps, result.notes) == ("mine", 2 + dense.steps, "digits")
    assert result.final_flops > dense.final_flops  # the usual width is 64


def test_a_global_open_loop_is_uneven_and_meets_the_budget(runs: Runs) -> None:
    """Claim: ranked over all groups, units go unevenly, by the same schedule and to the same budget."""
    even, ranked = (runs[1][name] for name in ("cubic-taylor", "cubic-taylor-global"))
    assert ranked.budget_met and ranked.final_flops == pytest.approx(even.final_flops, rel=0.15)
    shares = [
        {round(each.widths[name] / each.dense_widths[name], 2) for name in each.widths} for each in (even, ranked)
    ]
    assert max(shares[0]) - min(shares[0]) < max(shares[1]) - min(shares[1])
