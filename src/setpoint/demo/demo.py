"""The demo: a pretrained network learns new letters, dense and with Setpoint, step by step beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from html import escape
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import nn

from setpoint.checkpoint import save
from setpoint.demo.network import pretrained
from setpoint.demo.signs import NEW, OLD
from setpoint.demo.training import EACH, Moment, data, train
from setpoint.report.figures import BLUE, GREY, Figure, layout, line
from setpoint.report.ledger_page import DEMO, page_of, write_ledger_page
from setpoint.report.numbers import duration, human, percent
from setpoint.report.page import drawn
from setpoint.report.record import record_of
from setpoint.report.watch import view

STEPS = 360
"""Optimizer steps of each training, by default."""
WHO = ("dense", "setpoint")
ABOUT = (
    f"A network that reads {len(OLD)} letters of an invented alphabet learns {len(NEW)} more from {EACH} images of each"
)

Pair = tuple[Moment, Moment]
"""After the same step: the dense training, and the one with Setpoint."""


def demo(screen: Console, out: Path, budget: float, seed: int, steps: int) -> dict[str, Any]:
    """Train twice, show it, and write the ledger, the small model and the page.

    Args:
        screen: draws bars; if it is no terminal, a line now and then.
        out: folder for what is written.
        budget: FLOPs per step at the end, as a fraction of the dense network's.
        seed: of the images, the new head and the order of the images.

    Returns:
        What was measured, and what was written, for JSON.

    Raises:
        BudgetError: for a budget out of reach, before anything is trained.
    """
    moments = list[Pair]()
    with _one_thread():
        with screen.status("drawing the images, then trying what can be cut"):
            given, dense, pruned = data(seed), _network(seed), _network(seed)
            # The one with Setpoint first: it refuses a budget out of reach, and nothing was shown or written by then.
            trainings = zip(train(pruned, given, steps, seed, budget), train(dense, given, steps, seed), strict=True)
            first = next(trainings)
        out.mkdir(parents=True, exist_ok=True)
        with Live(console=screen, refresh_per_second=8) if screen.is_terminal else nullcontext() as live:
            if live is None:
                screen.print(ABOUT)
            started = time.perf_counter()
            for with_setpoint, without in chain([first], trainings):
                moments.append((without, with_setpoint))
                left = (time.perf_counter() - started) * (steps / max(1, without.step) - 1)
                if live is not None:
                    live.update(_view(moments[-1], steps, left, screen.height))
                elif without.step and without.step % max(1, steps // 4) == 0:
                    screen.print(_line(moments[-1]), highlight=False)
    found = _found(moments, budget, seed)
    for text in _lines(found):
        screen.print(text, highlight=False, soft_wrap=True)
    files = {"ledger": out / "run.jsonl", "model": out / "small.safetensors"}
    files["report"] = page_of(files["ledger"])
    ledger = moments[-1][1].ledger
    assert ledger is not None
    ledger.save(files["ledger"])
    save(pruned, files["model"])
    write_ledger_page(files["ledger"], files["report"], cards(found), accuracies(moments), DEMO)
    return {**found, **{name: str(path) for name, path in files.items()}}


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: layers are small, and on a busy machine threads wait for each other at each of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _network(seed: int) -> nn.Module:
    """The pretrained network with a new head, the same for each seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return pretrained(len(NEW))


def _view(now: Pair, steps: int, left: float, lines: int) -> RenderableType:
    """Both trainings as bars, and how the network with Setpoint stands."""
    rows = Table.grid(padding=(0, 2))
    for name, moment in zip(("dense", "with Setpoint"), now, strict=True):
        bar = ProgressBar(total=steps, completed=moment.step, width=24)
        rows.add_row(name, bar, f"accuracy {percent(moment.accuracy)}", duration(moment.seconds))
    about = f"step {now[0].step:,} of {steps:,}, " + (f"some {left:.0f} s left" if now[0].step else "starting")
    ledger = now[1].ledger
    assert ledger is not None
    shown = view(record_of(ledger), "last decision", lines - 6)
    return Group(Text(ABOUT), rows, Text(about), Text(), shown)


def _line(now: Pair) -> str:
    dense, pruned = now
    widths = pruned.ledger[-1].widths if pruned.ledger else {}
    units = f", {sum(widths.values()):,} units left" if widths else ""
    shares = f"dense {percent(dense.accuracy)}, with Setpoint {percent(pruned.accuracy)}"
    return f"step {dense.step:,}: accuracy {shares}{units}"


def _found(moments: Sequence[Pair], budget: float, seed: int) -> dict[str, Any]:
    """The results of both trainings. FLOPs and seconds of the one with Setpoint hold all of Setpoint's own work."""
    dense, pruned = moments[-1]
    summary = pruned.summary
    assert summary is not None
    return {
        "budget": budget,
        "seed": seed,
        "steps": dense.step,
        "budget_met": summary.budget_met,
        "accuracy": {"dense": dense.accuracy, "setpoint": pruned.accuracy},
        "flops_per_step": {"dense": summary.dense_flops, "setpoint": summary.final_flops},
        "train_flops": {"dense": summary.dense_flops * dense.step, "setpoint": summary.train_flops},
        "train_seconds": {"dense": dense.seconds, "setpoint": pruned.seconds},
        "step_seconds": {who: _last_steps([pair[place] for pair in moments]) for place, who in enumerate(WHO)},
        "units": {"dense": sum(summary.dense_widths.values()), "setpoint": sum(summary.widths.values())},
    }


def _last_steps(moments: Sequence[Moment]) -> float:
    """Seconds of a step: the median over the last quarter of a training."""
    seconds = [moment.seconds for moment in moments[-1 - max(1, len(moments) // 4) :]]
    return statistics.median(after - before for before, after in pairwise(seconds))


def _lines(found: dict[str, Any]) -> tuple[str, str, str]:
    """The three lines at the end."""
    dense, small = ({name: each[who] for name, each in found.items() if isinstance(each, dict)} for who in WHO)
    share, trained = (small[name] / dense[name] for name in ("flops_per_step", "train_flops"))
    met = f"budget {'met' if found['budget_met'] else 'NOT met'}: "
    return (
        f"accuracy   {percent(small['accuracy'])} with Setpoint, {percent(dense['accuracy'])} dense, on test images "
        "(one seed)",
        f"network    {met}{percent(share)} of the dense FLOPs, {small['units']:,} of {dense['units']:,} channels",
        f"training   {percent(trained)} of dense training FLOPs and {duration(small['train_seconds'])}, dense "
        f"{duration(dense['train_seconds'])}, own work included; a step at the end {duration(small['step_seconds'])}, "
        f"dense {duration(dense['step_seconds'])}",
    )


def cards(found: dict[str, Any]) -> str:
    """The page's head: what was compared, and how it ended."""
    items = (
        ("FLOPs per step", "flops_per_step", lambda value: human(value, "FLOPs")),
        ("accuracy", "accuracy", percent),
        ("FLOPs of the training", "train_flops", lambda value: human(value, "FLOPs")),
        ("a step at the end", "step_seconds", duration),
        ("whole training, overhead included", "train_seconds", duration),
    )
    made = "".join(
        f"<li><span>{title}</span><strong>{escape(show(found[key]['setpoint']))}</strong>"
        f"<small>{escape(show(found[key]['dense']))} dense</small></li>"
        for title, key, show in items
    )
    about = f"{ABOUT}. It does so twice with the same images in the same order: dense, and with Setpoint."
    return f'<p class="headline">{about}</p>\n<ul class="cards">{made}</ul>\n'


def accuracies(moments: Sequence[Pair]) -> str:
    """The accuracy of both networks over the steps."""
    data = []
    for place, (name, color) in enumerate((("dense", GREY), ("Setpoint", BLUE))):
        points = [(pair[place].step, 100 * pair[place].accuracy) for pair in moments]
        kept = [point for at, point in enumerate(points) if not at or point[1] != points[at - 1][1]]
        data.append(line(name, [*kept, *points[-1:]], color, width=2.4, hover="%{y:.1f} %"))
    figure = Figure(data, layout("accuracy on test images (%)", height=300))
    return drawn(figure, "Accuracy", "On test images, which neither training saw.")
