"""trackio: a run, or the module `trackio` after its `init`; and whatever else has `log(metrics, step=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from setpoint.integrations.loggers.logger import Logger, has, not_installed


def _opener() -> Callable[[], Any]:
    try:
        import trackio
        from trackio.context_vars import current_run
    except ImportError as error:
        raise not_installed("trackio", "trackio") from error
    return lambda: current_run.get() or trackio.init(project="setpoint")


def _write(run: Any, metrics: Mapping[str, float], step: int) -> None:
    run.log(dict(metrics), step=step)


TRACKIO = Logger(lambda to: has(to, "log"), _opener, _write)
