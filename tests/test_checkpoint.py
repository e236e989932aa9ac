from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jaxtyping
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import setpoint
from actuator.hand_made import CASES, Tied, group, mlp, mlp_model, residual, some_keep, train_step
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import named_tensors
from setpoint.checkpoint import fit
from setpoint.checkpoint.model_file import load, save
from setpoint.errors import CheckpointError, SetpointError
from setpoint.groups.group import Group, random_keep
from setpoint.groups.trace import find_groups
from setpoint.integrations import log_to


def shrunk(name: str, tmp_path: Path) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...], tuple[Group, ...], Path]:
    """A trained and shrunk model saved to a file, and a dense one of the same code with other weights."""
    model, inputs, groups = CASES[name]()
    dense, _, _ = CASES[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train_step(model, optimizer, inputs)
    groups = shrink(model, optimizer, groups, some_keep(groups))
    save(model, tmp_path / "small.safetensors")
    return model, dense, inputs, groups, tmp_path / "small.safetensors"


@pytest.mark.parametrize("name", list(CASES))
def test_a_loaded_model_is_the_saved_one(name: str, tmp_path: Path) -> None:
    """Claim: outputs are bit-equal after a round trip, the code's sizes too, and parameters keep their identity; a
    second file has the bytes of the first.
    """
    model, dense, inputs, groups, path = shrunk(name, tmp_path)
    parameters = list(dense.parameters())
    assert load(path, into=dense) is dense
    assert all(one is other for one, other in zip(parameters, dense.parameters(), strict=True))
    assert str(dense) == str(model)
    save(dense, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert torch.equal(model(*inputs), dense(*inputs))
    again = shrink(dense, None, groups, some_keep(groups, seed=1))
    assert [each.num_units for each in again] == [int(some_keep(groups, 1)[g.name].sum()) for g in groups]


@pytest.mark.parametrize(("given", "name"), [(None, "NoneType"), (nn.Linear, "the class Linear"), ({}, "dict")])
def test_what_is_no_model_is_refused_in_a_sentence(given: Any, name: str, tmp_path: Path) -> None:
    """Claim: None, a class in a model's place, a state dict: the error says what is wanted and what came."""
    file = tmp_path / "n.safetensors"
    for call in (
        lambda: load(file, into=given),
        lambda: save(given, file),
        lambda: setpoint.resumable(given),
        lambda: setpoint.shrink_to(given, {}),
        lambda: setpoint.bake(given),
    ):
        with pytest.raises(CheckpointError, match=f"takes a torch.nn.Module, got (an? )?{name}: give the model itself"):
            call()
    assert not file.exists()


def test_a_class_in_the_place_of_an_object_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: whatever takes a model or a loop says that it was given a class."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    file, kind, loop, x = tmp_path / "run", cast(Any, nn.Linear), cast(Any, setpoint.Loop), torch.zeros(1, 2)
    calls: list[Callable[[], Any]] = [
        lambda: setpoint.save_run(file, model=kind),
        lambda: setpoint.load_run(file, model=kind),
        lambda: setpoint.find_groups(kind, (x,)),
        lambda: setpoint.find_weights(kind),
        lambda: setpoint.shrink(nn.Linear(2, 3), None, (), {}, copies=[kind]),
        lambda: setpoint.unsharded(kind).__enter__(),
        lambda: setpoint.attach(kind, [], 0.5, total_steps=2),
        lambda: log_to(loop, file),
    ]
    for call in calls:
        with pytest.raises(SetpointError, match="the class L(inear|oop)"):
            call()


def test_loading_keeps_memory_format_and_frozen_parameters(tmp_path: Path) -> None:
    """Claim: `into` decides on memory format and requires_grad, the file on dtype; gradients are dropped."""
    model, _, inputs, _, path = shrunk("residual", tmp_path)
    save(model.bfloat16(), path)
    dense = residual()[0].to(memory_format=torch.channels_last)
    dense.stem.weight.requires_grad_(False)
    dense(*inputs).sum().backward()
    load(path, into=dense)
    assert dense.conv.weight.dtype == torch.bfloat16
    assert dense.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert [dense.stem.weight.requires_grad, dense.conv.weight.requires_grad] == [False, True]
    assert all(parameter.grad is None for parameter in dense.parameters())


class Odd(nn.Module):
    """Complex weights, a scalar, an empty tensor, an integer buffer and two non-persistent buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("none", torch.zeros(0, 2))
        self.register_buffer("count", torch.tensor([3, 1]))
        self.register_buffer("gain", torch.arange(4.0), persistent=False)
        self.register_buffer("cache", torch.zeros(100), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.mix.T).abs() * self.gain * self.scale


def test_complex_empty_and_non_persistent_tensors(tmp_path: Path) -> None:
    """Claim: complex, scalar, empty and integer tensors come back; so does a non-persistent buffer that was cut."""
    model, dense, x = Odd(), Odd(), torch.randn(2, 3)
    units = group("units", 4, "mix:0:produce gain:0:carry")
    shrink(model, None, (units,), {"units": np.array([True, False, True, True])})
    save(model, tmp_path / "odd.safetensors")
    with safe_open(tmp_path / "odd.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"mix", "scale", "none", "count", "gain"}
    load(tmp_path / "odd.safetensors", into=dense)
    assert torch.equal(dense(x), model(x)) and dense(x).shape == (2, 3)
    assert dense.mix.dtype == torch.complex64 and dense.count.tolist() == [3, 1]


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    """Claim: one of two names is in the file; a model that does not tie them is refused."""
    _, dense, _, _, path = shrunk("tied", tmp_path)
    with safe_open(path, framework="pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118
    load(path, into=dense)
    assert dense.head.weight is dense.embed.weight
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    refuse(path, untied, "tie different tensors: 'head.weight'")


def test_plain_code_can_read_the_file(tmp_path: Path) -> None:
    """Claim: the format is as documented: safetensors, sizes and digest as JSON under one metadata key."""
    model, _, _, _, path = shrunk("mlp", tmp_path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["setpoint"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
    assert header["format"] == 1
    assert header["sizes"] == {
        "0": {"out_features": 4},
        "2": {"in_features": 4, "out_features": 4},
        "4": {"in_features": 4},
    }
    digest = hashlib.sha256()
    rest = {key: value for key, value in header.items() if key not in ("format", "sha256")}
    digest.update(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(json.dumps([name, "float32", list(tensors[name].shape)]).encode())
        digest.update(tensors[name].numpy().tobytes())
    assert digest.hexdigest() == header["sha256"]


def refuse(path: Path, into: nn.Module, words: str) -> None:
    """Loading raises CheckpointError and changes nothing."""
    before = {name: (tensor, tensor.data_ptr(), tensor.clone()) for name, tensor in named_tensors(into).items()}
    text = str(into)
    with pytest.raises(CheckpointError, match=words):
        load(path, into=into)
    assert str(into) == text
    for name, tensor in named_tensors(into).items():
        same, pointer, value = before[name]
        assert tensor is same and tensor.data_ptr() == pointer and torch.equal(tensor, value)


def rewritten(path: Path, change: Callable[[dict[str, object], dict[str, Tensor]], object]) -> None:
    """Write the file again with its header and tensors changed, but not the digest in it."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["setpoint"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, metadata={"setpoint": json.dumps(header)})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.unlink(), "cannot read.*No such file"),
        (lambda p: (p.unlink(), p.mkdir()), "is a folder, and setpoint.save did not write it"),
        (lambda p: p.write_bytes(b""), "damaged or not a safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-7]), "damaged or not a safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:40]), "damaged or not a safetensors file"),
        (lambda p: p.write_bytes(b"hello, I am not a model"), "damaged or not a safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-3] + b"\x01\x02\x03"), "digest does not match"),
        (lambda p: rewritten(p, lambda h, t: h["sizes"]["0"].update(out_features=3)), "digest does not match"),
        (lambda p: rewritten(p, lambda h, t: t.update({"0.bias": t["2.bias"] + 1})), "digest does not match"),
        (lambda p: rewritten(p, lambda h, t: h.pop("sizes")), "digest does not match"),
        (lambda p: rewritten(p, lambda h, t: h.update(format=2)), "format 2.*upgrade Setpoint"),
        (lambda p: torch.save(mlp_model().state_dict(), p), "is a pickle"),
        (lambda p: torch.save({}, p, _use_new_zipfile_serialization=False), "is a pickle"),
        (lambda p: save_file({"0.weight": torch.zeros(2)}, p), "setpoint.save did not write it"),
    ],
)
def test_a_bad_file_is_refused(spoil: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    """Claim: a missing, cut off, foreign, pickled, newer or altered file raises CheckpointError and loads nothing."""
    _, dense, _, _, path = shrunk("mlp", tmp_path)
    spoil(path)
    refuse(path, dense, words)


def test_a_folder_of_save_pretrained_says_who_reads_it(tmp_path: Path) -> None:
    """Claim: the weights beside a setpoint.json, and their folder, are refused with the call that loads them."""
    save_file({"0.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "setpoint.json").write_text("{}", encoding="utf-8")
    said = f"setpoint.enable_checkpointing(), then from_pretrained({str(tmp_path)!r})"
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=re.escape(said)):
            load(path, mlp_model())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh()), "only the file has '2.bias'"),
        (lambda: nn.Sequential(*mlp_model(), nn.Linear(2, 2)), "only the model has '5.bias', '5.weight'"),
        (
            lambda: mlp_model(3, 5),
            r"'0.bias' has shape \(4,\) there, \(6,\) before any cut, and here it was built with \(3,\)",
        ),
        (
            lambda: nn.Sequential(nn.Linear(3, 6, dtype=torch.complex64), *mlp_model()[1:]),
            "float32 in the file and torch.c",
        ),
    ],
)
def test_a_wrong_model_is_refused(other: Callable[[], nn.Module], words: str, tmp_path: Path) -> None:
    """Claim: other names, larger tensors than the model's and other kinds of numbers raise CheckpointError."""
    refuse(shrunk("mlp", tmp_path)[-1], other(), words)


def test_a_model_without_data_or_sizes_is_refused(tmp_path: Path) -> None:
    """Claim: tensors on the meta device, and same tensors in code that lacks a size, raise CheckpointError."""
    _, dense, _, _, path = shrunk("mlp", tmp_path)
    with pytest.raises(CheckpointError, match="meta device"):
        load(path, into=mlp_model().to("meta"))
    del dense[2].in_features
    with pytest.raises(CheckpointError, match="made for another model.*no 'in_features'"):
        load(path, into=dense)


def test_a_failure_while_loading_is_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: an exception after some tensors were replaced puts them all back."""
    _, dense, inputs, _, path = shrunk("residual", tmp_path)
    before = copy.deepcopy(dense.state_dict())

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(fit, "apply_sizes", fail)
    with pytest.raises(MemoryError):
        load(path, into=dense)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert dense(*inputs).shape == (3, 3)


class Extra(nn.Linear):
    """Keeps something in its state dict that is not a tensor."""

    def get_extra_state(self) -> object:
        return {"anything": 1}


class Marked(torch.Tensor):
    """A tensor subclass."""


def test_models_that_tensors_alone_do_not_describe_are_refused(tmp_path: Path) -> None:
    """Claim: extra state, tensor subclasses and tensors without data raise CheckpointError, and no file appears."""
    special = nn.Linear(2, 2)
    special.bias = nn.Parameter(torch.zeros(2).as_subclass(Marked))
    for model, words in (
        (nn.Sequential(Extra(2, 2)), "module '0' .Extra. keeps extra state"),
        (special, "'bias' is a Marked"),
        (nn.Linear(2, 2, device="meta"), "meta device"),
    ):
        with pytest.raises(CheckpointError, match=words):
            save(model, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot write"):
        save(nn.Linear(2, 2), tmp_path / "no" / "folder.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_cut_submodule_is_saved_within_its_parent(tmp_path: Path) -> None:
    """Claim: a model of which only a part was cut, by itself, comes back as a whole."""
    part, inputs, groups = mlp()
    model = nn.Sequential(part, nn.Linear(2, 2))
    shrink(part, None, groups, some_keep(groups))
    save(model, tmp_path / "whole.safetensors")
    dense = nn.Sequential(mlp_model(), nn.Linear(2, 2))
    assert torch.equal(load(tmp_path / "whole.safetensors", into=dense)(*inputs), model(*inputs))
    assert str(dense) == str(model)


def exchanged(model: nn.Sequential) -> None:
    """Put new layers of the same shape in the places of the old ones."""
    for place, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            model[place] = nn.Linear(layer.in_features, layer.out_features)


@pytest.mark.parametrize("nested", [False, True])
def test_a_cut_model_with_exchanged_modules_saves_a_file_that_loads(nested: bool, tmp_path: Path) -> None:
    """Claim: a new layer in a cut one's place inherits what the file needs: sizes, and shapes before the cuts."""
    model, inputs, groups = mlp()
    groups = shrink(model, None, groups, some_keep(groups))
    exchanged(model)
    shrink(model, None, groups, some_keep(groups, seed=1))
    exchanged(model)
    whole, dense = (nn.ModuleDict({"net": each}) if nested else each for each in (model, mlp()[0]))
    save(whole, tmp_path / "small.safetensors")
    load(tmp_path / "small.safetensors", into=dense)
    assert str(dense) == str(whole)
    again = dense["net"] if nested else dense
    assert torch.equal(again(*inputs), model(*inputs))
    save(dense, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()


def test_a_head_for_another_task_on_a_cut_model_is_saved_as_it_is(tmp_path: Path) -> None:
    """Claim: a new last layer of other outputs loads into the dense model with that layer, and into no other."""
    model, inputs, groups = mlp()
    shrink(model, None, groups, some_keep(groups))
    model[4] = nn.Linear(model[4].in_features, 9)
    save(model, tmp_path / "small.safetensors")
    refuse(tmp_path / "small.safetensors", mlp()[0], r"'4.bias' has shape|'4.weight' has shape")
    dense = mlp()[0]
    dense[4] = nn.Linear(dense[4].in_features, 9)
    assert torch.equal(load(tmp_path / "small.safetensors", into=dense)(*inputs), model(*inputs))


def test_an_exchanged_module_whose_forward_is_corrected_saves_a_file_that_loads(tmp_path: Path) -> None:
    """Claim: where the code gives sizes itself, the dense model gets those of the cut one's calls."""

    class Heads(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.dim, self.heads = dim, heads
            self.inner, self.outer = nn.Linear(6, dim), nn.Linear(dim, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x).view(len(x), self.heads, self.dim // self.heads).relu().flatten(1))

    model, x = nn.Sequential(Heads(12, 4)), torch.randn(3, 6)
    groups = find_groups(model, (x,))
    assert groups
    shrink(model, None, groups, random_keep(groups, seed=1))
    width = model[0].inner.out_features
    assert width < 12
    again = Heads(width, width // 3)
    model[0] = again
    save(model, tmp_path / "small.safetensors")
    assert torch.equal(load(tmp_path / "small.safetensors", into=nn.Sequential(Heads(12, 4)))(x), model(x))


def test_a_compiled_model_is_saved_as_the_model_it_wraps(tmp_path: Path) -> None:
    """The wrapper of `torch.compile` is looked through: the file loads into the plain model."""
    model = nn.Linear(3, 2)
    save(torch.compile(model, backend="eager"), tmp_path / "model")
    again = load(tmp_path / "model", into=nn.Linear(3, 2))
    assert torch.equal(again.weight, model.weight)
