from pathlib import Path

import torch
from torch import Tensor, nn

from setpoint_bench.method import method_named
from setpoint_bench.methods.states import FewStates, Hankel
from setpoint_bench.recipe import Recipe
from setpoint_bench.sequences import PixelSequences, SequenceFamily
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.training import Cell, train


def _splits(folder: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    images = torch.rand(80, 1, 4, 4, generator=generator) + labels[:, None, None, None]
    return {name: (images, labels) for name in ("train", "validation", "test")}


DATA = PixelSequences(_splits, (1, 4, 4), 80, (1.0,), (1.0,))
TASK = SimpleTask("pixels", SequenceFamily(1, 4, 16, classes=2), DATA, Recipe(steps=40, batch=10, rule="adamw"))


def _finish(method: object, out: Path, budget: float | None = None) -> dict[str, int]:
    training = train(Cell(TASK, method, budget, 0), out, {})  # type: ignore[arg-type]
    while True:
        try:
            next(training)
        except StopIteration as end:
            return dict(end.value.widths)


def test_methods_drop_states_and_nothing_else(tmp_path: Path) -> None:
    """An exact number is met to the state; the budget's size follows from it."""
    assert _finish(method_named("hankel@states=5"), tmp_path, 0.9) == {"blocks.0.lru": 5}
    (by_budget,) = _finish(Hankel(), tmp_path, 0.5).values()
    assert 1 <= by_budget < 16
    course = FewStates(states=5.0).course(TASK, 1.0, {})
    model = TASK.build(course.widths)
    assert isinstance(model, nn.Module) and sum(p.shape[0] == 5 for p in model.parameters()) == 5
