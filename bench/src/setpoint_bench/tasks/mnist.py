"""The MNIST task: 28x28 handwritten digits and four convolutions."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from setpoint_bench.catalogue import task
from setpoint_bench.image_family import PlainFamily
from setpoint_bench.image_set import ImageSet
from setpoint_bench.images import Images, Splits
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask, smoothed_cross_entropy

MNIST = ImageSet("ylecun/mnist", column="image", mode="L")
NUM_TRAIN = 54_000


@task("mnist")
def mnist(data: Path | None = None) -> SimpleTask:
    """MNIST: 54,000 images train, 6,000 validate and 10,000 test; three passes.

    LeCun et al., "Gradient-based learning applied to document recognition", Proceedings of the IEEE 86 (1998).

    Args:
        data: folder that holds `ylecun/mnist`, or None for the usual places.
    """
    family = PlainFamily((32, 32, 64, 64), frozenset({1, 2, 4}), inputs=1, block=4)
    images = Images(splits, (1, 28, 28), NUM_TRAIN, mean=(33.3,), deviation=(78.6,), shift=2, folder=data)
    recipe = Recipe(steps=1, learning_rate=0.2, mixed=True)
    return SimpleTask("mnist", family, images, recipe, training_criterion=smoothed_cross_entropy).with_epochs(3)


@lru_cache(maxsize=1)
def splits(data: Path | None) -> Splits:
    return MNIST.splits(data)
