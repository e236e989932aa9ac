"""Compiled models: code is compiled once more after the first cut."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import setpoint
from loop.test_regrowth import Scripted

FLAGS = (
    "force_parameter_static_shapes",
    "force_nn_module_property_static_shapes",
    "allow_unspec_int_on_nn_module",
    "recompile_limit",
)
DROP: dict[int, dict[str, list[int]]] = {
    **{step: {"0": [1, 2]} for step in range(3, 24, 3)},
    16: {"2": [0]},
    19: {"2": [3]},
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is compiled before or after."""
    gc.collect()  # loops of other tests that were never finished
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()
    counters.clear()


def flags() -> list[Any]:
    return [getattr(dynamo.config, name) for name in FLAGS]


class Heads(nn.Module):
    """Attention that writes the number of its heads out."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.qkv, self.out, self.heads = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 3), 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        q, k, v = (
            part.view(len(x), x.shape[1], self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(len(x), x.shape[1], -1))


class Block(nn.Module):
    """Two linear layers around a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3))


def run(
    model: nn.Module, shape: tuple[int, ...], drop: Any, compiled: str, steps: int = 28, **how: Any
) -> tuple[list[float], list[int], setpoint.Loop]:
    """Losses, the steps at which something was compiled, and the loop."""
    compiles: list[int] = []
    step = 0

    def count(graph: Any, inputs: Any) -> Any:
        compiles.append(step)
        return graph.forward

    how = {"backend": count, **how}
    called: Any = torch.compile(model, **how) if compiled in ("before", "run") else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if compiled == "run":
        called(torch.zeros(shape)).sum().backward()
        optimizer.zero_grad()
    loop = setpoint.attach(
        called,
        optimizer,
        setpoint.Budget.fraction(0.9, of="params"),
        example=(torch.zeros(shape),),
        total_steps=40,
        controller=Scripted(drop, regrow=False, last=steps - 1),
        verify=False,
    )
    if compiled == "after":
        called = torch.compile(model, **how)
    if compiled == "blocks":
        for part in model.children():
            if isinstance(part, Block):
                part.compile(**how)
    losses = []
    for step in range(steps):  # noqa: B007  # the compiler looks at it
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        loss = called(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, compiles, loop


@pytest.mark.parametrize(
    ("compiled", "dynamic"), [("before", None), ("run", None), ("after", None), ("before", True), ("after", False)]
)
def test_code_is_compiled_once_more_for_all_groups(compiled: str, dynamic: bool | None) -> None:
    """Claim: whether it is compiled before or after attach, or was run before, in every mode of `dynamic`, there is one
    more compilation after the first cut, and none after those that follow, of any group; losses are those of the
    uncompiled run; Dynamo's settings are as before in the end.
    """
    before = flags()
    torch.manual_seed(0)
    expected, *_ = run(mlp(), (8, 6), DROP, compiled="no")
    torch.manual_seed(0)
    losses, compiles, loop = run(mlp(), (8, 6), DROP, compiled, dynamic=dynamic)
    assert losses == expected
    assert compiles == [0, 3] and loop.widths == {"0": 18, "2": 22}
    assert flags() != before
    loop.finish()
    assert flags() == before


def test_widths_that_were_equal_may_differ_later() -> None:
    """Claim: cutting one of two groups of equal width after the other compiles nothing more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    _, compiles, loop = run(model, (8, 6), {3: {"0": [1], "2": [1]}, 6: {"2": [0]}, 9: {"0": [5, 6]}}, "after", 12)
    assert loop.widths == {"0": 21, "2": 22} and compiles == [0, 3]


def test_heads_that_are_written_out_compile_once_more() -> None:
    """Claim: a forward whose sizes are corrected by place, with its backward pass compiled as well, compiles once more
    after the first cut of its heads, and not after the second.
    """
    torch.manual_seed(0)
    expected, *_ = run(Heads(), (4, 5, 6), {3: {"qkv": [0]}, 6: {"qkv": [1]}}, compiled="no", steps=9)
    torch.manual_seed(0)
    losses, _, loop = run(Heads(), (4, 5, 6), {3: {"qkv": [0]}, 6: {"qkv": [1]}}, "before", 9, backend="aot_eager")
    torch.testing.assert_close(losses, expected)
    assert loop.widths["qkv"] == 2 and counters["stats"]["unique_graphs"] == 2


def test_settings_are_left_alone_where_nothing_is_compiled() -> None:
    """Claim: in a process that compiles nothing Dynamo's settings do not change; with several loops they are put back
    when the last of them ends.
    """
    before = flags()
    *_, first = run(mlp(), (8, 6), {3: {"0": [1]}}, compiled="no", steps=5)
    assert flags() == before
    first.detach()
    *_, first = run(mlp(), (8, 6), {3: {"0": [1]}}, compiled="before", steps=5)
    *_, second = run(mlp(), (8, 6), {3: {"0": [1]}}, compiled="before", steps=5)
    first.detach()
    assert flags()[:3] == [False, False, True]
    second.detach()
    assert flags() == before


def test_with_a_budget_of_one_nothing_of_the_compiler_changes() -> None:
    """Claim: until something is cut, settings are not touched, nothing is compiled again, and losses are the same."""
    torch.manual_seed(0)
    before = flags()
    losses, compiles, loop = run(mlp(), (8, 6), {}, compiled="before", steps=5)
    assert flags() == before and compiles == [0]
    loop.finish()
    torch.manual_seed(0)
    assert losses == run(mlp(), (8, 6), {}, compiled="no", steps=5)[0]
