"""One line each for frameworks and loggers; an optional package is imported in one file, when it is asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from setpoint.integrations.loggers import log_to


def __getattr__(name: str) -> Any:
    # Loggers are loaded when somebody logs: `import setpoint` comes through this file.
    if name != "log_to":
        raise AttributeError(f"module 'setpoint.integrations' has no attribute {name!r}")
    from setpoint.integrations.loggers import log_to

    return log_to


__all__ = ["log_to"]
