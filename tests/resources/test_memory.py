"""Predicted peak memory equals what the live tensors of the rebuilt model come to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from groups.zoo import MODELS
from resources.peak import peak_bytes
from setpoint.cost.cost import Cost
from setpoint.errors import CostError
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import trace
from setpoint.resources import tape
from setpoint.resources.replica import Replica, replica
from setpoint.resources.tape import MemoryCost, Tape, solved, taken, trial_widths
from setpoint_bench.networks import CharGPT, PlainNet


def cnn() -> tuple[nn.Module, tuple[Any, ...]]:
    """A plain CNN in channels-last layout, whose activations outweigh its weights."""
    widths = {f"conv{i}": width for i, width in enumerate((16, 32, 32), start=1)}
    model = PlainNet(widths, frozenset({1, 2}), channels=3, classes=10).to(memory_format=torch.channels_last)
    return model, (torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last),)


def gpt() -> tuple[nn.Module, tuple[Any, ...]]:
    """A GPT of two layers, whose weights and moments outweigh its activations."""
    widths = {f"layer{i}.{part}": n for i in (1, 2) for part, n in (("heads", 4), ("neurons", 128))}
    return CharGPT(widths, 65, 16, 64, 16), (torch.randint(65, (2, 16)),)


ZOO = ("residual cnn", "concat cnn", "separate attention")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("cnn", torch.optim.SGD), ("gpt", torch.optim.AdamW), *((name, torch.optim.Adam) for name in ZOO)],
)
def test_peak_equals_the_measured_one(name: str, kind: type[torch.optim.Optimizer]) -> None:
    """At dense widths and random ones, with data and without, the prediction is the peak of a real step's tensors."""
    model, example = {"cnn": cnn, "gpt": gpt}[name]() if name not in ZOO else (part() for part in MODELS[name][:2])
    optimizer = kind(model.parameters(), lr=1e-3)
    groups = trace(model, example).groups
    make = partial(replica, model, (optimizer,), example, groups, [])
    costs = [MemoryCost(recorded(make, groups, data=data)) for data in (True, False)]
    generator = np.random.default_rng(7)
    random = {g.name: int(generator.integers(max(2, g.min_units), g.num_units + 1)) for g in groups}
    for widths in (widths_of(groups), random):
        with replica(model, (optimizer,), example, groups, [], widths, data=True) as copy:
            measured = peak_bytes(copy.step, copy.held())
        assert [cost.total(widths) for cost in costs] == pytest.approx([measured] * 2, rel=1e-3)


def recorded(make: Any, groups: tuple[Group, ...], *, data: bool) -> Tape:
    """The step of copies with data or without; nothing else is tried."""
    return tape._recorded(make, trial_widths(groups), data=data)


def test_weights_are_cast_once_at_every_width() -> None:
    """Under autocast the copy makes the same operations at every width, and the prediction equals the measured peak."""
    model, example = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    groups = trace(model, example).groups
    make = partial(replica, model, (optimizer,), example, groups, [])
    widths = {group.name: max(group.min_units, group.num_units // 2) for group in groups}
    with torch.autocast("cpu", torch.bfloat16):
        cost = MemoryCost(recorded(make, groups, data=True))
        with make(widths, data=True) as copy:
            torch.clear_autocast_cache()  # type: ignore[no-untyped-call]
            assert cost.total(widths) == pytest.approx(peak_bytes(copy.step, copy.held()), rel=1e-3)


@pytest.mark.parametrize("ends", ["without memory", "in a step"])
def test_a_copy_that_fails_leaves_nothing(ends: str) -> None:
    """Whatever ends the copy with data, copies without are recorded, and nothing of it stays in memory."""
    model, example = cnn()
    groups, left = trace(model, example).groups, list[weakref.ref[nn.Module]]()

    @contextmanager
    def make(widths: Mapping[str, int], *, data: bool) -> Iterator[Replica]:
        with replica(model, (torch.optim.SGD(model.parameters()),), example, groups, [], widths, data=data) as copy:
            if data:
                left.append(weakref.ref(copy.model))
                error = torch.OutOfMemoryError("no room") if ends == "without memory" else RuntimeError("with data")
                copy.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
            yield copy

    assert tape.record(make, groups).storages
    gc.collect()
    assert len(left) == 1 and left[0]() is None


def test_is_a_cost_that_falls_with_every_group() -> None:
    """It has the protocol's methods; a saving is a difference of totals, and fewer units never cost more."""
    model, example = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    groups = trace(model, example).groups
    cost = MemoryCost(recorded(partial(replica, model, (optimizer,), example, groups, []), groups, data=False))
    assert isinstance(cost, Cost) and cost.resource == "memory"
    dense = widths_of(groups)
    for group in groups:
        fewer = {**dense, group.name: group.num_units // 2}
        saving = cost.saving(dense, group.name, group.num_units - group.num_units // 2)
        assert saving == pytest.approx(cost.total(dense) - cost.total(fewer)) and saving > 0
    assert cost.saving(dense, "elsewhere", 1) == 0.0


def test_replica_leaves_the_model_alone() -> None:
    """Weights, optimizer state, gradients and hooks of the live model are as before; the copy has none of its hooks."""
    model, example = cnn()
    optimizer = torch.optim.AdamW(model.parameters())
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model(*example).sum().backward()
    optimizer.step()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    groups = trace(model, example).groups
    calls.clear()
    widths = {group.name: group.min_units for group in groups}
    for data in (True, False):
        with replica(model, (optimizer,), example, groups, [], widths, data=data) as copy:
            copy.step()
    assert not calls
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(map(torch.equal, (optimizer.state[p]["exp_avg"] for p in model.parameters()), moments))
    assert all(map(torch.equal, (p.grad for p in model.parameters() if p.grad is not None), gradients))


def fickle(widths: Mapping[str, int], product: bool) -> None:
    """A step that makes another operation once it is narrow, or a size that is a product of two widths."""
    a, b = widths["a"], widths["b"]
    x = torch.ones(a * b if product else a)
    if not product and a < 31:
        x + 1


@pytest.mark.parametrize(("product", "why"), [(False, "other operations"), (True, "not known")])
def test_what_is_no_function_of_widths_is_refused(product: bool, why: str) -> None:
    """Where other operations run at other widths, or a size is of no known form, nothing is made up."""
    groups = (Group("a", "unit", 32, ()), Group("b", "unit", 40, ()))
    vectors = trial_widths(groups)
    with pytest.raises(CostError, match=why):
        solved([taken(partial(fickle, widths, product), ()) for widths in vectors], vectors)


def test_two_key_value_heads_have_a_cost() -> None:
    """Claim: a model with two key/value heads has a cost; they save nothing by prediction, and its other layers do."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    example = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    groups = trace(model, example).groups
    optimizer = torch.optim.AdamW(model.parameters())
    memory = MemoryCost(tape.record(partial(replica, model, (optimizer,), example, groups, []), groups))
    widths = widths_of(groups)
    head = next(group.name for group in groups if group.num_units == 2)
    layer = next(group.name for group in groups if group.num_units == 64)
    for width in (64, 32):
        with replica(model, (optimizer,), example, groups, [], {**widths, layer: width}, data=True) as copy:
            assert memory.total({**widths, layer: width}) == pytest.approx(peak_bytes(copy.step, copy.held()), rel=0.03)
    assert memory.saving(widths, head, 1) == 0 and memory.saving(widths, layer, 8) > 0
