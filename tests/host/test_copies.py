"""Averaged copies of the model: given as `copies=`, and cut as the model is."""

from __future__ import annotations

import copy
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


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)


def listed(ema: EMAModel) -> dict[str, Tensor]:
    names = [name for name, _ in build().named_parameters()]
    return dict(zip(names, ema.shadow_params, strict=True))


KINDS = {
    "AveragedModel": Kind(averaged, lambda e, m: e.update_parameters(m), lambda e: named_tensors(e.module)),
    "ModelEMA": Kind(Plain, lambda e, m: e.update(m), lambda e: named_tensors(e.ema)),
    "Lightning": Kind(
        lambda m: averaged(Lightning(m)),
        lambda e, m: e.update_parameters(Lightning(m)),
        lambda e: named_tensors(e.module.net),
    ),
    "EMAModel": Kind(lambda m: EMAModel(m.parameters()), lambda e, m: e.step(m.parameters()), listed),
}
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


def masked_twin(kind: Kind) -> dict[str, Tensor]:
    """What a cut leaves of a copy that was averaged of a model with masked units."""
    model = made()
    groups = find_groups(model, (torch.zeros(8, 6),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    keep = {group.name: np.ones(group.num_units, bool) for group in groups}

    def masks(step: int) -> None:
        for name, units in DROP.get(step, {}).items():
            keep[name][units] = False
        mask(model, optimizer, groups, keep)

    ema = kind.make(model)
    train(model, optimizer, range(9), lambda: kind.update(ema, model), masks)
    dims = plan_cut(groups, keep).dims()
    return {name: take(tensor, dims.get(name, {})) for name, tensor in kind.tensors(ema).items()}


@pytest.mark.parametrize("name", KINDS)
def test_averaged_copies_are_cut_as_their_masked_twin(name: str) -> None:
    """Claim: what a copy averages is what the copy of a masked twin averages, and its tensors stay the same objects."""
    kind, model = KINDS[name], made()
    ema = kind.make(model)
    optimizer, loop = attached(model, copies=(ema,))
    before = kind.tensors(ema)
    train(model, optimizer, range(9), lambda: kind.update(ema, model))
    loop.detach()
    assert loop.widths == {"0": 22, "3": 23}
    mine, its = kind.tensors(ema), masked_twin(kind)
    assert all(mine[key] is before[key] for key in mine) and set(mine) == set(its)
    assert mine["0.weight"].shape == (22, 6) and mine["3.weight"].shape == (23, 22)
    for key, value in mine.items():
        torch.testing.assert_close(value, its[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["AveragedModel", "EMAModel"])
def test_averaged_copies_go_on_from_a_run_file(name: str, tmp_path: Path) -> None:
    """Claim: a run with a copy goes on bit for bit from a file."""
    kind = KINDS[name]

    def start() -> tuple[nn.Module, torch.optim.Optimizer, setpoint.Loop, Any]:
        model = made()
        ema = kind.make(model)
        return model, *attached(model, copies=(ema,)), ema

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


def test_timms_own_copies_are_cut() -> None:
    """Claim: so it is with the classes of timm itself."""
    timm = pytest.importorskip("timm.utils.model_ema")
    for number, kind in enumerate((timm.ModelEma, timm.ModelEmaV2, timm.ModelEmaV3)):
        model = made(number)
        ema = kind(model)
        optimizer, loop = attached(model, copies=(ema,))
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
    with pytest.raises(GroupError, match=r"copies\[0\] .* is a part of the model: attach the part that trains"):
        attached(model, copies=(model[0],))
    for wrong in (model, shallow, viewing, lists):
        with pytest.raises(GroupError, match=r"copies\[1\] .*shares the tensor '.*' with the model"):
            attached(model, copies=(copy.deepcopy(model), wrong))
    short = EMAModel(list(model.parameters())[:-1])  # type: ignore[arg-type]
    with pytest.raises(GroupError, match=r"copies\[0\] \(EMAModel\) is no copy of the model"):
        attached(model, copies=(short,))
    with pytest.raises(GroupError, match=r"copies\[0\] must be a torch.nn.Module, or have a list"):
        attached(model, copies=(list(model.parameters()),))


def test_a_copy_that_was_changed_is_named_and_nothing_is_cut() -> None:
    """Claim: a copy that fits no longer is named with `copies`; the model is as it was, and trains on alone."""
    model = made()
    ema = averaged(model)
    optimizer, loop = attached(model, copies=(ema,))
    ema.module[0] = nn.Linear(6, 20)
    with pytest.raises(LoopError, match=r"copies\[0\].*should have 24 entries"):
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


def test_masked_weights_are_masked_in_copies() -> None:
    """Claim: where single weights are masked, copies are masked too."""
    model, budget = made(), setpoint.Budget.fraction(0.5, of="params")
    emas = averaged(model), Plain(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    settings: dict[str, Any] = {"example": (torch.zeros(8, 6),), "total_steps": 20, "actuator": setpoint.Masking()}
    loop = setpoint.attach(model, optimizer, budget, copies=emas, **settings)
    train(model, optimizer, range(20))
    assert loop.finish().budget_met
    for part in (emas[0].module, emas[1].ema):
        gone = [(weight == 0)[~loop.masks[name]] for name, weight in part.named_parameters() if name in loop.masks]
        assert sum(each.numel() for each in gone) > 100 and all(bool(each.all()) for each in gone)


def test_averages_that_are_not_named_are_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    """Claim: attach says at INFO that copies are to be named, unless some are; an average in the model is warned of."""
    caplog.set_level("INFO", "setpoint")
    model = made()
    model.ema = type("ModelEMA", (Plain,), {})(model)
    optimizer, loop = attached(model)
    with pytest.warns(UserWarning, match=r"ema is an average \(ModelEMA\) that is not cut along.*copies="):
        train(model, optimizer, range(2))
    loop.detach()
    assert "must be named in copies=" in caplog.text
    caplog.clear()
    optimizer, loop = attached(model, copies=(model.ema,))
    train(model, optimizer, range(2))
    loop.detach()
    assert "must be named in copies=" not in caplog.text
