"""Shapes travel with the weights: any framework's own checkpoint can be read back."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import pickletools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import setpoint
from golden.models import GPT, ResNet
from setpoint.actuator.tensors import named_tensors
from setpoint.checkpoint.resumable import is_resumable
from setpoint.errors import CheckpointError, LoopError
from setpoint.loop.resume import check_format

Make = Callable[[], nn.Module]


class Depthwise(nn.Module):
    """A block of a mobile network."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depth, self.down = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.depth(torch.relu(self.norm(self.up(x))))))


class Scaled(nn.Module):
    """A network with a buffer along its units that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 20), nn.Linear(20, 2)
        self.register_buffer("scale", torch.linspace(1, 2, 20), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)) * self.scale)


def mlp() -> nn.Module:
    """Shapes tell everything."""
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


SEEDED = torch.Generator().manual_seed(0)
EXAMPLES: dict[Make, Any] = {
    mlp: (torch.randn(8, 6, generator=SEEDED),),
    ResNet: (torch.randn(4, 3, 8, 8, generator=SEEDED),),
    Depthwise: (torch.randn(4, 3, 6, 6, generator=SEEDED),),
    GPT: (torch.randint(0, 16, (4, 8), generator=SEEDED),),
    Scaled: (torch.randn(8, 6, generator=SEEDED),),
}
MODELS = pytest.mark.parametrize("make", EXAMPLES, ids=lambda make: make.__name__)


def train(model: nn.Module, example: Any, fraction: float = 0.5, steps: int = 30) -> torch.optim.Optimizer:
    """A run that cuts the model to a fraction of its FLOPs."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    budget = setpoint.Budget.fraction(fraction, of="flops")
    with setpoint.attach(model, optimizer, budget, example=example, total_steps=steps) as loop:
        for _ in range(steps):
            model(*example).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loop.summary is not None and loop.summary.resizes
    return optimizer


def cut(make: Make, fraction: float = 0.5) -> nn.Module:
    """A model that a run has cut, made resumable by whoever trains it; a copy of its own for each test."""
    return copy.deepcopy(_cut(make, fraction))


@cache
def _cut(make: Make, fraction: float) -> nn.Module:
    torch.manual_seed(0)
    model = setpoint.resumable(make())
    train(model, EXAMPLES[make], fraction)
    return model.eval()


def through_file(state: Any) -> Any:
    """A state dict through `torch.save`, read without pickles of foreign classes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@MODELS
def test_a_resumable_dense_model_takes_a_cut_state(make: Make) -> None:
    """Claim: through torch.save the loaded model computes the same bits, and its parameters keep their identity; a
    plain reader, a pickled copy, takes the state strictly.
    """
    model = cut(make)
    dense = setpoint.resumable(make())
    before = {name: id(tensor) for name, tensor in named_tensors(dense).items()}
    dense.load_state_dict(through_file(model.state_dict()))
    assert {name: id(tensor) for name, tensor in named_tensors(dense).items()} == before
    assert torch.equal(dense.eval()(*EXAMPLES[make]), model(*EXAMPLES[make]))
    plain = pickle.loads(pickle.dumps(model))  # of the same shapes, without hooks
    torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in plain.parameters())), plain.parameters())
    plain.load_state_dict(through_file(model.state_dict()), strict=True)
    assert torch.equal(plain(*EXAMPLES[make]), model(*EXAMPLES[make]))
    setpoint.resumable(dense)  # twice is once
    assert dense.state_dict()._metadata[""]["setpoint"].keys() == model.state_dict()._metadata[""]["setpoint"].keys()


class TwoNames(nn.Module):
    """A layer that is an attribute and stands in a container, and weights that are tied along the units."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.decoder = nn.Embedding(11, 24), nn.Linear(24, 24), nn.Linear(24, 11)
        self.layers = nn.ModuleList([self.inner, nn.Linear(24, 24)])
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
        out: Tensor = self.decoder(x)
        return out


def test_tensors_with_two_names_are_cut_and_come_back(tmp_path: Path) -> None:
    """Claim: states of model, average and run load where a cut tensor is tied, or a module is held twice."""
    example = (torch.randint(11, (4, 9)),)

    def start() -> dict[str, Any]:
        torch.manual_seed(0)
        model = TwoNames()
        optimizer, average = torch.optim.Adam(model.parameters()), AveragedModel(model)
        loop = setpoint.attach(model, optimizer, 0.5, total_steps=20, example=example, copies=[average])
        return {"model": model, "optimizer": optimizer, "average": average, "loop": loop}

    def steps(parts: dict[str, Any]) -> None:
        for _ in range(10):
            tokens = torch.randint(11, (4, 9))
            nn.functional.cross_entropy(parts["model"](tokens).mT, tokens).backward()
            parts["optimizer"].step()
            parts["optimizer"].zero_grad()
            parts["average"].update_parameters(parts["model"])

    parts = start()
    steps(parts)
    setpoint.save_run(tmp_path / "run.safetensors", **parts)
    model, average = parts["model"], parts["average"]
    assert model.embedding.weight.shape[1] < 24 and model.inner.weight.shape[0] < 24
    for fresh in (setpoint.resumable(TwoNames()), setpoint.shrink_to(TwoNames(), model.state_dict())):
        fresh.load_state_dict(through_file(model.state_dict()))
        assert fresh.decoder.weight is fresh.embedding.weight and fresh.layers[0] is fresh.inner
        assert torch.equal(fresh(*example), model(*example))
    setpoint.resumable(AveragedModel(TwoNames())).load_state_dict(through_file(average.state_dict()))
    again = start()
    setpoint.load_run(tmp_path / "run.safetensors", **again)
    for each in (parts, again):
        torch.manual_seed(1)
        steps(each)
        assert each["loop"].finish().budget_met
    assert all(map(torch.equal, model.parameters(), again["model"].parameters()))


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("make", [mlp, ResNet, Depthwise, GPT], ids=lambda make: make.__name__)
def test_shapes_alone_are_enough_where_a_format_drops_the_sizes(
    make: Make, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: through safetensors the first forward finds the sizes that code writes, with the same bits as a result; a
    model is made resumable by itself, or all are.
    """
    monkeypatch.setattr(nn.Module, "load_state_dict", nn.Module.load_state_dict)
    model = cut(make)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = make().eval()
    if enabled:
        setpoint.enable_checkpointing()
    else:
        setpoint.resumable(dense)
    dense.load_state_dict(load_safetensors(save_safetensors(tensors)))
    assert torch.equal(dense(*EXAMPLES[make]), model(*EXAMPLES[make]))


def test_a_buffer_without_a_state_needs_carried_sizes() -> None:
    """Claim: a non-persistent buffer that was cut cannot be guessed: the forward says so."""
    model = cut(Scaled)
    dense = setpoint.resumable(Scaled())
    dense.load_state_dict(dict(model.state_dict()))
    with pytest.raises(CheckpointError, match="the buffer 'scale' was cut, and is in no state dict"):
        dense(*EXAMPLES[Scaled])


class MadeLater(nn.Module):
    """A network whose buffer along the units is made in its first forward, and in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 20), nn.Linear(20, 2)
        self.register_buffer("scale", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if self.scale is None:
            self.register_buffer("scale", torch.linspace(1, 2, x.shape[1]), persistent=False)
        out: Tensor = self.last(x * self.scale)
        return out


def test_a_buffer_that_a_forward_makes_comes_back(tmp_path: Path) -> None:
    """Claim: it has its cut values in a model that has been called once; before, it is refused by name."""
    torch.manual_seed(0)
    model, x = MadeLater(), torch.randn(8, 6)
    model(x)
    groups = setpoint.find_groups(model, (x,))
    setpoint.shrink(model, None, groups, {groups[0].name: torch.arange(20).numpy() % 3 > 0})
    setpoint.save(model, tmp_path / "small.safetensors")
    loaded, taken = MadeLater(), setpoint.resumable(MadeLater())
    with pytest.raises(CheckpointError, match="yet to make its buffer 'scale': call the model once, then load"):
        taken.load_state_dict(through_file(model.state_dict()))
    loaded(x), taken(x)
    setpoint.load(tmp_path / "small.safetensors", into=loaded)
    taken.load_state_dict(through_file(model.state_dict()))
    for each in (loaded, taken):
        assert torch.equal(each.scale, model.scale) and torch.equal(each(x), model(x))


@MODELS
def test_a_cut_model_takes_a_wider_state_and_a_dense_one(make: Make) -> None:
    """Claim: what is loaded decides the shapes, also where the model is narrower."""
    half, dense = cut(make), make().eval()
    quarter = cut(make, 0.35)
    quarter.load_state_dict(through_file(half.state_dict()))
    assert torch.equal(quarter(*EXAMPLES[make]), half(*EXAMPLES[make]))
    if make is Scaled:
        with pytest.raises(CheckpointError, match="'scale' was cut, and is in no state dict: build the model again"):
            quarter.load_state_dict(dense.state_dict())
        return
    quarter.load_state_dict(through_file(dense.state_dict()))
    assert torch.equal(quarter(*EXAMPLES[make]), dense(*EXAMPLES[make]))
    optimizer = train(quarter.train(), EXAMPLES[make])
    assert all(state["exp_avg"].shape == parameter.shape for parameter, state in optimizer.state.items())


@MODELS
def test_shrink_to_by_hand(make: Make) -> None:
    """Claim: carried sizes, or an example, cut a dense model by hand; wrappers' names do not matter."""
    model = cut(make)
    dense = setpoint.shrink_to(make(), through_file(model.state_dict())).eval()
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense(*EXAMPLES[make]), model(*EXAMPLES[make]))
    if make is not Scaled:
        bare = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        other = setpoint.shrink_to(make(), bare, EXAMPLES[make]).eval()
        other.load_state_dict({name.removeprefix("module."): tensor for name, tensor in bare.items()})
        assert torch.equal(other(*EXAMPLES[make]), model(*EXAMPLES[make]))


def test_shrink_to_asks_for_an_example_only_where_shapes_cannot_tell() -> None:
    """Claim: PyTorch's own layers need none; a class of the user's does, and the error says so."""
    model = cut(mlp)
    bare = dict(model.state_dict())
    dense = setpoint.shrink_to(mlp(), bare)
    dense.load_state_dict(bare)
    assert torch.equal(dense(*EXAMPLES[mlp]), model(*EXAMPLES[mlp])) and str(dense) == str(model)
    dense = GPT()
    before = {name: tensor.clone() for name, tensor in named_tensors(dense).items()}
    with pytest.raises(CheckpointError, match=r"layers\.0.* writes in its code: give an example"):
        setpoint.shrink_to(dense, dict(cut(GPT).state_dict()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(dense).items())


def test_states_that_do_not_fit_are_refused_by_name_and_nothing_is_changed() -> None:
    """Claim: another architecture, a wider state, damaged or newer sizes: refused, with the model as it was."""
    model = cut(mlp)
    wide = nn.Sequential(nn.Linear(6, 99), nn.ReLU(), nn.Linear(99, 16), nn.ReLU(), nn.Linear(16, 3))
    newer, damaged = through_file(model.state_dict()), through_file(model.state_dict())
    newer._metadata[""]["setpoint"]["format"] = 99
    damaged._metadata[""]["setpoint"]["sizes"] = [3]
    other = cut(Depthwise).state_dict()
    renamed = through_file(model.state_dict())
    renamed._metadata[""]["setpoint"]["sizes"] = {"absent": {"out_features": 3}}
    for state, words in (
        (wide.state_dict(), r"'0\.weight' has shape \(99, 6\) there and \(24, 6\) in the dense model"),
        (newer, "^the state dict has sizes of format 99, this Setpoint reads up to 1: upgrade"),
        (damaged, "damaged"),
        (renamed, "no module 'absent'"),
    ):
        dense = setpoint.resumable(mlp())
        before = {name: tensor.clone() for name, tensor in named_tensors(dense).items()}
        with pytest.raises(CheckpointError, match=words):
            dense.load_state_dict(state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(dense).items())
    for classes, width, words in (
        (7, 24, r"'4\.weight' .*, \(3, 16\) before any cut, and here it was built with \(7, 16\)"),
        (3, 30, r"'0\.weight' .*, \(24, 6\) before any cut, and here it was built with \(30, 6\)"),
    ):
        foreign = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, classes))
        with pytest.raises(CheckpointError, match=words):
            setpoint.resumable(foreign).load_state_dict(model.state_dict())
        assert foreign[4].weight.shape == (classes, 16) and foreign[0].weight.shape == (width, 6)
    with pytest.raises(CheckpointError, match=r"none of the model's tensors: its names are 'net\.0\.bias'"):
        setpoint.shrink_to(mlp(), {f"net.{name}": value for name, value in model.state_dict().items()})
    dense = setpoint.resumable(mlp())
    with pytest.raises((CheckpointError, RuntimeError), match="another model|Missing key"):
        dense.load_state_dict(other)
    bare = dict(model.state_dict())
    bare["4.weight"], bare["4.bias"] = bare["4.weight"][:2], bare["4.bias"][:2]  # outputs are no units
    with pytest.raises(
        RuntimeError, match=r"'4\.weight' has 2 entries along dim 0 in the state, 3 in the model, and no layer"
    ):
        dense.load_state_dict(bare)
    with pytest.raises(CheckpointError, match=r"'4\.(weight|bias)'.* no cut of its groups leads"):
        setpoint.shrink_to(mlp(), bare, EXAMPLES[mlp])


def net(inputs: int = 12, first: int = 48, second: int = 48, classes: int = 10) -> nn.Module:
    """A network of any widths."""
    layers = nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, classes)
    return nn.Sequential(*layers)


OTHERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "classes": (net(classes=5).state_dict(), r"'4\.weight' has 5 entries .*no layer reads fewer"),
    "inputs": (net(7).state_dict(), r"'0\.weight' has 7 entries .*no layer makes fewer"),
    "cut, of other classes": (net(12, 24, 20, 5).state_dict(), r"'4\.weight' has 5 entries"),
    "cut, of other inputs": (net(7, 24, 20, 10).state_dict(), r"'0\.weight' has 7 entries"),
    "a part": (dict(list(net(12, 24, 20).state_dict().items())[:4]), r"'2\.weight' has 20 entries"),
    "a part of a layer": (dict(list(net(12, 24).state_dict().items())[:1]), "tensors of '0' do not belong together"),
    "words": ({**nn.Embedding(9, 4).state_dict()}, "no cut drops these"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("by", ["resumable", "enable_checkpointing", "shrink_to"])
def test_what_no_cut_changes_is_a_size_mismatch(other: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: other classes, input columns or rows of an embedding, and a part of a cut state, are PyTorch's size
    mismatch, also without `strict`, and change nothing.
    """
    state, words = OTHERS[other]
    monkeypatch.setattr(nn.Module, "load_state_dict", nn.Module.load_state_dict)
    model = nn.Embedding(12, 4) if other == "words" else net()
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    if by == "shrink_to":
        with pytest.raises(CheckpointError, match=words):
            setpoint.shrink_to(model, state)
    elif by == "enable_checkpointing":
        setpoint.enable_checkpointing()
        with pytest.raises(RuntimeError, match="size mismatch for"):
            model.load_state_dict(state, strict=False)
        return  # PyTorch has copied what fits, as ever
    else:
        with pytest.raises(RuntimeError, match=f"(?s){words}.*size mismatch for"):
            setpoint.resumable(model).load_state_dict(state, strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model).items())


class Gram(nn.Module):
    """No layer reads the outputs of the last one: they meet themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(6, 20), nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.out(self.up(x).relu())
        return z @ z.mT


def test_a_cut_that_shapes_alone_do_not_show_is_taken_by_an_example() -> None:
    """Claim: a cut of units that no layer reads is refused without metadata, and what the error advises is exact."""
    torch.manual_seed(0)
    model, x = Gram(), torch.randn(5, 6, generator=SEEDED)
    group = next(
        g for g in setpoint.find_groups(model, (x,)) if {part.tensor for part in g.slices} == {"out.weight", "out.bias"}
    )
    setpoint.shrink(model, None, (group,), {group.name: np.arange(16) < 7})
    state, fresh = dict(model.state_dict()), setpoint.resumable(Gram())
    with pytest.raises(
        RuntimeError, match=r"no layer reads fewer.* if not, shrink_to\(model, state, example=\(x,\)\) first"
    ):
        fresh.load_state_dict(state)
    setpoint.shrink_to(fresh, state, example=(x,)).load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
    fresh.load_state_dict(model.state_dict())  # with metadata


def test_shapes_that_only_the_groups_refute_are_refused_at_the_first_forward() -> None:
    """Claim: inputs and classes that are fewer alike could be parts of each other; each forward refuses them by the
    groups, until another state comes.
    """
    state = dict(net(12, 12, 12, 12).state_dict())
    state |= {"0.weight": state["0.weight"][:, :5], "4.weight": state["4.weight"][:5], "4.bias": state["4.bias"][:5]}
    model = setpoint.resumable(net(12, 12, 12, 12))
    model.load_state_dict(state)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no cut of its groups leads from one to the other"):
            model(torch.randn(3, 12))
    model.load_state_dict(net(12, 12, 12, 12).state_dict())
    assert model(torch.randn(3, 12)).shape == (3, 12)


@pytest.mark.parametrize("damage", ["sizes", "tensors", "missing"])
def test_carried_sizes_that_are_not_those_of_the_tensors_are_refused(damage: str) -> None:
    """Claim: sizes of other tensors, tensors of other sizes, and a part of them, change nothing, strict or not."""
    state = through_file(cut(mlp).state_dict())
    if damage == "sizes":
        state._metadata[""]["setpoint"]["sizes"]["0"]["out_features"] -= 1
    elif damage == "tensors":
        state["0.weight"], state["0.bias"] = state["0.weight"][1:], state["0.bias"][1:]
        state["2.weight"] = state["2.weight"][:, 1:]
    else:
        del state["2.weight"], state["2.bias"]
    model = setpoint.resumable(mlp())
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    with pytest.raises(RuntimeError, match="the sizes that the state dict carries are not those of its tensors"):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model).items())


@pytest.mark.parametrize("again", [False, True])
def test_a_state_carries_the_sizes_of_exchanged_layers_too(again: bool) -> None:
    """Claim: a new layer in a cut one's place, of a model that was cut here or by a load, loads into a dense model."""
    (x,) = EXAMPLES[Depthwise]
    model = cut(Depthwise)
    if again:
        state, model = through_file(model.state_dict()), setpoint.resumable(Depthwise()).eval()
        model.load_state_dict(state)
    channels = model.depth.weight.shape[0]
    assert channels < 24
    model.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    dense = setpoint.resumable(Depthwise()).eval()
    dense.load_state_dict(through_file(model.state_dict()))
    assert str(dense) == str(model) and torch.equal(dense(x), model(x))


@pytest.mark.parametrize("wrong", ["more", "fewer", "no tensor"])
def test_a_load_that_raises_leaves_the_model_as_it_was(wrong: str) -> None:
    """Claim: where PyTorch refuses a cut state for its names or values, the model is as wide as before, with its values
    and sizes; and what is only left out of a load that is not strict does not matter.
    """
    state = through_file(cut(Depthwise).state_dict())
    if wrong == "more":
        state["absent"] = torch.zeros(1)
    elif wrong == "fewer":
        del state["down.bias"]
    else:
        state["depth.bias"] = "x"
    dense = setpoint.resumable(Depthwise())
    words, before = str(dense), {name: tensor.clone() for name, tensor in named_tensors(dense).items()}
    with pytest.raises(RuntimeError, match="absent|down.bias|depth.bias"):
        dense.load_state_dict(state)
    assert str(dense) == words
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(dense).items())
    assert "setpoint" not in str(dense.state_dict()._metadata)
    if wrong != "no tensor":
        dense.load_state_dict(state, strict=False)
        assert dense.depth.groups < 24


@pytest.mark.parametrize("load", ["load_state_dict", "shrink_to"])
def test_a_state_of_other_shapes_is_refused_while_a_loop_is_at_work(load: str) -> None:
    """Claim: a loop that does not go on with what is loaded would die in its next step; with resume=True, before the
    first step, or once it is detached the load is welcome.
    """
    state, example = cut(mlp).state_dict(), EXAMPLES[mlp]

    def attached(**options: Any) -> tuple[nn.Module, setpoint.Loop]:
        torch.manual_seed(1)
        model = setpoint.resumable(mlp())
        settings = {"total_steps": 9, "example": example, "verify": False, **options}
        return model, setpoint.attach(model, torch.optim.AdamW(model.parameters()), 0.5, **settings)

    def take(model: nn.Module) -> None:
        model.load_state_dict(state) if load == "load_state_dict" else setpoint.shrink_to(model, state)

    model, loop = attached()
    before = [tensor.clone() for tensor in model.parameters()]
    with pytest.raises(LoopError, match="has a loop already, and the state has other shapes"):
        take(model)
    assert all(map(torch.equal, before, model.parameters()))
    model.load_state_dict(mlp().state_dict())  # of the same shapes
    loop.detach()
    for each in (model, attached(example=None)[0], attached(resume=True)[0]):
        take(each)
        assert each[0].out_features < 24


def test_a_run_goes_on_with_a_batch_of_another_shape() -> None:
    """Claim: where batches are padded to their longest row, any of them may come first when a run goes on."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        setpoint.attach(model, optimizer, 0.5, total_steps=12, resume=True)
        return model, optimizer

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            shape = [(4, 7), (4, 5), (2, 9)][step % 3]  # longer and shorter rows, fewer of them
            model(torch.randint(20, shape, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = start()
    saved = {}
    for step in range(12):
        saved[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, step, step + 1)
    assert model[1].out_features < 32
    for step in (2, 7):
        again, its_optimizer = start()
        again.load_state_dict(saved[step][0])
        its_optimizer.load_state_dict(saved[step][1])
        train(again, its_optimizer, step, 12)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True)), step


def trained(model: nn.Module) -> nn.Module:
    """The model after a run that was never told to resume."""
    train(model, EXAMPLES[mlp], steps=6)
    return model


def by_hand(model: nn.Module) -> nn.Module:
    groups = setpoint.find_groups(model, EXAMPLES[mlp])
    setpoint.shrink(model, None, groups, {groups[0].name: [False, *[True] * (groups[0].num_units - 1)]})
    return model


def loaded(model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        setpoint.save(trained(mlp()), f"{folder}/small.safetensors")
        return setpoint.load(f"{folder}/small.safetensors", into=model)


def compressed(model: nn.Module) -> nn.Module:
    setpoint.compress(model, [EXAMPLES[mlp]], "50% flops", verify=False)
    return model


@pytest.mark.parametrize("road", [trained, by_hand, loaded, compressed])
def test_every_cut_model_carries_its_sizes_and_names_a_state_of_others(
    road: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: whatever has cut a model, its plain state is read by whoever called enable_checkpointing; and a dense
    state is refused in one sentence before anything is copied.
    """
    model, dense = road(mlp()), mlp().state_dict()
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    with pytest.raises(
        CheckpointError, match=r"^size mismatch: '0\.weight' has shape \(24, 6\) in the state dict, and"
    ):
        model.load_state_dict({**dense})
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model).items())
    model.load_state_dict(model.state_dict())
    monkeypatch.setattr(nn.Module, "load_state_dict", nn.Module.load_state_dict)
    setpoint.enable_checkpointing()
    fresh = mlp()
    fresh.load_state_dict(through_file(model.state_dict()))
    assert str(fresh) == str(model) and torch.equal(fresh(*EXAMPLES[mlp]), model(*EXAMPLES[mlp]))


@pytest.mark.parametrize(
    ("example", "kind", "words"),
    [
        (None, CheckpointError, r"in the state dict, which Setpoint has cut, and \(24, 6\) in the model:"),
        (EXAMPLES[mlp], LoopError, "load the loop's own state first, or attach with resume=True"),
    ],
)
def test_a_cut_state_for_a_model_that_was_attached_is_refused_by_name(example: Any, kind: Any, words: str) -> None:
    """Claim: a dense model whose loop does not go on with what is loaded names a cut state, and is unchanged."""
    model, state = mlp(), through_file(trained(mlp()).state_dict())
    loop = setpoint.attach(model, torch.optim.AdamW(model.parameters()), 0.5, total_steps=6, example=example)
    before = [tensor.clone() for tensor in model.parameters()]
    with pytest.raises(kind, match=words):
        model.load_state_dict(state)
    assert all(map(torch.equal, before, model.parameters()))
    loop.detach()


@pytest.mark.parametrize("example", [None, EXAMPLES[mlp]])
def test_an_attach_that_is_refused_leaves_the_model_as_it_loads(example: Any) -> None:
    """Claim: after a refused attach(resume=True) a state of other shapes is an error as ever, and cuts nothing."""
    model = mlp()
    with pytest.raises(setpoint.SetpointError):
        budget = "7 bananas" if example is None else 1e-6
        setpoint.attach(model, torch.optim.SGD(model.parameters()), budget, total_steps=6, resume=True, example=example)
    assert not is_resumable(model) and not model._state_dict_hooks
    with pytest.raises(RuntimeError, match="size mismatch for"):
        model.load_state_dict(cut(mlp).state_dict())


def test_a_loops_state_of_a_newer_format_says_what_to_do() -> None:
    """Claim: as for sizes and files, the way out is named."""
    with pytest.raises(CheckpointError, match="the state has format 99, and this reads 2: upgrade Setpoint"):
        check_format({"format": 99})


def test_hooks_go_along_with_a_deep_copy_and_into_no_pickle() -> None:
    """Claim: an EMA's copy is resumable by itself; a pickle of a cut model names nothing of Setpoint."""
    model = cut(mlp)
    double = copy.deepcopy(model)
    double.load_state_dict(mlp().state_dict())
    assert double[0].out_features == 24 and model[0].out_features < 24
    names = {str(arg) for _, arg, _ in pickletools.genops(pickle.dumps(model)) if arg is not None}
    assert not [name for name in names if name.startswith("setpoint")]


def test_enable_checkpointing_makes_every_model_resumable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: once per process is enough: a dense model takes a cut state, a foreign one loads as ever."""
    monkeypatch.setattr(nn.Module, "load_state_dict", nn.Module.load_state_dict)
    model = cut(GPT)
    state = through_file(model.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        GPT().load_state_dict(state)
    setpoint.enable_checkpointing()
    setpoint.enable_checkpointing()
    dense = GPT().eval()
    dense.load_state_dict(state)
    assert torch.equal(dense(*EXAMPLES[GPT]), model(*EXAMPLES[GPT]))
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.Linear(2, 3).load_state_dict(nn.Linear(2, 4).state_dict())


def test_a_wrapper_that_was_not_cut_itself_takes_the_sizes_of_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: after `enable_checkpointing` an averaged model, and a pair of cut models, load under their own names."""
    monkeypatch.setattr(nn.Module, "load_state_dict", nn.Module.load_state_dict)
    setpoint.enable_checkpointing()
    for make in (Scaled, GPT):
        model = cut(make)
        averaged = AveragedModel(make())
        averaged.load_state_dict(through_file(AveragedModel(model).state_dict()))
        assert torch.equal(averaged.eval()(*EXAMPLES[make]), model(*EXAMPLES[make]))
    pair, dense = nn.ModuleList([cut(Scaled), cut(GPT)]), nn.ModuleList([Scaled(), GPT()]).eval()
    dense.load_state_dict(through_file(pair.state_dict()))
    for new, old, make in zip(dense, pair, (Scaled, GPT), strict=True):
        assert torch.equal(new(*EXAMPLES[make]), old(*EXAMPLES[make]))


def test_bake_takes_no_name_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a module that is imported, one that Python would find, and a file of the user's are refused and stay; a
    file that bake wrote is written again, and the model of the first time can be pickled still.
    """
    model, own, found = cut(GPT), tmp_path / "own_code.py", tmp_path / "path" / "found_by_python.py"
    found.parent.mkdir()
    for file in (own, found):
        file.write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(found.parent))
    for taken in (tmp_path / "json.py", own, tmp_path / found.name, tmp_path / "sys.py", tmp_path / "__main__.py"):
        with pytest.raises(CheckpointError, match="has the name of a "):
            setpoint.bake(model, taken)
    assert callable(json.dumps) and sys.modules["json"] is json and own.read_text() == found.read_text() == "x = 1\n"
    first = setpoint.bake(model, found.with_name("baked_twice.py"))
    for again in (first, setpoint.bake(model, found.with_name("baked_twice.py"))):
        torch.save(again, tmp_path / "small.pt")


@pytest.mark.parametrize("make", [mlp, ResNet, GPT], ids=lambda make: make.__name__)
def test_a_baked_model_loads_where_setpoint_is_not_installed(make: Make, tmp_path: Path) -> None:
    """Claim: its pickle needs the model's own code, torch, and at most the file that bake has written, which Python
    must be able to import.
    """
    model = cut(make)
    with pytest.raises(CheckpointError, match="no file that Python can import"):
        setpoint.bake(model, tmp_path / "small-forward.txt")
    baked = setpoint.bake(model, tmp_path / "small_forward.py")
    assert torch.equal(baked(*EXAMPLES[make]), model(*EXAMPLES[make]))
    assert (tmp_path / "small_forward.py").exists() == (make is GPT)
    torch.save([baked, EXAMPLES[make], model(*EXAMPLES[make])], tmp_path / "small.pt")
    code = (
        "import sys, torch\n"
        "class Refused:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'setpoint': raise ImportError('setpoint is not here')\n"
        "sys.meta_path.insert(0, Refused())\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parent)!r}]\n"
        f"model, example, want = torch.load({str(tmp_path / 'small.pt')!r}, weights_only=False)\n"
        "assert torch.equal(model(*example), want)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'setpoint']"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


class Half:
    """A run whose states are loaded one by one."""

    def __init__(self, seed: int = 0, kinds: Any = (torch.optim.AdamW,), **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = mlp()
        parameters = list(self.model.parameters())
        self.optimizers = [kind(parameters[n :: len(kinds)], lr=1e-2) for n, kind in enumerate(kinds)]
        settings = {"total_steps": 30, "example": EXAMPLES[mlp], "resume": True, "verify": False, **options}
        settings = {"controller": setpoint.PricedController(), **settings}
        self.loop = setpoint.attach(self.model, self.optimizers, 0.4, **settings)

    def train(self, first: int, last: int, *, save: bool = False) -> dict[int, Any]:
        """The states ahead of each step, where they are to be saved."""
        saved = {}
        for step in range(first, last):
            if save:
                saved[step] = copy.deepcopy([part.state_dict() for part in (self.model, *self.optimizers)])
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            nn.functional.cross_entropy(self.model(x), x[:, :3].argmax(1)).backward()
            for optimizer in self.optimizers:
                optimizer.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        return saved

    def load(self, states: Any, *numbers: int) -> Half:
        for number in numbers:
            [self.model, *self.optimizers][number].load_state_dict(copy.deepcopy(states[number]))
        return self


PAIR = (torch.optim.AdamW, torch.optim.SGD)


@pytest.mark.parametrize("example", [None, EXAMPLES[mlp]])
def test_a_half_of_a_state_is_named_before_the_next_step(example: Any) -> None:
    """Claim: only the optimizer's state, only the model's, one optimizer of two, states of different steps of which
    the widths differ: each is an error ahead of the step, and once the rest is loaded too, the run goes on to the bit.
    """
    whole = Half(kinds=PAIR, example=example)
    saved = whole.train(0, 30, save=True)
    for numbers, other, words in (
        ((1, 2), {}, "optimizer's state of step 20 was loaded, the model's was not, or is of another step: load both"),
        ((0,), {}, "the model was cut, but no state of a loop has come with its optimizer"),
        ((0, 1), {}, r"optimizers\[0\] has loaded a state of step 20, optimizers\[1\] no state"),
        ((0, 2), {}, r"optimizers\[0\] has loaded no state, optimizers\[1\] a state of step 20"),
        ((0, 1, 2), {2: 25}, r"a state of step 20, optimizers\[1\] a state of step 25: load all"),
        ((0, 1, 2), {0: 1}, "optimizer's state of step 20 was loaded, the model's was not, or is of another step"),
    ):
        again = Half(seed=1, kinds=PAIR, example=example)
        again.load({number: saved[other.get(number, 20)][number] for number in numbers}, *numbers)
        before = [tensor.clone() for tensor in again.model.parameters()]
        with pytest.raises(CheckpointError, match=words):
            again.train(20, 21)
        assert all(map(torch.equal, before, again.model.parameters()))
        if example is not None:
            again.model.zero_grad()
            again.load(saved[20], 1, 2, 0).train(20, 30)
            assert all(map(torch.equal, whole.model.parameters(), again.model.parameters())), words
            assert again.loop.widths == whole.loop.widths
        again.loop.detach()


def test_an_optimizers_state_from_before_attach_names_the_way_that_works() -> None:
    """Claim: a cut run's optimizer state under a dense model is refused, and what the error advises works."""
    saved = Half().train(0, 26, save=True)[25]
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    optimizer.load_state_dict(saved[1])
    with pytest.raises(CheckpointError, match=r"load both states.* after attach\(\.\.\., resume=True\)"):
        setpoint.attach(model, optimizer, 0.4, total_steps=30, example=EXAMPLES[mlp], resume=True)
    again = Half().load(saved, 1, 0)
    again.train(25, 30)
    assert again.loop.finish().budget_met


def test_weights_of_another_step_are_warned_of() -> None:
    """Claim: where all widths fit, the next step warns once that the weights are not those beside the optimizer's
    state; not where they were only rounded to half precision.
    """
    saved = Half().train(0, 30, save=True)
    for step in (25, 28):
        again = Half().load(saved[25], 1)
        again.load(saved[step], 0)
        if step == 25:
            again.train(25, 27)
            continue
        with pytest.warns(UserWarning, match=r"6 weights of 6, the first '0\.weight', differ from those of step 25"):
            again.train(25, 26)
    again = Half().load([{name: tensor.half() for name, tensor in saved[25][0].items()}, saved[25][1]], 1, 0)
    again.train(25, 26)


@pytest.mark.parametrize(("kinds", "now", "back"), [(PAIR, 28, 3), (PAIR, 12, 25), (PAIR, 26, 25), (PAIR[:1], 9, 9)])
def test_an_older_state_takes_a_run_back(kinds: Any, now: int, back: int) -> None:
    """Claim: in the middle of a run, loop, model and optimizers go to a wider or narrower state, the optimizer's first,
    and train on as that run did; a wider model's state without it is refused, with nothing changed.
    """
    whole, run = Half(kinds=kinds), Half(kinds=kinds)
    saved = whole.train(0, 30, save=True)
    run.train(0, now)
    if now == 28:
        before = copy.deepcopy(run.model.state_dict())
        with pytest.raises(LoopError, match=r"with resume=True load the optimizer's state first: it takes loop and"):
            run.load(saved[back], 0)
        assert all(map(torch.equal, before.values(), run.model.state_dict().values()))
    run.load(saved[back], *range(1, len(kinds) + 1), 0)
    assert run.loop.step == back
    run.train(back, 30)
    assert all(map(torch.equal, whole.model.parameters(), run.model.parameters()))
    rows = [[{k: v for k, v in row.items() if "sec" not in k} for row in r.loop.ledger.to_rows()] for r in (whole, run)]
    assert rows[0] == rows[1]
    assert run.loop.finish().train_flops == whole.loop.finish().train_flops


@pytest.mark.parametrize("example", [None, EXAMPLES[mlp]])
def test_a_state_of_another_kind_of_optimizer_is_refused_by_name(example: Any) -> None:
    """Claim: SGD's state under AdamW, or two that are exchanged, say whose the state is, and nothing is changed."""
    saved = Half(kinds=PAIR).train(0, 20, save=True)[19]
    again = Half(kinds=PAIR, example=example)
    before = [tensor.clone() for tensor in again.model.parameters()]
    with pytest.raises(CheckpointError, match=r"of optimizers\[1\] \(SGD\), and optimizers\[0\] \(AdamW\) is to load"):
        again.load([*saved[:1], *saved[:0:-1]], 1)
    assert all(map(torch.equal, before, again.model.parameters())) and not again.optimizers[0].state
    again.loop.detach()


@pytest.mark.parametrize("example", [None, EXAMPLES[mlp]])
@pytest.mark.filterwarnings("error")
def test_a_run_that_is_not_asked_to_go_on_says_so(example: Any) -> None:
    """Claim: without resume=True a state that carries a loop's warns, and names the flag, also before any cut."""
    saved = Half().train(0, 2, save=True)[1]
    again = Half(resume=False, example=example)
    with pytest.warns(UserWarning, match=r"a new run begins: attach\(\.\.\., resume=True\) continues it"):
        again.load(saved, 0, 1).train(1, 2)
    assert again.loop.step == 1
    again.loop.detach()


class Heads(nn.Module):
    """Writes the number of its heads in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(12, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        heads = self.q(x).view(len(x), 4, -1)
        return self.out(heads.softmax(2).flatten(1)) * scale


class Tied(nn.Module):
    """One weight embeds and reads out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 24), nn.Linear(24, 24), nn.Linear(24, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(x)).relu())


def halved(build: Make, x: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model cut to a half of its units, and its state without metadata."""
    torch.manual_seed(0)
    model = build()
    groups = setpoint.find_groups(model, (x,))
    half = {group.name: np.arange(group.num_units) < group.num_units // 2 for group in groups}
    setpoint.shrink(model, None, groups, half)
    return model, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("build", "x"), [(Heads, torch.ones(4, 12)), (Tied, torch.arange(8).view(2, 4))])
@pytest.mark.parametrize("way", ["called", "compiled", "copied", "pickled", "wrapped"])
def test_the_first_call_after_a_load_without_sizes_is_exact(build: Make, x: Tensor, way: str) -> None:
    """Claim: sizes in the root's own forward are right in the very first call, also compiled, in a copy and in a
    wrapper that binds its function, as Accelerate's; tied weights load. The signature of the forward is the class's
    own at any time, and without sizes nothing of Setpoint is left. A pickle loads, and its second call is exact.
    """
    small, state = halved(build, x)
    loaded, own = setpoint.resumable(build()), inspect.signature(build().forward)
    loaded.load_state_dict(state)
    assert inspect.signature(loaded.forward) == own
    model = loaded
    if way == "copied":
        model = copy.deepcopy(loaded)
    elif way == "compiled":
        model = torch.compile(loaded, backend="eager")
    elif way == "pickled":
        model = pickle.loads(pickle.dumps(loaded))
        model(x)
    elif way == "wrapped":
        inner = loaded.forward.__func__
        loaded.forward = MethodType(wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs)), loaded)
    for _ in range(2):
        assert torch.equal(model(x), small(x))
    called = loaded if way == "compiled" else model
    assert inspect.signature(called.forward) == own
    if way not in ("pickled", "wrapped"):
        assert ("forward" in vars(called)) == (build is Heads)
        loaded.load_state_dict(build().state_dict())
        assert "forward" not in vars(loaded) and inspect.signature(loaded.forward) == own


def test_a_state_that_widens_a_finished_model_is_warned_of() -> None:
    """Claim: a best state from before the last cut loads after `finish` with a warning, a later one without."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)), torch.randn(8, 6)
    optimizer, states = torch.optim.SGD(model.parameters(), 0.1), []
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=20, example=(x,), resume=True)
    for _ in range(20):
        states.append(copy.deepcopy(model.state_dict()))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop.finish().budget_met
    model.load_state_dict(states[-1])
    with pytest.warns(UserWarning, match="makes the model wider again, .* loop.budget_met"):
        model.load_state_dict(states[0])
    assert model[0].out_features == 32
