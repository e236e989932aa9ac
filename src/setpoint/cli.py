"""The command line: inspect and report, and what the package setpoint-bench adds to it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from setpoint.command_line import (
    Out,
    check_folder,
    console,
    errors_as_messages,
    finish,
    misuse,
    names,
    numbers,
    write_json,
)

GROUP = "setpoint.commands"
"""Entry points of other packages: commands, and the halves of `report` and `inspect` that belong to benchmarks."""
PACKED_FILES = ("results.jsonl.xz", "timing.jsonl.xz", "histories.jsonl.xz")
RESULT_FILES = ("results.jsonl", "timing.jsonl", *PACKED_FILES)
"""Files of a results folder that are no ledgers."""


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder that `bench` or `demo` wrote, or a ledger's file.", metavar="DIR|FILE")
    ],
    out: Out = None,
) -> None:
    """Show the results in a folder as tables, and write them to results.md and report.html.

    Of a ledger that a run of your own saved, by `loop.ledger.save("run.jsonl")`, show what was decided and spent, and
    write run.html.
    """
    with errors_as_messages():
        check_folder(out)
        if folder.is_file() and folder.name in RESULT_FILES:
            raise misuse(f"{folder} is one file of a results folder: give the folder, {folder.parent}")
        if folder.is_file() or (folder.suffix == ".jsonl" and not folder.exists()):
            _report_ledger(folder, out)
        else:
            _added("report-folder", "report FOLDER")(folder, out)


def inspect(
    target: Annotated[
        str | None, typer.Argument(help="A model of torchvision, timm or transformers, or module.py:function.")
    ] = None,
    input: Annotated[
        str | None, typer.Option("--input", help="Shape of the example, with commas; by default the model's usual.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Try the cuts on a copy of the model, as attach does.")] = True,
    spending: Annotated[
        bool, typer.Option("--spending", help="Also time a training step here: seconds and bytes by group.")
    ] = False,
    suite: Annotated[
        str | None, typer.Option(help="Check a whole family instead: torchvision, timm, transformers or plain.")
    ] = None,
    models: Annotated[str | None, typer.Option(help="Which models of the suite, with commas.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that check models of the suite; 0: this one; by default 2.", min=0)
    ] = None,
    out: Out = None,
) -> None:
    """Show a model's groups, what each costs, the cheapest reachable model, and what is frozen and why."""
    with errors_as_messages():
        if (target is None) == (suite is None):
            raise misuse("name either a model to inspect or a whole family with --suite, such as --suite timm")
        check_folder(out)
        if target is not None:
            if models is not None:
                raise misuse(f"--models picks from a suite: leave it out to inspect {target}")
            if workers is not None:
                raise misuse(f"--workers shares out the models of a suite: leave it out to inspect {target}")
            _inspect(target, None if input is None else tuple(numbers(input, "--input", int)), verify, out, spending)
        elif suite is not None:
            if input is not None:
                raise misuse("--input is for a single model: a suite has inputs of its own")
            chosen = None if models is None else names(models, "--models")
            _added("inspect-suite", "inspect --suite")(suite, chosen, 2 if workers is None else workers, out)


def make_app() -> typer.Typer:
    """The command line, with the commands of the packages that are installed."""
    made = typer.Typer(
        name="setpoint",
        help="Prune PyTorch models while they train, to a budget held by a feedback controller.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name in ("demo", "bench"):
        if entry_points(group=GROUP, name=name):
            made.command(name)(_added(name, name))
        else:
            anything = {"ignore_unknown_options": True, "allow_extra_args": True}
            made.command(name, context_settings=anything)(_absent(name))
    made.command()(report)
    made.command()(inspect)
    return made


def _added(name: str, command: str) -> Callable[..., None]:
    """What another package does for a command."""
    found = entry_points(group=GROUP, name=name)
    if not found:
        raise misuse(f"`setpoint {command}` is part of the benchmark, a package of its own: pip install setpoint-bench")
    loaded: Callable[..., None] = next(iter(found)).load()
    return loaded


def _absent(name: str) -> Callable[[], None]:

    def command() -> None:
        """Part of the benchmark: pip install setpoint-bench."""
        with errors_as_messages():
            _added(name, name)

    return command


def _inspect(target: str, shape: tuple[int, ...] | None, verify: bool, out: Path | None, spending: bool) -> None:
    from dataclasses import asdict

    from setpoint.report.inspect_model import inspect_model, load_target
    from setpoint.report.inspection_page import write_inspection
    from setpoint.report.inspection_tree import inspection_tree

    model, example = load_target(target, shape)
    found = inspect_model(target, model, example, verify=verify)
    if verify and not found.verified:
        print(f"{target} is large: read from its shapes alone, no cut was tried on a copy", file=sys.stderr)
    screen = console()
    screen.print(inspection_tree(found))
    answer: dict[str, Any] = asdict(found)
    if spending:
        from setpoint.report import group_spending

        shown = group_spending.spending(model, example, [group.name for group in found.groups if not group.kept_whole])
        screen.print(group_spending.spending_table(shown))
        answer["spending"] = asdict(shown)
    if out is not None:
        write_json(out / "inspect.json", answer)
        try:
            write_inspection(answer, out / "inspect.html")
        except ImportError as error:
            print(f"no inspect.html: {error}", file=sys.stderr)
    finish(answer)


def _report_ledger(file: Path, out: Path | None) -> None:
    from setpoint.report.ledger_page import ledger_tables, read_ledger, write_ledger_page
    from setpoint.report.resources import ledger_line

    record, screen = read_ledger(file), console()
    for table in ledger_tables(record):
        screen.print(table)
    shown = ledger_line(record)
    screen.print(shown, soft_wrap=True, markup=False, highlight=False)
    try:
        page = str(write_ledger_page(file, None if out is None else out / file.with_suffix(".html").name))
    except ImportError as error:
        print(f"no page: {error}", file=sys.stderr)
        page = None
    finish({"report": page, "ledger": shown})


app = make_app()
