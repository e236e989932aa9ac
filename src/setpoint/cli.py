"""The command line: demo, inspect, plan, compress, report, watch and list, and what setpoint-bench adds to it."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from setpoint.command_line import (
    Json,
    OneLine,
    check_folder,
    console,
    errors_as_messages,
    examples,
    finish,
    misuse,
    names,
    numbers,
    out_option,
    write_json,
)
from setpoint.messages import did_you_mean

Kind = Literal["tasks", "methods", "models"]
GROUP = "setpoint.commands"
"""Entry points of other packages: commands, and the halves of `report` and `inspect` that belong to benchmarks."""
LEDGER = "run.jsonl"
"""A ledger's name in the folder of a run."""
_LEDGER_START = '{"ledger":'
PACKED_FILES = ("results.jsonl.xz", "timing.jsonl.xz", "histories.jsonl.xz")
RESULT_FILES = ("results.jsonl", "timing.jsonl", *PACKED_FILES)
"""Files of a results folder that are no ledgers."""


def demo(
    budget: Annotated[
        str,
        typer.Option(help="Part of the dense FLOPs per step that is left at the end: 0.5 or 50%.", metavar="FRACTION"),
    ] = "0.5",
    seed: Annotated[int, typer.Option(help="Seed of images, new head and order.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each training: fewer take less time.", min=20)] = 360,
    out: Annotated[Path | None, out_option("by default runs/demo")] = None,
    json: Json = False,
) -> None:
    """Fine-tune a pretrained network before your eyes: dense, and with Setpoint.

    The network and the images come with Setpoint: nothing is downloaded.
    """
    with errors_as_messages():
        from setpoint.cost.parse import fraction

        share, folder = fraction(budget, "--budget"), out or Path("runs/demo")
        check_folder(folder)
        from setpoint.demo import demo as shown

        answer = shown.demo(console(), folder, share, seed, steps)
        finish(answer, f"open {answer['report']} in a browser")


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of `bench` or of a run, or a ledger's file.", metavar="DIR|FILE")
    ],
    out: Annotated[Path | None, out_option("by default where the ledger or the results are")] = None,
    goals: Annotated[
        bool, typer.Option("--goals", help="Also judge Setpoint's own goals in results.md of a folder of `bench`.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what a run decided and spent, and write it as a page.

    A run writes its ledger by `setpoint.integrations.log_to(loop, "run.jsonl")`.

    For a folder of `bench` it shows the results as tables, and writes results.md and report.html.
    """
    with errors_as_messages():
        check_folder(out)
        if folder.is_file() and folder.name in RESULT_FILES:
            raise misuse(f"{folder} is one file of a results folder: give the folder, {folder.parent}")
        if any((folder / name).is_file() for name in RESULT_FILES):
            _added("report-folder", "report FOLDER")(folder, out, goals)
        else:
            if goals:
                raise misuse(f"--goals judges results of the benchmark, and {folder} has none: leave it out")
            _report_ledger(_only_ledger(folder), out)


def inspect(
    target: Annotated[
        str | None,
        typer.Argument(help="A model of torchvision, timm or transformers, or module.py:function.", metavar="MODEL"),
    ] = None,
    input: Annotated[
        str | None, typer.Option("--input", help="Shape of the example, with commas; by default the model's usual.")
    ] = None,
    groups: Annotated[bool, typer.Option("--groups", help="Show every group, with its places, as a tree.")] = False,
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
    out: Annotated[Path | None, out_option("without it nothing is written")] = None,
    json: Json = False,
) -> None:
    """Show in eight lines what can be pruned in a model, how far, and what is not pruned and why."""
    with errors_as_messages():
        if (target is None) == (suite is None):
            raise misuse("name either a model to inspect or a whole family with --suite, such as --suite timm")
        check_folder(out)
        if target is not None:
            if models is not None:
                raise misuse(f"--models picks from a suite: leave it out to inspect {target}")
            if workers is not None:
                raise misuse(f"--workers shares out the models of a suite: leave it out to inspect {target}")
            shape = None if input is None else tuple(numbers(input, "--input", int))
            _inspect(target, shape, verify, out, spending, groups)
        elif suite is not None:
            if input is not None:
                raise misuse("--input is for a single model: a suite has inputs of its own")
            if groups or spending or not verify:
                raise misuse("--groups, --spending and --no-verify are for a single model: name one, without --suite")
            chosen = None if models is None else names(models, "--models")
            _added("inspect-suite", "inspect --suite")(suite, chosen, 2 if workers is None else workers, out)


def compress(
    target: Annotated[str, typer.Argument(help="module.py:function that returns a trained model.", metavar="MODEL")],
    data: Annotated[str, typer.Option("--data", help="module.py:function that returns batches, such as a loader.")],
    budget: Annotated[str, typer.Option("--budget", help='What the model may cost: 50% (of the FLOPs), "40% params".')],
    even: Annotated[bool, typer.Option("--even", help="Keep the same share of units in all groups.")] = False,
    samples: Annotated[int, typer.Option(help="Samples of the data that are looked at.", min=1)] = 1024,
    out: Annotated[Path | None, out_option("without it nothing is written")] = None,
    json: Json = False,
) -> None:
    """Cut a trained model to a budget without training, and write it to model.safetensors in the folder of --out.

    Without --out it is a trial: it says what the budget leaves, and keeps nothing.
    """
    with errors_as_messages():
        check_folder(out)
        _compress(target, data, budget, even, samples, out)


def watch(
    file: Annotated[
        Path, typer.Argument(help="A ledger's file, or its folder; a run may be writing it.", metavar="FILE")
    ],
    once: Annotated[bool, typer.Option("--once", help="Show the present state, and end.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks at the file.", min=0.05)] = 1.0,
    json: Json = False,
) -> None:
    """Watch a run: widths by group, cost against reference, and the price.

    The run writes its ledger by `setpoint.integrations.log_to(loop, "run.jsonl")`.

    Watching ends with the run. Ctrl-C ends the watching alone.
    """
    with errors_as_messages():
        from setpoint.report.ledger_page import read_ledger
        from setpoint.report.resources import state
        from setpoint.report.watch import view, watch

        file = _ledger_of(file)
        if file.is_dir():
            raise misuse(f"{file} is a folder without {LEDGER}: give the file that a run writes by log_to")
        screen = console()
        if once or (json and not file.exists()):  # a machine waits for no file
            record = read_ledger(file)
            screen.print(view(record, file.name))
        else:
            record = watch(file, screen, every)
        finish(state(record), f"setpoint report {file} writes a page of the run")


def list_names(
    kind: Annotated[str, typer.Argument(help="tasks, methods or models.", metavar="tasks|methods|models")],
    word: Annotated[str, typer.Argument(help="Only names that contain it.", metavar="WORD")] = "",
    json: Json = False,
) -> None:
    """List the names that other commands take: tasks and methods of the benchmark, models to inspect."""
    with errors_as_messages():
        if kind not in get_args(Kind):
            hint = did_you_mean(kind, get_args(Kind))
            raise misuse(f"there is no list of {kind!r}: {hint}use {', '.join(get_args(Kind))}")
        found: dict[str, str] = _models() if kind == "models" else _added(f"list-{kind}", f"list {kind}")()
        shown = {name: about for name, about in found.items() if word.lower() in name.lower()}
        if not shown:
            near = did_you_mean(word, [name.rpartition(":")[2] for name in found])
            near = near or f"leave the word out to list all {kind}"
            raise misuse(f"no name in the list of {kind} contains {word!r}: {near.strip()}")
        screen = console()
        for name, about in shown.items():
            screen.print(f"{name:28} {about}".rstrip(), soft_wrap=True, markup=False, highlight=False)
        then = {
            "tasks": "setpoint bench --task NAME --methods dense,small,setpoint",
            "methods": "setpoint bench --task digits --methods NAME,setpoint",
            "models": "setpoint inspect NAME",
        }
        finish({kind: shown}, then[kind])


def plan(
    target: Annotated[str | None, typer.Argument(help="The dense model, as inspect takes it.", metavar="MODEL")] = None,
    budget: Annotated[str | None, typer.Option(help="Budget per step of MODEL, such as 25% (of the FLOPs).")] = None,
    input: Annotated[str | None, typer.Option("--input", help="Shape of the example of MODEL, with commas.")] = None,
    size: Annotated[
        float | None, typer.Option(help="Parameters of the finished model; the published laws count embeddings.")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Data / compute-optimal data, where it is known.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens that a small model would be trained on.")] = None,
    samples: Annotated[
        float | None,
        typer.Option(help="Samples that a small model would be trained on, if it is given no tokens; needs --laws."),
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Bill of the whole run.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Bill in seconds on this machine, timed in steps of at most --batch.")
    ] = None,
    joules: Annotated[
        float | None, typer.Option(help="Bill in joules as metered here, in steps of at most --batch.")
    ] = None,
    batch: Annotated[float | None, typer.Option(help="Tokens of an optimizer step.")] = None,
    start: Annotated[
        float | None, typer.Option(help="Size to start from, as a multiple of the final size; by default 2.")
    ] = None,
    cuts: Annotated[str, typer.Option(help="Begin and end of the cuts, as shares of the steps.")] = "0.25,0.75",
    laws: Annotated[
        Path | None, typer.Option(help="JSON file of your own laws, as setpoint.advice.law.save_laws writes it.")
    ] = None,
    json: Json = False,
) -> None:
    """Say whether pruning while training from scratch pays, from which start size, and for how many steps.

    A pretrained model needs no such plan: its training is paid for, so fine-tune and prune it.
    """
    with errors_as_messages():
        from dataclasses import replace

        from setpoint.advice.law import LANGUAGE, load_laws
        from setpoint.advice.plan import budget_per_step, counts_tokens
        from setpoint.advice.plan import plan as advise

        basis = {"--ratio": ratio, "--tokens": tokens, "--samples": samples, "--flops": flops, "--seconds": seconds}
        basis["--joules"] = joules
        given = [name for name, value in basis.items() if value is not None]
        if len(given) != 1:
            raise misuse(
                f"give exactly one of {', '.join(basis)}, such as --tokens 5e10: got {', '.join(given) or 'none'}"
            )
        shape = None if input is None else tuple(numbers(input, "--input", int))
        beside = [name for name, value in (("--budget", budget), ("--input", input)) if value is not None]
        if target is None and beside:
            raise misuse(f"{beside[0]} is for a MODEL: name one, or leave {beside[0]} out")
        if target is None and size is None and ratio is None:
            raise misuse("give the final size: --size N, or MODEL with --budget; or --ratio alone")
        if target is not None and (seconds or joules) and batch is None and shape is None:
            raise misuse(
                f"{given[0]} needs the size of a step, on which its pace depends: give --batch N, such as --batch 8192"
            )
        if laws is None and samples is not None:
            raise misuse("--samples needs the constants of a family: give --laws FILE, or count --tokens")
        known, between = LANGUAGE if laws is None else load_laws(laws), tuple(numbers(cuts, "--cuts", float))
        if target is not None:
            budget_per_step(budget)
            print(f"building and tracing {target}", file=sys.stderr)
        model, example = (None, None) if target is None else _load(target, shape)
        if laws is None and example is not None and ratio is None and not counts_tokens(example):
            raise misuse(
                f"the published constants are of language models and count tokens, which {target} does not take: give "
                "--laws FILE with constants of its family, or --ratio R, its data / compute-optimal data"
            )
        found = advise(
            model,
            budget,
            example=example,
            size=size,
            ratio=ratio,
            tokens=tokens,
            samples=samples,
            flops=flops,
            seconds=seconds,
            joules=joules,
            batch=batch,
            start=start,
            cuts=between,
            laws=known,
        )
        if batch is None:  # the example's own is only large enough to trace with
            found = replace(found, batch=None, steps=None, small_steps=None)
        console().print(str(found), soft_wrap=True, markup=False, highlight=False)
        page = "https://github.com/setpoint-developers/setpoint/blob/main/docs/when-it-pays.md"
        finish(found.to_dict(), f"{page} says what stands behind this")


def make_app() -> typer.Typer:
    """The command line, with the commands of the packages that are installed."""
    made = typer.Typer(
        name="setpoint",
        cls=OneLine,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback(epilog=examples("setpoint demo", "setpoint inspect resnet18", "setpoint watch run.jsonl"))(_setpoint)
    made.command(epilog=examples("setpoint demo", "setpoint demo --budget 25%"))(demo)
    if entry_points(group=GROUP, name="bench"):
        lines = (
            "setpoint bench --task digits",
            "setpoint bench --task cifar10-mini --methods dense,small,setpoint --budgets 0.5,0.25 --seeds 0,1,2",
            "setpoint bench --task my_task.py:make --out runs/mine",
        )
        made.command("bench", epilog=examples(*lines))(_added("bench", "bench"))
    else:
        anything = {"ignore_unknown_options": True, "allow_extra_args": True}
        made.command("bench", context_settings=anything)(_absent("bench"))
    made.command(epilog=examples("setpoint report run.jsonl", "setpoint report runs/digits --out pages"))(report)
    made.command(
        epilog=examples(
            "setpoint inspect resnet18",
            "setpoint inspect timm/resnet18.a1_in1k --groups",
            "setpoint inspect my_model.py:build --input 2,3,64,64",
            "setpoint inspect --suite torchvision",
        )
    )(inspect)
    made.command(epilog=examples("setpoint compress net.py:build --data net.py:batches --budget 50% --out small"))(
        compress
    )
    made.command(
        epilog=examples(
            "setpoint plan --size 2e8 --tokens 5e10",
            "setpoint plan gpt2 --budget 50% --tokens 1e10",
            "setpoint plan --ratio 8",
        )
    )(plan)
    made.command(epilog=examples("setpoint watch run.jsonl", "setpoint watch run.jsonl --once"))(watch)
    made.command(
        "list", epilog=examples("setpoint list tasks", "setpoint list methods", "setpoint list models resnet")
    )(list_names)
    return made


def _show_version(wanted: bool) -> bool:
    if wanted:
        import torch

        from setpoint import __version__

        print(f"setpoint {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
        raise typer.Exit
    return wanted


def _setpoint(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and end.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Prune PyTorch models while they train, to a budget held by a feedback controller."""


def _models() -> dict[str, str]:
    """Models of the libraries that are installed, as `library:name`."""
    from setpoint.report.zoo import LIBRARIES, library_names

    found: dict[str, str] = {}
    for each in LIBRARIES:
        try:
            found |= dict.fromkeys((f"{each}:{name}" for name in library_names(each)), "")
        except ImportError:
            print(f"{each} is not installed: pip install {each}", file=sys.stderr)
    if not found:
        raise misuse(f"no library of models is installed: pip install {LIBRARIES[0]} (or {', '.join(LIBRARIES[1:])})")
    return found


def _ledger_of(path: Path) -> Path:
    """The ledger in a folder, as the demo and runs leave it there; a path that has none as it is."""
    return path / LEDGER if (path / LEDGER).is_file() else path


def _only_ledger(path: Path) -> Path:
    """The ledger that `report` is given by its file or folder."""
    path = _ledger_of(path)
    if not path.exists() and path.suffix != ".jsonl":
        raise misuse(f"{path} does not exist: give a ledger's file, or a folder with {LEDGER} or {RESULT_FILES[0]}")
    if not path.is_dir():
        return path
    found = sorted(each for each in path.glob("*.jsonl") if _is_ledger(each))
    if not found:
        raise misuse(
            f"neither results of the benchmark ({RESULT_FILES[0]}) nor ledgers (*.jsonl) are in {path}: "
            f'a run writes its ledger by setpoint.integrations.log_to(loop, "{LEDGER}")'
        )
    listed = ", ".join(each.name for each in found)
    raise misuse(f"no results of the benchmark in {path}; ledgers found: {listed}. Write: setpoint report {found[0]}")


def _is_ledger(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open(encoding="utf-8", errors="replace") as lines:
        return lines.read(len(_LEDGER_START)) == _LEDGER_START


def _added(name: str, command: str) -> Callable[..., Any]:
    """What another package does for a command."""
    found = entry_points(group=GROUP, name=name)
    if not found:
        raise misuse(f"`setpoint {command}` is part of the benchmark, a package of its own: pip install setpoint-bench")
    loaded: Callable[..., Any] = next(iter(found)).load()
    return loaded


def _absent(name: str) -> Callable[[], None]:

    def command() -> None:
        """Part of the benchmark: pip install setpoint-bench."""
        with errors_as_messages():
            _added(name, name)

    return command


def _load(target: str, shape: tuple[int, ...] | None) -> tuple[Any, Any]:
    """The model and example that a command names; an error says what the name is like."""
    from setpoint.errors import UsageError
    from setpoint.report.inspect_model import load_target
    from setpoint.report.own_function import is_own_function

    if is_own_function(target):
        _call_of(target)
    elif Path(target).is_file() and not target.endswith(".py"):
        raise misuse(f"{target} is a file and no model: name a function of a Python file, as module.py:function")
    try:
        return load_target(target, shape)
    except UsageError as error:
        raise misuse(_like(target, str(error))) from error


def _like(target: str, said: str) -> str:
    """What is said of a model that is refused; of a name that no library has, what it is like."""
    from setpoint.report.zoo import LIBRARIES, library_names

    if meant := _in_file(target):
        return f"{target!r} names no file: did you mean {meant}?"
    if ":" in target or "/" in target or target.endswith(".py"):
        return said
    for each in LIBRARIES:
        with suppress(ImportError):
            if target in library_names(each):
                return said
    if Path(target, "config.json").is_file():
        return f"unknown model {target!r}: write ./{target} for the folder"
    hub = "; models of the Hub are written owner/name, such as google-bert/bert-base-uncased"
    return f"{said}{hub if '-' in target else ''}"


def _in_file(target: str) -> str:
    """What was meant by `module:function`, where there is such a file; empty for anything else."""
    file, colon, function = target.partition(":")
    return f"{file}.py:{function}" if colon and Path(f"{file}.py").is_file() else ""


def _call_of(target: str) -> Callable[[], Any]:
    """The function of a file that returns a model or batches; a model itself is not called."""
    from torch import nn

    from setpoint.messages import a_type
    from setpoint.report.own_function import named_errors, own_function

    if meant := _in_file(target):
        raise misuse(f"{target!r} names no file: did you mean {meant}?")
    with named_errors(target):
        function = own_function(target)
    if isinstance(function, nn.Module):
        name = target.rpartition(":")[2]
        raise misuse(f"{target} is {a_type(function)} itself: name a function without arguments that returns {name}")
    return function


def _inspect(
    target: str, shape: tuple[int, ...] | None, verify: bool, out: Path | None, spending: bool, groups: bool
) -> None:
    from dataclasses import asdict

    from setpoint.report.inspect_model import inspect_model
    from setpoint.report.inspection_lines import inspection_lines
    from setpoint.report.inspection_page import write_inspection
    from setpoint.report.inspection_tree import inspection_tree

    model, example = _load(target, shape)
    if spending and any(parameter.is_meta for parameter in model.parameters()):
        raise misuse(f"{target} is large and read from its shapes alone: leave out --spending, which times a step")
    found = inspect_model(target, model, example, verify=verify)
    if verify and not found.verified:
        print(f"{target} is large: read from its shapes alone, no cut was tried on a copy", file=sys.stderr)
    screen = console()
    if groups:
        screen.print(inspection_tree(found))
    else:
        for line in inspection_lines(found):
            screen.print(line, soft_wrap=True, markup=False, highlight=False)
    answer: dict[str, Any] = asdict(found)
    if spending:
        from setpoint.report import group_spending

        shown = group_spending.spending(model, example, [group.name for group in found.groups if not group.kept_whole])
        for line in group_spending.spending_lines(shown):
            screen.print(line, soft_wrap=True, markup=False, highlight=False)
        screen.print(group_spending.spending_table(shown))
        answer["spending"] = asdict(shown)
    if out is not None:
        write_json(out / "inspect.json", answer)
        write_inspection(answer, out / "inspect.html")
    least = found.cheapest_flops / found.flops if found.flops else 0.0
    share = 0.5 if least <= 0.5 else math.ceil(100 * least) / 100
    to = "half of the FLOPs" if share == 0.5 else f"{share:.0%} of the FLOPs; half of them is out of reach"
    attach = f"setpoint.attach(model, optimizer, {share:g}, total_steps=...) prunes to {to}"
    given = [
        target,
        *([] if shape is None else ["--input", ",".join(map(str, shape))]),
        *([] if verify else ["--no-verify"]),
    ]
    finish(answer, attach if groups else f"setpoint inspect {shlex.join(given)} --groups shows every group")


def _compress(target: str, data: str, budget: str, even: bool, samples: int, out: Path | None) -> None:
    from dataclasses import asdict

    from torch import nn

    from setpoint.checkpoint import save
    from setpoint.messages import a_type
    from setpoint.one_shot.compress import compress, one_budget
    from setpoint.one_shot.samples import are_batches
    from setpoint.report.own_function import check_own_function, is_own_function, named_errors

    one_budget(budget)
    for each in (target, data):
        if is_own_function(each):
            check_own_function(each)
    if out is None:
        print("a trial: without --out DIR the small model is not kept", file=sys.stderr)
    with named_errors(target):
        made = _call_of(target)()
    with named_errors(data):
        batches = _call_of(data)()
    if not are_batches(batches):
        raise misuse(
            f"{data} returned {a_type(batches)}; --data needs batches: a DataLoader or another iterable of them"
        )
    model = made[0] if isinstance(made, tuple) and made else made  # as `inspect` takes it: a model, or one and inputs
    if not isinstance(model, nn.Module):
        raise misuse(f"{target} returned {a_type(model)}: return a torch.nn.Module")
    found = compress(model, batches, budget, even=even, num_samples=samples)
    console().print(str(found), soft_wrap=True, markup=False, highlight=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        save(model, out / "model.safetensors")
    written = None if out is None else str(out / "model.safetensors")
    then = "--out DIR keeps the model" if written is None else f"setpoint.load({written!r}, into=...) reads the model"
    finish({**asdict(found), "model": written}, then)


def _report_ledger(file: Path, out: Path | None) -> None:
    from setpoint.report.ledger_page import is_of_demo, ledger_tables, page_of, read_ledger, write_ledger_page
    from setpoint.report.resources import ledger_line, state

    record, screen, page = read_ledger(file), console(), page_of(file, out)
    written = not is_of_demo(page, file)
    if written:
        check_folder(page.parent)
    for table in ledger_tables(record):
        screen.print(table, width=None if screen.is_terminal else 100)
    screen.print(ledger_line(record), soft_wrap=True, markup=False, highlight=False)
    if written:
        write_ledger_page(file, page)
    finish({"report": str(page), **state(record)}, f"open {page} in a browser")


app = make_app()
