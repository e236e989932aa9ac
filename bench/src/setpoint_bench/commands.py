"""What the benchmark adds to the command line: bench, coverage, list, and its half of report."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from setpoint.cli import (
    FAILED,
    Json,
    check_folder,
    console,
    errors_as_messages,
    examples,
    finish,
    integers,
    names,
    out_option,
    write_json,
)
from setpoint.errors import BudgetError, UsageError
from setpoint.messages import did_you_mean

Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the data, for images.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder that holds the data.", metavar="DIR")]


def bench(
    task: Annotated[str, typer.Option(help="A name of `setpoint list tasks`, or own.py:function.")],
    methods: Annotated[
        str, typer.Option(help="Names of `setpoint list methods`, or own.py:function, with commas.")
    ] = "dense,small,setpoint",
    budgets: Annotated[str, typer.Option(help="Fractions of the dense FLOPs per step, with commas: 0.5,25%.")] = "0.5",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0",
    epochs: Epochs = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of passes.")] = None,
    data: Data = None,
    out: Annotated[Path | None, out_option("by default runs/TASK")] = None,
    split: Annotated[str, typer.Option(help="What the result is measured on: test, or validation to tune.")] = "test",
    workers: Annotated[int, typer.Option(help="Runs at a time; they share the processor's threads.", min=1)] = 1,
    interleaved: Annotated[
        bool, typer.Option("--interleaved", help="Methods take turns in one process, so that their seconds compare.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure methods side by side on a task; what the folder already holds is not run again.

    Each run has a process of its own. The same command continues one that was interrupted or killed.
    """
    with errors_as_messages():
        _bench(
            task,
            methods,
            [_fraction(budget) for budget in names(budgets, "--budgets")],
            integers(seeds, "--seeds"),
            out or Path("runs") / re.sub(r"[^\w.+@-]+", "-", task),
            epochs=epochs,
            steps=steps,
            data=data,
            split=split,
            workers=workers,
            interleaved=interleaved,
        )


def _fraction(text: str) -> float:
    """A budget of FLOPs per step as a fraction of the dense model's; the option takes no other."""
    from setpoint.cost.budget import parse_budget

    takes = "--budgets takes a fraction of the dense FLOPs per step, above 0 and at most 1, such as 0.5 or 50%"
    try:
        budget = parse_budget(text)
    except BudgetError as error:
        raise BudgetError(f"{takes}: got {text!r}") from error
    if (budget.resource, budget.per, budget.relative) != ("flops", "step", True):
        raise BudgetError(f"{takes}: got {text!r}, a budget of another kind")
    return float(budget.limit)


def report_folder(folder: Path, out: Path | None) -> None:
    from setpoint_bench.report.markdown import NAME, write_markdown

    check_folder(out or folder)
    text = write_markdown(folder, None if out is None else out / NAME)
    page = str(_write_page(folder, out))
    _print_table(folder)
    finish({"report": page, "table": str(text)}, f"open {page}")


def coverage(
    suite: Annotated[str, typer.Argument(help="torchvision, timm, transformers or plain.", metavar="SUITE")],
    models: Annotated[str | None, typer.Option(help="Which models of the suite, with commas; by default all.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that check models; 0: this one.", min=0)] = 2,
    out: Annotated[Path | None, out_option("without it nothing is written")] = None,
    json: Json = False,
) -> None:
    """Cut every model of a suite and compare it with its masked twin; the record is suite-SUITE.json in --out."""
    with errors_as_messages():
        from setpoint_bench.progress import sweep_bar
        from setpoint_bench.sweep import chosen_models, record, summary, sweep
        from setpoint_bench.table import suite_table

        check_folder(out)
        chosen = None if models is None else names(models, "--models")
        with sweep_bar(suite, len(chosen_models(suite, chosen))) as after:
            verdicts = sweep(suite, chosen, workers=workers, after=after)
        console().print(suite_table(suite, verdicts))
        if out is not None:
            write_json(out / f"suite-{suite}.json", record(suite, verdicts, workers))
        finish(summary(suite, verdicts), "setpoint inspect MODEL --groups shows one of them")


def list_names(
    kind: Annotated[str, typer.Argument(help="tasks, methods or models.", metavar="tasks|methods|models")],
    word: Annotated[str, typer.Argument(help="Only names that contain it.", metavar="WORD")] = "",
    json: Json = False,
) -> None:
    """List the names that other commands take: tasks and methods of the benchmark, models to inspect."""
    with errors_as_messages():
        lists = {"tasks": list_tasks, "methods": list_methods, "models": list_models}
        if kind not in lists:
            raise UsageError(f"there is no list of {kind!r}: {did_you_mean(kind, lists)}use {', '.join(lists)}")
        found = lists[kind]()
        shown = {name: about for name, about in found.items() if word.lower() in name.lower()}
        if not shown:
            near = did_you_mean(word, [name.rpartition(":")[2] for name in found])
            near = near or f"leave the word out to list all {kind}"
            raise UsageError(f"no name in the list of {kind} contains {word!r}: {near.strip()}")
        for name, about in shown.items():
            console().print(f"{name:28} {about}".rstrip(), soft_wrap=True, markup=False, highlight=False)
        then = {
            "tasks": "setpoint bench --task NAME --methods dense,small,setpoint",
            "methods": "setpoint bench --task digits --methods NAME,setpoint",
            "models": "setpoint inspect NAME",
        }
        finish({kind: shown}, then[kind])


def add_commands(app: typer.Typer) -> None:
    runs = (
        "setpoint bench --task digits",
        "setpoint bench --task cifar10-mini --methods dense,small,setpoint --budgets 0.5,0.25 --seeds 0,1,2",
        "setpoint bench --task my_task.py:make --out runs/mine",
    )
    app.command("bench", epilog=examples(*runs))(bench)
    app.command(epilog=examples("setpoint coverage timm --workers 4 --out results/coverage"))(coverage)
    lists = ("setpoint list tasks", "setpoint list methods", "setpoint list models resnet")
    app.command("list", epilog=examples(*lists))(list_names)


def named_model(name: str, shape: tuple[int, ...] | None) -> Any:
    """A model of torchvision, timm or transformers and an example, for `setpoint inspect`."""
    from setpoint_bench.zoo import named_model as made

    return made(name, shape)


def list_tasks() -> dict[str, str]:
    from setpoint_bench.catalogue import tasks

    return {name: _first_line(make) for name, make in tasks().items()}


def list_methods() -> dict[str, str]:
    """The methods, by name: what each does, and where it comes from."""
    from setpoint_bench.method import ABOUT, all_methods

    return {each.name: f"{ABOUT[each.name]} {each.paper}".rstrip() for each in all_methods()}


def list_models() -> dict[str, str]:
    """Models of the libraries that are installed, as `library:name`."""
    from setpoint_bench.zoo import LIBRARIES, library_names

    found: dict[str, str] = {}
    for library in LIBRARIES:
        try:
            found |= dict.fromkeys((f"{library}:{name}" for name in library_names(library)), "")
        except ImportError:
            print(f"{library} is not installed: pip install {library}", file=sys.stderr)
    return found


def _first_line(what: object) -> str:
    return (what.__doc__ or "").partition("\n")[0]


def _bench(
    task_name: str,
    methods: str,
    budgets: Sequence[float],
    seeds: Sequence[int],
    out: Path,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    data: Path | None = None,
    split: str = "test",
    workers: int = 1,
    interleaved: bool = False,
) -> None:
    from dataclasses import asdict
    from functools import partial

    from setpoint.report.target import is_own_function
    from setpoint_bench.catalogue import task_named
    from setpoint_bench.method import method_named
    from setpoint_bench.progress import train_cells
    from setpoint_bench.runner import grid
    from setpoint_bench.summary import summarise
    from setpoint_bench.task import split_named

    check_folder(out)
    task = task_named(task_name, epochs=epochs, steps=steps, data=data)
    chosen = {name: method_named(name) for name in names(methods, "--methods")}
    if len({method.name for method in chosen.values()}) < len(chosen):
        raise UsageError(f"--methods {methods}: two of these have the same name")
    cells = grid(task, chosen.values(), dict.fromkeys(budgets), dict.fromkeys(seeds), split_named(split))
    # What is the user's own may hold functions that cannot be sent to another process: it is made there anew.
    make = partial(task_named, task_name, epochs=epochs, steps=steps) if is_own_function(task_name) else None
    own = {method.name: name for name, method in chosen.items() if is_own_function(name)}
    outcome = train_cells(cells, out, workers, make, own, interleaved=interleaved)
    answer: dict[str, Any] = {"report": None}
    if outcome.results:
        _print_table(out)
        answer = {**summarise(outcome.results), "report": str(_write_page(out, None))}
    page = answer["report"]
    then = f"open {page} in a browser" if page else f"setpoint report {out} shows the results again"
    finish({**answer, "failures": [asdict(failure) for failure in outcome.failures]}, then)
    if outcome.failures:
        raise typer.Exit(FAILED)


def _write_page(folder: Path, out: Path | None) -> Path:
    from setpoint_bench.report.page import write_page

    if out is None:
        return write_page(folder)
    out.mkdir(parents=True, exist_ok=True)
    return write_page(folder, out / "report.html")


def _print_table(folder: Path) -> None:
    from setpoint_bench.report.folder import read_results
    from setpoint_bench.table import summary_tables

    screen = console()
    for table in summary_tables(read_results(folder)):
        screen.print(table)
