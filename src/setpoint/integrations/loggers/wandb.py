"""Weights & Biases: a run, or the module `wandb` with a run that has begun."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from setpoint.integrations.loggers.logger import Logger, has, not_installed


def _opener() -> Callable[[], Any]:
    try:
        import wandb
    except ImportError as error:
        raise not_installed("Weights & Biases", "wandb") from error
    return lambda: wandb.run or wandb.init()


def _prepare(run: Any, prefix: str) -> None:
    run.define_metric(f"{prefix}step")
    run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")


def _write(run: Any, metrics: Mapping[str, float], step: int) -> None:
    run.log(dict(metrics))  # without step=: W&B drops rows that lie behind, and the script counts its own


WANDB = Logger(lambda to: has(to, "log", "define_metric"), _opener, _write, _prepare)
