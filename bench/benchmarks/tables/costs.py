"""Tables on seconds and bytes: Setpoint's own, and budgets of them; and on long checks."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attach import BUDGETS

from setpoint.report.numbers import NOTHING, duration, human
from tables.words import made_on, rows_made_on


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
