"""Tables on Setpoint with one thing changed, on prices, and on what its readings are worth."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from setpoint.report.numbers import percent, signed
from tables.words import difference_text, made_on, rows_made_on

PAIRS = {"resnet56": "ResNet-56", "banking77": "MiniLM-L6", "clothing": "EfficientNet-Lite0"}
PARTS = (
    ("saliency from gradients", "alone, in place of magnitude", "cubic-taylor", "cubic"),
    ("early cuts", "alone, with even widths by magnitude", "setpoint-magnitude", "cubic"),
    ("early cuts", "left out", "setpoint", "setpoint-late"),
    ("early cuts", "earlier still", "setpoint-early", "setpoint"),
    ("cuts that wait for the loss", "added", "setpoint-waiting", "setpoint"),
    ("eight cuts", "two in their place", "setpoint-few", "setpoint"),
    ("widths by saliency", "left out: even widths", "setpoint", "setpoint-uniform"),
    ("widths by saliency", "bounded by a floor of 0.5", "setpoint-level@min_density=0.5", "setpoint"),
    ("widths by saliency", "bounded by a floor of 0.7", "setpoint-level", "setpoint"),
    ("widths and units by saliency", "left out: even widths by magnitude", "setpoint", "setpoint-magnitude"),
    ("seconds among blocks of about equal worth", "added, worth changed by 5 % at most", "setpoint-quick", "setpoint"),
    (
        "seconds among blocks of about equal worth",
        "added, worth changed by 20 % at most",
        "setpoint-quick@share=0.2",
        "setpoint",
    ),
    ("saliency by reconstruction", "in place of gradients", "setpoint-reconstruction", "setpoint"),
    ("readers fitted at each cut", "alone, with even widths", "fitted-even", "setpoint-magnitude"),
    ("readers fitted at each cut", "added", "setpoint-refitted", "setpoint"),
    ("readers fitted at each cut", "added, by reconstruction", "fitted", "setpoint-reconstruction"),
    ("readers fitted at each cut", "by reconstruction, beside the default", "fitted", "setpoint"),
    ("a teacher", "alone", "cubic-taught", "cubic"),
    ("a teacher", "added", "setpoint-taught", "setpoint"),
)
"""A part of the recipe, how it is measured, and the methods with it and without it."""


def ablation_table(path: Path) -> str:
    """Setpoint with one thing changed, on validation data, beside the default by seed."""
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| task | FLOPs | method | on validation | training FLOPs of the default's | Setpoint's own | "
        "units back (gone again) | to `setpoint` | seeds |"
    ]
    lines.append(f"|---|---:|---|{'---:|' * 6}")
    found: dict[tuple[str, float], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in data["rows"]:
        if "held" not in row and row["task"] not in PAIRS:
            found.setdefault((row["task"], row["budget"]), {}).setdefault(row["method"], {})[row["seed"]] = row
    for (task, budget), methods in found.items():
        default = methods["setpoint"]
        for method, by_seed in methods.items():
            metric, seeds = by_seed[min(by_seed)]["metric"], sorted(by_seed.keys() & default.keys())
            scale = 100 if metric == "accuracy" else 1
            value = statistics.fmean(row["value"] for row in by_seed.values())
            told = f"{value:.2%}".replace("%", " %") if metric == "accuracy" else f"{value:.4f}"
            flops = statistics.fmean(by_seed[seed]["train_flops"] / default[seed]["train_flops"] for seed in seeds)
            apart = difference_text([scale * (by_seed[seed]["value"] - default[seed]["value"]) for seed in seeds])
            ahead = "–" if method == "setpoint" else apart
            noted = [row for row in by_seed.values() if "grown" in row]
            shares = [row["overhead_flops"] / row["train_flops"] for row in noted]
            own = percent(statistics.fmean(shares)) if shares else "–"
            back, again = (sum(row[key] for row in noted) for key in ("grown", "dropped_again"))
            told_back = f"{back / len(noted):.0f} ({again / len(noted):.1f})" if back else "0" if noted else "–"
            cells = (
                task,
                percent(budget),
                f"`{method}`",
                told,
                f"{flops:.2f}",
                own,
                told_back,
                ahead,
                f"{len(by_seed)}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", rows_made_on([row for row in data["rows"] if row["task"] not in PAIRS])])


def recipe_table(path: Path) -> str:
    """What each part of the recipe is worth on the pretrained pairs, in points of validation accuracy."""
    rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["task"] in PAIRS]
    values: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        values.setdefault((row["task"], row["method"]), {})[row["seed"]] = 100 * row["value"]
    lines = [f"| part | measured | {' | '.join(PAIRS.values())} |", f"|---|---|{'---:|' * len(PAIRS)}"]
    for part, how, one, other in PARTS:
        cells = [_apart(values.get((task, one), {}), values.get((task, other), {})) for task in PAIRS]
        lines.append(f"| {part} | {how}: `{one}` − `{other}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", rows_made_on(rows)])


def quick_line(path: Path) -> str:
    """What a step takes at widths that are chosen by seconds as well, of what it takes at Setpoint's."""
    data = json.loads(path.read_text(encoding="utf-8"))["by_seconds"]
    found = []
    for row in data["rows"]:
        ratios = {
            method: [ours / theirs for ours, theirs in zip(turns, row["step_seconds"]["setpoint"], strict=True)]
            for method, turns in row["step_seconds"].items()
            if method != "setpoint"
        }
        told = [f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in ratios.values()]
        found.append(f"On {PAIRS[row['task']]} it is {' and '.join(told)}.")
    return (
        "The next numbers are seconds of a step, as a share of a step at Setpoint's widths, for `setpoint-quick` and "
        f"`setpoint-quick@share=0.2`. {' '.join(found)} Seed 0, {data['rounds']} turns, {data['environment']['cpu']}, "
        f"{data['date']}."
    )


def _apart(ones: dict[int, float], others: dict[int, float]) -> str:
    """Mean difference of common seeds, and that of each."""
    apart = [ones[seed] - others[seed] for seed in sorted(ones.keys() & others.keys())]
    if not apart:
        return "–"
    return f"{signed(statistics.fmean(apart), 2)} ({', '.join(signed(each, 1) for each in apart)})"


def feedback_table(path: Path) -> str:
    """A budget of memory with feedback and without: what is metered at the end, and what comes of it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| task | peak memory | method | metered at the end, of the limit | on validation | seeds |"]
    lines.append(f"|---|---:|---|{'---:|' * 3}")
    found: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in data["rows"]:
        if "held" in row:
            found.setdefault((row["task"], row["budget"], row["method"]), []).append(row)
    for (task, budget, method), rows in found.items():
        held = [row["held"]["memory"] for row in rows]
        value = statistics.fmean(row["value"] for row in rows)
        told = f"{value:.2%}".replace("%", " %") if rows[0]["metric"] == "accuracy" else f"{value:.4f}"
        share = percent(held[0]) if len(held) == 1 else f"{percent(min(held))} to {percent(max(held))}"
        lines.append(f"| {task} | {percent(budget)} | `{method}` | {share} | {told} | {len(rows)} |")
    return "\n".join([*lines, "", rows_made_on([row for row in data["rows"] if "held" in row])])


def returns_table(path: Path) -> str:
    """How far the loss rises within eight steps of a return, beside what it does without one."""
    lines = ["| task | units | nothing comes back | all at once | the same before a step | eased in | seeds |"]
    lines.append(f"|---|{'---:|' * 6}")
    data = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        found.setdefault(row["task"], []).append(row)
    for task, rows in found.items():
        told = {key: [max(row[key][1:]) - row["before"] for row in rows] for key in ("none", "at_once", "eased")}
        told["first"] = [row["at_once"][0] - row["before"] for row in rows]
        rises = [
            f"{statistics.fmean(told[key]):+.4f} ({min(told[key]):+.4f} to {max(told[key]):+.4f})"
            for key in ("none", "at_once", "first", "eased")
        ]
        lines.append(f"| {task} | {rows[0]['units']} | {' | '.join(rises)} | {len(rows)} |")
    return "\n".join([*lines, "", made_on(data)])


def price_table(path: Path) -> str:
    """What each rate came to: cost and what it costs, mean over seeds."""
    lines = ["| task | rate | FLOPs / step of dense | training FLOPs of dense | on validation | seeds |"]
    lines.append(f"|---|{'---:|' * 5}")
    data = json.loads(path.read_text(encoding="utf-8"))
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in data["rows"]:
        found.setdefault((row["task"], row["rate"]), []).append(row)
    for (task, rate), rows in found.items():
        keys = ("flops_ratio", "train_flops_ratio", "value")
        mean = {key: statistics.fmean(row[key] for row in rows) for key in keys}
        ratios = [row["flops_ratio"] for row in rows]
        width = "" if len(rows) == 1 else f" ({percent(min(ratios))} to {percent(max(ratios))})"
        value = f"{mean['value']:.2%}".replace("%", " %") if rows[0]["metric"] == "accuracy" else f"{mean['value']:.4f}"
        cells = (task, f"{rate:g}", percent(mean["flops_ratio"]) + width, percent(mean["train_flops_ratio"]), value)
        lines.append(f"| {' | '.join(cells)} | {len(rows)} |")
    return "\n".join([*lines, "", made_on(data)])


def even_table(path: Path) -> str:
    """What one width for all layers of a kind costs in loss, by budget, and the sentence that says so."""
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| task | steps | budget | free widths | even widths | even − free | seeds |", f"|---|{'---:|' * 6}"]
    found: dict[tuple[str, float], dict[bool, dict[int, dict[str, Any]]]] = {}
    for row in data["rows"]:
        by_seed = found.setdefault((row["task"], row["budget"]), {True: {}, False: {}})[row["even"]]
        by_seed[row["seed"]] = row
    prices = []
    for (task, budget), both in found.items():
        free, even = ([rows[seed]["loss"] for seed in sorted(rows)] for rows in (both[False], both[True]))
        apart = [one - other for one, other in zip(even, free, strict=True)]
        steps, price = next(iter(both[True].values()))["steps"], statistics.fmean(apart)
        prices.append(f"{price:+.3f} at {budget:.0%} of the FLOPs".replace("%", " %"))
        cells = (task, f"{steps}", f"{budget:.0%}".replace("%", " %"))
        losses = (f"{statistics.fmean(free):.4f}", f"{statistics.fmean(even):.4f}")
        spread = f"{price:+.4f} ({min(apart):+.4f} to {max(apart):+.4f})"
        lines.append(f"| {' | '.join((*cells, *losses, spread))} | {len(free)} |")
    said = f"Even widths changed the validation loss by {' and '.join(prices)}, in nats."
    return "\n".join([*lines, "", said, made_on(data)])


def calibration_table(path: Path) -> str:
    """How predicted and measured loss increases agree, as a loop reads and with weights at rest, beside the aims."""
    lines = [
        "| task | read | ranks within groups, mean (least) | over the whole model | 10 % cut: predicted / real |",
        f"|---|---|{'---:|' * 3}",
    ]
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    for name, found in tasks.items():
        unit = "targets" if "running, B = targets" in found["variants"] else "examples"
        for words, key in (("in training, curvature (the default)", "running"), ("at rest, with slope", "still")):
            variant = found["variants"][f"{key}, B = {unit}" + (", with slope" if key == "still" else "")]
            within = f"{variant['spearman_within_mean']:.2f} ({variant['spearman_within_least']:.2f})"
            ratio = f"{variant['ten_percent']['predicted_over_real']:.2f}"
            lines.append(f"| {name} | {words} | {within} | {variant['spearman_whole']:.2f} | {ratio} |")
    lines.append("| aim | | at least 0.80 | at least 0.70 | 0.5 to 2 |")
    about = "; ".join(
        f"{name}: {found['samples']:,} examples, {found['targets']:,} targets, {found['environment']['cpu']}, "
        f"{found['date'][:10]}"
        for name, found in tasks.items()
    )
    return "\n".join([*lines, "", f"{about}."])
