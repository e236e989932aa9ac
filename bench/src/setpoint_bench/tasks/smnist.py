"""The tasks smnist and scifar: MNIST and CIFAR-10 read pixel by pixel, also in a random order."""

from __future__ import annotations

from pathlib import Path

from setpoint_bench.catalogue import task
from setpoint_bench.recipe import Recipe
from setpoint_bench.sequences import PixelSequences, SequenceFamily
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.tasks import cifar10, mnist

_MNIST = SequenceFamily(inputs=1, channels=8, states=256)
_CIFAR = SequenceFamily(inputs=3, channels=64, states=384, blocks=2)


@task("smnist")
@task("smnist-196", "MNIST as sequences of 196 averages of four pixels; model and passes of smnist.", length=196)
@task("psmnist", "MNIST as sequences of 784 pixels in one random order; model and passes of smnist.", permuted=True)
@task(
    "psmnist-196",
    "MNIST as sequences of 196 averages of four pixels in one random order; model and passes of smnist.",
    length=196,
    permuted=True,
)
def smnist(data: Path | None = None, *, length: int = 784, permuted: bool = False) -> SimpleTask:
    """MNIST as sequences of 784 pixels; one recurrent block of 256 states, three passes.

    Model, batch and dropout are those of CompreSSM's sMNIST (ICLR 2026), whose runs are about sixty times longer.

    Args:
        data: folder that holds `ylecun/mnist`, or None for the usual places.
        length: 784 pixels, or 196 averages of four.
        permuted: whether pixels come in one fixed random order.
    """
    pool = {784: 1, 196: 2}[length]
    images = PixelSequences(
        mnist.splits, (1, 28, 28), mnist.NUM_TRAIN, (33.3,), (78.6,), pool=pool, permuted=permuted, folder=data
    )
    recipe = Recipe(steps=1, batch=50, rule="adamw", learning_rate=4e-3, weight_decay=0.01, warm_up=0.1)
    name = f"{'p' if permuted else ''}smnist{'' if length == 784 else f'-{length}'}"
    return SimpleTask(name, _MNIST, images, recipe).with_epochs(3)


@task("scifar")
@task("pscifar", "CIFAR-10 as sequences of 1,024 coloured pixels in one random order; as scifar.", permuted=True)
def scifar(data: Path | None = None, *, permuted: bool = False) -> SimpleTask:
    """CIFAR-10 as sequences of 1,024 coloured pixels; two recurrent blocks of 384 states, ten passes, for a GPU.

    Args:
        data: folder that holds `uoft-cs/cifar10`, or None for the usual places.
        permuted: whether pixels come in one fixed random order.
    """
    images = PixelSequences(
        cifar10.splits,
        (3, 32, 32),
        cifar10.NUM_TRAIN,
        cifar10.MEAN,
        cifar10.DEVIATION,
        permuted=permuted,
        folder=data,
    )
    recipe = Recipe(steps=1, batch=50, rule="adamw", learning_rate=4e-3, weight_decay=0.05, warm_up=0.1)
    return SimpleTask(f"{'p' if permuted else ''}scifar", _CIFAR, images, recipe).with_epochs(10)
