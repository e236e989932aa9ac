"""The law on language: small models against pruned ones of equal final size and training FLOPs, on fresh text.

    python bench/benchmarks/law_language.py --out results/law-language.json            all runs in order; resumable
    python bench/benchmarks/law_language.py --out results/law-language.json --fit      constants with intervals

A byte-level GPT of two layers has a residual stream that stays as it is; heads and neurons are what is scaled and
pruned. First come runs of five sizes at three budgets of FLOPs, and the law is fitted to them. It says how many tokens
are optimal for the small model. Then come, at 1, 4, 16 and 64 times these tokens, the small model and runs that start
larger and are cut between 25 and 75 % of the steps. All spend the FLOPs of the small model's run, all of Setpoint's own
work included; each rate of learning is swept at seed 0 on validation bytes, and the test bytes are reported. At last
comes a pair of twice the final size, which confirms or contradicts what was found at 16.

    python bench/benchmarks/law_language.py --out results/law-language.json --larger   ten times the size

The larger models have four layers and a residual stream twice as wide, and a step has four times the windows. They have
a calibration of their own, and runs at 1, 4 and 16 times their optimal tokens that start at the final size, at twice or
at four times that, and at 16 also at eight times.

A finished run is a row of the file and is not run again. Nothing else is kept of an interrupted one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import setpoint
from setpoint.controller.priced import PricedController
from setpoint.controller.schedule import Schedule
from setpoint.cost.flops import flops_cost
from setpoint.errors import UsageError
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import trace
from setpoint_bench.environment import machine
from setpoint_bench.installed_text import HELD_OUT, VOCABULARY, InstalledText, installed_text, windows
from setpoint_bench.law import Law, fit_law
from setpoint_bench.networks import CharGPT
from setpoint_bench.task import BenchError

WINDOW = 64
"""Bytes of a window."""


@dataclass(frozen=True)
class Scale:
    """A small model; one of size k has k times its heads (but one at least) and neurons in each layer.

    Args:
        layers, heads, neurons: numbers; `heads` and `neurons` are those of a layer.
        embedding, head_dim: features of the residual stream, and of a head.
        batch: windows of a step.
    """

    layers: int
    embedding: int
    head_dim: int
    heads: int
    neurons: int
    batch: int

    @property
    def tokens(self) -> int:
        """Bytes of a step."""
        return WINDOW * self.batch


TINY = Scale(layers=2, embedding=32, head_dim=8, heads=1, neurons=16, batch=8)
LARGER = Scale(layers=4, embedding=64, head_dim=16, heads=1, neurons=64, batch=32)
JUDGED = {"validation": 384, "test": 1024}
"""Windows of a held-out split that judge a run."""
WARM_UP, FLOOR, DECAY = 1 / 15, 0.1, 0.1
SIZES = (0.5, 1.0, 2.0, 4.0, 8.0)
BUDGETS = (800, 2400, 7200)
"""Of the calibration: the FLOPs of so many steps of the small model; at the first one rates are swept."""
SHORT = 300
"""A budget that is shown beside the others. Its runs end before any power law begins: no law is fitted to it."""
LOW_RATES = (0.004, 0.008)
"""Peak learning rates of long runs."""
RATES = {
    "calibration": (0.004, 0.008, 0.016),
    "arm": (0.008, 0.016, 0.032),
    "pair": LOW_RATES,
    "larger calibration": (0.004, 0.008, 0.016),
    "larger": (0.004, 0.008, 0.002),
    "larger, starts of 4": (0.008, 0.004, 0.016),
}
"""Those that are swept."""
LARGER_SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)
LARGER_BUDGETS = (1_350, 400, 4_000)
"""Of the calibration of larger models; at the first one rates are swept."""
LARGER_ARMS = (("small", 1.0), ("even", 2.0), ("setpoint", 2.0))
LARGER_STARTS_OF_4 = (("even", 4.0), ("setpoint", 4.0))
LARGER_LONG_RATES = {"small": (0.004, 0.002, 0.001), "even": (0.004, 0.002, 0.008), "setpoint": (0.004, 0.002)}
"""By arm of the larger models, the rates that are swept at a ratio of 16."""
LARGER_LONG_STARTS = (
    ("even", 4.0, 0.004, 0),
    ("even", 8.0, 0.004, 0),
    ("even", 4.0, 0.008, 0),
    ("even", 4.0, 0.008, 1),
    ("setpoint", 4.0, 0.008, 0),
    ("even", 4.0, 0.008, 2),
    ("setpoint", 4.0, 0.008, 1),
    ("setpoint", 8.0, 0.004, 0),
    ("setpoint", 4.0, 0.008, 2),
)
"""Starts at a ratio of 16 beyond those of 2, with the rates that are tried, and seeds."""
CUTS = (0.25, 0.75)
SCHEDULE = Schedule(warmup=CUTS[0], settle=CUTS[1], land=CUTS[1], shape="linear")
ARMS = (("small", 1.0), ("even", 2.0), ("setpoint", 2.0), ("even", 4.0), ("setpoint", 4.0))
LONG_ARMS = (*ARMS, ("even", 8.0), ("setpoint", 8.0))
LONGEST_ARMS = (*ARMS, ("even", 8.0))
LARGER_PAIR = 4.0
LARGER_PAIR_ARMS = (
    ("small", 4.0, 0.002, 0),
    ("small", 4.0, 0.004, 0),
    ("small", 4.0, 0.008, 0),
    ("even", 8.0, 0.004, 0),
    ("even", 8.0, 0.008, 0),
    ("small", 4.0, 0.004, 1),
    ("even", 8.0, 0.004, 1),
)
"""Of the pair of larger models: its final size, and its arms with rates and seeds."""
LARGER_PAIR_RATIO = 8.0
"""The text holds 14 times the optimal bytes of this size; a run of 8 times takes most of an hour."""
PAIR, PAIR_ARMS = 2.0, (("small", 2.0), ("even", 4.0), ("setpoint", 4.0))
"""Of the pair: its final size, and its arms, in sizes of the small model."""
SEEDS = (0, 1, 2)
REPLICAS = 50


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        kind: "calibration", "arm", or "pair" for the arms of a larger final size; "larger calibration", "larger" and
            "larger pair" for those of the larger models; "arm, made again" and "larger, made again".
        arm: "small" trains one size throughout; "even" and "setpoint" come down to the final one.
        start: size at the beginning, in sizes of the small model.
        ratio: tokens of the model of the final size / its optimal ones; None for the calibration.
        steps: of the model of the final size, for the FLOPs of the run.
        rate: peak learning rate.
        seed: of weights and order of windows.
        final: size at the end, in sizes of the small model.
    """

    kind: str
    arm: str
    start: float
    ratio: float | None
    steps: int
    rate: float
    seed: int
    final: float = 1.0

    def same(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is of this run."""
        return all(row.get(key, 1.0) == value for key, value in asdict(self).items())  # older rows lack `final`

    @property
    def scale(self) -> Scale:
        """What its sizes are multiples of."""
        return LARGER if self.kind.startswith("larger") else TINY


@dataclass(frozen=True, eq=False)
class Bench:
    """What all runs share: the text, and the held-out windows that judge."""

    text: InstalledText
    judged: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, text: InstalledText, judged: Mapping[str, int]) -> Bench:
        """Held-out windows at equal distances, so many of each split."""
        held = {split: getattr(text, split) for split in HELD_OUT}
        places = {
            split: torch.linspace(0, len(part) - WINDOW - 1, judged[split]).long() for split, part in held.items()
        }
        return cls(text, {split: windows(part, places[split], WINDOW) for split, part in held.items()})

    def batches(self, seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows in an order of the seed, none of them twice, so many at a time.

        Raises:
            BenchError: where the text is used up.
        """
        order = torch.randperm((len(self.text.train) - 1) // WINDOW, generator=torch.Generator().manual_seed(seed))
        for places in order.split(batch):
            yield windows(self.text.train, places * WINDOW, WINDOW)
        raise BenchError(f"the text of {len(self.text.train):,} bytes is used up: no byte is used twice")

    @torch.no_grad()
    def loss(self, model: nn.Module, split: str) -> float:
        """Nats per byte on a held-out split."""
        inputs, targets = self.judged[split]
        losses = [
            F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
            for x, y in zip(inputs.split(32), targets.split(32), strict=True)
        ]
        return float(torch.stack(losses).double().sum()) / targets.numel()


def built(size: float, scale: Scale = TINY) -> CharGPT:
    """The model of a size."""
    heads, neurons = max(1, round(scale.heads * size)), round(scale.neurons * size)
    widths = {}
    for layer in range(1, scale.layers + 1):
        widths |= {f"layer{layer}.heads": heads, f"layer{layer}.neurons": neurons}
    return CharGPT(widths, VOCABULARY, WINDOW, scale.embedding, scale.head_dim, fused=True)


def params(model: nn.Module) -> int:
    """Parameters outside of embeddings."""
    return sum(each.numel() for name, each in model.named_parameters() if name not in ("wte.weight", "wpe.weight"))


def example(scale: Scale) -> tuple[Tensor]:
    """Inputs of a step."""
    return (torch.zeros(scale.batch, WINDOW, dtype=torch.long),)


@cache
def step_flops(size: float, scale: Scale = TINY) -> float:
    """FLOPs of a training step, as Setpoint counts them."""
    found = trace(built(size, scale), example(scale))
    return float(flops_cost(found).total(widths_of(found.groups)))


@cache
def prunable(size: float, scale: Scale) -> tuple[Group, ...]:
    """Heads and neurons, in blocks of one: the final size is to be that of the small model to the unit."""
    groups = setpoint.find_groups(built(size, scale), example(scale))
    return tuple(replace(each, multiple_of=1) for each in groups if each.lossless)


def controller(arm: str) -> PricedController:
    """Even widths look at no spending and at no other layer: with "uniform" each layer keeps the same share."""
    return PricedController(schedule=SCHEDULE, allocation="uniform" if arm == "even" else "worth")


def trained(bench: Bench, cell: Cell, report: Callable[[float], None]) -> dict[str, Any]:
    """The row of one run.

    Args:
        report: is called with the share that is done.
    """
    began = time.perf_counter()
    torch.manual_seed(cell.seed)
    scale = cell.scale
    model, batches = built(cell.start, scale), bench.batches(cell.seed, scale.batch)
    matrices = [each for each in model.parameters() if each.dim() > 1]
    rest = [each for each in model.parameters() if each.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}],
        lr=cell.rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    bill, loop, total = cell.steps * step_flops(cell.final, scale), None, 0
    if cell.arm == "small":
        total = round(bill / step_flops(cell.start, scale))
    else:
        small = sum(each.numel() for each in built(cell.final, scale).parameters())
        # Without the FLOPs of a step a bill has its cuts early: those of parameters alone may save no FLOPs.
        budgets = [
            setpoint.Budget.total(small, of="params"),
            setpoint.Budget.total(step_flops(cell.final, scale), of="flops"),
            setpoint.Budget.total(bill, of="flops", per="run"),
        ]
        loop = setpoint.attach(
            model, optimizer, budgets, example=example(scale), total_steps=cell.steps, controller=controller(cell.arm),
            sensor=setpoint.TaylorSensor(scale.tokens), groups=prunable(cell.start, scale), verify=False,
        )  # fmt: skip
    step, sizes = 0, 0
    while step < (total if loop is None else loop.total_steps):
        length = total if loop is None else loop.total_steps
        for group in optimizer.param_groups:
            group["lr"] = cell.rate * _schedule((step + 1) / length)
        sizes += params(model)
        inputs, targets = next(batches)
        torch.autograd.backward(F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()))
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        report(step / length)
    summary = None if loop is None else loop.finish()
    if summary is not None and not summary.budget_met:
        raise BenchError(f"{cell}: {summary.reason}")
    return {
        **asdict(cell),
        "num_steps": step,
        "tokens": step * scale.tokens,
        "flops": step * step_flops(cell.start, scale) if summary is None else summary.train_flops,
        "bill": bill,
        "size": params(model),
        "average_size": sizes / step,
        # Not `attn.n_head`: where the tracer corrects views in place of the attribute, it stays as it was.
        "widths": [
            [layer.attn.c_attn.out_features // (3 * scale.head_dim), layer.c_fc.out_features]  # type: ignore[union-attr]
            for layer in model.layers
        ],
        **{split: bench.loss(model, split) for split in HELD_OUT},
        "seconds": round(time.perf_counter() - began, 1),
        **{key: machine()[key] for key in ("code", "cpu", "torch")},
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _schedule(progress: float) -> float:
    """A rise, then half a cosine."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


class Results:
    """The results file: a row for each finished run, written at once. It changes as runs finish."""

    def __init__(self, out: Path, bench: Bench) -> None:
        self.out, about = out, bench.text.about()
        self.held: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"rows": []}
        before = self.held.setdefault("data", about)
        if before["digest"] != about["digest"]:
            others = sorted(dict(before["packages"].items() ^ about["packages"].items()))
            raise BenchError(
                f"the bytes here are not those of {out}: digest {about['digest']}, there {before['digest']}; packages "
                f"of another version: {', '.join(others) or 'none'}. Install the versions there, or give another --out"
            )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All finished runs."""
        rows: list[dict[str, Any]] = self.held["rows"]
        return rows

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """The row of a run that is finished."""
        return next((row for row in self.rows if cell.same(row)), None)

    def keep(self, **found: Any) -> None:
        """Write what was found; an interrupted write leaves the old file."""
        self.held |= found
        self.out.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(f"  {json.dumps(row)}" for row in self.rows)
        rest = json.dumps({key: value for key, value in self.held.items() if key != "rows"}, indent=1)
        part = self.out.with_suffix(".part")
        part.write_text(f'{rest[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
        os.replace(part, self.out)


def best_rate(rows: Sequence[Mapping[str, Any]], rates: Sequence[float] = (), **of: Any) -> float:
    """The rate of the lowest validation loss at seed 0 among the rows with these values.

    Args:
        rates: all that must have been swept; by default those of the kind.

    Raises:
        ValueError: where not all rates were swept.
    """
    found = [row for row in rows if row["seed"] == 0 and all(row[key] == value for key, value in of.items())]
    if not {row["rate"] for row in found} >= set(rates or RATES[of["kind"]]):
        raise ValueError(f"the rates of {of} are not swept yet")
    return float(min(found, key=lambda row: row["validation"])["rate"])


def calibration(
    rows: Sequence[Mapping[str, Any]],
    budgets: Sequence[int],
    kind: str = "calibration",
    sizes: Sequence[float] = SIZES,
    swept: int = BUDGETS[0],
) -> Iterator[Cell]:
    """Runs of a calibration: rates are swept at one budget, and the best of each size taken at the others."""
    for rate in RATES[kind]:
        yield from (Cell(kind, "small", size, None, swept, rate, 0) for size in sizes)
    for budget in budgets:
        for size in sizes:
            rate = best_rate(rows, kind=kind, start=size, steps=swept)
            yield Cell(kind, "small", size, None, budget, rate, 0)


def calibrated(
    rows: Sequence[Mapping[str, Any]], budgets: Sequence[int] = BUDGETS, kind: str = "calibration"
) -> list[dict[str, Any]]:
    """Of each size and budget of a calibration the run with the lowest validation loss."""
    found: dict[tuple[float, int], dict[str, Any]] = {}
    for row in rows:
        key = row["start"], row["steps"]
        if (
            row["kind"] == kind
            and row["steps"] in budgets
            and (key not in found or row["validation"] < found[key]["validation"])
        ):
            found[key] = dict(row)
    return [found[key] for key in sorted(found)]


def optimal_tokens(runs: Sequence[Mapping[str, Any]], size: float, scale: Scale = TINY) -> float:
    """The compute-optimal tokens of a size: best sizes of all budgets, and a line through their logarithms.

    The best size of a budget is the vertex of the parabola through the best run and its neighbours in the logarithm of
    the size (the second approach of Hoffmann et al. 2022). Unlike a fit of the law it asks nothing of far larger sizes.
    Where the smallest or the largest size is the best, the parabola is that of its neighbour, and its vertex outside.

    Raises:
        BenchError: where a parabola has no lowest point.
    """
    best, spent = [], []
    for budget in sorted({run["steps"] for run in runs}):
        row = sorted((run for run in runs if run["steps"] == budget), key=lambda run: run["average_size"])
        lowest = min(range(1, len(row) - 1), key=lambda place: row[place]["validation"])
        near = row[lowest - 1 : lowest + 2]
        curve = np.polyfit([math.log(run["average_size"]) for run in near], [run["validation"] for run in near], 2)
        if curve[0] <= 0:
            raise BenchError(f"the losses of {budget} steps have no lowest point between these sizes")
        best.append(-curve[1] / (2 * curve[0]))
        spent.append(math.log(row[0]["bill"]))
    slope, start = np.polyfit(spent, best, 1)
    bill = math.exp((math.log(params(built(size, scale))) - start) / slope)
    return bill / step_flops(size, scale) * scale.tokens


def fitted(runs: Sequence[Mapping[str, Any]], losses: Sequence[float] | None = None) -> Law:
    """The law of the calibration's runs, on test bytes."""
    sizes, tokens, measured = ([float(run[key]) for run in runs] for key in ("average_size", "tokens", "test"))
    return fit_law(sizes, tokens, measured if losses is None else losses, "calibration of law_language.py")


def constants(law: Law) -> list[float]:
    """E, A, a, B, b."""
    return [law.irreducible, law.size_scale, law.size_exponent, law.data_scale, law.data_exponent]


def best_rates(rows: Sequence[Mapping[str, Any]], ratio: float) -> dict[tuple[str, float], float]:
    """By arm, the best rate at a ratio."""
    return {arm: best_rate(rows, kind="arm", arm=arm[0], start=arm[1], ratio=ratio) for arm in ARMS}


def arms(rows: Sequence[Mapping[str, Any]], optimal: int) -> Iterator[Cell]:
    """Seed 0: rates are swept at a ratio of 1, and the best is taken at 4, and at 16 for starts of up to 2.

    Args:
        optimal: steps of the small model that its optimal tokens make.
    """
    low, middle, high = RATES["arm"]
    for rate in (middle, low, high):
        yield from (Cell("arm", arm, start, 1.0, optimal, rate, 0) for arm, start in ARMS)
    best = best_rates(rows, 1.0)
    yield from (Cell("arm", *arm, 4.0, 4 * optimal, best[arm], 0) for arm in ARMS)
    yield from (Cell("arm", *arm, 16.0, 16 * optimal, best[arm], 0) for arm in ARMS if arm[1] <= 2)


def further_arms(rows: Sequence[Mapping[str, Any]], optimal: int) -> Iterator[Cell]:
    """The other rates at a ratio of 4, two further seeds at the best rates, then larger starts and seeds at 16.

    Runs that start at 8 take the rate of a start at 4.
    """
    first = best_rates(rows, 1.0)
    for place in (1, 2):
        for arm in ARMS:
            rates = sorted(RATES["arm"], key=lambda rate: rate != first[arm])
            yield Cell("arm", *arm, 4.0, 4 * optimal, rates[place], 0)
    swept = best_rates(rows, 4.0)
    for seed in SEEDS[1:]:
        yield from (Cell("arm", *arm, 1.0, optimal, first[arm], seed) for arm in ARMS)
        yield from (Cell("arm", *arm, 4.0, 4 * optimal, swept[arm], seed) for arm in ARMS)
    longest = {arm: first[arm] if arm[1] <= 2 else swept[arm[0], min(arm[1], 4.0)] for arm in LONG_ARMS}
    for seed in SEEDS:
        new = (arm for arm in LONG_ARMS if seed or arm[1] > 2)
        yield from (Cell("arm", *arm, 16.0, 16 * optimal, longest[arm], seed) for arm in new)


def longest_arms(rows: Sequence[Mapping[str, Any]], optimal: int) -> Iterator[Cell]:
    """Seed 0 at a ratio of 64, at the rates of 16; then lower rates at both.

    The best rate falls as runs become longer, and the small model began with a higher one than the others.
    """
    first, swept = best_rates(rows, 1.0), best_rates(rows, 4.0)
    for arm in LONGEST_ARMS:
        rate = first[arm] if arm[1] <= 2 else swept[arm[0], min(arm[1], 4.0)]
        yield Cell("arm", *arm, 64.0, 64 * optimal, rate, 0)
    small, even = ARMS[:2]
    yield Cell("arm", *small, 64.0, 64 * optimal, LOW_RATES[1], 0)
    yield from (Cell("arm", *small, 16.0, 16 * optimal, LOW_RATES[1], seed) for seed in SEEDS)
    yield from (Cell("arm", *arm, 64.0, 64 * optimal, LOW_RATES[0], 0) for arm in (small, even))
    yield from (Cell("arm", *arm, 16.0, 16 * optimal, LOW_RATES[0], seed) for seed in SEEDS for arm in ARMS[:3])
    yield from (Cell("arm", *arm, 64.0, 64 * optimal, LOW_RATES[0], 0) for arm in ARMS[2:])


def pair(rows: Sequence[Mapping[str, Any]], optimal: int) -> Iterator[Cell]:
    """The pair of twice the final size at a ratio of 16: rates are swept at seed 0, each arm's best is taken at others.

    Args:
        optimal: steps of the final size that its optimal tokens make.
    """
    for seed in SEEDS:
        for arm, start in PAIR_ARMS:
            rates = RATES["pair"] if seed == 0 else (best_rate(rows, kind="pair", arm=arm, start=start, ratio=16.0),)
            yield from (Cell("pair", arm, start, 16.0, 16 * optimal, rate, seed, PAIR) for rate in rates)


def run_all(results: Results, bench: Bench, pause: Path | None) -> None:
    """Make every run that the file does not hold."""
    for cell in calibration(results.rows, (SHORT, *BUDGETS[1:2])):
        run_one(results, bench, cell, pause)
    if "optimal_steps" not in results.held:
        optimal = optimal_tokens(calibrated(results.rows), 1.0)
        print(f"optimal for the small model: {optimal:,.0f} tokens", flush=True)
        results.keep(optimal_tokens=optimal, optimal_steps=max(8, round(optimal / TINY.tokens)))
    optimal_steps = results.held["optimal_steps"]
    for cells in (arms, further_arms):
        for cell in cells(results.rows, optimal_steps):
            run_one(results, bench, cell, pause)
    for cell in calibration(results.rows, BUDGETS[2:]):
        run_one(results, bench, cell, pause)
    if "pair_optimal_steps" not in results.held:
        optimal = optimal_tokens(calibrated(results.rows), PAIR)
        results.keep(pair_optimal_tokens=optimal, pair_optimal_steps=round(optimal / TINY.tokens))
    for cell in pair(results.rows, results.held["pair_optimal_steps"]):
        run_one(results, bench, cell, pause)
    for cell in longest_arms(results.rows, optimal_steps):
        run_one(results, bench, cell, pause)


def larger(rows: Sequence[Mapping[str, Any]], optimal: int) -> Iterator[Cell]:
    """Arms of the larger models: rates are swept at a ratio of 4, and each arm's best is taken at 1.

    Seed 0 comes first, then the other seeds. Rates are swept once more at 16, with all seeds at the best. Then come
    starts of 4, whose rates are swept at 4 and 1, and larger starts at 16. A second rate at 1 and the other seeds of
    starts of 4 come last.
    """

    def of(arm: tuple[str, float], ratio: float, rate: float, seed: int = 0) -> Cell:
        return Cell("larger", *arm, ratio, round(ratio * optimal), rate, seed)

    def best(arm: tuple[str, float], ratio: float, rates: Sequence[float]) -> float:
        return best_rate(rows, rates, kind="larger", arm=arm[0], start=arm[1], ratio=ratio)

    yield from (of(arm, 4.0, rate) for rate in RATES["larger"] for arm in LARGER_ARMS)
    swept = {arm: best(arm, 4.0, RATES["larger"]) for arm in LARGER_ARMS}
    for ratio, seed in ((1.0, 0), (4.0, 1), (1.0, 1), (4.0, 2), (1.0, 2)):
        yield from (of(arm, ratio, swept[arm], seed) for arm in LARGER_ARMS)
    yield from (of(arm, 16.0, rate) for arm in LARGER_ARMS for rate in LARGER_LONG_RATES[arm[0]])
    swept = {arm: best(arm, 16.0, LARGER_LONG_RATES[arm[0]]) for arm in LARGER_ARMS}
    yield from (of(arm, 16.0, swept[arm], seed) for seed in SEEDS[1:] for arm in LARGER_ARMS)
    rates = RATES["larger, starts of 4"]
    yield from (of(arm, ratio, rate) for ratio in (4.0, 1.0) for arm in LARGER_STARTS_OF_4 for rate in rates)
    yield from (of((arm, start), 16.0, rate, seed) for arm, start, rate, seed in LARGER_LONG_STARTS)
    yield from (of(arm, 1.0, rate) for arm in LARGER_ARMS for rate in LOW_RATES)
    for seed in SEEDS[1:]:
        yield from (of(arm, 1.0, best(arm, 1.0, LOW_RATES), seed) for arm in LARGER_ARMS)
        yield from (of(arm, ratio, best(arm, ratio, rates), seed) for ratio in (1.0, 4.0) for arm in LARGER_STARTS_OF_4)


def larger_pair(optimal: int) -> Iterator[Cell]:
    """The pair of larger models: rates at seed 0, and the best of them at another seed.

    Args:
        optimal: steps of the final size that its optimal tokens make.
    """
    for arm, start, rate, seed in LARGER_PAIR_ARMS:
        steps = round(LARGER_PAIR_RATIO * optimal)
        yield Cell("larger pair", arm, start, LARGER_PAIR_RATIO, steps, rate, seed, LARGER_PAIR)


def run_larger(results: Results, bench: Bench, pause: Path | None) -> None:
    """Make every run of the larger models that the file does not hold."""
    swept, *others = LARGER_BUDGETS
    for cell in calibration(results.rows, others, "larger calibration", LARGER_SIZES, swept):
        run_one(results, bench, cell, pause)
    if "larger_optimal_steps" not in results.held:
        runs = calibrated(results.rows, LARGER_BUDGETS, "larger calibration")
        optimal = optimal_tokens(runs, 1.0, LARGER)
        print(f"optimal for the larger model: {optimal:,.0f} tokens", flush=True)
        results.keep(larger_optimal_tokens=optimal, larger_optimal_steps=round(optimal / LARGER.tokens))
    for cell in larger(results.rows, results.held["larger_optimal_steps"]):
        run_one(results, bench, cell, pause)
    if "larger_pair_optimal_steps" not in results.held:
        optimal = optimal_tokens(calibrated(results.rows, LARGER_BUDGETS, "larger calibration"), LARGER_PAIR, LARGER)
        results.keep(larger_pair_optimal_tokens=optimal, larger_pair_optimal_steps=round(optimal / LARGER.tokens))
    for cell in larger_pair(results.held["larger_pair_optimal_steps"]):
        run_one(results, bench, cell, pause)


def made_again(rows: Sequence[Mapping[str, Any]], kind: str) -> Iterator[Cell]:
    """A run of each arm at a ratio of 1 and seed 0, with the best of its rates, as another kind of row.

    Args:
        kind: "arm" or "larger".
    """
    there = [row for row in rows if (row["kind"], row["ratio"], row["seed"]) == (kind, 1.0, 0)]
    for arm, start in sorted({(row["arm"], row["start"]) for row in there}, key=ARMS.index):
        best = min((row for row in there if (row["arm"], row["start"]) == (arm, start)), key=lambda r: r["validation"])
        yield Cell(f"{kind}, made again", arm, start, 1.0, best["steps"], best["rate"], 0)


def run_one(results: Results, bench: Bench, cell: Cell, pause: Path | None) -> None:
    """Make one run unless the file holds it, and say how it goes."""
    if results.row(cell) is not None:
        return
    while pause is not None and pause.exists():
        time.sleep(3)
    began = said = time.perf_counter()

    def report(share: float) -> None:
        nonlocal said
        now = time.perf_counter()
        if now - said > 30:
            said = now
            print(f"  {share:.0%}, {(now - began) * (1 / share - 1):.0f} s left of this run", flush=True)

    row = trained(bench, cell, report)
    results.rows.append(row)
    results.keep()
    print(
        f"{datetime.now():%H:%M:%S} {cell.kind} {cell.arm} x{cell.start:g} r {cell.ratio} rate {cell.rate} "
        f"seed {cell.seed}: {row['num_steps']} steps, {row['flops'] / row['bill']:.3f} of the FLOPs, "
        f"size {row['size']}, test {row['test']:.4f}, {row['seconds']} s",
        flush=True,
    )


def long_runs(rows: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """The small models of arms at seed 0, each ratio at its best rate."""
    small = [row for row in rows if row["kind"] == kind and row["arm"] == "small" and row["seed"] == 0]
    return [
        min((row for row in small if row["ratio"] == ratio), key=lambda row: row["validation"])
        for ratio in sorted({row["ratio"] for row in small})
    ]


def fit(
    results: Results, runs: Sequence[Mapping[str, Any]], long: Sequence[Mapping[str, Any]], prefix: str = ""
) -> None:
    """The law's constants with intervals: residuals of the fit, as logarithms, are drawn anew and fitted again.

    Where no exponents above 0 fit, there is no law, and the file says so.

    Args:
        runs: the calibration.
        long: dense runs of arms. A second law is fitted to these and the calibration, without intervals.
        prefix: of the names in the file.
    """

    def keep(**found: Any) -> None:
        results.keep(**{f"{prefix}{name}": value for name, value in found.items()})

    results.held.pop(f"{prefix}why_no_law", None)
    try:
        law = fitted(runs)
        keep(long_law=constants(fitted([*runs, *long])))
    except (UsageError, OverflowError) as error:
        keep(law=None, why_no_law=str(error), replicas=[])
        print(f"no law: {error}")
        return
    generator = np.random.default_rng(0)
    foretold = np.array([law.loss(run["average_size"], run["tokens"]) for run in runs])
    residuals = np.log([run["test"] for run in runs]) - np.log(foretold)
    residuals *= math.sqrt(len(runs) / (len(runs) - 5))  # five constants take as many degrees of freedom
    replicas = []
    for _ in range(REPLICAS):
        try:
            drawn = fitted(runs, list(foretold * np.exp(generator.choice(residuals, len(runs)))))
        except (UsageError, OverflowError):
            continue
        replicas.append(constants(drawn))
    keep(law=constants(law), replicas=replicas, drawn=REPLICAS, residuals=residuals.tolist())
    for name, value, draws in zip(("E", "A", "a", "B", "b"), constants(law), np.transpose(replicas), strict=True):
        print(name, f"{value:.4g}", *(f"{end:.4g}" for end in np.quantile(draws, (0.025, 0.975))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fit", action="store_true", help="only fit the constants to the calibration that is there")
    parser.add_argument("--larger", action="store_true", help="the runs of ten times the size")
    parser.add_argument("--again", action="store_true", help="one run of each arm at r = 1, with those of the file")
    parser.add_argument("--pause-while", type=Path, help="begin no run while this file is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shared = Bench.of(installed_text(), JUDGED)
    kept = Results(given.out, shared)
    if given.fit and given.larger:
        runs = calibrated(kept.rows, LARGER_BUDGETS, "larger calibration")
        fit(kept, runs, long_runs(kept.rows, "larger"), "larger_")
    elif given.fit:
        fit(kept, calibrated(kept.rows), [*long_runs(kept.rows, "arm"), *long_runs(kept.rows, "pair")])
    elif given.again:
        for cell in made_again(kept.rows, "larger" if given.larger else "arm"):
            run_one(kept, shared, cell, given.pause_while)
    else:
        (run_larger if given.larger else run_all)(kept, shared, given.pause_while)
