"""The CIFAR-10 tasks: 32x32 colour images, or 16x16 for short runs, and networks of several sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from setpoint_bench.catalogue import task
from setpoint_bench.family import Family
from setpoint_bench.image_family import PlainFamily, ResidualFamily, ShortFamily
from setpoint_bench.image_set import ImageSet
from setpoint_bench.images import Images, Splits, ten_views
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask, smoothed_cross_entropy

CIFAR10 = ImageSet("uoft-cs/cifar10", column="img", mode="RGB")
NUM_TRAIN = 45_000
MEAN = (125.3, 123.0, 113.9)
DEVIATION = (63.0, 62.1, 66.7)
MINI = PlainFamily((32, 64, 64, 128, 128, 128), frozenset({1, 3, 5}))


@task("cifar10")
def cifar10(data: Path | None = None) -> SimpleTask:
    """CIFAR-10 and a residual network of seven convolutions, in sixteen passes.

    45,000 images train, 5,000 validate and 10,000 test.

    Krizhevsky, "Learning multiple layers of features from tiny images" (2009); the recipe, learning rate up and
    down in straight lines, mirrored and shifted images, whitened patches, and judgement by several views of each
    image, is after Page, "How to train your ResNet" (2018).

    Args:
        data: folder that holds `uoft-cs/cifar10`, or None for the usual places.
    """
    recipe = Recipe(steps=1, learning_rate=0.2, fall="linear", mixed=True, num_validations=5)
    made = _task("cifar10", ShortFamily((64, 192, 256)), recipe, data, shift=2).with_epochs(16)
    return replace(made, views=ten_views)


@task("cifar10-resnet18")
def cifar10_resnet18(data: Path | None = None) -> SimpleTask:
    """CIFAR-10 and a ResNet-18 in 100 passes, for a GPU.

    Args:
        data: folder that holds `uoft-cs/cifar10`, or None for the usual places.
    """
    family = ResidualFamily((64, 128, 256, 512), (2, 2, 2, 2))
    recipe = Recipe(steps=1, learning_rate=0.1, warm_up=0.05, mixed=True)
    return _task("cifar10-resnet18", family, recipe, data).with_epochs(100)


@task("cifar10-mini")
def cifar10_mini(data: Path | None = None) -> SimpleTask:
    """CIFAR-10 at 16x16 and six convolutions, for runs of a minute or two.

    Args:
        data: folder that holds `uoft-cs/cifar10`, or None for the usual places.
    """
    images = Images(splits_16, (3, 16, 16), NUM_TRAIN, MEAN, DEVIATION, shift=1, flip=True, folder=data)
    recipe = Recipe(steps=1, learning_rate=0.1, fall="linear", mixed=True)
    return SimpleTask("cifar10-mini", MINI, images, recipe, training_criterion=smoothed_cross_entropy).with_epochs(10)


def _task(name: str, family: Family, recipe: Recipe, data: Path | None, shift: int = 4) -> SimpleTask:
    images = Images(splits, (3, 32, 32), NUM_TRAIN, MEAN, DEVIATION, shift, flip=True, folder=data)
    return SimpleTask(name, family, images, recipe, training_criterion=smoothed_cross_entropy)


@lru_cache(maxsize=1)
def splits(data: Path | None) -> Splits:
    return CIFAR10.splits(data)


@lru_cache(maxsize=1)
def splits_16(data: Path | None) -> Splits:
    """The same, each square of four pixels averaged into one."""
    return {name: (_halved(images), labels) for name, (images, labels) in CIFAR10.splits(data).items()}


def _halved(images: Tensor) -> Tensor:
    return F.avg_pool2d(images.float(), 2)
