"""The deep image task: the pretrained ResNet-56 of He et al. adapts to CIFAR-10 in compressed images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from setpoint_bench.catalogue import task
from setpoint_bench.data import find_data
from setpoint_bench.images import Images, Splits, channels_last
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError, Dimension
from setpoint_bench.tasks import cifar10

WEIGHTS = "akamaster/pytorch_resnet_cifar10"
SOURCE = "https://github.com/akamaster/pytorch_resnet_cifar10"
MEAN = tuple(255 * each for each in (0.485, 0.456, 0.406))
DEVIATION = tuple(255 * each for each in (0.229, 0.224, 0.225))
STAGES = (16, 32, 64)
NUM_TRAIN, PASSES = 10_000, 3
NUM_VALIDATION = 2_000


class PaddedBlock(nn.Module):
    """Residual block whose shortcut has no weights: `relu(pad(x) + bn2(conv2(relu(bn1(conv1(x))))))`.

    Where the stream gets wider and half as high, every second row and column goes on, between channels of zeros.
    """

    def __init__(self, inputs: int, inner: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.added = (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, inner, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return F.relu(x + y)


class PaddedNet(nn.Module):
    """Residual network for 32x32 images with shortcuts that have no weights (option A).

    He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2.

    Args:
        widths: `"layer1.block1"` is the inner width of the first block, and so on.
        blocks: of each of the three stages.
    """

    def __init__(self, widths: Mapping[str, int], blocks: int) -> None:
        super().__init__()
        width = STAGES[0]
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential() for _ in STAGES)
        for stage, layer in enumerate((self.layer1, self.layer2, self.layer3), start=1):
            for block in range(1, blocks + 1):
                outputs = STAGES[stage - 1]
                layer.append(PaddedBlock(width, widths[f"layer{stage}.block{block}"], outputs))
                width = outputs
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


@dataclass(frozen=True)
class PaddedFamily:
    """Networks of which the dense one starts from trained weights, and narrower ones from fresh weights.

    Only the inside of each block is free: the shortcuts tie the residual stream to its channels.

    Args:
        blocks: of each of the three stages; the network has 6 `blocks` + 2 layers.
        folder: the data folder, or None for the usual places.
    """

    blocks: int
    folder: Path | None = None

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        return {
            f"layer{stage}.block{block}": Dimension(width, 4)
            for stage, width in enumerate(STAGES, start=1)
            for block in range(1, self.blocks + 1)
        }

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        model = channels_last(PaddedNet(widths, self.blocks))
        dense = all(widths[name] == dimension.dense for name, dimension in self.dimensions.items())
        if dense and not next(model.parameters()).is_meta:
            model.load_state_dict(load_file(self._file()))
        return model

    def _file(self) -> Path:
        name = f"{WEIGHTS}/resnet{6 * self.blocks + 2}.safetensors"
        file = find_data(name, self.folder)
        if file is None:
            raise BenchError(
                f"cannot find {name}: name a folder that holds it by --data DIR or SETPOINT_DATA; the weights are "
                f"those of {SOURCE}, saved as safetensors without the prefix 'module.'"
            )
        return file


@task("resnet56")
def resnet56(data: Path | None = None) -> SimpleTask:
    """A ResNet-56 that was trained on CIFAR-10 adapts to compressed copies of its images.

    Three passes over 10,000 of the images that train; 2,000 of the test images validate, the others test. He et al.,
    "Deep residual learning for image recognition", CVPR 2016.

    Args:
        data: folder that holds `uoft-cs/cifar10` and the weights, or None for the usual places.
    """
    return replace(_task("resnet56", 9, data), neighbour="resnet20")


@task("resnet20")
def resnet20(data: Path | None = None) -> SimpleTask:
    """A ResNet-20 that was trained on CIFAR-10 adapts to compressed copies of its images: the rival of `resnet56`.

    Args:
        data: folder that holds `uoft-cs/cifar10` and the weights, or None for the usual places.
    """
    return _task("resnet20", 3, data)


def _task(name: str, blocks: int, data: Path | None) -> SimpleTask:
    images = Images(few_images, (3, 32, 32), NUM_TRAIN, MEAN, DEVIATION, shift=4, flip=True, folder=data)
    recipe = Recipe(steps=1, learning_rate=0.04, fall="linear", warm_up=0.1, mixed=True)
    made = SimpleTask(name, PaddedFamily(blocks, data), images, recipe, scratch_learning_rate=5.0)
    return made.with_epochs(PASSES)


@lru_cache(maxsize=1)
def few_images(data: Path | None) -> Splits:
    """CIFAR-10, of which few images train.

    The weights were trained on all images that train, so that only test images can tell what is lost: the first ones
    validate, the others test.
    """
    splits = cifar10.splits(data)
    (images, labels), (unseen, classes) = splits["train"], splits["test"]
    count = min(NUM_VALIDATION, len(unseen) // 2)
    return {
        "train": (images[:NUM_TRAIN], labels[:NUM_TRAIN]),
        "validation": (unseen[:count], classes[:count]),
        "test": (unseen[count:], classes[count:]),
    }
