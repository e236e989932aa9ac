"""The command line: inspect, time, export, compress, report and run, and what setpoint-bench adds to it.

A command prints for readers, or with --json one object for machines. What a user can put right is one line on stderr
and exit code 2; options are read by Typer, which says itself what it does not take.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from runpy import run_module, run_path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from setpoint.errors import SetpointError, UsageError, printable

if TYPE_CHECKING:
    from rich.console import Console

FAILED, MISUSE, INTERRUPTED = 1, 2, 130
"""Exit codes: runs of a benchmark failed; the command cannot be done as given; Ctrl-C."""
GROUP = "setpoint.commands"
"""Its entry point `commands` is a module of setpoint-bench: `add_commands`, `report_folder` and `named_model`."""
LEDGER = "run.jsonl"
RESULT_FILES = ("results.jsonl", "timing.jsonl", "results.jsonl.xz", "timing.jsonl.xz", "histories.jsonl.xz")
"""Files of a results folder that are no ledgers."""
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


# The commands.


def inspect(
    target: Annotated[
        str,
        typer.Argument(help="module.py:function; with setpoint-bench also a name of a library.", metavar="MODEL"),
    ],
    input: Annotated[
        str | None, typer.Option("--input", help="Shape of the example, with commas; by default the model's usual.")
    ] = None,
    groups: Annotated[bool, typer.Option("--groups", help="Show every group, with its places, as a tree.")] = False,
    verify: Annotated[bool, typer.Option(help="Try the cuts on a copy of the model, as attach does.")] = True,
    out: Annotated[Path | None, out_option("without it nothing is written")] = None,
    json: Json = False,
) -> None:
    """Show in eight lines what can be pruned in a model, how far, and what is not pruned and why."""
    with errors_as_messages():
        from dataclasses import asdict

        from setpoint.report.inspection import inspect_model, inspection_lines, inspection_tree, write_inspection
        from setpoint.report.target import load_target, names_a_file

        check_folder(out)
        shape = None if input is None else tuple(integers(input, "--input"))
        load = load_target if names_a_file(target) else _of_bench(f"inspect {target}").named_model
        found = inspect_model(target, *load(target, shape), verify=verify)
        if verify and not found.verified:
            print(f"{target} is large: read from its shapes alone, no cut was tried on a copy", file=sys.stderr)
        if groups:
            console().print(inspection_tree(found))
        else:
            _print("\n".join(inspection_lines(found)))
        answer: dict[str, Any] = asdict(found)
        if out is not None:
            write_json(out / "inspect.json", answer)
            write_inspection(found, out / "inspect.html")
        again = [target, *([] if input is None else ["--input", input]), *([] if verify else ["--no-verify"])]
        then = f"setpoint inspect {shlex.join(again)} --groups shows every group"
        if groups:
            # The next step has to work: half of the FLOPs may be out of reach.
            share = max(0.5, math.ceil(100 * found.cheapest_flops / (found.flops or 1.0)) / 100)
            then = f"setpoint.attach(model, optimizer, {share:g}, total_steps=...) prunes to {share:.0%} of the FLOPs"
            then += "" if share == 0.5 else "; half of them is out of reach"
        finish(answer, then)


def time(
    target: Annotated[
        str, typer.Argument(help="As for inspect, with the inputs that will be served.", metavar="MODEL")
    ],
    runtime: Annotated[str, typer.Option("--runtime", help="Names, with commas between them.")] = "onnxruntime",
    input: Annotated[
        str | None, typer.Option("--input", help="Shape of the inputs, with commas; by default one sample.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Of one forward; by default one.", min=1)] = None,
    out: Annotated[Path | None, out_option("without it nothing is written")] = None,
    json: Json = False,
) -> None:
    """Time a model and cut copies where it will be served, before any training: which budget gives which milliseconds.

    Copies cut evenly to 75, 50, 40 and 25 % of the FLOPs take turns with the dense model, as floats and in int8.
    """
    with errors_as_messages():
        from dataclasses import asdict

        from setpoint.groups.example import one_sample
        from setpoint.report.target import load_target, names_a_file
        from setpoint.report.timing import time_cuts

        check_folder(out)
        shape = None if input is None else tuple(integers(input, "--input"))
        with _progress_told():
            runtimes = [_runtime(name, threads) for name in names(runtime, "--runtime")]
            own = names_a_file(target)
            load = load_target if own else _of_bench(f"time {target}").named_model
            model, example = load(target, shape)
            example = example if own or shape is not None else one_sample(example)
            found = []
            for number, each in enumerate(runtimes):
                found.append(time_cuts(model, example, each))
                _print(("\n" if number else "") + str(found[-1]))
        answer = {"model": target, "timings": [asdict(timing) for timing in found]}
        if out is not None:
            write_json(out / "time.json", answer)
        then = f'setpoint.attach(model, optimizer, "50% {runtimes[0].name}", total_steps=...) holds it to half'
        finish(answer, then)


def _runtime(name: str, threads: int | None) -> Any:
    """A runtime that works here, by its name."""
    from dataclasses import replace

    from setpoint.resources.serving import check_runtime
    from setpoint.runtimes import named

    found: Any = named(name)
    if threads is not None:
        if not hasattr(found, "threads"):
            raise UsageError(f"{name} has no setting of threads: set OMP_NUM_THREADS={threads} instead of --threads")
        found = replace(found, threads=threads)
    check_runtime(found)
    return found


def export(
    target: Annotated[
        str, typer.Argument(help="As for inspect, with the inputs that will be served.", metavar="MODEL")
    ],
    to: Annotated[str, typer.Option("--to", help="onnx, openvino or executorch.")],
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help="File of setpoint.save, of the model cut; MODEL is the dense one then."),
    ] = None,
    input: Annotated[str | None, typer.Option("--input", help="Shape of the inputs, with commas.")] = None,
    timed: Annotated[bool, typer.Option("--time", help="Time dense and cut in turns, as floats and in int8.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", help="Of one forward; by default one.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="By default model.onnx or the like.", metavar="FILE")] = None,
    json: Json = False,
) -> None:
    """Write a model, or a cut one, as a file for a runtime, and compare the file's outputs with PyTorch's."""
    with errors_as_messages():
        from dataclasses import asdict

        from setpoint.checkpoint.model_file import load as load_weights
        from setpoint.groups.untouched import copy_of
        from setpoint.messages import progress
        from setpoint.report.target import load_target, names_a_file
        from setpoint.report.timing import time_cut
        from setpoint.runtimes.exported import export as write
        from setpoint.runtimes.exported import name_in, reader_of

        shape = None if input is None else tuple(integers(input, "--input"))
        if weights is not None and not weights.exists():
            raise UsageError(f"no file {weights}: give one that setpoint.save or setpoint compress has written")
        name = name_in(to)
        with _progress_told():
            runtime = _runtime(name, threads)
            path = out or Path(f"model{runtime.suffix}")
            reader_of(path, runtime)
            load = load_target if names_a_file(target) else _of_bench(f"export {target}").named_model
            dense, example = load(target, shape)
            cut = None if weights is None else load_weights(weights, into=copy_of(dense, users_hooks=False))
            with progress(f"writing {path}"):
                exported = write(dense if cut is None else cut, example, path, runtime)
            _print(f"{path}: its outputs are PyTorch's, but for {exported.difference:.1e} of their largest value")
            timing = time_cut(dense, cut, example, runtime) if timed else None
        if timing is not None:
            _print(str(timing))
        answer = {"file": str(path), "difference": exported.difference}
        answer |= {} if timing is None else {"timing": asdict(timing)}
        finish(answer, f"setpoint.runtimes.open_file({str(path)!r}, example, {name!r}) runs it")


def compress(
    target: Annotated[str, typer.Argument(help="module.py:function that returns a trained model.", metavar="MODEL")],
    data: Annotated[str, typer.Option("--data", help="module.py:function that returns batches, such as a loader.")],
    budget: Annotated[str, typer.Option("--budget", help='What it may cost: 50% (of the FLOPs), "8 ms onnxruntime".')],
    even: Annotated[bool, typer.Option("--even", help="Keep the same share of units in all groups.")] = False,
    samples: Annotated[int, typer.Option(help="Samples of the data that are looked at.", min=1)] = 1024,
    out: Annotated[Path | None, out_option("without it nothing is written")] = None,
    json: Json = False,
) -> None:
    """Cut a trained model to a budget without training, and write it to model.safetensors in the folder of --out.

    Without --out it is a trial: it says what the budget leaves, and keeps nothing.
    """
    with errors_as_messages():
        from dataclasses import asdict

        from torch import nn

        from setpoint.checkpoint.model_file import save
        from setpoint.messages import a_type, progress
        from setpoint.one_shot.compress import compress as cut
        from setpoint.one_shot.compress import one_budget, runtime_of
        from setpoint.report.target import call_own, check_own_function
        from setpoint.resources.serving import check_runtime

        check_folder(out)
        goal = one_budget(budget)
        for function in (target, data):
            check_own_function(function)  # both, before the first one is run
        if out is None:
            print("a trial: without --out DIR the small model is not kept", file=sys.stderr)
        with _progress_told(), progress("loading model and data"):
            if goal.resource == "inference":
                check_runtime(runtime_of(goal))
            made, batches = call_own(target), call_own(data)
        model = made[0] if isinstance(made, tuple) and made else made  # `inspect` takes a model and its inputs, too
        if not isinstance(model, nn.Module):
            raise UsageError(f"{target} returned {a_type(model)}: return a torch.nn.Module")
        with _progress_told():
            found = cut(model, batches, budget, even=even, num_samples=samples)
        _print(str(found))
        written, then = None, "--out DIR keeps the model"
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            written = str(out / "model.safetensors")
            save(model, Path(written))
            then = f"setpoint.load({written!r}, into=...) reads the model"
        finish({**asdict(found), "model": written}, then)


def report(
    path: Annotated[
        Path, typer.Argument(help="Folder of `bench` or of a run, or a ledger's file.", metavar="DIR|FILE")
    ],
    out: Annotated[Path | None, out_option("by default where the ledger or the results are")] = None,
    json: Json = False,
) -> None:
    """Show what a run decided and spent, and write it as a page.

    A run writes its ledger by `setpoint.integrations.log_to(loop, "run.jsonl")`.

    For a folder of `bench` it shows the results as tables, and writes results.md and report.html.
    """
    with errors_as_messages():
        check_folder(out)
        if any((path / name).is_file() for name in RESULT_FILES):
            _of_bench("report FOLDER").report_folder(path, out)
            return
        from setpoint.report.page import page_of, write_ledger_page
        from setpoint.report.record import facts, read_ledger, state

        file = path if path.is_file() or path.suffix == ".jsonl" else path / LEDGER
        page, record = page_of(file, out), read_ledger(file)
        check_folder(page.parent)
        said = facts(record)
        for name, text in said.items():
            _print(f"{name:<{max(map(len, said)) + 2}}{text}")
        write_ledger_page(file, page)
        finish({"report": str(page), **state(record)}, f"open {page} in a browser")


def run(
    program: Annotated[
        list[str],
        typer.Argument(help="As in a shell: python FILE.py, python -m MODULE, or a command.", metavar="PROGRAM"),
    ],
) -> None:
    """Run a Python program in this process, in which every model reads and writes cut models' checkpoints.

    It is `setpoint.enable_checkpointing()` ahead of a program that cannot be changed. Processes that the program starts
    know nothing of it.
    """
    with errors_as_messages():
        start = _started(program)
        from setpoint.integrations.checkpointing import enable_checkpointing

        enable_checkpointing()
    try:
        code = start()
    except SystemExit:
        raise
    except BaseException as error:  # shown as without this command, whose frames and Typer's stand above the program's
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
    sys.exit(code)  # outside, since the errors of a program are its own


def _started(program: list[str]) -> Callable[[], Any]:
    """What runs a program, whose words `sys.argv` then has, and returns its exit code."""
    by_python = Path(program[0]).name.startswith("python")
    name, *arguments = program[by_python:] or [""]
    if by_python and name == "-m" and arguments:
        name, *arguments = arguments
        sys.path[:0] = [os.getcwd()]
        package = name.partition(".")[0]  # `find_spec` imports it, and raises where there is none
        if find_spec(package) is None or find_spec(name) is None:
            raise UsageError(f"there is no module {name!r}: install its package, or go to the folder that has it")
        run: Callable[..., Any] = partial(run_module, alter_sys=True)
    elif by_python and (not name or name.startswith("-")):
        raise UsageError(
            f"run takes 'python FILE' and 'python -m MODULE', got {' '.join(program)!r}: leave out options of the "
            "interpreter, some of which are variables, such as PYTHONUNBUFFERED=1"
        )
    elif not by_python and (scripts := entry_points(group="console_scripts", name=name)):
        sys.argv = [name, *arguments]
        return lambda: next(iter(scripts)).load()()
    else:
        if not Path(name).is_file():
            raise UsageError(f"{name!r} is no file, and no command of a Python package that is installed here")
        with open(name, "rb") as file:
            if not (name.endswith(".py") or b"python" in file.readline()):
                raise UsageError(f"{name!r} is no Python program: only one of those can run in this process")
        sys.path[:0] = [str(Path(name).resolve().parent)]
        run = run_path
    sys.argv = [name, *arguments]
    return lambda: run(name, run_name="__main__") and None  # it returns the program's variables


def make_app() -> typer.Typer:
    """The command line, with the commands of the packages that are installed."""
    made = typer.Typer(
        name="setpoint",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback(epilog=examples("setpoint inspect resnet18", "setpoint report run.jsonl"))(_setpoint)
    models = "setpoint inspect timm/resnet18.a1_in1k --groups", "setpoint inspect my_model.py:build --input 2,3,64,64"
    made.command(epilog=examples("setpoint inspect resnet18", *models))(inspect)
    timed = "setpoint time resnet18 --runtime onnxruntime", "setpoint time net.py:build --runtime onnxruntime,openvino"
    made.command(epilog=examples(*timed))(time)
    small = "setpoint export net.py:build --weights small.safetensors --to onnx --time"
    made.command(epilog=examples("setpoint export net.py:build --to openvino", small))(export)
    cut = "setpoint compress net.py:build --data net.py:batches --budget 50% --out small"
    made.command(epilog=examples(cut))(compress)
    made.command(epilog=examples("setpoint report run.jsonl", "setpoint report runs/digits --out pages"))(report)
    ways = "setpoint run validate.py --checkpoint small.pt", "setpoint run python -m package.validate small.pt"
    made.command(epilog=examples(*ways), context_settings={"allow_interspersed_args": False})(run)
    for benchmark in entry_points(group=GROUP, name="commands"):
        benchmark.load().add_commands(made)
    return made


def __getattr__(name: str) -> Any:
    # Not made at import: the commands of setpoint-bench import this file, whichever of the two is loaded first.
    if name == "app":
        return make_app()
    raise AttributeError(f"module 'setpoint.cli' has no attribute {name!r}")


def _show_version(wanted: bool) -> None:
    if wanted:
        import torch

        from setpoint import __version__

        print(f"setpoint {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
        raise typer.Exit


def _setpoint(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and end.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Prune PyTorch models while they train, to a budget held by a feedback controller.

    The commands bench, coverage and list are part of the benchmark: pip install setpoint-bench.
    """


def _of_bench(command: str) -> Any:
    """The module in which setpoint-bench has its commands."""
    found = entry_points(group=GROUP, name="commands")
    if not found:
        raise UsageError(
            f"`setpoint {command}` is part of the benchmark, a package of its own: pip install setpoint-bench"
        )
    return next(iter(found)).load()


# What all commands share.


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """What a user can put right becomes one line on stderr and exit code 2."""
    _answers.set(sys.stdout)
    try:
        # What a user's file prints must not end up in the JSON.
        with redirect_stdout(sys.stderr) if _as_json.get() else nullcontext():
            yield
    except (SetpointError, OSError, ImportError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename} cannot be read or written: {error.strerror}"
        print(f"error: {printable(message)}", file=sys.stderr)
        raise typer.Exit(MISUSE) from None
    except KeyboardInterrupt:
        print("interrupted: finished runs are kept, and the same command continues there", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _progress_told() -> Iterator[None]:
    """Inside, standard error says what is being done also where it is no terminal."""
    log, handler = logging.getLogger("setpoint"), logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def check_folder(out: Path | None) -> None:
    """Refuse what is no folder and cannot be made one, before any work is done."""
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: name a folder")
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{out} cannot be made or written to: name another folder by --out")


def console() -> Console:
    """Standard output; in a pipe it is wide, so that tables keep their shape, and with --json it is mute."""
    from rich.console import Console

    if _as_json.get():
        return Console(quiet=True)
    # Rich would wrap at 80 columns in a pipe.
    screen = Console() if sys.stdout.isatty() else Console(width=200)
    made = screen.render_str  # through which every text goes, also those of a table
    screen.render_str = lambda text, **look: made(printable(text), **look)  # type: ignore[method-assign]
    return screen


def _print(line: str) -> None:
    console().print(line, soft_wrap=True, markup=False, highlight=False)


def finish(answer: dict[str, Any], then: str) -> None:
    """End a command: say what to do next, or with --json print the answer as all of stdout."""
    if _as_json.get():
        print(_text(answer), file=_answers.get(), flush=True)
    else:
        _print(f"next: {then}")


def write_json(path: Path, answer: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(answer, indent=2) + "\n", encoding="utf-8")


def _text(answer: dict[str, Any], indent: int | None = None) -> str:
    from setpoint.checkpoint.plain import without_nan

    return json.dumps(without_nan(answer), indent=indent)


def examples(*lines: str) -> str:
    """Examples below the help of a command."""
    return "\n\n".join(("Examples:", *(f"  {line}" for line in lines)))


def names(text: str, option: str) -> list[str]:
    """Words between commas."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError(f"{option} is empty: give names with commas between them")
    return words


def integers(text: str, option: str) -> list[int]:
    """Whole numbers between commas."""
    try:
        return [int(word) for word in names(text, option)]
    except ValueError as error:
        raise UsageError(f"{option} takes whole numbers with commas between them, got {text!r}") from error
