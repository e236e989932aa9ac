"""The tables of what the law predicts and of what was measured, and a picture of both."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from law_language import (
    BUDGETS,
    LARGER,
    LARGER_BUDGETS,
    LARGER_PAIR,
    SHORT,
    TINY,
    WINDOW,
    built,
    calibrated,
    optimal_tokens,
    params,
)

from setpoint.report.figures import BLUE, DARK, ORANGE, OTHERS
from setpoint.report.numbers import NOTHING, signed
from setpoint_bench.installed_text import VOCABULARY
from setpoint_bench.law import LANGUAGE, Law
from setpoint_bench.report.folder import read_lines
from setpoint_bench.report.packed import file_of
from setpoint_bench.report.statistics import Difference, paired
from setpoint_bench.results import FILE
from tables.words import rows_made_on

WIDTHS = {"even": "even", "setpoint": "Setpoint's own"}


def law_table(file: Path) -> str:
    """By data / compute-optimal data, the gain of each start size, by each of the published fits."""
    rows = json.loads(file.read_text(encoding="utf-8"))["predicted"]
    starts = sorted({row["start"] for row in rows})
    lines = [
        "| r | " + " | ".join(f"start at {start:g} x" for start in starts) + " |",
        "|---:|" + "---:|" * len(starts),
    ]
    for ratio in sorted({row["ratio"] for row in rows}):
        gains = {row["start"]: row["gain"] for row in rows if row["ratio"] == ratio}
        shown = (" / ".join(_percent(gain) for gain in gains[start]) for start in starts)
        lines.append(f"| {ratio:g} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Arm:
    """An arm at a ratio, beside the small model of the same seeds.

    Args:
        ratio: r.
        arm: "even" or "setpoint".
        start: size at the beginning, in final sizes.
        rate: of learning, the best on validation bytes at seed 0; `small_rate` is that of the small model.
        size: final parameters outside of embeddings, mean; `average` is that over the steps, in final sizes.
        loss: mean on test bytes, in nats per byte; `small` is that of the small model.
        gain: of the pruned model, in nats per byte.
        predicted: the same by the law of the calibration, from average sizes and tokens; None where there is no law.
        by_final: the same with final sizes in place of average ones.
        ends: 95 % interval of what is predicted, and of the small model's reducible loss by the law.
        reducible: the small model's reducible loss, by the law.
        off: measured loss less the law's, of the small model and of the pruned one; None where there is no law.
        refitted: the gain as predicted by the law that was fitted to the long dense runs, too.
        to_even: where a run has even widths of the same start beside it, its gain over these.
        published: shares of the reducible loss that the published fits predict for these sizes and bytes.
        runs: means of the pruned runs and of the small model's: "size", "average_size", "tokens" and "test".
    """

    ratio: float
    arm: str
    start: float
    rate: float
    small_rate: float
    size: float
    average: float
    loss: float
    small: float
    gain: Difference
    predicted: float | None
    by_final: float | None
    ends: tuple[float, float] | None
    reducible: float | None
    off: tuple[float, float] | None
    refitted: float | None
    to_even: Difference | None
    published: tuple[float, ...]
    runs: tuple[Mapping[str, float], Mapping[str, float]]


def arms_of(data: Mapping[str, Any], kind: str = "arm", prefix: str = "") -> list[Arm]:
    """All arms of a kind in a results file that have a seed in common with the small model.

    Args:
        kind: "arm", "pair", or "larger".
        prefix: of the law's names in the file.
    """
    rows = [row for row in data["rows"] if row["kind"] == kind]
    final = float(rows[0].get("final", 1.0)) if rows else 1.0  # older rows lack it
    fit = _of(data, prefix)
    law = _law(fit["law"]) if fit.get("law") else None
    long = _law(fit["long_law"]) if fit.get("long_law") else None
    draws = [_law(replica) for replica in fit.get("replicas", [])]
    found = []
    for ratio in sorted({row["ratio"] for row in rows}):
        small = _chosen(rows, ratio, "small", final)
        for start, arm in sorted({(row["start"], row["arm"]) for row in rows if row["ratio"] == ratio}):
            runs = _chosen(rows, ratio, arm, start)
            pairs = [(runs[seed], small[seed]) for seed in sorted(runs.keys() & small.keys())]
            if arm == "small" or not pairs:
                continue
            ours, theirs = (_means(each) for each in zip(*pairs, strict=True))
            by_law = [_predicted(each, ours, theirs) for each in draws]
            low, high = np.quantile(by_law, (0.025, 0.975)).tolist() if by_law else (None, None)
            found.append(
                Arm(
                    ratio, arm, start / final, pairs[0][0]["rate"], pairs[0][1]["rate"],
                    ours["size"], ours["average_size"] / ours["size"],
                    ours["test"], theirs["test"], paired([plain["test"] - cut["test"] for cut, plain in pairs]),
                    None if law is None else _predicted(law, ours, theirs),
                    None if law is None else _predicted(law, ours, theirs, size="size"),
                    None if low is None else (low, high),
                    None if law is None else theirs["test"] - law.irreducible,
                    None if law is None else (_off(law, theirs), _off(law, ours)),
                    None if long is None else _predicted(long, ours, theirs),
                    _to_even(rows, ratio, start, runs) if arm == "setpoint" else None,
                    _published(ratio, ours, theirs, prefix), (ours, theirs),
                )
            )  # fmt: skip
    return found


def _off(law: Law, run: Mapping[str, float]) -> float:
    return run["test"] - law.loss(run["average_size"], run["tokens"])


def _to_even(
    rows: Sequence[dict[str, Any]], ratio: float, start: float, runs: Mapping[int, Mapping[str, Any]]
) -> Difference | None:
    even = _chosen(rows, ratio, "even", start)
    seeds = sorted(even.keys() & runs.keys())
    return paired([even[seed]["test"] - runs[seed]["test"] for seed in seeds]) if seeds else None


def _of(data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What the file holds under names with a prefix."""
    return {name.removeprefix(prefix): value for name, value in data.items() if name.startswith(prefix)}


def _means(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {key: statistics.fmean(run[key] for run in runs) for key in ("size", "average_size", "tokens", "test")}


def _chosen(rows: Sequence[dict[str, Any]], ratio: float, arm: str, start: float) -> dict[int, dict[str, Any]]:
    """The runs of an arm by seed, at the rate that was the best on validation bytes at seed 0."""
    runs = [row for row in rows if (row["ratio"], row["arm"], row["start"]) == (ratio, arm, start)]
    swept = [row for row in runs if row["seed"] == 0]
    if not swept:
        return {}
    rate = min(swept, key=lambda row: row["validation"])["rate"]
    return {row["seed"]: row for row in runs if row["rate"] == rate}


def _law(constants: Sequence[float]) -> Law:
    return Law(*constants[:5], source="calibration")


def _predicted(law: Law, pruned: Mapping[str, float], small: Mapping[str, float], size: str = "average_size") -> float:
    """The gain in nats per byte that the law predicts, from sizes, average or final ones, and tokens."""
    return law.loss(small[size], small["tokens"]) - law.loss(pruned[size], pruned["tokens"])


def gain_by_worth(law: Law, arm: Arm, exponent: float) -> float:
    """The gain if the bytes D of a pruned run are worth `D (mean size / final size)^-k` to its final size."""
    pruned, small = arm.runs
    worth = pruned["tokens"] * (pruned["average_size"] / pruned["size"]) ** -exponent
    return law.loss(small["size"], small["tokens"]) - law.loss(pruned["size"], worth)


def worth_exponent(law: Law, arms: Sequence[Arm]) -> float:
    """The k, in hundredths from -1 to 2, with the smallest mean distance between measured and predicted gains."""

    def error(exponent: float) -> float:
        return sum(abs(arm.gain.mean - gain_by_worth(law, arm, exponent)) for arm in arms)

    return min((step / 100 for step in range(-100, 201)), key=error)


def _published(ratio: float, pruned: Mapping[str, float], small: Mapping[str, float], prefix: str) -> tuple[float, ...]:
    """The gains that the published fits predict, which count embeddings, as shares of the reducible loss."""
    embeddings = (LARGER if prefix else TINY).embedding * (VOCABULARY + WINDOW)
    average = (pruned["average_size"] + embeddings) / (small["size"] + embeddings)
    return tuple(law.gain(ratio, average, cost=small["tokens"] / pruned["tokens"]) for law in LANGUAGE)


def measured_table(file: Path, kind: str = "arm", prefix: str = "") -> str:
    """What was measured beside what was predicted, by the calibration and by the published fits."""
    data = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "| r | start | widths | rate | small model's rate | final size | small model | pruned | gain, nats per byte "
        "| law of the calibration | measured − law | of reducible loss: measured | published fits | seeds |",
        f"|---:|---:|---|{'---:|' * 11}",
    ]
    for each in arms_of(data, kind, prefix):
        by_law, share, apart = "–", "–", "–"
        if each.predicted is not None and each.reducible is not None:
            by_law, share = _nats(each.predicted), _percent(each.gain.mean / each.reducible)
            apart = _apart(each)
            if each.ends is not None:
                by_law += f" [{_nats(each.ends[0])}, {_nats(each.ends[1])}]"
        cells = (
            *_measured(each),
            by_law,
            apart,
            share,
            " / ".join(map(_percent, each.published)),
            f"{each.gain.num}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    of = {**data, **_of(data, prefix)}
    made = [
        row if "cpu" in row else {**of["environment"], "date": of["date"]}  # older rows do not name their machine
        for row in data["rows"]
        if row["kind"] == kind
    ]
    return "\n".join([*lines, "", rows_made_on(made)])


def _measured(arm: Arm) -> Iterator[str]:
    """The first cells of a row of arms."""
    yield from (f"{arm.ratio:g}", f"{arm.start:g} x", WIDTHS[arm.arm], f"{arm.rate:g}", f"{arm.small_rate:g}")
    yield from (f"{arm.size:,.0f}", f"{arm.small:.4f}", f"{arm.loss:.4f}", _bold(arm.gain))


def errors_table(file: Path) -> str:
    """How far the law of each calibration is from both models of a comparison, and what a wider fit predicts."""
    data = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "| final size | r | start | widths | small model: measured − law | pruned: measured − law | gain: measured "
        "| law of the calibration | law refitted with the long dense runs | Setpoint's own − even |",
        f"|---:|---:|---:|---|{'---:|' * 6}",
    ]
    for kind, prefix in (("arm", ""), ("larger", "larger_")):
        for each in arms_of(data, kind, prefix):
            if each.off is None or each.predicted is None or each.refitted is None:
                continue  # no law fits
            cells = (
                f"{each.size:,.0f}",
                f"{each.ratio:g}",
                f"{each.start:g} x",
                WIDTHS[each.arm],
                *(_nats(value) for value in (*each.off, each.gain.mean, each.predicted, each.refitted)),
                "–" if each.to_even is None else _bold(each.to_even),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


FITTED_TO = (1.0, 4.0)  # the ratios of the very small model that k is fitted to


def forms_table(file: Path) -> str:
    """How far three forms of the law of each calibration are from the measured gains.

    They take the average size, the final size, and the final size with bytes that are worth less.
    """
    data = json.loads(file.read_text(encoding="utf-8"))
    exponent = worth_exponent(_law(data["law"]), [arm for arm in arms_of(data) if arm.ratio in FITTED_TO])
    lines = [
        "| final size | r | compared | error, average size | error, final size | error, bytes worth less "
        "| of reducible loss: average size | final size | bytes worth less | k by these rows alone |",
        f"|---:|---:|---:|{'---:|' * 7}",
    ]
    for kind, prefix in (("arm", ""), ("pair", ""), ("larger", "larger_"), ("larger pair", "larger_")):
        arms, law = arms_of(data, kind, prefix), _law(_of(data, prefix)["law"])
        for ratio in sorted({each.ratio for each in arms}):
            seen = _ratio_of(data, kind, prefix) if kind.endswith("pair") else ratio
            errors: list[tuple[float, ...]] = []
            shares: list[tuple[float, ...]] = []
            for each in arms:
                if each.ratio != ratio or each.predicted is None or each.by_final is None:
                    continue  # of another r, or no law fits
                forms = (each.predicted, each.by_final, gain_by_worth(law, each, exponent))
                errors.append(tuple(abs(each.gain.mean - form) for form in forms))
                shares.append(tuple(error / (each.reducible or math.nan) for error in errors[-1]))
            if errors:
                size = max(each.size for each in arms)
                nats = (f"{statistics.fmean(column):.4f}" for column in zip(*errors, strict=True))
                known = all(min(share) > 0 for share in shares)  # else the loss is below the law's E
                percent = (
                    f"{100 * statistics.fmean(column):.1f} %" if known else NOTHING
                    for column in zip(*shares, strict=True)
                )
                alone = signed(worth_exponent(law, [each for each in arms if each.ratio == ratio]), 2)
                cells = (*nats, *percent, alone.removeprefix("+"))
                lines.append(f"| {size:,.0f} | {seen:.0f} | {len(errors)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def worth_line(file: Path) -> str:
    """The exponent k of bytes that are worth less: as fitted, over refits of the law, and with runs made again."""
    data = json.loads(file.read_text(encoding="utf-8"))
    law, arms = _law(data["law"]), arms_of(data)
    fitted = [arm for arm in arms if arm.ratio in FITTED_TO]
    exponent, errors = worth_exponent(law, fitted), []
    exponents = list[float]()
    for refit in map(_law, data["replicas"]):
        exponents.append(worth_exponent(refit, fitted))
        errors.append(_error_by_worth(refit, [arm for arm in arms if arm.ratio == 16], exponents[-1]))
    low, high = np.quantile(exponents, (0.025, 0.975)).tolist()
    least, most = np.quantile(errors, (0.025, 0.975)).tolist()
    return (
        f"k = {exponent:.2f} [{low:.2f}, {high:.2f}] is fitted to the {len(fitted)} gains of the very small model at "
        f"r = 1 and 4, by their mean distance. At r = 16 its mean error is "
        f"{100 * _error_by_worth(law, [arm for arm in arms if arm.ratio == 16], exponent):.1f} % "
        f"[{100 * least:.1f}, {100 * most:.1f}] of the reducible loss. The intervals are over "
        f"{len(errors)} refits of the law of the calibration, of which {sum(error < 0.03 for error in errors)} come "
        f"below 3 %.{_worth_of_runs_made_again(data, law)}"
    )


def _worth_of_runs_made_again(data: Mapping[str, Any], law: Law) -> str:
    """What k and the error at r = 16 would be with the runs that were made again in place of the first ones."""
    names = ("arm", "start", "ratio", "rate", "seed")
    again = {tuple(row[each] for each in names): row for row in data["rows"] if row["kind"] == "arm, made again"}
    if not again:
        return ""
    rows = [
        {**again.get(tuple(row[each] for each in names), row), "kind": "arm"}
        for row in data["rows"]
        if row["kind"] == "arm"
    ]
    arms = arms_of({**data, "rows": rows})
    exponent = worth_exponent(law, [arm for arm in arms if arm.ratio in FITTED_TO])
    error = _error_by_worth(law, [arm for arm in arms if arm.ratio == 16], exponent)
    return (
        f" With the runs at r = 1 that were made again in place of the same ones, k would be {exponent:.2f} and this "
        f"error {100 * error:.1f} %."
    )


def _error_by_worth(law: Law, arms: Sequence[Arm], exponent: float) -> float:
    """Mean distance between measured and predicted gains, as a share of the small model's reducible loss."""
    return statistics.fmean(
        abs(arm.gain.mean - gain_by_worth(law, arm, exponent)) / (arm.small - law.irreducible) for arm in arms
    )


def least_error_line(file: Path) -> str:
    """By how much the published fits miss at r = 16 at least, whatever the irreducible loss is."""
    data = json.loads(file.read_text(encoding="utf-8"))
    there = [arm for arm in arms_of(data) if arm.ratio == 16]
    errors = [100 * (min(arm.published) - arm.gain.mean / arm.small) for arm in there]
    missed = sum(error > 3 for error in errors)
    return (
        f"The reducible loss is hardly known, but it is at most the loss itself. So at r = 16 the measured shares are "
        f"{_percent(max(arm.gain.mean / arm.small for arm in there))} at best, and the fits of others miss them by "
        f"{min(errors):.1f} to {max(errors):.1f} points at least. An error below 3 % of the reducible loss was the "
        f"goal. It is missed in {missed} of {len(errors)} rows for certain."
    )


def earlier_cuts_line(file: Path) -> str:
    """What larger models lost at r = 4 with a bill alone, which moved the cuts ahead, beside the runs of the table."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]

    def best(kind: str, arm: str) -> dict[str, Any]:
        found = [row for row in rows if (row["kind"], row["ratio"], row["seed"], row["arm"]) == (kind, 4.0, 0, arm)]
        return min((row for row in found if row["start"] <= 2), key=lambda row: row["validation"])

    small = best("larger", "small")["test"]
    texts = []
    for arm, words in WIDTHS.items():
        early, late = best("larger, earlier cuts", arm), best("larger", arm)
        texts.append(
            f"With {words} widths the gain was {_nats(small - early['test'])} in place of "
            f"{_nats(small - late['test'])} nats per byte. The mean size was {early['average_size']:,.0f} in place of "
            f"{late['average_size']:,.0f} parameters."
        )
    return f"These are at r = 4, from a start of 2, of seed 0. {' '.join(texts)}"


def made_again_line(file: Path) -> str:
    """Runs of each arm that were made again, of the very small and of the larger model, beside those of the tables."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    names = ("arm", "start", "ratio", "rate", "seed")
    texts = []
    for kind in ("arm", "larger"):
        committed = {tuple(row[name] for name in names): row for row in rows if row["kind"] == kind}
        again = [row for row in rows if row["kind"] == f"{kind}, made again"]
        apart = [row["test"] - committed[tuple(row[name] for name in names)]["test"] for row in again]
        other = [each for each in apart if abs(each) >= 5e-5]
        size = max(row["size"] for row in again)
        same = f"With {size:,.0f} parameters {len(apart) - len(other)} of {len(apart)} runs have the same loss"
        ends = " to ".join(signed(end, 4) for end in sorted({min(other), max(other)})) if other else ""
        texts.append(f"{same}. The loss of the others differs by {ends} nats per byte" if other else same)
    made = rows_made_on([row for row in rows if row["kind"].endswith("made again")])
    return f"One run of each arm at r = 1, of seed 0, was made again. {'. '.join(texts)}. {made}"


def _bold(gain: Difference) -> str:
    text = _with_interval(gain)
    return f"**{text}**" if gain.clear else text


def _apart(arm: Arm) -> str:
    """The measured gain less the predicted one; both intervals as independent errors where there are three seeds."""
    assert arm.predicted is not None
    mean = arm.gain.mean - arm.predicted
    if arm.gain.low is None or arm.gain.high is None or arm.ends is None:
        return _nats(mean)
    half = (arm.gain.high - arm.gain.low) / 2
    low, high = math.hypot(half, arm.ends[1] - arm.predicted), math.hypot(half, arm.predicted - arm.ends[0])
    return f"{_nats(mean)} [{_nats(mean - low)}, {_nats(mean + high)}]"


def pair_table(file: Path, kind: str = "pair", prefix: str = "") -> str:
    """The pair of a larger final size: what was measured, and what the law of the calibration predicts.

    Args:
        kind: "pair" or "larger pair".
        prefix: of the law's names in the file.
    """
    data = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "| r | start | widths | rate | small model's rate | final size | small model | pruned | gain, nats per byte "
        "| law of the calibration | seeds |",
        f"|---:|---:|---|{'---:|' * 8}",
    ]
    for each in arms_of(data, kind, prefix):
        _, *rest = _measured(each)
        cells = (
            f"{_ratio_of(data, kind, prefix):.0f}",
            *rest,
            "–" if each.predicted is None else _nats(each.predicted),
            f"{each.gain.num}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio_of(data: Mapping[str, Any], kind: str, prefix: str) -> float:
    """The bytes of a pair's small model / its optimal ones."""
    seen = next(row["tokens"] for row in data["rows"] if row["kind"] == kind and row["arm"] == "small")
    return float(seen / data[f"{prefix}pair_optimal_tokens"])


def rates_table(file: Path, kind: str = "arm") -> str:
    """By ratio and learning rate, the small model beside even starts of 2 at seed 0; the best of a ratio is bold."""
    rows = [row for row in json.loads(file.read_text(encoding="utf-8"))["rows"] if row["kind"] == kind]
    found = {
        (row["ratio"], row["arm"], row["rate"]): row["test"]
        for row in rows
        if row["seed"] == 0
        and (row["arm"], row["start"] / row.get("final", 1.0)) in (("small", 1.0), ("even", 2.0))  # older rows lack it
    }
    rates = sorted({rate for _, _, rate in found})
    lines = [
        "| r | model | " + " | ".join(f"rate {rate:g}" for rate in rates) + " |",
        f"|---:|---|{'---:|' * len(rates)}",
    ]
    for ratio in sorted({ratio for ratio, _, _ in found}):
        for arm, words in (("small", "small"), ("even", "even, start at 2 x")):
            losses = {rate: found[ratio, arm, rate] for rate in rates if (ratio, arm, rate) in found}
            if not losses:
                continue
            shown = {rate: f"{loss:.4f}" for rate, loss in losses.items()}
            best = min(losses, key=lambda rate: losses[rate])
            shown[best] = f"**{shown[best]}**"
            lines.append(f"| {ratio:g} | {words} | {' | '.join(shown.get(rate, '–') for rate in rates)} |")
    return "\n".join(lines)


def over_trained_line(file: Path) -> str:
    """Setpoint's runs at the largest r that has three seeds, from each start, beside the small model."""
    data = json.loads(file.read_text(encoding="utf-8"))
    arms = [arm for arm in arms_of(data) if arm.arm == "setpoint"]
    largest = max(arm.ratio for arm in arms if arm.gain.num >= 3)
    there = sorted((arm for arm in arms if arm.ratio == largest), key=lambda arm: arm.start)
    starts = _listed([f"{arm.start:g}" for arm in there])
    losses = _listed([f"{arm.loss:.3f}" for arm in there])

    def rates(arm: str, start: float) -> int:
        of = (row for row in data["rows"] if row["kind"] == "arm" and (row["arm"], row["start"]) == (arm, start))
        return len({row["rate"] for row in of if row["ratio"] == largest and row["seed"] == 0})

    by_law = largest * data["optimal_tokens"] / _law(data["law"]).optimal_data(params(built(1.0)))
    return (
        f"A tiny language model was trained from scratch on {by_law:.0f} to {largest:g} times the data that is optimal "
        f"for its size, by two estimates. "
        f"Small from the start, "
        f"it ends at {there[0].small:.3f} nats per byte; less is better. From a start {starts} times as large it ends "
        f"at {losses} for the same FLOPs ({there[0].gain.num} seeds). The small model had {rates('small', 1.0)} "
        f"learning rates to choose from, the others {_listed([f'{rates(arm.arm, arm.start)}' for arm in there])}."
    )


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def images_table(file: Path, once: Path) -> str:
    """Pruned models beside small ones of the same training FLOPs, at the task's own passes and at multiples of them."""
    every = json.loads(file.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in every if row["task"].startswith(once.name)]  # of the task, and with wrong labels
    shown = {(row["task"], row["budget"]) for row in rows}
    for row in read_lines(file_of(once, FILE), FILE, []):  # of the task as it is
        if (row["task"], row["budget"]) in shown and row["split"] == "test":
            rows.append({**row, "passes": 1})
    lines = [
        "| labels | passes | FLOPs / step | dense, as many passes | small, as many passes | small model | pruned "
        "| gain, points | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    values: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        cell = row["task"], row["passes"], row["budget"], row["method"]
        values.setdefault(cell, {})[row["seed"]] = 100 * row["value"]
    cells = {(task, -budget, passes) for task, passes, budget, method in values if method == "setpoint"}
    for task, share, passes in sorted(cells):
        small, pruned = (values.get((task, passes, -share, method), {}) for method in ("small-long", "setpoint"))
        seeds = sorted(small.keys() & pruned.keys())
        if seeds:
            gain = paired([pruned[seed] - small[seed] for seed in seeds])
            others = (values.get((task, passes, None, "dense"), {}), values.get((task, passes, -share, "small"), {}))
            compared = ({seed: each[seed] for seed in seeds} for each in (small, pruned))
            labels = "a fifth wrong" if task.endswith("noisy") else "as they are"
            lines.append(
                f"| {labels} | {passes:g} x | {-100 * share:.0f} % "
                f"| {' | '.join(map(_mean_points, (*others, *compared)))} | {_points(gain)} | {len(seeds)} |"
            )
    return "\n".join([*lines, "", rows_made_on([{**row["environment"], "date": row["date"]} for row in rows])])


def _mean_points(values: Mapping[int, float]) -> str:
    return f"{statistics.fmean(values.values()):.2f} %" if values else NOTHING


def _points(gain: Difference) -> str:
    """A gain in points, bold where its interval excludes 0."""
    ends = [end for end in (gain.mean, gain.low, gain.high) if end is not None]
    mean, *interval = (f"{end:+.2f}".replace("-", "−") for end in ends)
    text = f"{mean} [{', '.join(interval)}]" if interval else mean
    return f"**{text}**" if gain.clear else text


def _with_interval(gain: Difference) -> str:
    """A gain in nats, and its interval where there is one."""
    mean = _nats(gain.mean)
    if gain.low is None or gain.high is None:
        return mean
    return f"{mean} [{_nats(gain.low)}, {_nats(gain.high)}]"


def _nats(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def calibration_runs_table(file: Path, kind: str = "calibration", prefix: str = "") -> str:
    """The losses of a calibration by budget and size, and what was fitted to them."""
    data = json.loads(file.read_text(encoding="utf-8"))
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for row in data["rows"]:
        key = row["steps"], row["size"]
        if row["kind"] == kind and (key not in best or row["validation"] < best[key]["validation"]):
            best[key] = row
    sizes = sorted({size for _, size in best})
    lines = [
        "| FLOPs | " + " | ".join(f"{size:,} parameters" for size in sizes) + " |",
        f"|---:|{'---:|' * len(sizes)}",
    ]
    for steps in sorted({steps for steps, _ in best}):
        row = {size: best[steps, size] for size in sizes if (steps, size) in best}
        least = min(row, key=lambda size: row[size]["test"])
        shown = {size: f"{run['test']:.3f} ({run['tokens'] / 1e6:.2f})" for size, run in row.items()}
        cells = (f"**{shown[size]}**" if size == least else shown.get(size, "–") for size in sizes)
        lines.append(f"| {next(iter(row.values()))['bill']:.2g} | {' | '.join(cells)} |")
    found = _of(data, prefix)
    if found.get("law"):
        names = ("E", "A", "a", "B", "b")
        ends = np.quantile(found["replicas"], (0.025, 0.975), axis=0).T
        by_law = ", ".join(
            f"{name} = {value:.3g} [{low:.3g}, {high:.3g}]"
            for name, value, (low, high) in zip(names, found["law"], ends, strict=True)
        )
        lines += [
            "",
            f"Fitted: {by_law} (95 % intervals; {len(found['replicas'])} of {found['drawn']} refits found a law).",
        ]
    elif "why_no_law" in found:
        lines += ["", f"No law of this form fits these runs: {found['why_no_law'].replace('_', ' ')}."]
    return "\n".join(lines)


def optimal_line(file: Path) -> str:
    """How much data is optimal for the small model, without and with the shortest budget, and by the fitted law."""
    data = json.loads(file.read_text(encoding="utf-8"))
    rows = data["rows"]
    used, every = (optimal_tokens(calibrated(rows, budgets), 1.0) for budgets in (BUDGETS, (SHORT, *BUDGETS)))
    taken = data["optimal_tokens"]
    return (
        f"From the best sizes, {used / 1e3:,.0f} thousand bytes are compute-optimal for the final size. This number "
        f"leaves out the smallest budget, since its runs are short. With that budget it would be {every / 1e3:,.0f} "
        f"thousand bytes. Both were known when the budget was left out. The runs below "
        f"take {taken / 1e3:,.0f} thousand, which was the number before the largest budget was run. "
        f"{_by_law(data['law'], params(built(1.0)), taken)}"
    )


def larger_optimal_line(file: Path) -> str:
    """How much data is optimal for the larger model of the final size, by two ways."""
    data = json.loads(file.read_text(encoding="utf-8"))
    taken, largest = data["larger_optimal_tokens"], sorted(LARGER_BUDGETS)[1:]
    fewer = optimal_tokens(calibrated(data["rows"], largest, "larger calibration"), 1.0, LARGER)
    return (
        f"From the best sizes, {taken / 1e6:.1f} million bytes are compute-optimal for the final size. The runs below "
        f"take this number. At the smallest budget the smallest model is the best, so the optimum is outside of the "
        f"sizes there. Without that budget it would be {fewer / 1e6:.1f} million. "
        f"{_by_law(data['larger_law'], params(built(1.0, LARGER)), taken)}"
    )


def _by_law(constants: Sequence[float], size: int, taken: float) -> str:
    """The compute-optimal data by a fitted law."""
    found = _law(constants).optimal_data(size)
    return (
        f"By the fitted law it would be {found / 1e6:.1f} million, and each *r* below would be {taken / found:.2g} "
        f"times as large."
    )


def pair_optimal_line(file: Path) -> str:
    """The ratio of the very small pair, by two ways."""
    data = json.loads(file.read_text(encoding="utf-8"))
    (size,) = {row["size"] for row in data["rows"] if row["kind"] == "pair" and row["arm"] == "small"}
    return f"The *r* of the pair is as uncertain. {_ratio_by_law(data, 'pair', '', size)}"


def larger_pair_optimal_line(file: Path) -> str:
    """The ratio of the pair of larger models, by three ways."""
    data = json.loads(file.read_text(encoding="utf-8"))
    (size,) = {row["size"] for row in data["rows"] if row["kind"] == "larger pair" and row["arm"] == "small"}
    runs = calibrated(data["rows"], sorted(LARGER_BUDGETS)[1:], "larger calibration")
    fewer = optimal_tokens(runs, LARGER_PAIR, LARGER)
    ratio = data["larger_pair_optimal_tokens"] / fewer * _ratio_of(data, "larger pair", "larger_")
    return (
        f"This *r* is the least certain one, since the best size of no budget of the calibration is as large. Without "
        f"the smallest budget it would be {ratio:.2g}. {_ratio_by_law(data, 'larger pair', 'larger_', size)}"
    )


def _ratio_by_law(data: Mapping[str, Any], kind: str, prefix: str, size: int) -> str:
    taken = data[f"{prefix}pair_optimal_tokens"] * _ratio_of(data, kind, prefix)
    return f"By the fitted law it would be {taken / _law(data[f'{prefix}law']).optimal_data(size):.2g}."


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


Form = Callable[[Arm], float | None]


def _line(arms: Sequence[Arm], start: float, form: Form) -> list[tuple[float, float]]:
    """(r, gain) that a form of the law predicts for the even arms of a start: the numbers of the tables."""
    points = sorted(
        (each.ratio, gain)
        for each in arms
        if (each.arm, each.start) == ("even", start) and (gain := form(each)) is not None
    )
    if len(points) == 1:  # a dash, as one point is no line
        ((ratio, gain),) = points
        return [(ratio / 1.3, gain), (ratio * 1.3, gain)]
    return points


WIDTH, LEFT, TOP, WIDE, HIGH, APART = 880, 70, 106, 780, 220, 80
RATIOS = (0.7, 96.0)
COLORS = {2.0: BLUE, 4.0: ORANGE, 8.0: OTHERS[0]}


@dataclass(frozen=True)
class Panel:
    """The part of the picture that shows one final size.

    Args:
        arms: what was measured.
        extra: arms of another final size, drawn as squares.
        title: says which sizes these are.
        top: of its drawing, in the picture.
        forms: of the law, by the look of their lines.
    """

    arms: Sequence[Arm]
    extra: Sequence[Arm]
    title: str
    top: float
    forms: Mapping[str, Form]

    def parts(self) -> Iterator[str]:
        """Its grid, lines and points."""
        arms = [*self.arms, *self.extra]
        lines = {
            (look, start): line
            for look, form in self.forms.items()
            for start in COLORS
            if (line := _line(self.arms, start, form))
        }
        ends = [end for each in arms for end in (each.gain.low, each.gain.high, each.gain.mean) if end is not None]
        ends += [end for line in lines.values() for _, end in line]
        low, high = min(-0.01, *ends), max(0.01, *ends)

        def at(ratio: float, gain: float) -> tuple[float, float]:
            across = math.log(ratio / RATIOS[0]) / math.log(RATIOS[-1] / RATIOS[0])
            return LEFT + WIDE * across, self.top + HIGH * (high - gain) / (high - low)

        yield f'<text x="{LEFT}" y="{self.top - 8}">{self.title}</text>'
        step = next(step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / step <= 8)
        for mark in np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step:
            y = at(1.0, mark)[1]
            yield f'<path class="{"zero" if abs(mark) < step / 2 else "grid"}" d="M{LEFT} {y:.1f}h{WIDE}"/>'
            yield f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{mark:+.3g}</text>'
        for ratio in (1, 2, 4, 8, 16, 32, 64):
            x = at(ratio, 0.0)[0]
            yield f'<text class="soft" x="{x:.1f}" y="{self.top + HIGH + 20}" text-anchor="middle">{ratio}</text>'
        for (look, start), line in lines.items():
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in line))
            yield f'<path class="{look} s{start:g}" d="M{path}"/>'
        for each in arms:
            apart = 1.05 if each.arm == "setpoint" else 1 / 1.05
            x, y = at(each.ratio * apart * (1 + 0.02 * (math.log2(each.start) - 2)), each.gain.mean)
            if each.gain.low is not None and each.gain.high is not None:
                top, bottom = at(1.0, each.gain.high)[1], at(1.0, each.gain.low)[1]
                yield f'<path class="line s{each.start:g}" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>'
            look = f"s{each.start:g} {'own' if each.arm == 'setpoint' else 'even'}"
            if each in self.extra:
                yield f'<rect class="{look}" stroke-width="2" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
            else:
                yield f'<circle class="{look}" stroke-width="2" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def write_law_picture(file: Path, out: Path) -> Path:
    """Draw the gain against r, a panel for each size: the law of the calibration as lines, measured points.

    A filled point is of Setpoint's own widths, an open one of even widths. The SVG follows the reader's light or dark
    scheme.
    """
    data = json.loads(file.read_text(encoding="utf-8"))
    small = arms_of(data)
    exponent = worth_exponent(_law(data["law"]), [arm for arm in small if arm.ratio in FITTED_TO])

    def forms(prefix: str) -> dict[str, Form]:
        law = _law(_of(data, prefix)["law"])
        return {"line": lambda arm: arm.predicted, "line dashed": lambda arm: gain_by_worth(law, arm, exponent)}

    panels = [Panel(small, (), _sized(small), TOP, forms(""))]
    if larger := arms_of(data, "larger", "larger_"):
        pair = arms_of(data, "larger pair", "larger_")
        title = f"{_sized(larger)}; squares: {_sized(pair)}" if pair else _sized(larger)
        panels.append(Panel(larger, pair, title, TOP + HIGH + APART, forms("larger_")))
    every = [each for panel in panels for each in (*panel.arms, *panel.extra)]
    height = panels[-1].top + HIGH + 68

    light = "".join(f".s{start:g} {{ stroke: {color}; color: {color}; }} " for start, color in COLORS.items())
    dark = "".join(
        f".s{start:g} {{ stroke: {DARK[color]}; color: {DARK[color]}; }} " for start, color in COLORS.items()
    )
    drawn = "filled: Setpoint's own widths, open: even widths"
    law = any(each.predicted is not None for each in every)
    if law:
        drawn += ", line: law of the calibration, dashed: final sizes, bytes worth less"
    if any(each.gain.low is not None for each in every):
        drawn += ", bar: 95 %"
    title = "Gain in nats per byte against r, tokens / compute-optimal tokens of the small model"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{title}">',
        "<style>text { font: 12px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1c2430; } "
        ".soft { fill: #5a6575; } .ground { fill: #ffffff; } .grid { stroke: #e1e6ec; } .zero { stroke: #5a6575; } "
        f".line {{ fill: none; stroke-width: 2; }} .dashed {{ stroke-dasharray: 5 5; }} "
        f".own {{ fill: currentColor; }} .even {{ fill: #ffffff; }} {light}"
        "@media (prefers-color-scheme: dark) { text { fill: #e6eaf0; } .soft { fill: #a3acb9; } "
        f".grid {{ stroke: #2a3441; }} .ground, .even {{ fill: #12181f; }} {dark}}}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="6"/>',
        f'<text x="{LEFT}" y="{height - 12}">r = tokens / compute-optimal tokens of the small model</text>',
        f'<text x="{LEFT}" y="44">gain over the small model, nats per byte</text>',
        f'<text class="soft" x="{LEFT}" y="62">{drawn}</text>',
    ]
    for place, start in enumerate(start for start in COLORS if law or any(each.start == start for each in every)):
        x = LEFT + 130 * place
        parts.append(
            f'<path class="line s{start:g}" d="M{x} 18h26"/><text x="{x + 32}" y="22">start at {start:g} x</text>'
        )
    parts += [part for panel in panels for part in panel.parts()]
    out.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
    return out


def _sized(arms: Sequence[Arm]) -> str:
    return f"final size {max(each.size for each in arms):,.0f} parameters"
