"""The fine-tuning task: a network pretrained on six classes of CIFAR-10 learns the other four from 2,000 images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from setpoint_bench.catalogue import task
from setpoint_bench.image_family import PlainFamily
from setpoint_bench.images import Images, Splits, classes_only
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask, smoothed_cross_entropy
from setpoint_bench.task import Dimension
from setpoint_bench.tasks import cifar10

PRETRAINED = Path(__file__).parent / "pretrained" / "six-classes.safetensors"
SIX = (0, 1, 2, 3, 4, 5)
FOUR = (6, 7, 8, 9)
NUM_SIX = 26_982
NUM_TRAIN = 2000


@dataclass(frozen=True)
class PretrainedFamily:
    """Plain networks of which the dense one starts from trained convolutions, with a classifier of its own.

    A narrower one starts from scratch.

    Args:
        plain: the networks.
        checkpoint: the dense one's convolutions and norms.
    """

    plain: PlainFamily
    checkpoint: Path

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        return self.plain.dimensions

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        model = self.plain.build(widths)
        dense = all(widths[name] == dimension.dense for name, dimension in self.dimensions.items())
        if dense and not next(model.parameters()).is_meta:
            model.get_submodule("features").load_state_dict(load_file(self.checkpoint))
        return model


def save_features(model: nn.Module, checkpoint: Path) -> None:
    """Keep a plain network's convolutions and norms, in half precision."""
    features = model.get_submodule("features").state_dict()
    halved = {name: value.half() if value.is_floating_point() else value for name, value in features.items()}
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in halved.items()}, checkpoint)


def pretraining(data: Path | None = None) -> SimpleTask:
    """What the committed checkpoint was trained on: airplanes, automobiles, birds, cats, deer and dogs.

    Args:
        data: folder that holds `uoft-cs/cifar10`, or None for the usual places.
    """
    images = _images(splits_six, NUM_SIX, data)
    recipe = Recipe(steps=1, learning_rate=0.2, fall="linear", mixed=True)
    family = replace(cifar10.MINI, classes=len(SIX))
    made = SimpleTask("pretraining", family, images, recipe, training_criterion=smoothed_cross_entropy)
    return made.with_epochs(8)


@task("finetune")
def finetune(data: Path | None = None) -> SimpleTask:
    """A network that was trained on six classes of CIFAR-10 learns the other four.

    2,000 frogs, horses, ships and trucks train, those in CIFAR-10's validation tenth validate, 4,000 test.

    A fifth of the steps of the pretraining.

    Args:
        data: folder that holds `uoft-cs/cifar10`, or None for the usual places.
    """
    family = PretrainedFamily(replace(cifar10.MINI, classes=len(FOUR)), PRETRAINED)
    images = _images(splits_four, NUM_TRAIN, data)
    recipe = Recipe(steps=pretraining().steps // 5, learning_rate=0.05, fall="linear", mixed=True)
    return SimpleTask(
        "finetune",
        family,
        images,
        recipe,
        training_criterion=smoothed_cross_entropy,
        scratch_learning_rate=4.0,  # the peak that the checkpoint was trained at
    )


def _images(load: Callable[[Path | None], Splits], num_train: int, data: Path | None) -> Images:
    return Images(load, (3, 16, 16), num_train, cifar10.MEAN, cifar10.DEVIATION, shift=2, flip=True, folder=data)


@lru_cache(maxsize=1)
def splits_six(data: Path | None) -> Splits:
    return _chosen(cifar10.splits_16(data), SIX)


@lru_cache(maxsize=1)
def splits_four(data: Path | None) -> Splits:
    """Small images of the four classes, the first 2,000 of those that train."""
    chosen = _chosen(cifar10.splits_16(data), FOUR)
    images, labels = chosen["train"]
    return {**chosen, "train": (images[:NUM_TRAIN], labels[:NUM_TRAIN])}


def _chosen(splits: Splits, classes: tuple[int, ...]) -> Splits:
    """The images of these classes, whose labels count from 0."""
    chosen = {}
    for name, (images, labels) in splits.items():
        places, renumbered = classes_only(labels, classes)
        chosen[name] = (images[places], renumbered)
    return chosen
