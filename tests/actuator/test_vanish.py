"""Vanishing: a branch that loses all its units, and the sum that goes round it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.cost.flops import flops_cost
from setpoint.groups.group import Group
from setpoint.groups.trace import find_groups, trace
from setpoint.groups.vanish import EmptyForward
from setpoint_bench.counter import step_flops

Example = tuple[Tensor, ...]


class Inverted(nn.Module):
    """Inverted residual blocks: 1x1, depthwise with stride, 1x1; the second one has a way round."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(self._block(stride) for stride in (2, 1))
        self.head = nn.Linear(8, 3)

    @staticmethod
    def _block(stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, stride, padding=1, groups=16),
            nn.GroupNorm(16, 16),
            nn.SiLU(),
            nn.Conv2d(16, 8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.stem(x))
        out: Tensor = self.head((x + self.blocks[1](x)).mean((2, 3)))
        return out


def _inverted() -> tuple[nn.Module, Example]:
    return Inverted(), (torch.randn(4, 3, 8, 8),)


def _encoder() -> tuple[nn.Module, Example]:
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), (torch.randn(2, 5, 16),)


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Example]], list[str]]] = {
    "inverted": (_inverted, ["blocks.1.0"]),
    "encoder": (_encoder, ["linear1", "self_attn"]),
}


def vanished(name: str) -> tuple[nn.Module, Example, tuple[Group, ...], dict[str, np.ndarray]]:
    build, _ = MODELS[name]
    torch.manual_seed(0)
    model, example = build()
    groups = tuple(group for group in find_groups(model, example) if group.lossless)
    keep = {group.name: np.full(group.num_units, group.min_units > 0) for group in groups}
    return model.double(), tuple(x.double() for x in example), groups, keep


@pytest.mark.parametrize("name", MODELS)
def test_only_what_something_goes_round_may_vanish(name: str) -> None:
    """`min_units` is 0 for the inner units of a residual branch, and above it where the model would be cut in two."""
    *_, groups, _ = vanished(name)
    assert sorted(group.name for group in groups if group.min_units == 0) == MODELS[name][1]


class TwoInputs(nn.Module):
    """A hidden layer, whose output also depends on a second input; with `around` a second layer beside it."""

    def __init__(self, how: str, around: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(6, 12), nn.Linear(12, 6), how
        self.other, self.back = (nn.Linear(6, 12), nn.Linear(12, 6)) if around else (None, None)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(x)))
        if self.other is not None and self.back is not None:
            y = y + self.back(torch.relu(self.other(x)))
        if self.how == "masked":
            return y * other[:, :1]
        if self.how == "mixed":
            return other.mean(1, keepdim=True) @ torch.ones(1, len(y)) @ y
        return torch.where(other[:, :1] > 0, y, torch.zeros(()))


@pytest.mark.parametrize("how", ["masked", "mixed", "chosen"])
def test_another_input_is_no_way_round_a_layer(how: str) -> None:
    """Claim: where a mask or an adjacency reaches the output past a layer, and the data do not, the layer stays."""
    (group,) = find_groups(TwoInputs(how), (torch.randn(4, 6), torch.rand(4, 6)))
    assert group.min_units > 0


class OwnMask(nn.Module):
    """Words whose padding is masked at the end, by a mask of the words themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.last(torch.relu(self.first(self.embedding(ids))))
        return y.masked_fill(~(ids != 0).unsqueeze(-1), 0.0) + torch.zeros_like(ids).unsqueeze(-1)


def test_a_mask_of_the_data_is_no_way_round_a_layer() -> None:
    """Claim: a comparison with the data, or their shape alone, carries none of them past a layer."""
    groups = find_groups(OwnMask(), (torch.randint(1, 20, (4, 6)),))
    assert len(groups) == 2 and all(group.min_units > 0 for group in groups)


class Spiking(nn.Module):
    """Neurons that fire or do not: all that goes on is a comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.first(x) > 0).float()
        x = (self.second(x) > 0).float()
        out: Tensor = self.last(x)
        return out


def test_where_all_data_go_through_comparisons_no_layer_vanishes() -> None:
    """Claim: an output that no input reaches otherwise needs the layers on the way through comparisons."""
    groups = find_groups(Spiking(), (torch.randn(4, 6),))
    assert all(group.min_units > 0 for group in groups)


def test_of_layers_that_go_round_each_other_one_stays() -> None:
    """Claim: two branches that are added, and nothing else, do not both vanish; else the output were a constant."""
    groups = find_groups(TwoInputs("masked", around=True), (torch.randn(4, 6), torch.rand(4, 6)))
    assert sorted(group.min_units > 0 for group in groups) == [False, True]


@pytest.mark.parametrize("name", MODELS)
def test_a_branch_without_units_equals_its_masked_twin(name: str) -> None:
    """Outputs, gradients and weights after three further AdamW steps agree to 1e-10."""
    model, example, groups, keep = vanished(name)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, twin)]
    shrink(model, optimizers[0], groups, keep)
    mask(twin, optimizers[1], groups, keep)
    for _ in range(3):
        outputs = []
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(each(*example))
            outputs[-1].square().mean().backward()
            mask(twin, optimizers[1], groups, keep)
            optimizer.step()
            mask(twin, optimizers[1], groups, keep)
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-10)
    whole = dict(twin.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.shape == whole[key].shape:
            torch.testing.assert_close(parameter, whole[key], rtol=0, atol=1e-10)
        else:
            assert parameter.numel() == 0


def test_a_branch_without_units_costs_what_the_counter_sees() -> None:
    """The FLOPs that the cost tells equal those counted operation by operation: what replaces a layer does none."""
    model, example, groups, keep = vanished("inverted")
    cost = flops_cost(trace(model, example))
    shrink(model, None, groups, keep)
    widths = {name: int(mask.sum()) for name, mask in keep.items()}
    assert widths["blocks.1.0"] == 0
    assert cost.total(widths) == step_flops(model, example)


@pytest.mark.parametrize(("stride", "padding"), [(1, "same"), *product((1, 2, 3), (0, 2, "valid"))])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_layer_without_channels_gives_the_positions_of_one_that_has_some(
    dim: int, dilation: int, stride: int, padding: int | str
) -> None:
    """For each padding, stride and dilation, and for transposed convolutions, shapes agree but for the channels.

    Kernels, and strides and paddings that are numbers, differ from dim to dim.
    """
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1]
    x = torch.zeros(2, 1, *(9, 12, 14)[:dim])
    kernel, steps = (3, 5, 7)[:dim], (stride, stride, 1)[:dim]
    around = padding if isinstance(padding, str) else (padding, 1, 0)[:dim]
    layers: list[nn.modules.conv._ConvNd] = [plain(1, 1, kernel, steps, around, dilation)]
    if not isinstance(around, str):
        more = tuple(step - 1 for step in steps)
        layers.append(transposed(1, 1, kernel, steps, around, more, dilation=dilation))
    for layer in layers:
        assert EmptyForward(layer)(x).shape == layer(x).shape


def test_copies_pickles_and_files_of_a_vanished_branch_run(tmp_path: Path) -> None:
    """deepcopy, pickle, and save and load give the same outputs; a layer that has channels keeps its own forward."""
    model, example, groups, keep = vanished("inverted")
    shrink(model, None, groups, keep)
    want = model(*example)
    assert isinstance(model.get_submodule("blocks.1.0").__dict__["forward"], EmptyForward)
    assert "forward" not in model.get_submodule("blocks.0.0").__dict__
    setpoint.save(model, tmp_path / "small.safetensors")
    loaded = setpoint.load(tmp_path / "small.safetensors", into=_inverted()[0].double())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        torch.testing.assert_close(other(*example), want, rtol=0, atol=1e-12)


def test_a_failed_cut_gives_the_layers_their_forward_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an exception in the middle the model computes what it did before."""
    model, example, groups, keep = vanished("inverted")
    want = model(*example)

    def fail(*_: object) -> None:
        raise RuntimeError("interrupted")

    monkeypatch.setattr("setpoint.actuator.shrink.torch.clear_autocast_cache", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        shrink(model, None, groups, keep)
    assert not any(isinstance(m.__dict__.get("forward"), EmptyForward) for m in model.modules())
    torch.testing.assert_close(model(*example), want, rtol=0, atol=0)


class Staying(nn.Module):
    """Branches that something goes round, and that cannot run without channels."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.stem, self.pooled = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.back, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 2, 1)
        self.normed = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), norm(nn.Conv2d(12, 8, 1)))
        self.resized = nn.Sequential(nn.Conv2d(8, 10, 1), nn.Upsample(scale_factor=2), nn.Conv2d(10, 8, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(nn.functional.max_pool2d(self.pooled(x).relu(), 3, 1, 1))
        x = x + self.resized(x)
        out: Tensor = self.head(x + self.normed(x))
        return out


def test_a_branch_that_cannot_vanish_says_why() -> None:
    """Pooling and resizing know no empty tensor, no weight is divided by a norm of 0: a note, a least width above 0."""
    groups = {group.name: group for group in find_groups(Staying(), (torch.randn(2, 3, 8, 8),))}
    assert groups["pooled"].min_units > 0 and groups["normed.0"].min_units > 0
    (pooled,), (normed,) = groups["pooled"].notes, groups["normed.0"].notes
    assert pooled.startswith("the group cannot vanish: RuntimeError") and "divided by a norm" in normed
    assert groups["resized.0"].min_units > 0 and "resized" in groups["resized.0"].notes[0]
    assert groups["pooled"].lossless and groups["resized.0"].lossless and groups["normed.0"].lossless
