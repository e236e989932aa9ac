"""Log to: a loop's metrics, after each step, to the logger that the script has."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from setpoint.errors import LoopError, UsageError
from setpoint.integrations.loggers.ledger_file import LedgerFile
from setpoint.integrations.loggers.logger import Logger
from setpoint.integrations.loggers.mlflow import MLFLOW
from setpoint.integrations.loggers.tensorboard import TENSORBOARD
from setpoint.integrations.loggers.trackio import TRACKIO
from setpoint.integrations.loggers.wandb import WANDB
from setpoint.loop.loop import Loop
from setpoint.loop.summary import Summary
from setpoint.loop.telling import News
from setpoint.messages import a_type

LOGGERS = {"tensorboard": TENSORBOARD, "mlflow": MLFLOW, "wandb": WANDB, "trackio": TRACKIO}
"""By name, in the order in which an object is held against them."""


def log_to(loop: Loop, to: Any, *, every: int = 1, prefix: str = "setpoint/") -> Callable[[], object]:
    """Log where a run is: its metrics to a logger, or its ledger to a file that grows with each decision.

    Of several ranks the first logs. A loop that has not begun is logged from its first step on.

    Args:
        to: a TensorBoard `SummaryWriter`; a W&B run; a trackio run, or anything else with `log(metrics, step=...)`; the
            module `mlflow`, an MLflow run or client, or anything else with `log_metrics(metrics, step=...)`; one of
            their names, "tensorboard", "wandb", "trackio" or "mlflow", for a new one; or the path of a `.jsonl` file,
            which gets the ledger.
        every: log after so many steps, at each decision, and at the end.
        prefix: what the names of metrics begin with.

    Returns:
        stops the logging.

    Raises:
        ModuleNotFoundError: for the name of a logger that is not installed, saying what to install.
        UsageError: for what is no logger.
        LoopError: after `finish`.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is a number of steps, at least 1, got {every!r}")
    begun = bool(loop.metrics())
    if begun and loop.summary is not None:
        raise LoopError("the run is finished, so that nothing is to come: call log_to before loop.finish()")
    if isinstance(to, os.PathLike) or isinstance(to, str) and to.endswith(".jsonl"):
        return _follow(loop, LedgerFile(to), begun)
    name, logger = _logger(to)
    logging = _Logging(loop, logger, logger.opener() if name else lambda: to, every, prefix)
    return loop.on_step(logging.then_close if name else logging)


def _follow(loop: Loop, file: LedgerFile, begun: bool) -> Callable[[], object]:
    def seen(news: News) -> None:
        if loop.host.ranks.own == 0 and (news is not None or not file.begun):
            file.follow(loop.ledger)

    if begun:
        seen(None)
    return loop.on_step(seen)


class _Logging:
    """Writes a loop's metrics to a logger, which is made when there is something to write, on the rank that does."""

    def __init__(self, loop: Loop, logger: Logger, opener: Callable[[], Any], every: int, prefix: str) -> None:
        self._loop, self._logger, self._opener, self._every, self._prefix = loop, logger, opener, every, prefix
        self._to: Any = None
        self._logged: int | None = None

    def __call__(self, news: News) -> None:
        loop, logger, prefix = self._loop, self._logger, self._prefix
        if loop.host.ranks.own or loop.step == self._logged or news is None and loop.step % self._every:
            return
        if self._logged is None:
            self._to = self._opener()
            logger.prepare(self._to, prefix)
        logger.write(self._to, {f"{prefix}{name}": value for name, value in loop.metrics().items()}, loop.step)
        self._logged = loop.step

    def then_close(self, news: News) -> None:
        """The same, and close at the end what nobody else has at hand."""
        self(news)
        if isinstance(news, Summary) and self._to is not None:
            self._logger.close(self._to)


def _logger(to: Any) -> tuple[str, Logger]:
    """The kind of a logger, and its name if it was asked for by that."""
    if isinstance(to, str):
        if to in LOGGERS:
            return to, LOGGERS[to]
    else:
        for logger in LOGGERS.values():
            if logger.fits(to):
                return "", logger
    what = repr(to) if isinstance(to, (str, int, float, type(None))) else a_type(to)
    raise UsageError(
        f"log_to cannot log to {what}: give a SummaryWriter, a wandb, trackio or MLflow run, one of the names "
        f"{', '.join(map(repr, LOGGERS))}, or the path of a file that ends in .jsonl"
    )
