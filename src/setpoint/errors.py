"""What a user can catch: every error Setpoint raises on purpose.

Each message says what is wrong, what was given, and what to do about it. After any of them the
user's model and optimizer are as they were before the call.
"""

from collections.abc import Iterator
from contextlib import contextmanager


def printable(text: str) -> str:
    r"""A text with its control characters written out, but for line breaks and tabs: a terminal would obey them.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)


class SetpointError(Exception):
    """Root of all errors that Setpoint raises on purpose.

    >>> import setpoint
    >>> try:
    ...     setpoint.Budget.fraction(1.5, of="flops")
    ... except setpoint.SetpointError as error:
    ...     print(type(error).__name__)
    BudgetError
    """

    def __str__(self) -> str:
        return printable(super().__str__())  # names in it may come from a file that somebody else wrote


class BudgetError(SetpointError, ValueError):
    """A budget that makes no sense, names an unknown resource, or cannot be reached."""


class ExampleError(SetpointError, ValueError):
    """An `example` that the model does not accept: wrong shape, device, type or number of inputs."""


class ExportError(SetpointError, RuntimeError):
    """A model whose forward `torch.export` cannot follow, or that no file can hold; the message names the line."""


class PathError(SetpointError, RuntimeError):
    """A forward that makes other calls than at the example, so that its sizes cannot be corrected by place."""


class OptimizerError(SetpointError, ValueError):
    """An optimizer that does not train the model, or whose state cannot follow a resize."""


class GroupError(SetpointError, ValueError):
    """A group, unit or keep vector that does not fit the model."""


class StateSpaceError(SetpointError, ValueError):
    """A state-space layer that is not stable, not finite or not of the form that it should have."""


class VerificationError(SetpointError, RuntimeError):
    """A cut that did not behave like its masked twin on a copy, so it was not applied."""


class LoopError(SetpointError, RuntimeError):
    """A call at the wrong time: a second `attach`, a second `finish`, a step after the end."""


class NotBegunError(LoopError, AttributeError):
    """A question about a loop that waits for the first optimizer step."""


class RuntimeUnavailable(SetpointError, RuntimeError):
    """A runtime whose package is missing, or that cannot run the model; the message says what to install or change."""


class CheckpointError(SetpointError, ValueError):
    """A file that is damaged, not a Setpoint file, or made for another model."""


@contextmanager
def as_written(what: str) -> Iterator[None]:
    """Inside, the contents of a file or a state are taken apart: those of another form are a CheckpointError.

    >>> with as_written("the file"):
    ...     {}["weight"]
    Traceback (most recent call last):
    setpoint.errors.CheckpointError: the file is damaged: KeyError('weight')
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # Python prints the text of a cause as it is.
        raise CheckpointError(f"{what} is damaged: {error!r}") from (error if str(error).isprintable() else None)


class UsageError(SetpointError, ValueError):
    """A command that asks for what there is not: a model, a function or a shape."""


class ReportError(SetpointError, ValueError):
    """A results folder that is empty, damaged, or written in an unknown format."""


class CostError(SetpointError, ValueError):
    """A cost that cannot be predicted or measured for this model on this device."""


class RankError(SetpointError, RuntimeError):
    """Processes that train one model together and do not agree, or of which one has failed or is lost."""
