"""A target: a model and an example by a library's name, or from a function of a user's file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from setpoint.errors import UsageError
from setpoint.report.target import load_target, named_model


@pytest.mark.parametrize(
    ("target", "shape", "inputs"),
    [
        ("torchvision:squeezenet1_1", None, {"0": (2, 3, 224, 224)}),
        ("squeezenet1_1", (1, 3, 64, 64), {"0": (1, 3, 64, 64)}),
        ("torchvision:r3d_18", None, {"0": (2, 3, 16, 112, 112)}),
        ("torchvision:lraspp_mobilenet_v3_large", None, {"0": (2, 3, 224, 224)}),
        ("timm:test_vit", None, {"0": (2, 3, 160, 160)}),
        ("transformers:bert", (3, 24), {"input_ids": (3, 24), "attention_mask": (3, 24)}),
        ("transformers:t5", None, {"input_ids": (2, 128), "decoder_input_ids": (2, 74)}),
        ("transformers:segformer", None, {"pixel_values": (2, 3, 224, 224)}),
    ],
)
def test_a_name_is_enough(target: str, shape: tuple[int, ...] | None, inputs: dict[str, tuple[int, ...]]) -> None:
    """Every library's models come in train mode with inputs of their usual size, or of the size asked for."""
    pytest.importorskip(target.partition(":")[0] if ":" in target else "torchvision")
    model, example = named_model(target, shape)
    assert model.training
    found = example if isinstance(example, dict) else dict(enumerate(example))
    assert {str(key): tuple(value.shape) for key, value in found.items()} == inputs


def test_large_models_have_shapes_only() -> None:
    """A transformers model of billions of parameters is made without its weights, and its inputs likewise."""
    pytest.importorskip("transformers")
    model, example = named_model("transformers:llama")
    assert sum(parameter.numel() for parameter in model.parameters()) > 6e9
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(value.is_meta for value in example.values())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torchvision:resnet5", "did you mean .*resnet50"),
        ("timm:vit_tiny_patch16_22", "did you mean timm:vit_tiny_patch16_224"),
        ("transformers:gpt-2", "did you mean transformers:gpt2"),
        ("jax:resnet50", "unknown library 'jax'"),
        ("model.py", "the model, model.py:function"),
        ("torchvison/resnet18", r"did you mean torchvision\?"),
        ("bert-base-uncased", "are written owner/name, such as google-bert/bert-base-uncased"),
        (__file__.replace("report/test_target.py", "slow.txt"), "is a file and no model"),
    ],
)
def test_unknown_names(target: str, message: str) -> None:
    """An unknown name is an error that tells the nearest names, or what to give instead."""
    with pytest.raises(UsageError, match=message):
        named_model(target)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timm its models are unknown, and the error says what to install; other libraries still serve."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"unknown model 'test_vit'.*not installed: timm"):
        named_model("test_vit")
    with pytest.raises(UsageError, match=r"'timm:test_vit' needs timm: pip install timm"):
        named_model("timm:test_vit")
    model, _ = named_model("squeezenet1_1")
    assert model.training


def test_without_any_library_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a bare installation the error says what to install."""

    def absent(library: str) -> list[str]:
        raise ImportError(library)

    monkeypatch.setattr("setpoint.report.target.library_names", absent)
    words = r"'resnet18' needs a model library: pip install torchvision \(or timm, transformers\)"
    with pytest.raises(UsageError, match=words):
        named_model("resnet18")


OWN = """
import torch
from torch import nn

def helper():
    raise KeyError("no such layer")

def fails():
    return helper()

def without_inputs():
    return nn.Linear(3, 4)

def too_many():
    return nn.Linear(3, 4), 1, 2

def number():
    return 3

def fine():
    return nn.Linear(3, 4), torch.zeros(2, 3)

net = nn.Linear(3, 4)
"""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("fails", r"model.py:fails raised KeyError: 'no such layer' \(at model.py:6: \"raise KeyError"),
        ("without_inputs", "returned a model without inputs: return `model, "),
        ("too_many", "returned 3 things"),
        ("number", "returned an int: return a torch.nn.Module"),
        ("fin", "has no function 'fin': did you mean fine"),
        ("net", "net is a Linear itself: name a function without arguments that returns net"),
    ],
)
def test_what_goes_wrong_in_a_users_file_is_one_line(tmp_path: Path, function: str, said: str) -> None:
    """An exception names function, line and message; a model without inputs is asked for them and gets no images."""
    file = tmp_path / "model.py"
    file.write_text(OWN)
    with pytest.raises(UsageError, match=said):
        load_target(f"{file}:{function}")
    assert load_target(f"{file}:without_inputs", (2, 3))[1][0].shape == (2, 3)
    assert load_target(f"{file}:fine")[1][0].shape == (2, 3)


@pytest.mark.parametrize(
    ("text", "said"), [("def f(:\n", "SyntaxError"), ("import not_there\ndef f(): ...\n", "No module named")]
)
def test_a_file_that_does_not_load_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    """So does a file that Python cannot read."""
    file = tmp_path / "model.py"
    file.write_text(text)
    with pytest.raises(UsageError, match=f"{said}.* \\(at model.py:1"):
        load_target(f"{file}:f")


def test_a_file_without_the_function_is_not_run(tmp_path: Path) -> None:
    """Claim: a name that the file does not define is refused before the file is run, with the nearest name."""
    file = tmp_path / "model.py"
    file.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef build(): ...\n")
    with pytest.raises(UsageError, match="has no function 'buld': did you mean build"):
        load_target(f"{file}:buld")
    assert not (tmp_path / "ran").exists()
