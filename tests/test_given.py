"""What users may hand in, and what they are told of the rest: a sentence, and nothing is changed."""

from __future__ import annotations

import copy
import re
from collections import ChainMap, UserDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import setpoint
from setpoint.errors import BudgetError, ExampleError, GroupError, LoopError, OptimizerError
from setpoint.regrowth.regrowing import Regrowing
from setpoint.sensor.magnitude import MagnitudeSensor


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the type checker of the tests, which would refuse first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


HALF = setpoint.Budget.fraction(0.5, of="flops")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def attach(model: nn.Module, optimizer: Any = None, budget: Any = HALF, **options: Any) -> setpoint.Loop:
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if optimizer is None else optimizer
    options = {"example": (torch.ones(4, 6),), "total_steps": 12, **options}
    return setpoint.attach(model, optimizer, budget, **options)


def train(model: nn.Module, optimizers: list[Optimizer], loop: setpoint.Loop, *inputs: Tensor) -> setpoint.Summary:
    for _ in range(loop.total_steps):
        for each in optimizers:
            each.zero_grad()
        model(*inputs).square().mean().backward()
        for each in optimizers:
            each.step()
    return loop.finish()


# Tensors that are not dense.


class Words(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = kind(20, 16, sparse=sparse)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Of words by their numbers."""
        return self.b(torch.relu(self.a(self.words(x))))


OPTIMIZERS: dict[str, Callable[[Words], list[Optimizer]]] = {
    "SGD": lambda m: [torch.optim.SGD(m.parameters(), 0.1)],
    "SGD with momentum": lambda m: [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)],
    "SparseAdam": lambda m: [
        torch.optim.SparseAdam(m.words.parameters(), 0.01)
        if m.words.sparse
        else torch.optim.Adam(m.words.parameters()),
        torch.optim.SGD([*m.a.parameters(), *m.b.parameters()], 0.1),
    ],
}


@pytest.mark.parametrize(
    ("optimizer", "kind"), [*((each, nn.Embedding) for each in OPTIMIZERS), ("SGD", nn.EmbeddingBag)]
)
def test_embeddings_with_sparse_gradients_attach(optimizer: str, kind: Callable[..., nn.Module]) -> None:
    """Claim: sparse=True attaches, is cut to budget, and with SGD trains and is cut as the dense embedding is."""
    ids = torch.randint(0, 20, (4, 5))
    ends = []
    for sparse in (True, False)[: 1 if optimizer == "SparseAdam" else 2]:
        model = Words(kind, sparse)
        optimizers = OPTIMIZERS[optimizer](model)
        loop = attach(model, optimizers, example=(ids,))
        assert train(model, optimizers, loop, ids).budget_met and loop.widths["words"] < 16
        ends.append(([*model.parameters()], loop.widths))
    assert all(widths == ends[0][1] for _, widths in ends)
    assert all(all(map(torch.allclose, ends[0][0], weights)) for weights, _ in ends)


class Graph(nn.Module):
    def __init__(self, layout: str, trained: bool) -> None:
        super().__init__()
        neighbours = torch.eye(4).to_sparse() if layout == "coo" else torch.eye(4).to_sparse_csr()
        if trained:
            self.neighbours = nn.Parameter(neighbours)
        else:
            self.register_buffer("neighbours", neighbours)
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Of what the neighbours are."""
        return self.inner(torch.sparse.mm(self.neighbours, x))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(("layout", "trained"), [("coo", False), ("csr", False), ("coo", True)])
def test_models_that_hold_sparse_tensors_attach(layout: str, trained: bool) -> None:
    """Claim: beside a sparse buffer or weight everything else is tried out, and cut to budget."""
    model = Graph(layout, trained)
    optimizer = torch.optim.SGD(model.inner.parameters(), 0.1)
    loop = attach(model, optimizer)
    assert set(loop.widths) == {"inner.0", "inner.2"}
    assert train(model, [optimizer], loop, torch.ones(4, 6)).budget_met


@pytest.mark.filterwarnings("ignore:Sparse")
def test_an_example_may_be_sparse() -> None:
    """Claim: cuts are tried out on a sparse input as it is."""
    assert set(attach(mlp(), example=(torch.eye(12, 6).to_sparse(),)).widths) == {"0", "2"}


def test_tensors_without_data_are_named() -> None:
    """Claim: a model on the meta device, or a part of it, is refused by the name of a tensor."""
    part = mlp()
    part.register_buffer("table", torch.zeros(3, device="meta"))
    for model, name in ((mlp().to("meta"), "0.weight"), (part, "table")):
        with pytest.raises(LoopError, match=f"'{name}' is on the meta device.*to_empty"):
            attach(model)


# Examples.


class Named(nn.Module):
    rows: ClassVar[list[int]] = []
    """How many it has seen, copies of it too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Of x by its name."""
        self.rows.append(len(x))
        return self.inner(x)


class Batch(UserDict[str, Tensor]):
    """As transformers' BatchEncoding is one."""


@pytest.mark.parametrize("kind", [Batch, MappingProxyType, ChainMap])
def test_any_mapping_is_an_example(kind: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Claim: it is taken as the dict of the same inputs is: cuts are tried out on a few of its rows."""
    seen = []
    for example in ({"x": torch.randn(64, 6)}, kind({"x": torch.randn(64, 6)})):
        Named.rows.clear()
        loop = attach(Named(), example=example)
        seen.append((list(Named.rows), loop.spending.account.overhead_flops))
    assert seen[0] == seen[1] and 4 in seen[0][0]


def test_no_example_says_what_to_do() -> None:
    """Claim: None is told what an example is, where there is no training to wait for."""
    with pytest.raises(ExampleError, match="got None: give inputs as the model gets them in training"):
        setpoint.find_groups(mlp(), None)


def test_nan_is_called_nan() -> None:
    """Claim: a weight or an example with NaN in it is refused as such, by its place, not as a cut that failed."""
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 2] = torch.nan  # type: ignore[index]
    with pytest.raises(LoopError, match="'2.weight' holds NaN"):
        attach(model)
    with pytest.raises(ExampleError, match="input 0 of the example holds NaN"):
        attach(mlp(), example=(torch.full((4, 6), torch.nan),))
    named = Named()
    with pytest.raises(ExampleError, match="x of the example holds NaN"):
        attach(named, example={"x": torch.full((4, 6), torch.nan)})


class Forgiving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Of what is known of x."""
        return self.inner(x.nan_to_num())


def test_a_model_that_stands_nan_in_its_inputs_attaches() -> None:
    """Claim: what is missing may be NaN where the model reckons with it."""
    x = torch.ones(4, 6)
    x[0, 0] = torch.nan
    assert set(attach(Forgiving(), example=(x,)).widths) == {"inner.0", "inner.2"}


# Things of another kind.


class Listing:
    def __init__(self, shadow_params: list[Any]) -> None:
        self.shadow_params = shadow_params


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a controller's class": ({"controller": setpoint.PricedController}, LoopError, "is a class: give an object"),
    "a controller's name": ({"controller": "priced"}, LoopError, "controller must be a Controller.*got 'priced'"),
    "no controller": (
        {"controller": object()},
        LoopError,
        "controller must be a Controller.*got <object.*no decide and no due",
    ),
    "a sensor's class": ({"sensor": MagnitudeSensor}, LoopError, "is a class: give an object"),
    "a sensor's name": ({"sensor": "taylor"}, LoopError, "sensor must be a Sensor.*got 'taylor'"),
    "an optimizer's class": ({"optimizer": torch.optim.SGD}, OptimizerError, "got <class 'torch.optim.sgd.SGD'>"),
    "an optimizer's name": ({"optimizer": "sgd"}, OptimizerError, "got 'sgd'"),
    "optimizers' classes": ({"optimizer": [torch.optim.SGD]}, OptimizerError, "got .<class 'torch.optim.sgd.SGD'>"),
    "a group's name": ({"groups": "0"}, GroupError, "out of find_groups.*got one of '0'"),
    "names of groups": ({"groups": ["0", "2"]}, GroupError, "out of find_groups.*got one of '0'"),
    "a class of groups": ({"groups": setpoint.Budget}, GroupError, "out of find_groups.*got <class"),
    "a number of groups": ({"groups": 3}, GroupError, "out of find_groups.*got 3"),
    "a word for allow_lossy": ({"allow_lossy": "no"}, ValueError, "allow_lossy is True or False, got 'no'"),
    "a word for verify": ({"verify": "no"}, ValueError, "verify is True or False, got 'no'"),
    "steps in words": ({"total_steps": "12"}, ValueError, "positive integer, got '12'"),
    "a number of copies": ({"copies": 3}, GroupError, "copies must be a sequence.*got int"),
    "one copy": ({"copies": nn.Linear(6, 3)}, GroupError, r"got Linear: write copies=\(it,\)"),
    "a list of numbers": ({"copies": [Listing([1, 2])]}, GroupError, "is no copy of the model: its shadow_params"),
    "a method's class": ({"method": int}, LoopError, "has no method <class 'int'>"),
    "a class of tensors": ({"example": Tensor}, ExampleError, "must be a tuple of positional inputs"),
    "a number of inputs": ({"example": 3}, ExampleError, "must be a tuple of positional inputs.*got int"),
    "no rows": ({"example": (torch.zeros(0, 6),)}, ExampleError, "has no rows"),
    "a huge budget": ({"budget": 10**400}, BudgetError, "must be at most 1"),
    "per cent": ({"budget": 50}, BudgetError, "at most 1, got 50.0: 1.0 is the dense model and 0.5 is 50 %"),
    "half a step": ({"total_steps": np.float64(12)}, ValueError, "positive integer, got np.float64"),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_things_of_another_kind_are_refused(what: str) -> None:
    """Claim: classes, names and the like are refused by the argument and what was given, before anything is done."""
    options, error, words = WRONG[what]
    with pytest.raises(error, match=words):
        attach(mlp(), **options)


def test_no_copies_may_be_said_in_any_way() -> None:
    """Claim: None is as good as an empty sequence, and a ModuleList is one."""
    model = mlp()
    copies = nn.ModuleList([copy.deepcopy(model)])
    assert [len(attach(mlp(), copies=each, verify=False).host.copies) for each in (None, (), [])] == [0, 0, 0]
    assert len(attach(model, copies=copies, verify=False).host.copies) == 1


def test_a_single_group_is_refused() -> None:
    """Claim: groups are a sequence."""
    model = mlp()
    with pytest.raises(GroupError, match="must be a sequence of groups.*got Group"):
        attach(model, groups=setpoint.find_groups(model, (torch.ones(4, 6),))[0])


# NumPy's numbers.


def _python(value: Any) -> bool:
    """Whether no number in it is NumPy's."""
    return not isinstance(value, np.generic) and "np." not in repr(value) and "array" not in repr(value)


@pytest.mark.parametrize("make", [np.float32, np.float16, np.array])
def test_numpy_numbers_are_taken_as_settings(make: Callable[[float], Any]) -> None:
    """Claim: wherever a number is asked for one of NumPy's will do, and is Python's own from there on."""
    half, three = make(0.5), np.int64(3)
    schedule = setpoint.Schedule(make(0.125), half, make(0.75), three)
    made = [
        setpoint.Budget.fraction(half, of="flops", deadband=half),
        setpoint.Budget.total(np.int32(100), of="energy", watts=half),
        setpoint.Price(half, of="flops"),
        setpoint.Tolerance(half),
        schedule,
        setpoint.PricedController(schedule=schedule, slew=half, hysteresis=half, dwell=three),
        Regrowing(three),
    ]
    assert all(map(_python, made))
    sensor = setpoint.TaylorSensor(three, window=three)
    assert type(sensor.num_samples) is type(sensor.window) is int


def test_numpy_numbers_are_taken_by_a_run() -> None:
    """Claim: so are the steps of a run, also when they are changed, and its ledger can be written."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    budget = setpoint.Budget.fraction(np.float32(0.5), of="flops")
    loop = attach(model, optimizer, budget, total_steps=np.int64(10), verify=np.bool_(False))
    loop.total_steps = np.int32(12)  # type: ignore[assignment]
    assert type(loop.total_steps) is int
    assert train(model, [optimizer], loop, torch.ones(4, 6)).budget_met
    assert _python(loop.ledger.header) and _python(loop.ledger.to_rows()[-1]["limit"])


@pytest.mark.parametrize("settings", [{"warmup": "0.1"}, {"num_cuts": 2.5}, {"num_cuts": float("nan")}])
def test_settings_of_a_schedule_are_numbers(settings: dict[str, Any]) -> None:
    """Claim: anything else is a ValueError that says what was given."""
    with pytest.raises(ValueError, match=re.escape(repr(next(iter(settings.values()))))):
        setpoint.Schedule(**settings)


# What to keep.


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list, tuple], ids=["array", "tensor", "list", "tuple"])
def test_shrink_takes_booleans_of_any_kind(kind: Callable[[list[bool]], Any]) -> None:
    """Claim: an array, a tensor, a list and a tuple of booleans say the same."""
    model = mlp()
    groups = setpoint.find_groups(model, (torch.ones(4, 6),))
    small = setpoint.shrink(model, None, groups, {"0": kind([unit % 3 > 0 for unit in range(16)])})
    assert [each.num_units for each in small] == [10, 16] and model[0].out_features == 10


@pytest.mark.parametrize("kept", [[1] * 16, torch.ones(16), np.arange(16), "0" * 16, [True] * 15])
def test_shrink_refuses_what_is_not_one_boolean_per_unit(kept: Any) -> None:
    """Claim: numbers are no booleans, and each unit has one."""
    model = mlp()
    groups = setpoint.find_groups(model, (torch.ones(4, 6),))
    with pytest.raises(GroupError, match=r"keep\['0'\]"):
        setpoint.shrink(model, None, groups, {"0": kept})
    with pytest.raises(GroupError, match="by name of the group, got a list"):
        setpoint.shrink(model, None, groups, [kept])  # type: ignore[arg-type]


# Optimizers that keep something else.


class Codes(Tensor):
    """Numbers of 8 bits that stand for others, as torchao keeps them: no operation but its own knows them."""

    codes: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor) -> Codes:
        made: Codes = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes = codes
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse."""
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(str(function))


class EightBits(Optimizer):
    """SGD with a moment that large parameters have in 8 bits."""

    def __init__(self, params: Any, lr: float = 0.1, blocks: bool = False) -> None:
        super().__init__(params, {"lr": lr, "blocks": blocks})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move."""
        for settings in self.param_groups:
            for each in settings["params"]:
                if each.numel() >= 4096 and settings["blocks"]:
                    self.state[each]["scale"] = torch.ones(each.numel() // 256)
                elif each.numel() >= 4096:
                    self.state[each]["moment"] = Codes(torch.zeros(each.shape, dtype=torch.int8))
                each.sub_(settings["lr"] * each.grad)


@pytest.mark.parametrize(("blocks", "words"), [(False, r"'moment'. of .* as a Codes"), (True, r"'scale'. of shape")])
def test_optimizers_with_states_of_8_bits_are_refused(blocks: bool, words: str) -> None:
    """Claim: a state that only large parameters have in another form is seen by attach, not by the first cut."""
    model = mlp()
    with pytest.raises(OptimizerError, match=f"EightBits keeps state.{words}.*such as torch.optim.AdamW"):
        attach(model, EightBits(model.parameters(), blocks=blocks))


def test_lookahead_is_refused() -> None:
    """Claim: timm's Lookahead, which wraps an optimizer and keeps slow weights, is an OptimizerError."""
    optim = pytest.importorskip("timm.optim")
    model = mlp()
    with pytest.raises(OptimizerError, match="Lookahead"):
        attach(model, optim.Lookahead(torch.optim.SGD(model.parameters(), 0.1)))


@pytest.mark.parametrize("size", [0, -2, 2.5, True])
def test_block_sizes_that_are_none_are_refused(size: object) -> None:
    """Claim: a group whose blocks hold no whole number of units is refused before the training, and by compress."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(8, 4)
    (group,) = setpoint.find_groups(model, (x,))
    wrong, optimizer = replace(group, multiple_of=size), torch.optim.SGD(model.parameters(), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(GroupError, match="multiple_of of group '0' is a whole number of units"):
        setpoint.attach(model, optimizer, 0.5, total_steps=10, example=(x,), groups=(wrong,))
    with pytest.raises(GroupError, match="multiple_of of group '0' is a whole number of units"):
        setpoint.compress(model, [x], 0.5, groups=(wrong,), verify=False)
