"""Tables on seconds and bytes: Setpoint's own, and budgets of them; and on long checks."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attach import BUDGETS

from setpoint.report.numbers import NOTHING, duration, human, percent
from setpoint_bench.report.folder import read_lines
from setpoint_bench.report.packed import file_of
from setpoint_bench.report.statistics import paired
from setpoint_bench.results import FILE
from tables.words import made_on, marked, rows_made_on


def overhead_table(path: Path) -> str:
    """Setpoint's own cost."""
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| what | measured |", "|---|---|"]
    for name, row in data["sensing"].items():
        low, high = row["slowdown_quartiles"]
        often = "each step" if row["sensed_every"] == 1 else f"one step in {row['sensed_every']}"
        lines.append(
            f"| sensing in {often}, share of a dense `{name}` step ({duration(row['step_seconds'])}) | median "
            f"{row['sensing_share_median']:.2%}, mean {row['sensing_share_mean']:.2%} "
            f"(step with / without: {row['slowdown_median']:+.2%}, quartiles {low:+.2%} to {high:+.2%}) |"
        )
    for name, row in data["whole_runs"].items():
        for when, word in (("first", "new"), ("known", "known")):
            trees = {tree: [run[when] for run in runs] for tree, runs in row["runs"].items()}
            shown = (f"{_share_of_runs(runs)} {tree}" for tree, runs in trees.items())
            took = duration(statistics.median(run["seconds"] for run in trees["now"]))
            lines.append(
                f"| own work in a run of `{name}`, {row['steps']:,} steps, {took}, {word} | {', '.join(shown)} |"
            )
    runs = [{**row["environment"], "date": row["date"]} for row in data["whole_runs"].values()]
    resnet = data["resnet50"]
    lines += [
        f"| `find_groups(resnet50)`, best of {len(resnet['find_groups_seconds'])} | "
        f"{min(resnet['find_groups_seconds']):.2f} s |",
        f"| resize of ResNet-50 with AdamW state | {resnet['resize_seconds']:.2f} s, "
        f"{resnet['resize_in_steps']:.2f} of a training step at batch {resnet['batch']} |",
        f"| `import setpoint` beside `import torch` | {data['import']['added_seconds_median']:+.2f} s |",
        "",
        _before(data["whole_runs"]),
        f"Whole runs: {rows_made_on(runs)} The rest: {made_on(data)} Seed {data['seed']}.",
    ]
    return "\n".join(lines)


def _before(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Which older version stands beside rows, by their names."""
    names: dict[str, list[str]] = {}
    for name, row in rows.items():
        if "base" in row:
            names.setdefault(row["base"], []).append(f"`{name}`")
    shown = (f"commit {base} for {', '.join(each)}" for base, each in names.items())
    return f"Before: {'; '.join(shown)}."


def _share_of_runs(runs: Sequence[Mapping[str, float]]) -> str:
    shares = [run["own_seconds"] / run["seconds"] for run in runs]
    spread = f" ({min(shares):.2%} to {max(shares):.2%})" if len(shares) > 1 else ""
    return f"{statistics.median(shares):.2%}{spread}"


def predictions_table(latency: Path, memory: Path) -> str:
    """How far predicted seconds and bytes are from measured ones."""
    lines = [
        "| what | model | median error | within 10 % | largest error | mean error, signed | widths | time to build |",
        f"|{'---|' * 8}",
    ]
    about = []
    parts = (("seconds of a step", latency, "models"), ("seconds of an inference", latency, "inference"))
    for what, path, part in (*parts, ("bytes of a step", memory, "models")):
        if not path.exists():
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        about.append(made_on(data))
        for name, row in data[part].items():
            signed = [_signed_error(each) for each in row["rows"]]
            near = statistics.fmean(abs(error) <= 0.1 for error in signed)
            errors = (
                f"{row['median_error']:.1%} | {near:.0%} of widths | {row['largest_error']:.1%} | "
                f"{statistics.fmean(signed):+.1%} | {len(row['rows'])}"
            )
            lines.append(f"| {what} | {name} | {errors} | {duration(row['build_s']) if 'build_s' in row else '–'} |")
    return "\n".join([*lines, "", " ".join(dict.fromkeys(about))]) if about else "Not measured yet."


def _signed_error(row: dict[str, float]) -> float:
    """Prediction over measurement, less 1."""
    unit = "s" if "measured_s" in row else "bytes"
    return row[f"predicted_{unit}"] / row[f"measured_{unit}"] - 1


def real_budgets_table(path: Path) -> str:
    """Accuracy at equal measured latency, a later larger batch that fits, and two budgets at once."""
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| what | measured |", "|---|---|"]
    if "latency" in data:
        found = data["latency"]
        accuracy = [statistics.fmean(each) for each in zip(*_pairs(found["rows"]), strict=True)]
        half = "" if found["half_interval"] is None else f" ± {found['half_interval']:.2%}"
        inside = sum(row["between"] for row in found["rows"])
        lines += [
            f"| `latency` at {found['fraction']:g} of dense beside `flops` at the same measured seconds, "
            f"{len(found['rows'])} seeds ({inside} within the range of the FLOPs runs) | {accuracy[0]:.2%} and "
            f"{accuracy[1]:.2%}: {found['mean_difference']:+.2%}{half} |",
            f"| the largest metered latency over its limit, when the budget was met | {found['over_budget']:+.1%} |",
            "| the same models timed once more after training, by seed | "
            + ", ".join(f"{row['latency']['step_s'] / row['latency']['limit'] - 1:+.1%}" for row in found["rows"])
            + " |",
        ]
    if "fits" in data:
        found = data["fits"]
        lines.append(
            f"| a batch of {found['larger_batch']} within {human(found['limit_bytes'], 'B')}, after training with "
            f"{found['batch']} | dense {human(found['dense_bytes'], 'B')}: {_fit(found['dense_fits'])}; cut "
            f"{human(found['cut_bytes'], 'B')}: {_fit(found['cut_fits'])} |"
        )
    if "two" in data:
        found = data["two"]
        limits = " and ".join(f"`{name}` {value:g}" for name, value in found["limits"].items())
        lines.append(
            f"| {limits} in one run: spent and metered over the limit | {found['flops_over_limit']:+.1%} and "
            f"{found['memory_over_limit']:+.1%}, {'met' if found['budget_met'] else 'missed'} |"
        )
    return "\n".join([*lines, "", f"Task `{data['task']}`, {data['steps']} steps. {made_on(data)}"])


def _pairs(rows: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """Accuracy of the latency budget and of FLOPs budgets at its seconds, by seed."""
    return [(row["latency"]["accuracy"], row["flops_accuracy"]) for row in rows]


def _fit(fits: bool) -> str:
    return "fits" if fits else "does not fit"


RUN_STEPS, RUN_DECISIONS = 1000, 15


def distributed_table(path: Path) -> str:
    """What ranks send each other at a decision, and a resize, beside a step, by number of ranks; and a run's share."""
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| model | ranks | step | sums at each step read | reading | plan | both, in steps | new reducer | "
        f"resize, in steps | {RUN_DECISIONS} decisions, of a run of {RUN_STEPS:,} steps |",
        f"|---|{'---:|' * 9}",
    ]
    for count, models in data["ranks"].items():
        for name, row in models.items():
            keys = ("step_seconds", "sensing_seconds", "reading_seconds", "plan_seconds")
            told = [duration(row[key]) if row.get(key) else "–" for key in keys]
            share = RUN_DECISIONS * row["decision_in_steps"] / RUN_STEPS
            lines.append(
                f"| {name} | {count} | {' | '.join(told)} | {row['decision_in_steps']:.3f} | "
                f"{duration(row['rewrap_seconds']) if row['rewrap_seconds'] else '–'} | {row['resize_in_steps']:.2f} | "
                f"{share:.3%} |"
            )
    cores = data["environment"]["cores"]
    note = f"The machine has {cores} cores. With more ranks, processes wait for each other, and rows say little."
    return "\n".join([*lines, "", f"{note} {made_on(data)}"])


def soak_table(path: Path) -> str:
    """What long checks said at their end."""
    if not path.exists():
        return "Not run yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| check | outcome | report | duration | date |", "|---|---|---|---:|---|"]
    for name, each in data["checks"].items():
        outcome = "passed" if each["passed"] else "**failed**"
        lines.append(f"| {name} | {outcome} | {each['said']} | {duration(each['seconds'])} | {each['date'][:10]} |")
    return "\n".join([*lines, "", made_on(data)])


def bench_quick_table(path: Path) -> str:
    """How long `make bench-quick` takes, and how many of its runs end as the committed ones do."""
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| task | runs | committed runs | runs with the committed value | largest difference |",
        f"|---|{'---:|' * 4}",
    ]
    for task, each in data["tasks"].items():
        counts = " | ".join(str(each[key]) for key in ("runs", "committed", "same"))
        lines.append(f"| {task} | {counts} | {_apart(each['largest_difference'], each['metric'])} |")
    return "\n".join([*lines, "", f"The whole command took {duration(data['seconds'])}. {made_on(data)}"])


def _apart(difference: float | None, metric: str) -> str:
    """A difference without a sign: in points of accuracy, or in nats."""
    if difference is None:
        return NOTHING
    return f"{100 * difference:.2f} points" if metric == "accuracy" else f"{difference:.4f} nats"


def compiled_table(path: Path) -> str:
    """Whole runs with and without torch.compile, dense and pruned."""
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| task | run | whole run | first compiled step | step at first | last step | cuts | recompilations | "
        "their time | of the first compiled step | ahead of eager from step |",
        f"|---|---|{'---:|' * 9}",
    ]
    for task, measured in data["tasks"].items():
        middles = {
            name: {
                key: statistics.median(row[key] for row in rounds)
                for key, value in rounds[0].items()
                if key != "budget_met" and value is not None
            }
            for name, rounds in measured["runs"].items()
        }
        for name, rounds in measured["runs"].items():
            middle, eager = middles[name], middles[f"eager, {name.rpartition(', ')[2]}"]
            ends = [row["seconds"] for row in rounds]
            apart = f" ({duration(min(ends))} to {duration(max(ends))})" if len(ends) > 1 else ""
            keys = ("first_compiled_seconds", "dense_step_seconds", "last_step_seconds")
            steps = [duration(middle[key]) if key in middle else NOTHING for key in keys]
            share = middle["recompile_seconds"] / middle.get("first_compiled_seconds", 1.0)
            again = f"{middle['recompiles']:g} | {duration(middle['recompile_seconds'])} | {share:.2f}"
            lines.append(
                f"| {task}, {measured['steps']:,} steps | {name} | {duration(middle['seconds'])}{apart} | "
                f"{' | '.join(steps)} | {middle['resizes']:g} | "
                f"{again if middle['recompiles'] else '– | – | –'} | {_ahead(measured['steps'], middle, eager)} |"
            )
    made = rows_made_on([{**each["environment"], "date": each["date"]} for each in data["tasks"].values()])
    return "\n".join([*lines, "", f"A row without a range is one run, others are medians. {made}"])


def _ahead(steps: int, compiled: Mapping[str, float], eager: Mapping[str, float]) -> str:
    """The step from which a compiled run is ahead of the eager one, if it goes on at the pace of its last steps."""
    behind, gain = (eager[key] - compiled[key] for key in ("seconds", "last_step_seconds"))
    if compiled is eager or (behind < 0 and gain <= 0):
        return NOTHING
    return "within the run" if behind >= 0 else f"{steps - behind / gain:,.0f}"


def attach_table(path: Path) -> str:
    """What attach takes: of a model that is new, of one that is known, and of a new one with an older version."""
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    kinds, made = ("cold", "warm", "before"), list[dict[str, Any]]()
    lines = ["| model | processor | pairs | first time | known model | first time, before |"]
    lines.append(f"|---|---|---:|{'---:|' * 3}")
    found = [(each["environment"], name, row) for each in data["machines"] for name, row in each["models"].items()]
    timed = [(about, budget, name, row[budget]) for budget in BUDGETS for about, name, row in found if budget in row]

    def line(first: str, about: dict[str, Any], row: dict[str, Any]) -> str:
        made.append({**about, "date": row["date"]})
        shown = [_seconds_and_steps(row[kind], row["pairs"]) if kind in row else NOTHING for kind in kinds]
        return f"| {first} | {about['cpu']} | {row['pairs']} | {' | '.join(shown)} |"

    lines += [line(f"`{name}`", about, row) for about, name, row in found]
    if timed:
        lines += [
            "",
            "| budget | model | processor | pairs | first time | learnt before | first time, before |",
            f"|---|---|---|---:|{'---:|' * 3}",
        ]
    lines += [line(f"{budget} | `{name}`", about, row) for about, budget, name, row in timed]
    bases = sorted(
        {row["base"] for _, _, row in found if "base" in row} | {r["base"] for *_, r in timed if "base" in r}
    )
    before = f"Before: commit {' or '.join(bases)}. " if bases else ""
    where = f"{data['what'].capitalize()}. Seed {data['seed']}. {before}{rows_made_on(made)}"
    return "\n".join([*lines, "", where])


def _seconds_and_steps(found: Mapping[str, Any], pairs: int) -> str:
    shown = duration(found["seconds_median"])
    if "steps_median" not in found:
        return shown
    low, high = found["steps_range"]
    spread = f" ({low:.1f} to {high:.1f})" if pairs > 1 else ""
    return f"{shown}, {found['steps_median']:.1f} steps{spread}"


def growth_table(path: Path) -> str:
    """Discovery, a decision and a cut against depth and width, and the line through the depths."""
    if not path.exists():
        return "Not measured yet."
    lines = ["| processor | layers | width | parameters | groups | units | discovery | decision | cut |"]
    lines.append(f"|---|{'---:|' * 8}")
    about = []
    for data in json.loads(path.read_text(encoding="utf-8"))["machines"]:
        for row in data["models"]:
            seconds = [duration(row[f"{kind}_s"]) for kind in ("discovery", "decision", "cut")]
            sizes = [f"{row['layers']}", f"{row['width']:,}", human(row["params"])]
            sizes += [f"{row['groups']}", f"{row['units']:,}"]
            lines.append(f"| {' | '.join([data['environment']['cpu'], *sizes, *seconds])} |")
        deep = [row for row in data["models"] if row["width"] == data["models"][0]["width"]]
        # A cut that was measured once may hold a full collection of Python's garbage: no line goes through such cuts.
        repeated = [kind for kind in ("discovery", "decision", "cut") if all(f"{kind}_s" in r["rounds"] for r in deep)]
        once = (
            "" if "cut" in repeated else "Each cut was measured once, and may hold a collection of Python's garbage. "
        )
        fitted = [
            f"{kind} {duration(slope)} a layer"
            for kind in repeated
            for slope, _ in [statistics.linear_regression([r["layers"] for r in deep], [r[f"{kind}_s"] for r in deep])]
        ]
        about.append(f"Least squares over the depths: {', '.join(fitted)}. {once}Seed {data['seed']}. {made_on(data)}")
    return "\n".join([*lines, "", "\n\n".join(about)])


def widths_table(path: Path) -> str:
    """Seconds of a step at Setpoint's widths and at even widths of the same FLOPs."""
    if not path.exists():
        return "Not measured yet."
    lines = ["| processor | task | budget | FLOPs, even | FLOPs, Setpoint | step, even | step, Setpoint |"]
    lines[0] += " Setpoint / even |"
    lines.append(f"|---|---|{'---:|' * 6}")
    about = []
    for data in json.loads(path.read_text(encoding="utf-8"))["machines"]:
        for row in data["rows"]:
            flops, seconds = row["flops"], {arm: statistics.median(each) for arm, each in row["step_seconds"].items()}
            shares = [f"{100 * flops[arm] / flops['dense']:.1f} %" for arm in ("even", "Setpoint")]
            times = [f"{100 * seconds[arm] / seconds['dense']:.1f} %" for arm in ("even", "Setpoint")]
            ratio = f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
            what = [data["environment"]["cpu"], row["task"], f"{100 * row['budget']:g} %"]
            lines.append(f"| {' | '.join([*what, *shares, *times, ratio])} |")
        about.append(f"Median of the ratios: {data['median_ratio']:.2f}. Seed {data['seed']}. {made_on(data)}")
    return "\n".join([*lines, "", "\n\n".join(["FLOPs and seconds of a step are shares of dense.", *about])])


def frameworks_table(path: Path) -> str:
    """By framework, the lines that are added to its script, and what works; each cell is so many tests that passed."""
    if not path.exists():
        return "Not run yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    columns = list(next(iter(data["frameworks"].values()))["cells"])
    lines = [f"| framework | lines added | {' | '.join(columns)} |", f"|---|---:|{'---|' * len(columns)}"]
    for name, each in data["frameworks"].items():
        cells = " | ".join(f"**{cell}**" if cell.startswith("fails") else cell for cell in each["cells"].values())
        framework = " ".join(filter(None, (name, each["version"])))  # a script has no version
        lines.append(f"| {framework} | {each['lines']} | {cells} |")
    return "\n".join([*lines, "", made_on(data)])


def again_table(file: Path, root: Path) -> str:
    """Runs that were made again, beside those of the tables under `root`: the paired difference by seed.

    A difference above 0 is better than before, for a loss as well as for an accuracy.
    """
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    lines = [
        "| task | method | FLOPs / step | in the tables | made again | gain | seeds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for task in sorted({row["task"] for row in rows}):
        earlier = [row for row in read_lines(file_of(root / task, FILE), FILE, []) if row["split"] == "test"]
        metric = earlier[0]["metric"]
        points, better = metric == "accuracy", -1.0 if metric == "loss" else 1.0
        cells = {(row["method"], row["budget"]) for row in rows if row["task"] == task}
        for method, budget in sorted(cells, key=lambda cell: (cell[0], -(cell[1] or 1.0))):
            before, after = (
                {row["seed"]: row["value"] for row in found if (row["method"], row["budget"]) == (method, budget)}
                for found in (earlier, [row for row in rows if row["task"] == task])
            )
            seeds = sorted(before.keys() & after.keys())
            if not seeds:
                continue
            means = (statistics.fmean(values[seed] for seed in seeds) for values in (before, after))
            shown = " | ".join(f"{100 * mean:.2f} %" if points else f"{mean:.4f}" for mean in means)
            gain = marked(paired([better * (after[seed] - before[seed]) for seed in seeds]), metric)
            lines.append(f"| `{task}` | `{method}` | {percent(budget or 1.0)} | {shown} | {gain} | {len(seeds)} |")
    return "\n".join([*lines, "", rows_made_on([{**row["environment"], "date": row["date"]} for row in rows])])
