"""The digits task: scikit-learn's 8x8 handwritten digits and a residual CNN far larger than they need."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from setpoint_bench.catalogue import task
from setpoint_bench.image_family import ResidualFamily
from setpoint_bench.images import Images, Splits
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask, smoothed_cross_entropy
from setpoint_bench.task import BenchError

NUM_TRAIN = 971


def digits(epochs: int = 40, width: int = 64) -> SimpleTask:
    """1,797 images: two fixed fifths test, a fixed tenth of the rest validates.

    Alpaydin and Kaynak, "Cascading classifiers", Kybernetika 34 (1998), as embedded in scikit-learn.

    Args:
        epochs: passes over the training images.
        width: channels of the first of two stages of two blocks; the second has twice as many. Wide nets are
            sized in steps of 8 channels, which run faster.
    """
    family = ResidualFamily((width, 2 * width), (2, 2), inputs=1, block=8 if width >= 64 else 4)
    data = Images(splits, (1, 8, 8), NUM_TRAIN, mean=(0.0,), deviation=(16.0,), shift=1)
    recipe = Recipe(steps=1, batch=64, learning_rate=0.1, warm_up=0.1, num_validations=20)
    made = SimpleTask(
        "digits", family, data, recipe, training_criterion=smoothed_cross_entropy, device=torch.device("cpu")
    )
    return made.with_epochs(epochs)


@task("digits")
def usual_digits(data: Path | None = None) -> SimpleTask:
    """1,797 handwritten digits and a residual network of eight convolutions, for runs of a minute.

    Raises:
        BenchError: a folder was named, where there is nothing to read.
    """
    if data is not None:
        raise BenchError("--data is for tasks that read a folder: the digits come with scikit-learn")
    return digits()


@lru_cache(maxsize=1)
def splits(data: Path | None) -> Splits:
    """Pixels 0 to 16 and labels of each split; the split never changes, and no data folder is needed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BenchError("the digits task needs scikit-learn: pip install setpoint-bench") from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    num_test = 2 * len(order) // 5
    parts = torch.split(order, [num_test, len(order) - num_test - NUM_TRAIN, NUM_TRAIN])
    names = ("test", "validation", "train")
    return {name: (images[part], targets[part]) for name, part in zip(names, parts, strict=True)}
