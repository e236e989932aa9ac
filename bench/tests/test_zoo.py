"""Models by name: a model and an example from each library."""

from __future__ import annotations

import sys

import pytest

from setpoint.errors import UsageError
from setpoint.report.inspection import inspect_model
from setpoint_bench.zoo import named_model


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
        ("jax:resnet50", "unknown library 'jax'.*or FILE.py:function"),
        ("bert-base-uncased", "are written owner/name, such as google-bert/bert-base-uncased"),
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


@pytest.mark.parametrize(
    ("target", "shape", "unit"),
    [
        ("torchvision:squeezenet1_1", (2, 3, 64, 64), "channel"),
        ("timm:test_convnext", None, "neuron"),
        ("transformers:poolformer", (2, 3, 64, 64), "channel"),
    ],
)
def test_models_by_name(target: str, shape: tuple[int, ...] | None, unit: str) -> None:
    """A model of each library is inspected by its name alone, verified or not."""
    pytest.importorskip(target.partition(":")[0])
    model, example = named_model(target, shape)
    found = inspect_model(target, model, example, verify="squeezenet" in target)
    assert any(group.what == unit and not group.kept_whole for group in found.groups)
    assert 0 < found.cheapest_flops < found.flops and 0 < found.cheapest_params < found.params
    assert found.frozen and 0 < found.prunable_params_share <= 1
