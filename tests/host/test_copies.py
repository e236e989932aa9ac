"""Averaged copies of the model: given as `copies=`, or found on the classes that hold them, and cut as the model is."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import setpoint
from loop.test_regrowth import Scripted
from setpoint.actuator.cut import plan_cut
from setpoint.actuator.mask import mask
from setpoint.actuator.tensors import named_tensors, take
from setpoint.errors import GroupError, LoopError
from setpoint.groups.trace import find_groups


class Plain:
    """As timm's first one and ultralytics', which are no modules; without their name."""

    def __init__(self, model: nn.Module) -> None:
        self.ema = copy.deepcopy(model).eval()
        for parameter in self.ema.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for key, value in self.ema.state_dict().items():
            if value.dtype.is_floating_point:
                value.mul_(0.9).add_(model.state_dict()[key], alpha=0.1)


def named(name: str) -> Callable[[nn.Module], Any]:
    """A class of that name, which lives no longer than its instance: as long as there is one, attach looks for more."""
    return lambda model: type(name, (), {"__init__": Plain.__init__, "update": Plain.update})(model)


class ModelEmaV3(nn.Module):
    """As timm's second and third."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for mine, its in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(0.9 * mine + 0.1 * its)


class Lightning(nn.Module):
    """As a LightningModule: the trained model is a part of it, and its averaged copy holds the whole of it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class EMAModel:
    """As diffusers': a list of tensors in the order of the parameters."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self.shadow_params, self.optimization_step = [p.clone().detach() for p in parameters], 0
        self.collected_params = None

    @torch.no_grad()
    def step(self, parameters: Iterator[nn.Parameter]) -> None:
        self.optimization_step += 1
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            shadow.sub_(0.1 * (shadow - parameter)) if parameter.requires_grad else shadow.copy_(parameter)

    def state_dict(self) -> dict[str, Any]:
        return {"optimization_step": self.optimization_step, "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = copy.deepcopy(state_dict)
        self.optimization_step = state_dict["optimization_step"]
        self.shadow_params = state_dict["shadow_params"]
        assert isinstance(self.shadow_params, list) and all(isinstance(p, Tensor) for p in self.shadow_params)


@dataclass(frozen=True)
class Kind:
    """How copies of a kind are made, averaged and looked into."""

    make: Callable[[nn.Module], Any]
    update: Callable[[Any, nn.Module], None]
    tensors: Callable[[Any], dict[str, Tensor]]
    named: bool = False


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)


def listed(ema: EMAModel) -> dict[str, Tensor]:
    names = [name for name, _ in build().named_parameters()]
    return dict(zip(names, ema.shadow_params, strict=True))


KINDS = {
    "AveragedModel": Kind(averaged, lambda e, m: e.update_parameters(m), lambda e: named_tensors(e.module)),
    "ModelEma": Kind(named("ModelEma"), lambda e, m: e.update(m), lambda e: named_tensors(e.ema)),
    "ModelEMA": Kind(named("ModelEMA"), lambda e, m: e.update(m), lambda e: named_tensors(e.ema)),
    "ModelEmaV3": Kind(ModelEmaV3, lambda e, m: e.update(m), lambda e: named_tensors(e.module)),
    "Lightning": Kind(
        lambda m: averaged(Lightning(m)),
        lambda e, m: e.update_parameters(Lightning(m)),
        lambda e: named_tensors(e.module.net),
    ),
    "EMAModel": Kind(lambda m: EMAModel(m.parameters()), lambda e, m: e.step(m.parameters()), listed, named=True),
}
LATE = [name for name, kind in KINDS.items() if not kind.named and name not in ("ModelEma", "ModelEMA")]
DROP = {3: {"0": [1, 4]}, 6: {"3": [0]}}


def build() -> nn.Module:
    # No bias before the norm: its gradient is rounding alone, which AdamW would blow up.
    first, last = nn.Linear(6, 24, bias=False), nn.Linear(24, 3)
    return nn.Sequential(first, nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.GELU(), last)


def attached(model: nn.Module, controller: Any = None, **options: Any) -> tuple[torch.optim.Optimizer, setpoint.Loop]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    budget = setpoint.Budget.fraction(0.9, of="params")
    controller = Scripted(DROP, regrow=False) if controller is None else controller
    settings = {"example": (torch.zeros(8, 6),), "total_steps": 30, "controller": controller, "verify": False}
    return optimizer, setpoint.attach(model, optimizer, budget, **{**settings, **options})


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    average: Callable[[], Any] = lambda: None,
    masked: Callable[[int], None] = lambda step: None,
) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
        masked(step + 1)
        average()


def made(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def masked_twin(kind: Kind, since: int) -> tuple[dict[str, Tensor], Any]:
    """A copy that was averaged of a model with masked units, and what a cut leaves of it; made after so many steps."""
    model = made()
    groups = find_groups(model, (torch.zeros(8, 6),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    keep = {group.name: np.ones(group.num_units, bool) for group in groups}

    def masks(step: int) -> None:
        for name, units in DROP.get(step, {}).items():
            keep[name][units] = False
        mask(model, optimizer, groups, keep)

    train(model, optimizer, range(since), masked=masks)
    ema = kind.make(model)
    train(model, optimizer, range(since, 9), lambda: kind.update(ema, model), masks)
    dims = plan_cut(groups, keep).dims()
    return {name: take(tensor, dims.get(name, {})) for name, tensor in kind.tensors(ema).items()}, model


@pytest.mark.parametrize(
    ("name", "since"), [*((name, 0) for name in KINDS), *((name, 0.5) for name in LATE), *((name, 4) for name in LATE)]
)
def test_averaged_copies_are_cut_as_their_masked_twin(name: str, since: float) -> None:
    """Claim: a copy on a known class is cut along without being named, whether it was made before attach, after it or
    after a cut; so is a list of tensors that is named: what it averages is what the copy of a masked twin averages. Its
    tensors stay the same objects.
    """
    kind, model = KINDS[name], made()
    early = kind.make(model) if since == 0 else None
    optimizer, loop = attached(model, copies=(early,) if kind.named else ())
    train(model, optimizer, range(int(since)))
    ema = early or kind.make(model)
    before = kind.tensors(ema)
    train(model, optimizer, range(int(since), 9), lambda: kind.update(ema, model))
    loop.detach()
    assert loop.widths == {"0": 22, "3": 23}
    mine, (its, _) = kind.tensors(ema), masked_twin(kind, int(since))
    assert all(mine[key] is before[key] for key in mine) and set(mine) == set(its)
    assert mine["0.weight"].shape == (22, 6) and mine["3.weight"].shape == (23, 22)
    for key, value in mine.items():
        torch.testing.assert_close(value, its[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["AveragedModel", "ModelEmaV3", "EMAModel"])
def test_averaged_copies_go_on_from_a_run_file(name: str, tmp_path: Path) -> None:
    """Claim: a run whose copy was found, or is a list of tensors, goes on bit for bit from a file, which need not be
    given a copy that was found.
    """
    kind = KINDS[name]

    def start() -> tuple[nn.Module, torch.optim.Optimizer, setpoint.Loop, Any]:
        model = made()
        ema = kind.make(model)
        return model, *attached(model, copies=(ema,) if kind.named else ()), ema

    model, optimizer, loop, ema = start()
    train(model, optimizer, range(5), lambda: kind.update(ema, model))
    setpoint.save_run(tmp_path / "run", model=model, optimizer=optimizer, loop=loop, ema=ema)
    train(model, optimizer, range(5, 9), lambda: kind.update(ema, model))
    loop.detach()
    again, other, resumed, copied = start()
    setpoint.load_run(tmp_path / "run", model=again, optimizer=other, loop=resumed, ema=copied)
    train(again, other, range(5, 9), lambda: kind.update(copied, again))
    assert resumed.widths == loop.widths == {"0": 22, "3": 23}
    mine = kind.tensors(copied)
    assert all(torch.equal(mine[key], value) for key, value in kind.tensors(ema).items())
    if not kind.named:
        setpoint.save_run(tmp_path / "without", model=again, optimizer=other, loop=resumed)


def test_timms_own_copies_are_found() -> None:
    """Claim: so it is with the classes of timm itself, compiled ones too."""
    timm = pytest.importorskip("timm.utils.model_ema")
    for number, kind in enumerate((timm.ModelEma, timm.ModelEmaV2, timm.ModelEmaV3)):
        model = made(number)
        ema = kind(model)
        optimizer, loop = attached(model)
        train(model, optimizer, range(9), partial(ema.update, model))
        loop.detach()
        part = ema.ema if number == 0 else ema.module
        assert part[3].weight.shape == (23, 22) and part(torch.zeros(4, 6)).shape == (4, 3)


def test_a_copy_that_shares_tensors_with_the_model_is_refused_at_attach() -> None:
    """Claim: a copy that is the model, or holds one of its tensors, or the memory of one, is refused before anything is
    done, and so are those that are no copies.
    """
    model = made()
    shallow, viewing = copy.copy(model), copy.deepcopy(model)
    viewing[3].bias.data = model[3].bias.data
    lists = EMAModel(model.parameters())
    lists.shadow_params[2] = model[1].weight
    for wrong in (model, shallow, viewing, lists):
        with pytest.raises(GroupError, match=r"copies\[1\] .*shares the tensor '.*' with the model"):
            attached(model, copies=(copy.deepcopy(model), wrong))
    short = EMAModel(list(model.parameters())[:-1])  # type: ignore[arg-type]
    with pytest.raises(GroupError, match=r"copies\[0\] \(EMAModel\) is no copy of the model"):
        attached(model, copies=(short,))
    with pytest.raises(GroupError, match=r"copies\[0\] must be a torch.nn.Module, or have a list"):
        attached(model, copies=(list(model.parameters()),))


def test_runs_leave_each_others_copies_alone() -> None:
    """Claim: of runs side by side each cuts its own copies only, be they made before or after either is attached; and a
    copy of an earlier model, of a model with other weights, or of another one that lives, is left alone.
    """
    torch.manual_seed(0)
    earlier = build()
    optimizer = torch.optim.AdamW(earlier.parameters(), lr=0.01)
    train(earlier, optimizer, range(30))
    old, del_me = averaged(earlier), averaged(made(7))
    models = [made(0), made(1)]
    first = averaged(models[0])
    runs = [attached(models[0])]
    second = averaged(models[1])
    runs.append(attached(models[1], Scripted({2: {"0": [5]}}, regrow=False)))
    third = averaged(models[0])
    for model, (optimizer, _) in zip(models, runs, strict=True):
        train(model, optimizer, range(9))
    widths = [each.module[0].out_features for each in (old, del_me, first, second, third)]
    assert widths == [24, 24, 22, 23, 22]
    assert [each.module[0].weight.shape[0] for each in (old, del_me, first, second, third)] == widths


def test_twins_have_copies_of_their_own() -> None:
    """Claim: of models with the same weights each has the copy that was made of it, whichever is attached, and when."""
    models = [made(), made(), made()]
    optimizer = torch.optim.AdamW(models[2].parameters(), lr=0.01)
    early = [averaged(each) for each in models]
    runs = [attached(models[0]), attached(models[1])]
    late = [averaged(each) for each in models]
    for model, (each, _) in zip(models, [*runs, (optimizer, None)], strict=True):
        train(model, each, range(9))
    widths = [[each.module[0].weight.shape[0] for each in some] for some in (early, late)]
    assert widths == [[22, 22, 24], [22, 22, 24]]


def test_a_copy_that_may_be_anothers_is_left_and_told() -> None:
    """Claim: where it was not seen of what a copy was made, and another model in training has the same weights, or one
    that is not trained is more like the copy, it is not cut, a warning says so, and `copies=` settles it.
    """
    model = made()
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    ema = named("ModelEMA")(model)
    with pytest.warns(UserWarning, match=r"ModelEMA holds .* as much like another model.*copies="):
        _, loop = attached(model)
    loop.detach()
    _, loop = attached(model, copies=(ema.ema,))
    loop.detach()
    del optimizer
    _, loop = attached(model)  # the other one is a mere snapshot, and as much like the copy as the model
    assert loop.host.copies == (ema.ema,)
    loop.detach()
    with torch.no_grad():
        model[0].weight.add_(torch.randn(24, 6))
    with pytest.warns(UserWarning, match="as much like another model"):
        attached(model)[1].detach()
    assert other[0].out_features == 24


def test_a_copy_that_was_changed_is_named_and_nothing_is_cut() -> None:
    """Claim: a copy that fits no longer is named with `copies`; the model is as it was, and trains on alone."""
    for named in (True, False):
        model = made()
        ema = averaged(model)
        optimizer, loop = attached(model, copies=(ema,) if named else ())
        ema.module[0] = nn.Linear(6, 20)
        kind = LoopError if named else GroupError  # a found one is met by the cut itself
        words = r"copies\[0\].*should have 24 entries" if named else r"should have 24 entries.*copies="
        with pytest.raises(kind, match=words):
            train(model, optimizer, range(9))
        assert model[0].weight.shape == (24, 6)
        loop.detach()
        optimizer.zero_grad()
        train(model, optimizer, range(2))
    model = made()
    lists = EMAModel(model.parameters())
    optimizer, loop = attached(model, copies=(lists,))
    lists.shadow_params = lists.shadow_params[:-2]
    with pytest.raises(LoopError, match=r"copies\[0\].*'5.weight'.*dim 1 should have 24 entries"):
        train(model, optimizer, range(9))


def test_a_copy_made_after_a_cut_takes_units_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: units that come back do so in a copy, too, that was made while they rested: as they rest in the model."""
    monkeypatch.setattr("setpoint.regrowth.regrowing._PROBE_SHARE", 1.0)
    model = made()
    optimizer, loop = attached(model, Scripted({3: {"0": [1, 4]}}, {9: {"0": [4]}}))
    train(model, optimizer, range(2))
    rest = model[0].weight[4].detach().clone()
    train(model, optimizer, range(2, 3))
    assert loop.widths["0"] == 22
    ema = averaged(model)
    train(model, optimizer, range(3, 9))
    assert loop.widths["0"] == 23 and ema.module[0].weight.shape == (23, 6)
    torch.testing.assert_close(ema.module[0].weight[3], rest, rtol=0.1, atol=0.05)
    train(model, optimizer, range(9, 12), lambda: ema.update_parameters(model))
    loop.detach()


def test_masked_weights_are_masked_in_copies_that_were_found() -> None:
    """Claim: where single weights are masked, a copy that was found is masked as one that is named."""
    model, budget = made(), setpoint.Budget.fraction(0.5, of="params")
    emas = averaged(model), named("ModelEma")(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masking, example = setpoint.Masking(), (torch.zeros(8, 6),)
    loop = setpoint.attach(model, optimizer, budget, example=example, total_steps=20, actuator=masking)
    train(model, optimizer, range(20))
    assert loop.finish().budget_met
    for part in (emas[0].module, emas[1].ema):
        gone = [(weight == 0)[~loop.masks[name]] for name, weight in part.named_parameters() if name in loop.masks]
        assert sum(each.numel() for each in gone) > 100 and all(bool(each.all()) for each in gone)


def test_what_is_found_is_let_go() -> None:
    """Claim: a detached loop follows no copies that are made later, and holds none back from the loop that comes next;
    when loop and copies are dropped, nothing keeps them.
    """
    gc.collect()  # copies that other tests left, made of a model with the same weights
    model = made()
    optimizer, loop = attached(model)
    loop.detach()
    ema = averaged(model)
    optimizer, again = attached(model)
    train(model, optimizer, range(9), partial(ema.update_parameters, model))
    assert ema.module[0].weight.shape == (22, 6) and not loop.host.copies and len(again.host.copies) == 1
    again.detach()
    gone = weakref.ref(ema), weakref.ref(model), weakref.ref(again)
    del ema, model, again, loop, optimizer
    gc.collect()
    assert [each() for each in gone] == [None, None, None]
