"""What all commands share: output for readers, JSON for machines, and errors in one line with exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import Console

FAILED = 1
MISUSE = 2
INTERRUPTED = 130

_as_json: ContextVar[bool] = ContextVar("as_json", default=False)
_answers: ContextVar[Any] = ContextVar("answers", default=None)
"""Standard output as it was when a command with --json began: what a user's file prints goes to standard error."""


def _choose(as_json: bool) -> bool:
    _as_json.set(as_json)
    return as_json


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", callback=_choose)]
"""A command that has this option may call `console` and `finish`, which know what was chosen."""


def out_option(otherwise: str) -> Any:
    """The option --out of a command, and what holds without it."""
    return typer.Option("--out", help=f"Folder for everything that is written; {otherwise}.", metavar="DIR")


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """What a user can put right becomes one line on stderr and exit code 2."""
    from setpoint.errors import SetpointError

    _answers.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr) if _as_json.get() else nullcontext():
            yield
    except (SetpointError, OSError, ImportError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename} cannot be read or written: {error.strerror}"
        print(f"error: {message}", file=sys.stderr)
        raise typer.Exit(MISUSE) from None
    except KeyboardInterrupt:
        print("interrupted: finished runs are kept, and the same command goes on from there", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


class OneLine(TyperGroup):
    """Commands that report a misuse in one line, too, and whose help shows flags without a value."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by its name."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _show_without_value(command.get_params(ctx))
        return command

    def get_params(self, ctx: Any) -> Any:
        """The options of all commands."""
        return _show_without_value(super().get_params(ctx))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; standing alone, end the process with its exit code."""
        run = partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except typer.Abort:
            code = FAILED
        except Exception as error:  # typer's own are of click, or of a copy of it
            told = getattr(error, "format_message", None)
            if told is None:
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
            else:
                at = getattr(error, "ctx", None)
                said = " ".join(told().split()).removesuffix(".")
                for what in ("integer", "number"):
                    said = said.replace(f"Input should be a valid {what}, unable to parse string as", "it takes")
                said = said.replace("it takes a number", "it takes a number, such as 0.5 or 2e8")
                dot = "" if said.endswith("?") else "."
                then = f"{dot} {at.command_path} -h shows examples" if at is not None else ""
                print(f"error: {said}{then}", file=sys.stderr)
            code = MISUSE
        sys.exit(code if isinstance(code, int) else 0)


def _show_without_value(parameters: Sequence[Any]) -> Sequence[Any]:
    for each in parameters:
        if getattr(each, "is_flag", False):
            each.metavar = ""  # newer versions of Typer show <bool>
    return parameters


def misuse(message: str) -> Exception:
    """The error for a command that cannot be done as given."""
    from setpoint.errors import UsageError

    return UsageError(message)


def check_folder(out: Path | None) -> None:
    """Refuse what is no folder and cannot be made one, or takes no file; nothing is left behind."""
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise misuse(f"--out {out} is a file: name a folder")
    made = [each for each in (out, *out.parents) if not each.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise misuse(f"{out} cannot be read or written: {error.strerror}: name another folder by --out") from error
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()


def console() -> Console:
    """Standard output; in a pipe it is wide, so that tables keep their shape, and with --json it is mute."""
    from rich.console import Console

    if _as_json.get():
        return Console(quiet=True)
    return Console() if sys.stdout.isatty() else Console(width=200)


def finish(answer: dict[str, Any], then: str) -> None:
    """End a command: say what to do next, or with --json write the answer.

    Args:
        answer: one JSON object, with --json all of stdout.
        then: the next step.
    """
    from setpoint.report.values import finite

    if _as_json.get():
        print(json.dumps(finite(answer)), file=_answers.get(), flush=True)
    else:
        console().print(f"next: {then}", soft_wrap=True, markup=False, highlight=False)


def examples(*lines: str) -> str:
    """Examples below the help of a command."""
    return "\n\n".join(("Examples:", *(f"  {line}" for line in lines)))


def write_json(path: Path, answer: dict[str, Any]) -> None:
    """Write an answer to a file of its own."""
    from setpoint.report.values import finite

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(answer), indent=2) + "\n", encoding="utf-8")


def names(text: str, option: str) -> list[str]:
    """Words between commas."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise misuse(f"{option} is empty: give names with commas between them")
    return words


def numbers(text: str, option: str, kind: type[Any]) -> list[Any]:
    """Numbers between commas."""
    try:
        return [kind(word) for word in names(text, option)]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise misuse(f"{option} takes {what} with commas between them, got {text!r}") from error
