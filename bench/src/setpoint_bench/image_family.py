"""Families of image classifiers, in channels-last layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from setpoint_bench.images import channels_last
from setpoint_bench.networks import PlainNet, ResidualNet, ShortResidualNet
from setpoint_bench.task import Dimension


@dataclass(frozen=True)
class PlainFamily:
    """VGG-like networks."""

    channels: tuple[int, ...]
    pool_after: frozenset[int]
    inputs: int = 3
    classes: int = 10
    block: int = 8

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        return {f"conv{number}": Dimension(width, self.block) for number, width in enumerate(self.channels, start=1)}

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        return channels_last(PlainNet(widths, self.pool_after, channels=self.inputs, classes=self.classes))


@dataclass(frozen=True)
class ResidualFamily:
    """Residual networks, each stage after the first at half the height and width.

    He et al., "Deep residual learning for image recognition", CVPR 2016.
    """

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    inputs: int = 3
    classes: int = 10
    block: int = 8

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        return _stages(self.channels, self.blocks, self.block)

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        return channels_last(ResidualNet(widths, self.blocks, channels=self.inputs, classes=self.classes))


@dataclass(frozen=True)
class ShortFamily:
    """Residual networks of seven convolutions for short runs on colour images.

    Args:
        channels: dense widths of the three stages; the blocks inside are as wide as their stages.
    """

    channels: tuple[int, int, int]

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        first, second, third = (Dimension(width, 8) for width in self.channels)
        stages = {"stage1": first, "block1": first, "stage2": second, "stage3": third, "block3": third}
        return {"patches": Dimension(27), **stages}

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        return channels_last(ShortResidualNet(widths, classes=10))


def _stages(channels: tuple[int, ...], blocks: tuple[int, ...], block: int) -> dict[str, Dimension]:
    dimensions = {}
    for stage, (width, count) in enumerate(zip(channels, blocks, strict=True), start=1):
        dimensions[f"stage{stage}"] = Dimension(width, block)
        for number in range(1, count + 1):
            dimensions[f"stage{stage}.block{number}"] = Dimension(width, block)
    return dimensions
