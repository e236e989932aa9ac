"""The command line: demo, bench, report and inspect; the last line of stdout is one JSON object."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


app = typer.Typer(
    name="setpoint",
    help="Prune PyTorch models while they train, to a budget held by a feedback controller.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED = 1
MISUSE = 2
INTERRUPTED = 130

Out = Annotated[Path | None, typer.Option("--out", help="Folder for everything that is written.", metavar="DIR")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the data, for images.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder that holds the data.", metavar="DIR")]


@app.command()
def demo(
    budget: Annotated[float, typer.Option(help="FLOPs per step at the end, as a fraction of dense.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    epochs: Epochs = None,
    out: Out = None,
) -> None:
    """Train a residual CNN on handwritten digits: dense, small from scratch, and pruned by Setpoint."""
    with _errors_as_messages():
        _bench("digits", "dense,small,setpoint", [budget], [seed], out or Path("runs/demo-digits"), epochs=epochs)


@app.command()
def bench(
    task: Annotated[str, typer.Option(help="digits, cifar10, ...: a wrong one lists all; or own.py:function.")],
    methods: Annotated[
        str, typer.Option(help="Names of methods, or own.py:function, with commas.")
    ] = "dense,small,setpoint",
    budgets: Annotated[str, typer.Option(help="Fractions of the dense FLOPs per step, with commas.")] = "0.5",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0",
    epochs: Epochs = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of passes.")] = None,
    length: Annotated[int | None, typer.Option(help="Steps of a sequence: smnist has 784, and 196 pooled.")] = None,
    data: Data = None,
    out: Out = None,
    split: Annotated[str, typer.Option(help="What the result is measured on: test, or validation to tune.")] = "test",
    workers: Annotated[int, typer.Option(help="Runs at a time; they share the processor's threads.", min=1)] = 1,
    timing: Annotated[
        bool, typer.Option("--timing", help="Measure what finished runs take, in turns; the machine should be idle.")
    ] = False,
) -> None:
    """Measure methods side by side on a task; what the folder already holds is not run again.

    Each run has a process of its own. One that was interrupted, even killed, goes on with the same command.
    """
    with _errors_as_messages():
        _bench(
            task,
            methods,
            _numbers(budgets, "--budgets", float),
            _numbers(seeds, "--seeds", int),
            out or Path("runs") / re.sub(r"[^\w.+@-]+", "-", task),
            epochs=epochs,
            steps=steps,
            length=length,
            data=data,
            split=split,
            workers=workers,
            timing=timing,
        )


@app.command()
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
    from setpoint.report.folder import RESULTS, TIMING
    from setpoint.report.markdown import NAME, write_markdown

    with _errors_as_messages():
        if out is not None:
            _check_folder(out)
        if folder.is_file():
            if folder.name in (RESULTS, TIMING):
                raise _misuse(f"{folder} is one file of a results folder: give the folder, {folder.parent}")
            _report_ledger(folder, out)
            return
        text = write_markdown(folder, None if out is None else out / NAME)
        page = _page_if_possible(folder, out)
        _print_table(folder)
        _finish({"report": page, "table": str(text)})


@app.command()
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
    with _errors_as_messages():
        if (target is None) == (suite is None):
            raise _misuse("name either a model to inspect or a whole family with --suite, such as --suite timm")
        if out is not None:
            _check_folder(out)
        if target is not None:
            if models is not None:
                raise _misuse(f"--models picks from a suite: leave it out to inspect {target}")
            if workers is not None:
                raise _misuse(f"--workers shares out the models of a suite: leave it out to inspect {target}")
            _inspect(target, None if input is None else tuple(_numbers(input, "--input", int)), verify, out, spending)
        elif suite is not None:
            if input is not None:
                raise _misuse("--input is for a single model: a suite has inputs of its own")
            chosen = None if models is None else _names(models, "--models")
            _sweep(suite, chosen, 2 if workers is None else workers, out)


def _inspect(target: str, shape: tuple[int, ...] | None, verify: bool, out: Path | None, spending: bool) -> None:
    """Inspect one model; print its tree, and write its page if there is a folder for it."""
    from dataclasses import asdict

    from setpoint.bench.inspection import inspect_model, load_target
    from setpoint.bench.tree import inspection_tree
    from setpoint.report.inspection import write_inspection

    model, example = load_target(target, shape)
    found = inspect_model(target, model, example, verify=verify)
    if verify and not found.verified:
        print(f"{target} is large: read from its shapes alone, no cut was tried on a copy", file=sys.stderr)
    _console().print(inspection_tree(found))
    answer = asdict(found)
    if spending:
        from setpoint.bench import spending as spent

        told = spent.spending(model, example, [group.name for group in found.groups if not group.kept_whole])
        _console().print(spent.spending_table(told))
        answer["spending"] = asdict(told)
    if out is not None:
        _write_json(out / "inspect.json", answer)
        try:
            write_inspection(answer, out / "inspect.html")
        except ImportError as error:
            print(f"no inspect.html: {error}", file=sys.stderr)
    _finish(answer)


def _sweep(suite: str, models: Sequence[str] | None, workers: int, out: Path | None) -> None:
    """Check the models of a suite; print a table, and write the record if there is a folder for it."""
    from setpoint.bench.progress import sweep_bar
    from setpoint.bench.sweep import chosen_models, record, summary, sweep
    from setpoint.bench.table import suite_table

    with sweep_bar(suite, len(chosen_models(suite, models))) as after:
        verdicts = sweep(suite, models, workers=workers, after=after)
    _console().print(suite_table(suite, verdicts))
    if out is not None:
        _write_json(out / f"suite-{suite}.json", record(suite, verdicts, workers))
    _finish(summary(suite, verdicts))


def _report_ledger(file: Path, out: Path | None) -> None:
    """Tables and page of one ledger."""
    from setpoint.report.ledger_page import ledger_tables, read_ledger, write_ledger_page
    from setpoint.report.resources import ledger_line

    record, console = read_ledger(file), _console()
    for table in ledger_tables(record):
        console.print(table)
    told = ledger_line(record)
    console.print(told, soft_wrap=True, markup=False, highlight=False)
    try:
        page = str(write_ledger_page(file, None if out is None else out / file.with_suffix(".html").name))
    except ImportError as error:
        print(f"no page: {error}", file=sys.stderr)
        page = None
    _finish({"report": page, "ledger": told})


def _write_json(path: Path, answer: dict[str, Any]) -> None:
    from setpoint.report.values import finite

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(answer), indent=2) + "\n", encoding="utf-8")


def _bench(
    task_name: str,
    methods: str,
    budgets: Sequence[float],
    seeds: Sequence[int],
    out: Path,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    length: int | None = None,
    data: Path | None = None,
    split: str = "test",
    workers: int | None = None,
    timing: bool = False,
) -> None:
    """Run a benchmark, write its page, and print table and JSON; without `workers` in this process, taking turns."""
    from dataclasses import asdict
    from functools import partial

    from setpoint.bench.catalogue import task_named, with_length
    from setpoint.bench.method import method_named
    from setpoint.bench.own_function import is_own_function
    from setpoint.bench.runner import grid
    from setpoint.bench.summary import summarise
    from setpoint.bench.task import split_named
    from setpoint.bench.terminal import time_cells, train_cells
    from setpoint.cost.budget import Budget

    for budget in budgets:
        Budget.fraction(budget, of="flops")
    task = task_named(with_length(task_name, length), epochs=epochs, steps=steps, data=data)
    chosen = {name: method_named(name) for name in _names(methods, "--methods")}
    if len({method.name for method in chosen.values()}) < len(chosen):
        raise _misuse(f"--methods {methods}: two of these have the same name")
    _check_folder(out)
    cells = grid(task, chosen.values(), dict.fromkeys(budgets), dict.fromkeys(seeds), split_named(split))
    # What is the user's own may hold functions that cannot be sent to another process: it is made there anew.
    make = partial(task_named, task_name, epochs=epochs, steps=steps) if is_own_function(task_name) else None
    own = {method.name: name for name, method in chosen.items() if is_own_function(name)}
    outcome = time_cells(cells, out) if timing else train_cells(cells, out, workers, make, own)
    answer: dict[str, Any] = {"report": None}
    if outcome.results:
        _print_table(out)
        answer = {**summarise(outcome.results, outcome.rounds), "report": _page_if_possible(out)}
    _finish({**answer, "failures": [asdict(failure) for failure in outcome.failures]})
    if outcome.failures:
        raise typer.Exit(FAILED)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise _misuse(f"--out {out} is a file: name a folder")


def _write_page(folder: Path, out: Path | None) -> Path:
    """The report page, in the results folder or in another."""
    from setpoint.report.page import write_page

    if out is None:
        return write_page(folder)
    out.mkdir(parents=True, exist_ok=True)
    return write_page(folder, out / "report.html")


def _page_if_possible(folder: Path, out: Path | None = None) -> str | None:
    """The page's path; None where plotly is missing, which must not cost a finished benchmark its numbers."""
    try:
        return str(_write_page(folder, out))
    except ImportError as error:
        print(f"no report.html: {error}; then `setpoint report {folder}` writes it", file=sys.stderr)
        return None


def _print_table(folder: Path) -> None:
    """The summary of all results in the folder, on stdout."""
    from setpoint.bench.table import summary_tables
    from setpoint.report.folder import read_results

    console = _console()
    for table in summary_tables(read_results(folder), console.width):
        console.print(table)


def _console() -> Console:
    """Standard output; in a pipe it is wide, so that tables keep their shape."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)


def _finish(answer: dict[str, Any]) -> None:
    """The last line of stdout."""
    from setpoint.report.values import finite

    sys.stdout.write(json.dumps(finite(answer)) + "\n")
    sys.stdout.flush()


def _names(text: str, option: str) -> list[str]:
    """Words between commas."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise _misuse(f"{option} is empty: give names with commas between them")
    return words


def _numbers(text: str, option: str, kind: type[Any]) -> list[Any]:
    """Numbers between commas."""
    try:
        return [kind(word) for word in _names(text, option)]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise _misuse(f"{option} takes {what} with commas between them, got {text!r}") from error


def _misuse(message: str) -> Exception:
    from setpoint.bench.task import BenchError

    return BenchError(message)


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """What a user can put right becomes one line on stderr and exit code 2."""
    from setpoint.errors import SetpointError

    try:
        yield
    except (SetpointError, OSError, ImportError) as error:
        told = str(error)
        if isinstance(error, OSError) and error.filename:
            told = f"{error.filename} cannot be read or written: {error.strerror}"
        print(f"error: {told}", file=sys.stderr)
        raise typer.Exit(MISUSE) from None
    except KeyboardInterrupt:
        print("interrupted: finished runs are kept, and the same command goes on from there", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
