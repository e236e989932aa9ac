"""Recipes: scripts as people have them, with at most four lines added (the import is one)."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.groups.group import Group

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"


@cache
def script(path: Path) -> ModuleType:
    """A script as a module."""
    name = f"_script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Recipe:
    """A script and how to ask it."""

    path: Path
    checkpoint: str
    """Name of a file that it saves, with a number in it."""
    points: tuple[int, int, int]
    """Numbers of checkpoints before the first cut, between cuts, and after the last one."""
    update: str = ""
    """Where its average is updated, as "class.method" of a module that it imports."""
    settings: dict[str, Any] = field(default_factory=dict)
    resume: str = "resume"

    def train(self, folder: Path, resume: Path | None = None) -> tuple[list[nn.Module], setpoint.Loop]:
        """The model, and its average if it has one; and the loop."""
        given = {} if resume is None else {self.resume: resume if self.resume == "init_from" else str(resume)}
        *models, loop = script(self.path).train(folder, **self.settings, **given)
        return models, loop

    def load(self, path: Path) -> nn.Module:
        """The best model, as an evaluation loads it."""
        saved = torch.load(path, weights_only=True)
        if "timm" in self.path.name:
            timm = pytest.importorskip("timm")
            settings = {"num_classes": 3, **self.settings}
            model = setpoint.resumable(timm.create_model(settings.pop("name"), **settings))
            timm.models.load_checkpoint(model, str(path))
        else:
            kind = script(self.path)
            model = setpoint.resumable(kind.ResNet() if "torchvision" in self.path.name else kind.GPT(kind.GPTConfig()))
            model.load_state_dict(saved["model"])
        return model


TIMM = Recipe(EXAMPLES / "timm_training.py", "checkpoint-{}.pth.tar", (0, 3, 18))
RECIPES = {
    "timm": replace(TIMM, update="ModelEmaV3.update", settings={"name": "test_resnet"}),
    "timm-vit": replace(TIMM, update="ModelEmaV3.update", settings={"name": "test_vit", "img_size": 32}),
    "torchvision": Recipe(
        HERE / "torchvision_like.py", "model_{}.pth", (0, 3, 18), "ExponentialMovingAverage.update_parameters"
    ),
    "nanogpt": Recipe(EXAMPLES / "nanogpt_like.py", "ckpt-{}.pt", (2, 8, 38), resume="init_from"),
}


@dataclass
class Whole:
    """A run from beginning to end; its history grows."""

    recipe: Recipe
    folder: Path
    models: list[nn.Module] = field(default_factory=list)
    loop: Any = None
    history: list[tuple[dict[str, Any], dict[str, Tensor]]] = field(default_factory=list)
    """By group the units, and by name the vectors of weights: at the start and after each update of the average."""


PARAMS = [pytest.param(name, marks=[pytest.mark.slow] * (name == "timm-vit")) for name in RECIPES]


@pytest.fixture(scope="module", params=PARAMS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """Each recipe is run as a whole once."""
    recipe = RECIPES[request.param]
    if "timm" in recipe.path.name:
        pytest.importorskip("timm")
    run, attached = Whole(recipe, tmp_path_factory.mktemp("whole")), list[setpoint.Loop]()
    with pytest.MonkeyPatch.context() as patch:
        attach, module = setpoint.attach, script(recipe.path)

        def attach_and_note(model: nn.Module, *args: Any, **settings: Any) -> setpoint.Loop:
            run.history.append(({}, vectors(model)))
            attached.append(attach(model, *args, **{"controller": setpoint.PricedController(), **settings}))
            return attached[0]

        patch.setattr(setpoint, "attach", attach_and_note)
        if recipe.update:
            name, method = recipe.update.split(".")
            kind = getattr(module, name, None) or getattr(module.timm.utils, name)
            update = getattr(kind, method)

            def update_and_note(average: Any, model: nn.Module, *rest: Any) -> None:
                update(average, model, *rest)
                run.history.append((attached[0].origin, vectors(model)))

            patch.setattr(kind, method, update_and_note)
        torch.manual_seed(0)
        run.models, run.loop = recipe.train(run.folder)
    yield run


def vectors(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.dim() == 1}


def test_few_lines_meet_the_budget_with_a_live_optimizer(whole: Whole) -> None:
    """Claim: with at most four lines, the import among them; every moment fits its parameter."""
    lines = whole.recipe.path.read_text(encoding="utf-8").splitlines()
    marked = [line for line in lines if line.endswith("# setpoint")]
    used = [line for line in lines if line.startswith("    ") and "setpoint." in line and "def " not in line]
    assert len(marked) <= 3 and len([line for line in used if line not in marked and "print" not in line]) == 0
    summary = whole.loop.summary
    assert summary.budget_met and summary.resizes
    (optimizer,) = whole.loop.host.optimizers
    for parameter, state in optimizer.state.items():
        assert all(each.shape == parameter.shape for each in state.values() if each.dim())
    assert len(optimizer.state) == len(list(whole.models[0].parameters()))


def test_the_average_is_right(whole: Whole) -> None:
    """Claim: for each unit that stayed it is the average of that unit's own history."""
    if not whole.recipe.update:
        pytest.skip("it keeps no average")
    average = vectors(whole.models[1])
    start = 0 if "timm" in whole.recipe.path.name else 1  # torch's begins with the first weights that it is given
    checked = 0
    for group in whole.loop.groups:
        for name in whole_vectors(group) & average.keys():
            rows = [of_units(group.name, whole.loop.origin[group.name], name, each) for each in whole.history[start:]]
            expected = rows[0]
            for each in rows[1:]:
                expected = 0.9 * expected + 0.1 * each
            torch.testing.assert_close(average[name], expected)
            checked += 1
    assert checked >= 3


def whole_vectors(group: Group) -> set[str]:
    """Vectors of which each entry is a unit of the group."""
    return {
        each.tensor for each in group.slices if each.dim == 0 and np.array_equal(each.index, np.arange(group.num_units))
    }


def of_units(group: str, units: Any, name: str, moment: tuple[dict[str, Any], dict[str, Tensor]]) -> Tensor:
    """The entries of a vector that belonged to these units at a moment."""
    origin, tensors = moment
    there = origin.get(group, np.arange(len(tensors[name])))
    return tensors[name][torch.from_numpy(np.flatnonzero(np.isin(there, units)))]


@pytest.mark.parametrize("point", [0, 1, 2], ids=["before", "between", "after"])
def test_it_goes_on_bit_for_bit(whole: Whole, point: int, tmp_path: Path) -> None:
    """Claim: before the first cut, between cuts, after the last one: weights, averages and decisions are the same."""
    path = whole.folder / whole.recipe.checkpoint.format(whole.recipe.points[point])
    sizes = sum(each.numel() for each in whole.recipe.load(path).parameters())
    final = sum(each.numel() for each in whole.models[0].parameters())
    assert (sizes > final) == (point < 2)
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setpoint, "attach", partial(setpoint.attach, controller=setpoint.PricedController()))
        models, loop = whole.recipe.train(tmp_path, path)
    for one, two in zip(models, whole.models, strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[name]), name
    assert [(each.step, each.widths) for each in loop.ledger] == [
        (each.step, each.widths) for each in whole.loop.ledger
    ]


def test_the_best_model_is_loaded(whole: Whole) -> None:
    """Claim: the last checkpoint gives a freshly built model the outputs of the trained one; timm loads its average."""
    number, every = re.compile(r"\d+"), whole.folder.glob(whole.recipe.checkpoint.format("*"))
    last = max(int(number.findall(path.name)[0]) for path in every)
    loaded = whole.recipe.load(whole.folder / whole.recipe.checkpoint.format(last)).eval()
    model = whole.models[1 if "timm" in whole.recipe.path.name else 0].eval()
    if "nano" in whole.recipe.path.name:  # which saves ahead of a step
        assert loaded.h[0].c_fc.out_features == model.h[0].c_fc.out_features
        model.load_state_dict(loaded.state_dict())
        x = torch.randint(128, (2, 16))
        assert torch.equal(loaded(x)[0], model(x)[0])
    else:
        x = torch.randn(2, 3, *((8, 8) if "torchvision" in whole.recipe.path.name else (32, 32)))
        assert torch.equal(loaded(x), model(x))
