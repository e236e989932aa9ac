"""Sizes in live Python code: bound where the sizes come from them, corrected by place, or the group frozen."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from groups.zoo import GPT, SeparateAttention
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.actuator.verify import failing_groups
from setpoint.errors import ExportError, PathError
from setpoint.groups.group import Group, random_keep
from setpoint.groups.sizes_in_code.shim import HEADS, set_call_sizes
from setpoint.groups.trace import find_groups, trace
from setpoint.groups.walk import _RULES


def places(groups: tuple[Group, ...]) -> set[tuple[str, str]]:
    """Module and place of every size, without what the code gives there."""
    return {(size.module, size.place.partition("=")[0]) for group in groups for size in group.sizes}


def cut(model: nn.Module, groups: tuple[Group, ...], keep: dict[str, np.ndarray] | None = None) -> nn.Module:
    """Cut a model at random, or to these units, and its masked twin."""
    twin, keep = copy.deepcopy(model), random_keep(groups) if keep is None else keep
    mask(twin, None, groups, keep)
    shrink(model, None, groups, keep)
    return twin


def test_attributes_are_bound_where_they_suffice() -> None:
    """When every size comes from an attribute, the attribute is bound and the forward runs as written."""
    model = SeparateAttention()
    groups = find_groups(model, (torch.randn(3, 6, 24),))
    assert ("", "heads") in places(groups)
    assert not any("#" in place for _, place in places(groups))


def test_calls_are_corrected_where_attributes_do_not_suffice() -> None:
    """A head size worked out as `C // n_head` is corrected at its call, in every module of the class."""
    groups = tuple(g for g in find_groups(GPT(), (torch.randint(0, 20, (3, 8)),)) if g.lossless)
    bound = places(groups)
    for layer in range(2):
        assert (f"h.{layer}.attn", "view#0[3]") in bound
        assert (f"h.{layer}.attn", "n_head") not in bound


class Coincidence(nn.Module):
    """Integers that equal sizes by accident, and sizes written as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.repeats = 6
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for _ in range(self.repeats):
            x = torch.tanh(x)
        return self.c(torch.relu(self.b(x)).view(-1, 6))


def test_an_integer_that_equals_a_size_by_accident_is_left_alone() -> None:
    """A loop count of 6 beside layers of 6 stays 6; the written size of the view is corrected."""
    model, x = Coincidence(), torch.randn(4, 5)
    groups = find_groups(model, (x,))
    assert {group.name for group in groups} == {"a", "b"}
    twin = cut(model, groups)
    assert model.repeats == 6
    torch.testing.assert_close(model(x), twin(x))


class Repeated(nn.Module):
    """A loop count that equals the one width of the module's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.repeats, self.width = 7, 7
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for _ in range(self.repeats):
            x = torch.tanh(x)
        return self.b(x)


def test_a_stated_width_is_set_only_where_the_forward_does_not_read_it() -> None:
    """Of two attributes that equal a width, the loop count stays, and the one that no code reads follows the width."""
    model = Repeated()
    shrink(model, None, find_groups(model, (torch.randn(4, 5),)), {"a": np.arange(7) < 3})
    assert (model.repeats, model.width) == (7, 3)


class Three(nn.Module):
    """Three layers; `between` is done with the units of the first."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.a, self.b, self.c = nn.Linear(5, 16), nn.Linear(16, 12), nn.Linear(12, 2)
        self.register_buffer("scale", torch.linspace(1, 2, 16))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.b(self.between(self, self.a(x).relu())).relu())
        return out


def insisting(model: nn.Module, y: Tensor) -> Tensor:
    if y.shape[-1] != 16:
        raise RuntimeError("this needs 16")
    return y


WORKED_OUT: dict[str, Callable[[Tensor], Any]] = {
    "math.sqrt": lambda y: 1 / math.sqrt(y.shape[1]),
    "np.sqrt": lambda y: 1 / np.sqrt(y.shape[1]),
    "np.int64": lambda y: np.int64(y.shape[1]),
    "mean": lambda y: y.sum(1, keepdim=True) / y.size(1),
    "as_tensor": lambda y: torch.as_tensor(y.shape[1]),
    "new_tensor": lambda y: y.new_tensor(y.shape[1]),
    "full": lambda y: torch.full((1,), y.shape[1]),
    "new_full": lambda y: y.new_full((1,), y.shape[1]),
    "clamp": lambda y: y.sum(1, keepdim=True).clamp(max=y.shape[1] - 12),
}
FREEZING: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "insists": (insisting, "this needs 16"),
    "in evaluation only": (lambda model, y: y if model.training else y * model.scale, "in eval mode"),
    **{name: (lambda model, y, of=of: y * of(y), "worked out from its size") for name, of in WORKED_OUT.items()},
}


@pytest.mark.parametrize("name", FREEZING)
def test_what_the_forward_does_not_survive_is_frozen_by_name(name: str) -> None:
    """A group without which the forward does not run, in either mode, or computes with other numbers, stays and is
    named with the reason; the others can go.
    """
    between, words = FREEZING[name]
    traced = trace(Three(between), (torch.randn(3, 5),))
    assert [group.name for group in traced.groups] == ["b"]
    assert any(frozen.place == "a" and words in frozen.reason for frozen in traced.frozen)


class Tail(nn.Module):
    """Slices by written numbers, which a cut would make wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 24), nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x, first, second = y[:, :], y[:, 0:8], y[:, 8:]
        return self.c(self.b(first.tanh()) * second)


def test_slices_by_written_numbers_are_corrected() -> None:
    """Runs of a dim are cut out where they lie after the cut, and the cut equals its masked twin."""
    model, example = Tail(), (torch.randn(3, 5),)
    groups = find_groups(model, example)
    assert sorted(group.num_units for group in groups) == [8, 16]
    assert any(size.place.startswith("slice#") for group in groups for size in group.sizes)
    assert failing_groups(model, example, groups) == ()


@pytest.mark.parametrize(
    "options", [{}, {"kdim": 6, "vdim": 7}, {"bias": False, "add_bias_kv": True, "add_zero_attn": True}]
)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_of_torch_attention_can_go(options: dict[str, Any], need_weights: bool, batch_first: bool) -> None:
    """With all heads its stand-in gives what torch's own forward gives; masks, both layouts, extra keys included."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options).double()
    q, k, v = (
        torch.randn(5, 3, 16),
        torch.randn(3, 3, options.get("kdim", 16)),
        torch.randn(3, 3, options.get("vdim", 16)),
    )
    if batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    padding = torch.zeros(3, 3, dtype=torch.bool)
    padding[1, 2] = True
    mask = torch.ones(5, 3, dtype=torch.bool).triu(2)
    inputs = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need_weights}
    want = attention(q.double(), k.double(), v.double(), **inputs)
    set_call_sizes(attention, {HEADS: 4})
    got = attention(q.double(), k.double(), v.double(), **inputs)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-12)
    assert (got[1] is None) == (want[1] is None)
    if want[1] is not None:
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-12)


class Averaging(nn.Module):
    """Attention called as most people call it: weights asked for, and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend, self.head = nn.Linear(5, 16), nn.MultiheadAttention(16, 4), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attend(x, x, x)[0])


def test_heads_are_found_where_weights_are_asked_for() -> None:
    """The average over heads that nobody reads does not stand in the way; a cut equals its masked twin."""
    model, example = Averaging(), (torch.randn(7, 2, 5),)
    groups = tuple(group for group in find_groups(model, example) if group.what == "head")
    assert [(group.name, group.num_units, group.lossless) for group in groups] == [("attend", 4, True)]
    assert failing_groups(model, example, groups) == ()


def test_a_transformer_layer_runs_without_gradients_after_a_cut() -> None:
    """Torch's fused path of evaluation without gradients is left after a cut, for the masked twin's output."""
    model, example = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), (torch.randn(2, 5, 16),)
    groups = tuple(group for group in find_groups(model, example) if group.lossless)
    assert [(group.name, group.what) for group in groups] == [("self_attn", "head"), ("linear1", "neuron")]
    masked = cut(model, groups, {group.name: np.arange(group.num_units) % 2 == 0 for group in groups})
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*example), masked.eval()(*example), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_either_mode_gives_the_same_groups(mode: str) -> None:
    """Discovery works in training and in evaluation mode."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Dropout(), nn.Flatten(), nn.Linear(24, 2))
    getattr(model, mode)()
    (group,) = find_groups(model, (torch.randn(2, 3, 2, 2),))
    assert group.num_units == 6 and model.training is (mode == "train")


COMPILED = """
import numpy as np, torch
from torch import nn
from setpoint.actuator.shrink import shrink
from setpoint.groups.trace import find_groups

class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 24), nn.Linear(8, 16), nn.Linear(16, 2)
    def forward(self, x):
        y = self.a(x).view(-1, 24)
        first, second, third = y.split([8, 8, 8], 1)
        return self.c(self.b(y[:, 0:8].tanh()) * torch.cat([second, third], 1))

layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
for name, model, x in [("slices", Tail(), torch.randn(3, 5)), ("heads", layer, torch.randn(2, 5, 16))]:
    groups = tuple(group for group in find_groups(model, (x,)) if group.lossless)
    assert groups, name
    keep = {g.name: np.arange(g.num_units) % 2 == 0 for g in groups}
    shrink(model.eval(), None, groups, keep)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)
    print(name)
"""


def test_corrected_forwards_compile() -> None:
    """After a cut torch.compile takes the whole forward in one graph, with the same outputs.

    In a process of its own, because Dynamo cannot follow the type checker that the tests put on every function.
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["slices", "heads"], done.stderr


class Mixed(nn.Module):
    """A fused projection split by the width of another group's output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.qkv, self.out = nn.Linear(5, 16), nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        q, k, v = self.qkv(x).split(x.shape[-1], -1)
        return self.out(q.tanh() * k.sigmoid() + v)


@pytest.mark.parametrize("first", [0, 1])
def test_groups_may_be_cut_one_after_the_other(first: int) -> None:
    """A call whose size the forward works out of one group and that counts another is right after a cut of either."""
    model, example = Mixed(), (torch.randn(3, 5),)
    groups = find_groups(model, example)
    assert [group.name for group in groups] == ["a", "qkv"]
    twin = copy.deepcopy(model).double()
    model.double()
    x = example[0].double()
    keep = {"a": np.arange(16) % 3 > 0, "qkv": np.arange(16) % 2 > 0}
    for name in (("a", "qkv"), ("qkv", "a"))[first]:
        mask(twin, None, find_groups(twin.float(), example), {name: keep[name]})
        groups = shrink(model, None, groups, {name: keep[name]})
        torch.testing.assert_close(model(x), twin.double()(x), rtol=0, atol=1e-6)


def test_a_rule_that_does_not_cover_a_call_freezes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a rule is no crash: what the op touches stays, by name, and the rest is found."""

    def fail(walk: Any, out: Any, x: Any) -> Any:
        raise ValueError("this form is unknown\nand so is that")

    monkeypatch.setitem(_RULES, torch.ops.aten.erf.default, fail)
    traced = trace(Three(lambda model, y: torch.erf(y)), (torch.randn(3, 5),))
    assert [group.name for group in traced.groups] == ["b"]
    assert [f.reason for f in traced.frozen if f.place == "model: erf"] == [
        "the op's rule does not cover this call (ValueError: this form is unknown)"
    ]


class Squeezed(nn.Module):
    """A squeeze of all dims of one entry, which would take a single channel with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).mean((2, 3), keepdim=True).squeeze())


def test_a_squeeze_keeps_two_units() -> None:
    """Where a squeeze would take a dim of one unit away, `min_units` is two, and the model runs with these."""
    model, example = Squeezed(), (torch.randn(4, 3, 6, 6),)
    (group,) = find_groups(model, example)
    assert group.min_units == 2
    shrink(model, None, (group,), {group.name: np.arange(12) < 2})
    assert model(*example).shape == (4, 5)


SUMS: dict[str, Any] = {
    "padding with ones": lambda m, y: torch.nn.functional.pad(y, (0, 0, 1, 1), value=1.0).sum(-1, keepdim=True),
    "a shared layer with a bias": lambda m, y: m.shared(y.unsqueeze(-1)).sum(1),
    "a product of sigmoids": lambda m, y: (torch.sigmoid(y).unsqueeze(-1) @ m.row).sum(1),
    "a norm of other dims": lambda m, y: m.norm(y.unsqueeze(-1).expand(-1, -1, 4)).sum(1),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_over_units_that_are_not_zero_is_lossy(name: str) -> None:
    """Where a dropped unit would not be zero in a sum over the units, the group is not called lossless."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shared, self.norm = nn.Linear(5, 16), nn.Linear(1, 4), nn.LayerNorm(4)
            self.row = nn.Parameter(torch.randn(1, 4))
            self.b = nn.Linear(1 if name.startswith("padding") else 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(SUMS[name](self, self.a(x)))

    assert not any(group.lossless for group in find_groups(Sum(), (torch.randn(3, 5),)) if group.name == "a")


class AddsZeros(nn.Module):
    """Writes the batch and the length of its input into a call that also counts units."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros(x.shape[0], x.shape[1], 16, dtype=x.dtype)
        out: Tensor = self.out(start + self.inner(x).relu())
        return out


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sizes_of_the_data_are_not_bound(batch: int) -> None:
    """A corrected call goes on taking batch and length from its input: other ones than the example's work."""
    torch.manual_seed(0)
    model = AddsZeros().double()
    groups = find_groups(model, (torch.randn(2, 6, 8).double(),))
    assert ("", "zeros#0[2]") in places(groups) and ("", "zeros#0[0]") not in places(groups)
    twin = cut(model, groups)
    x = torch.randn(batch, 5, 8).double()
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-12)


class RoutedByIndex(nn.Module):
    """An expert that is given just the rows that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        (rows,) = torch.where(x[:, 0] > 0)
        return x.index_add(0, rows, self.out(self.expert(x[rows]).relu()))


def test_a_size_that_depends_on_the_data_is_named() -> None:
    """A forward whose sizes depend on values cannot be followed, and the error names the operation."""
    with pytest.raises(ExportError, match="depends on the data"):
        find_groups(RoutedByIndex(), (torch.randn(6, 8),))


class OptionalMask(nn.Module):
    """Attention whose mask, where there is one, is brought into shape before queries, keys and values are."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        if mask is not None:
            mask = mask.view(batch, 1, 1, length)
        q, k, v = (part(x).view(batch, length, 4, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, 16))
        return out


class Swapped(nn.Module):
    """Takes the halves of its inner units in one order or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, swapped: bool = False) -> Tensor:
        y = self.inner(x).tanh()
        if swapped:
            b, a = y[:, 8:16], y[:, 0:8]
        else:
            a, b = y[:, 0:8], y[:, 8:16]
        out: Tensor = self.first(a) + 2 * self.second(b)
        return out


@pytest.mark.parametrize("kind", ["mask", "slices"])
def test_another_path_than_the_example_is_told_and_never_computed_wrongly(kind: str) -> None:
    """A cut forward that makes other calls than at the example raises PathError; on the example's path it works."""
    torch.manual_seed(0)
    model, x = {
        "mask": (OptionalMask(), torch.randn(2, 5, 16)),
        "slices": (Swapped(), torch.randn(3, 8)),
    }[kind]
    other = torch.ones(2, 5, dtype=torch.bool) if kind == "mask" else True
    cut(model, find_groups(model, (x,)))
    model(x)
    with pytest.raises(PathError, match="does not take the path of the example"):
        model(x, other)


def test_an_example_with_the_optional_input_takes_its_path() -> None:
    """With the mask in the example, the cut attention works with one, as its masked twin does."""
    torch.manual_seed(0)
    model = OptionalMask().double()
    x, seen = torch.randn(2, 5, 16).double(), torch.rand(2, 5) < 0.7
    groups = find_groups(model, {"x": x, "mask": seen})
    twin = cut(model, groups)
    torch.testing.assert_close(model(x, seen), twin(x, seen), rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError):
        model(x)


class Modal(nn.Module):
    """Heads by a size worked out, with a call ahead of theirs in one of train and eval mode only."""

    def __init__(self, only: str, merge: str) -> None:
        super().__init__()
        self.only, self.merge = only, merge
        self.qkv, self.out, self.aux = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        extra = self.aux(x.reshape(B * T, C)).sum() if self.training == (self.only == "train") else 0
        q, k, v = self.qkv(x).reshape(B, T, 3, C // 8, -1).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-1, -2)) * 8**-0.5).softmax(-1) @ v
        y = y.transpose(1, 2)
        y = y.flatten(2) if self.merge == "flatten" else y.reshape(B, T, -1)
        out: Tensor = x + self.out(y) + extra
        return out


@pytest.mark.parametrize("merge", ["flatten", "reshape"])
@pytest.mark.parametrize("only", ["train", "eval"])
def test_a_call_of_one_mode_only_ahead_of_a_corrected_one_freezes(only: str, merge: str) -> None:
    """Where train and eval mode number a corrected call otherwise, its units stay, and the reason says so."""
    traced = trace(Modal(only, merge), (torch.randn(2, 5, 32),))
    assert "qkv" not in {group.name for group in traced.groups}
    assert any(frozen.place == "qkv" and "no fixed place" in frozen.reason for frozen in traced.frozen)


class Ahead(nn.Module):
    """Torch's attention, then heads of its own by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.first = nn.MultiheadAttention(24, 3, batch_first=True, add_bias_kv=True, add_zero_attn=True)
        self.qkv, self.out = nn.Linear(24, 96), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x, x, x, need_weights=False)[0]
        q, k, v = (
            part.reshape(len(x), x.shape[1], self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        y = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
        out: Tensor = x + self.out(y.transpose(1, 2).flatten(2))
        return out


def test_calls_inside_torchs_attention_are_not_counted_around_it() -> None:
    """Heads behind an nn.MultiheadAttention follow a cut, before and after that attention was cut itself."""
    torch.manual_seed(0)
    model, x = Ahead().double(), torch.randn(2, 5, 24).double()
    for heads in ({3, 4}, {2, 3}):
        groups = find_groups(model, (x,))
        assert {group.num_units for group in groups} == heads
        twin = cut(model, groups, {group.name: np.arange(group.num_units) > 0 for group in groups})
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-12)


class Answer:
    """A plain object with results."""

    def __init__(self, logits: Tensor, features: Tensor) -> None:
        self.logits, self.features = logits, features


class Answering(nn.Module):
    """Gives out its inner units in an object that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Answer:
        y = self.a(x).tanh()
        return Answer(self.b(y), y)


def test_outputs_in_plain_objects_stay_whole() -> None:
    """Tensors in attributes of whatever the model returns are outputs like others."""
    traced = trace(Answering(), (torch.randn(3, 5),))
    assert traced.groups == ()
    assert any(frozen.reason == "output of the network" for frozen in traced.frozen)


def test_finding_groups_leaves_all_chance_alone() -> None:
    """NumPy's and torch's generators go on as if nothing had drawn from them (the type checks draw from Python's)."""

    class Skips(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            chance = np.random.random() + torch.rand(()) * 0  # noqa: NPY002
            out: Tensor = super().forward(x) * chance
            return out

    def state() -> tuple[list[int], list[int]]:
        return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    np.random.seed(3)  # noqa: NPY002
    model = Skips(nn.Linear(5, 8), nn.Linear(8, 2))
    before = state()
    find_groups(model, (torch.ones(3, 5),))
    assert state() == before
