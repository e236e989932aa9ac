"""Loggers: a loop's metrics, after each step, go to the logger that the script has; a ledger goes to a growing file."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from setpoint.errors import LoopError, UsageError
from setpoint.loop.loop import Loop
from setpoint.loop.summary import Event, Summary
from setpoint.messages import a_type, warn

_LOGGERS = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "trackio": "trackio", "mlflow": "MLflow"}


def log_to(loop: Loop, to: Any, *, every: int = 1, prefix: str = "setpoint/") -> Callable[[], object]:
    """Log where a run is: its metrics to a logger, or its ledger to a file that grows with each decision.

    Of several ranks the first logs. A loop that has not begun is logged from its first step on. What cannot be written,
    to a full disk say, is warned of once and does not end the training: each later write is another try.

    Args:
        to: a TensorBoard `SummaryWriter`; a W&B run; a trackio run, or anything else with `log(metrics, step=...)`; the
            module `mlflow`, or anything else with `log_metrics(metrics, step=...)`; one of their names, "tensorboard",
            "wandb", "trackio" or "mlflow", for a new one; or the path of a `.jsonl` file, which gets the ledger.
        every: log after so many steps, at each decision, and at the end.
        prefix: what the names of metrics begin with.

    Returns:
        stops the logging.

    Raises:
        ModuleNotFoundError: for the name of a logger that is not installed, saying what to install.
        UsageError: for what is no logger.
        LoopError: after `finish`.
    """
    if not isinstance(loop, Loop):
        raise UsageError(f"log_to logs a loop, which attach returns, got {a_type(loop)}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is a number of steps, at least 1, got {every!r}")
    begun = bool(loop.metrics())
    if begun and loop.summary is not None:
        raise LoopError("the run is finished, so that nothing is to come: call log_to before loop.finish()")
    if isinstance(to, os.PathLike) or isinstance(to, str) and to.endswith(".jsonl"):
        return loop.on_step(_forgiving(_ledger_writer(loop, Path(to), begun=begun), to))
    return loop.on_step(_forgiving(_metrics_writer(loop, to, every, prefix), to))


def _forgiving(write: Callable[[Event], None], to: Any) -> Callable[[Event], None]:
    """`write`, with a warning the first time that the system refuses."""
    warned = False

    def try_to_write(event: Event) -> None:
        nonlocal warned
        try:
            write(event)
        except OSError as error:
            if not warned:
                warned = True
                what = str(to) if isinstance(to, (str, os.PathLike)) else a_type(to)
                fixes = {FileNotFoundError: "make its folder", PermissionError: "allow writing there"}
                fix = fixes.get(type(error), "make room if the disk is full")
                warn(
                    f"log_to cannot write to {what} ({type(error).__name__}: {error}). Training continues, loop.ledger "
                    f"has all of it, and each later write is another try: {fix}, or call loop.ledger.save(path)"
                )

    return try_to_write


def _ledger_writer(loop: Loop, path: Path, *, begun: bool) -> Callable[[Event], None]:
    """What keeps a file equal to the ledger, on the first rank."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}: make it first")

    def write(event: Event) -> None:
        # All of it, which is rarely much: the entry of the last cut learns later what the cut did to the loss.
        if loop.host.ranks.own == 0 and (event is not None or not path.exists()):
            loop.ledger.save(path)

    if begun and loop.host.ranks.own == 0:
        loop.ledger.save(path)
    return write


def _metrics_writer(loop: Loop, to: Any, every: int, prefix: str) -> Callable[[Event], None]:
    """What writes a loop's metrics to a logger, which is made when there is something to write, on the first rank."""
    named = isinstance(to, str)
    if not (to in _LOGGERS if named else any(_has(to, name) for name in ("add_scalar", "log", "log_metrics"))):
        what = repr(to) if isinstance(to, (str, int, float, type(None))) else a_type(to)
        raise UsageError(
            f"log_to cannot log to {what}: give a SummaryWriter, a wandb or trackio run, the module mlflow, one of the "
            f"names {', '.join(map(repr, _LOGGERS))}, or the path of a file that ends in .jsonl"
        )
    open_logger: Callable[[], Any] = _opener(to) if named else lambda: to
    logger: Any = None
    logged: int | None = None

    def write(event: Event) -> None:
        nonlocal logger, logged
        if loop.host.ranks.own:
            return
        if loop.step != logged and (event is not None or loop.step % every == 0):
            if logged is None:
                logger = open_logger()
                if _is_wandb(logger):  # an axis of its own, as W&B's steps are not the loop's
                    logger.define_metric(f"{prefix}step")
                    logger.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
            _write(logger, {f"{prefix}{name}": value for name, value in loop.metrics().items()}, loop.step)
            logged = loop.step
        if isinstance(event, Summary) and named and _has(logger, "add_scalar"):
            logger.close()  # nobody else has it at hand

    return write


def _opener(name: str) -> Callable[[], Any]:
    """What makes a new logger; the package is looked for at once, so that a run does not fail at its first step."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter
        if name == "wandb":
            import wandb

            return lambda: wandb.run or wandb.init()
        if name == "trackio":
            import trackio
            from trackio.context_vars import current_run

            return lambda: current_run.get() or trackio.init(project="setpoint")
        import mlflow

        return lambda: mlflow
    except ImportError as error:
        raise ModuleNotFoundError(f"{_LOGGERS[name]} is not installed: pip install {name}", name=name) from error


def _has(to: Any, method: str) -> bool:
    return callable(getattr(to, method, None))


def _is_wandb(to: Any) -> bool:
    return _has(to, "log") and _has(to, "define_metric")


def _write(to: Any, metrics: Mapping[str, float], step: int) -> None:
    if _has(to, "add_scalar"):  # a `SummaryWriter`, of PyTorch, tensorboardX or the like
        for name, value in metrics.items():
            to.add_scalar(name, value, step)
    elif _has(to, "log_metrics"):  # MLflow takes no other signs in a name
        named = {re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII): value for name, value in metrics.items()}
        to.log_metrics(named, step=step)
    elif _is_wandb(to):
        to.log(dict(metrics))  # without step=: W&B drops rows that lie behind, and the script counts its own
    else:
        to.log(dict(metrics), step=step)
