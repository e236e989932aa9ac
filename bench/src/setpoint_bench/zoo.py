"""Models of libraries that the benchmark trains: names, sizes and configurations of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from setpoint.report.zoo import library


def classifier_names() -> list[str]:
    """Names of torchvision's models that classify images."""
    models = library("torchvision").models
    return list(models.list_models(module=models))


def bert_encoder(**sizes: int) -> nn.Module:
    """An untrained BERT encoder without a pooler; `sizes` are named as in its configuration."""
    transformers = library("transformers")
    encoder: nn.Module = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    return encoder


def timm_network(name: str, classes: int) -> nn.Module:
    """An untrained network of timm with this many classes."""
    network: nn.Module = library("timm").create_model(name, pretrained=False, num_classes=classes)
    return network


def small_config(name: str, known: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
    """The configuration of a model type at `sizes`, and at those `known` sizes whose names the type has."""
    transformers = library("transformers")
    plain = transformers.AutoConfig.for_model(name)
    fitting = {key: value for key, value in known.items() if hasattr(plain, key)}
    return transformers.AutoConfig.for_model(name, **{**fitting, **sizes})
