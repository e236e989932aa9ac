"""The torchvision suite: every classification builder up to 300 million parameters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from setpoint_bench.coverage import Build
from setpoint_bench.zoo import classifier_names, torchvision_model

_TOO_LARGE = {"regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32"}
"""Over 300 million parameters."""


def suite() -> Mapping[str, Build]:
    return {name: partial(_build, name) for name in classifier_names() if name not in _TOO_LARGE}


def _build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The untrained model and four small images; some are built for one size of image."""
    size = 224 if name.startswith(("vit", "maxvit")) else 299 if name == "inception_v3" else 64
    return torchvision_model(name, (4 if size == 64 else 2, 3, size, size))
