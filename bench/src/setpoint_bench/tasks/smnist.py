"""The task smnist: MNIST read pixel by pixel by a state-space model."""

from __future__ import annotations

from pathlib import Path

from setpoint_bench.catalogue import task
from setpoint_bench.recipe import Recipe
from setpoint_bench.sequences import PixelSequences, SequenceFamily
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.tasks import mnist


@task("smnist")
@task("smnist-196", "MNIST as sequences of 196 averages of four pixels; model and passes of smnist.", pool=2)
def smnist(data: Path | None = None, *, pool: int = 1) -> SimpleTask:
    """MNIST as sequences of 784 pixels; one recurrent block of 256 states, three passes.

    Model, batch and dropout are those of CompreSSM's sMNIST (ICLR 2026), whose runs are about sixty times longer.

    Args:
        data: folder that holds `ylecun/mnist`, or None for the usual places.
        pool: averages of so many pixels each way are read.
    """
    images = PixelSequences(mnist.splits, (1, 28, 28), mnist.NUM_TRAIN, (33.3,), (78.6,), pool=pool, folder=data)
    recipe = Recipe(steps=1, batch=50, rule="adamw", learning_rate=4e-3, weight_decay=0.01, warm_up=0.1)
    name = "smnist" if pool == 1 else "smnist-196"
    return SimpleTask(name, SequenceFamily(inputs=1, channels=8, states=256), images, recipe).with_epochs(3)
