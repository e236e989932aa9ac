"""timm's own string of shapes, from which it builds pruned models without Setpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models import MobileNetV3, ResNet, VisionTransformer, adapt_model_from_string
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

import setpoint
from setpoint.errors import CheckpointError
from setpoint.groups.group import random_keep
from setpoint.integrations.timm import shape_string


def residual(block: Any = BasicBlock, **more: Any) -> nn.Module:
    return ResNet(block, (1, 1, 1, 1), channels=(8, 8, 16, 16), stem_width=8, num_classes=4, **more)


def mobile() -> nn.Module:
    blocks = decode_arch_def([["ds_r1_k3_s1_e1_c8"], ["ir_r1_k3_s2_e3_c16_se0.25"], ["cn_r1_k1_s1_c24"]])
    return MobileNetV3(blocks, num_classes=4, stem_size=8, num_features=32)


def cut(model: nn.Module) -> nn.Module:
    """With other widths everywhere, and statistics of its own."""
    model.train()(torch.rand(4, 3, 32, 32))
    groups = setpoint.find_groups(model, (torch.rand(2, 3, 32, 32),))
    setpoint.shrink(model, None, groups, random_keep(groups))
    return model


@pytest.mark.parametrize(
    "build", [residual, lambda: residual(Bottleneck, global_pool="catavgmax"), mobile], ids=["plain", "both", "mobile"]
)
def test_timm_builds_the_cut_model_from_the_string(build: Callable[[], nn.Module]) -> None:
    """Claim: the dense model, adapted by timm and given the weights, computes the same bits; nothing else changes."""
    model, x = cut(build()), torch.rand(2, 3, 32, 32)
    string = shape_string(model)
    assert model.training and string == shape_string(copy.deepcopy(model))
    small = adapt_model_from_string(build(), string)
    small.load_state_dict(model.state_dict())
    assert torch.equal(small.eval()(x), model.eval()(x))
    assert {tuple(p.shape) for p in small.parameters()} != {tuple(p.shape) for p in build().parameters()}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: residual(Bottleneck, cardinality=4), "conv2', a Conv2d: .*groups=.* in place of .*groups=4"),
        (
            lambda: VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2),
            "attn.qkv.* timm builds it with",
        ),
    ],
    ids=["grouped", "attention"],
)
def test_what_the_string_cannot_say_is_refused_by_name(build: Callable[[], nn.Module], words: str) -> None:
    """Claim: grouped convolutions and attention are named, and what to do instead."""
    model = cut(build())
    with pytest.raises(CheckpointError, match=words) as caught:
        shape_string(model)
    assert "setpoint.save" in str(caught.value)
