"""MLflow: the module `mlflow`, a run, or a client beside the run that is active; and Lightning's loggers, all of which
have `log_metrics(metrics, step=...)`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from setpoint.errors import UsageError
from setpoint.integrations.loggers.logger import Logger, has, not_installed


def _fits(to: Any) -> bool:
    return has(to, "log_metrics") or has(to, "log_batch") or hasattr(getattr(to, "info", None), "run_id")


def _mlflow() -> Any:
    try:
        import mlflow
    except ImportError as error:
        raise not_installed("MLflow", "mlflow") from error
    return mlflow


def _opener() -> Callable[[], Any]:
    found = _mlflow()
    return lambda: found


def _write(to: Any, metrics: Mapping[str, float], step: int) -> None:
    named = {re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII): value for name, value in metrics.items()}
    if has(to, "log_metrics"):
        to.log_metrics(named, step=step)
        return
    mlflow = _mlflow()
    client, run = (to, mlflow.active_run()) if has(to, "log_batch") else (mlflow.MlflowClient(), to)
    if run is None:
        raise UsageError("an MLflow client needs a run: begin one by mlflow.start_run(), or give log_to the run itself")
    now = time.time_ns() // 1_000_000
    client.log_batch(run.info.run_id, [mlflow.entities.Metric(name, value, now, step) for name, value in named.items()])


MLFLOW = Logger(_fits, _opener, _write)
