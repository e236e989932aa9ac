"""Tables on state-space models."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from setpoint.report.numbers import duration, percent
from setpoint_bench.report.columns import metric_text, seconds_text
from setpoint_bench.report.folder import RESULTS
from setpoint_bench.report.markdown import about
from setpoint_bench.report.packed import file_of
from setpoint_bench.report.statistics import difference
from setpoint_bench.report.summary import series, summary_rows
from tables.read import read_results
from tables.words import difference_text, made_on, marked, seeds_text


def states_table(folder: Path) -> str:
    """Accuracy, states and seconds of the methods that drop states, and how far Setpoint's are ahead, seed by seed."""
    if not file_of(folder, RESULTS).exists():
        return "Not measured yet."
    results = read_results(folder)
    rows = summary_rows(results)
    names = ("hankel@states=28", "hankel@states=28@settle=0.12")  # as it is by default, and sooner
    ours = [next(row for row in rows if row.method == name) for name in names]
    by_label = series(results.cells)
    lines = [
        "| method | accuracy on test | states | whole run | `hankel` ahead by | `hankel@settle=0.12` ahead by |",
        f"|---|{'---:|' * 5}",
    ]
    for row in rows:
        if row.method in ("small", "setpoint"):  # they end at another cost
            continue
        cells = by_label[row.label]
        states = sorted({width for cell in cells for width in cell.widths.values()})
        told = f"{states[0]}" if len(states) == 1 else f"{states[0]} to {states[-1]}"
        time = (
            "busy machine" if row.clock == "shared" else f"{seconds_text(row)}, {percent(row.seconds_ratio)} of dense"
        )
        ahead = []
        for each in ours:
            ahead.append("–" if row is each else marked(difference(by_label[each.label], cells), row.metric))
        lines.append(f"| `{row.method}` | {metric_text(row)} | {told} | {time} | {' | '.join(ahead)} |")
    return "\n".join([*lines, "", about(results.cells, rows)])


def moments_table(path: Path) -> str:
    """The loss after a cut of states, by what becomes of the optimizer's moments, paired with carrying them."""
    data = json.loads(path.read_text(encoding="utf-8"))
    after = [f"after {steps}" for steps in data["after"][1:]]
    lines = [f"| states | moments | before | right after | {' | '.join(after)} |", f"|{'---|' * (4 + len(after))}"]
    found: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for run in data["runs"]:
        found.setdefault((run["kept"], run["way"]), {})[run["seed"]] = run
    for (kept, way), runs in found.items():
        carried, cells = found[kept, "carry"], []
        for place in range(len(data["after"])):
            told = f"{statistics.fmean(run['after'][place] for run in runs.values()):.3f}"
            if way != "carry":
                told += (
                    f" ({difference_text([r['after'][place] - carried[s]['after'][place] for s, r in runs.items()])})"
                )
            cells.append(told)
        before = statistics.fmean(run["before"] for run in runs.values())
        lines.append(f"| {data['states']} to {kept} | {way} | {before:.3f} | {' | '.join(cells)} |")
    told = f"Means over {seeds_text(data)}; in parentheses the paired difference to `carry` with its 95 % interval."
    return "\n".join([*lines, "", f"{told} {made_on(data)}"])


def state_regrowth_table(path: Path) -> str:
    """Loss of runs without and with regrowth of states."""
    data = json.loads(path.read_text(encoding="utf-8"))
    without, back = ({r["seed"]: r for r in data["runs"] if r["regrow"] == wanted} for wanted in (False, True))
    lines = ["| regrowth | FLOPs of the run | states that came back | loss | difference |", "|---|---|---|---|---|"]
    for name, runs in (("off", without), ("on", back)):
        apart = difference_text([run["loss"] - without[seed]["loss"] for seed, run in runs.items()])
        share = statistics.fmean(run["train_flops"] / without[seed]["train_flops"] for seed, run in runs.items())
        came = statistics.fmean(run["regrown_units"] for run in runs.values())
        loss = statistics.fmean(run["loss"] for run in runs.values())
        told = apart if runs is back else "–"
        lines.append(f"| {name} | {share:.1%} | {came:.1f} | {loss:.3f} | {told} |")
    told = f"Means over {seeds_text(data)} of {data['steps']} steps; the difference is paired, with its 95 % interval."
    return "\n".join([*lines, "", f"{told} {made_on(data)}"])


def mamba2_table(path: Path) -> str:
    """Test loss of Mamba-2 at half the cost, by what chose the states and heads that went."""
    data = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in data["runs"]:
        found.setdefault(run["way"], {})[run["seed"]] = run
    lines = [
        "| which go | FLOPs of a step | loss right after the last cut | test loss | paired difference to ranking |",
        f"|{'---|' * 5}",
    ]
    for way, runs in found.items():
        mean = statistics.fmean
        after = f"{mean(r['right_after'][-1] for r in runs.values()):.3f}" if way != "dense" else "–"
        apart = difference_text([r["loss"] - found["ranking"][seed]["loss"] for seed, r in runs.items()])
        share = f"{mean(r['flops_ratio'] for r in runs.values()):.1%}"
        loss = f"{mean(r['loss'] for r in runs.values()):.3f}"
        lines.append(f"| {way} | {share} | {after} | {loss} | {apart if way != 'ranking' else '–'} |")
    told = (
        f"Means over {seeds_text(data)} of {data['steps']} steps, differences with their 95 % interval; losses in nats."
    )
    return "\n".join([*lines, "", f"{told} {made_on(data)}"])


def ssm_table(path: Path) -> str:
    """Seconds of a training step by length and states, and of one reduction."""
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| what | processor time | reference | times as fast |", "|---|---|---|---|"]
    for row in data["training_steps"]:
        lines.append(
            f"| a step over {row['steps']} inputs, {row['states']} states | {duration(row['seconds_median'])} | "
            f"{duration(row['reference_seconds'])} | {row['times_faster']:.1f} |"
        )
    found = data["reduction"]
    layer = f"{found['states']} states with {found['channels']} channels"
    for what, seconds in (("one reduction", found["reduction_seconds"]), ("a step", found["step_seconds"])):
        lines.append(f"| {what} of {layer} | {duration(statistics.median(seconds))} | – | – |")
    return "\n".join([*lines, "", made_on(data)])
