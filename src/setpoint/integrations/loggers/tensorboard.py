"""TensorBoard: a `SummaryWriter`, of PyTorch, tensorboardX or the like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from setpoint.integrations.loggers.logger import Logger, has, not_installed


def _opener() -> Callable[[], Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise not_installed("TensorBoard", "tensorboard") from error
    return SummaryWriter


def _write(writer: Any, metrics: Mapping[str, float], step: int) -> None:
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)


TENSORBOARD = Logger(lambda to: has(to, "add_scalar"), _opener, _write, close=lambda writer: writer.close())
