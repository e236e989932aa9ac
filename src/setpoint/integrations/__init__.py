"""One line each for frameworks and loggers; an optional package is imported in one file, when it is asked for."""

from setpoint.integrations.loggers import log_to

__all__ = ["log_to"]
