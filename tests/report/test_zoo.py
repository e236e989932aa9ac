"""The zoo: a model and an example by name, from each library."""

from __future__ import annotations

import sys

import pytest

from setpoint.errors import UsageError
from setpoint.report.zoo import named_model, transformers_model


@pytest.mark.parametrize(
    ("target", "shape", "inputs"),
    [
        ("torchvision:squeezenet1_1", None, {"0": (2, 3, 224, 224)}),
        ("squeezenet1_1", (1, 3, 64, 64), {"0": (1, 3, 64, 64)}),
        ("torchvision:r3d_18", None, {"0": (2, 3, 16, 112, 112)}),
        ("torchvision:raft_small", None, {"0": (2, 3, 128, 128), "1": (2, 3, 128, 128)}),
        ("torchvision:lraspp_mobilenet_v3_large", None, {"0": (2, 3, 224, 224)}),
        ("timm:test_vit", None, {"0": (2, 3, 160, 160)}),
        ("transformers:llama", None, {"input_ids": (2, 128), "attention_mask": (2, 128)}),
        ("transformers:segformer", None, {"pixel_values": (2, 3, 224, 224)}),
    ],
)
def test_a_name_is_enough(
    target: str, shape: tuple[int, ...] | None, inputs: dict[str, tuple[int, ...]], recwarn: pytest.WarningsRecorder
) -> None:
    """Every library's models come in train mode with inputs of their usual size, or of the size asked for."""
    pytest.importorskip(target.partition(":")[0] if ":" in target else "torchvision")
    model, example = named_model(target, shape)
    assert model.training
    found = example if isinstance(example, dict) else dict(enumerate(example))
    assert {str(key): tuple(value.shape) for key, value in found.items()} == inputs


def test_inputs_of_an_encoder_and_decoder() -> None:
    """The decoder's tokens are fewer than the encoder's, so that no dim of one can be mistaken for the other's."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    _, example = transformers_model(transformers.AutoConfig.for_model("t5", **sizes), (3, 24))
    assert [tuple(value.shape) for value in example.values()] == [(3, 24), (3, 14)]


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
        ("model.py", "module.py:function"),
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

    monkeypatch.setattr("setpoint.report.zoo.library_names", absent)
    words = r"'resnet18' needs a model library: pip install torchvision \(or timm, transformers\)"
    with pytest.raises(UsageError, match=words):
        named_model("resnet18")
