"""Writes the tables and the picture of README.md and of pages in docs/ from the committed result files.

    python benchmarks/readme.py            rewrite what stands between the markers
    python benchmarks/readme.py --check    fail if a page does not show what the result files say

A marker is `<!-- results:NAME -->` ... `<!-- end -->`; NAME is a folder of results/, `tasks` for all folders,
`goals`, `headline`, `validation`, `sparse`, `overhead`, `suites`, `discovery`, `coverage`, `moments`, `state-regrowth`,
`mamba2`, `ssm`, `predictions`, `distributed`, `compiled`, `soak`, `states`, `ablation`, `feedback`, `price`,
`returns`, `calibration` or `real-budgets`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from setpoint.report.columns import interval_text, metric_text, seconds_text
from setpoint.report.folder import read_results
from setpoint.report.goals import GOALS, Goal, goals
from setpoint.report.markdown import about, task_text
from setpoint.report.numbers import duration, human, percent
from setpoint.report.picture import write_picture
from setpoint.report.results import Cell, Results
from setpoint.report.statistics import Difference, difference, paired
from setpoint.report.summary import series, summary_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
_DOCS = (
    "results.md",
    "tasks.md",
    "coverage.md",
    "state-space.md",
    "budgets.md",
    "distributed.md",
    "how-it-works.md",
    "price.md",
    "resume.md",
)
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in _DOCS))
MARKER = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def methods_table(folder: Path, *, judged: bool = False) -> str:
    """Tables of a results folder with what they were measured on, and with the headline goals if it is to be judged."""
    results = read_results(folder)
    rows = summary_rows(results)
    for task in results.tasks():  # seconds compare on one machine only; what was learnt, with one version and precision
        timed = {json.dumps(cell.timing.environment) for cell in results.of(task) if cell.timing}
        assert len(timed) <= 1, f"{folder}: timed on several machines"
        ran = {tuple(cell.environment.get(key) for key in ("torch", "dtype")) for cell in results.of(task)}
        assert len(ran) == 1, f"{folder}: runs of several versions: {ran}"
    return "\n\n".join(
        task_text(results.of(task), [row for row in rows if row.task == task], judged=judged)
        for task in results.tasks()
    )


def goals_table() -> str:
    """The headline goals on every task that has been measured, task by task."""
    found: dict[str, dict[str, Goal]] = {}
    for folder in sorted(path.parent for path in RESULTS.glob("*/results.jsonl")):
        results = read_results(folder)
        rows = summary_rows(results)
        for task in results.tasks():
            mine = [row for row in rows if row.task == task]
            found[task] = {goal.letter: goal for goal in goals(results.of(task), mine)}
    lines = [f"| goal | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for letter, text, _ in GOALS:
        lines.append(f"| ({letter}) {text} | {' | '.join(each[letter].verdict for each in found.values())} |")
    return "\n".join(lines)


HEADLINES = ("small", "small-long")


def headline_table() -> str:
    """Setpoint on every task at every budget, beside dense, small, and the best that is pruned after training."""
    lines = [
        "| task | budget | dense | `small` | `small-long` | best with units cut after training | Setpoint | "
        "its training FLOPs | its training time | to `small` | to `small-long` |",
        f"|---|{'---:|' * 10}",
    ]
    for folder in sorted(path.parent for path in RESULTS.glob("*/results.jsonl")):
        results = read_results(folder)
        rows = summary_rows(results)
        for task in results.tasks():
            mine = [row for row in rows if row.task == task]
            dense = next((metric_text(row) for row in mine if row.method == "dense"), "–")
            for ours in (row for row in mine if row.method == "setpoint"):
                beside = {row.method: row for row in mine if row.budget == ours.budget}
                after = [
                    row
                    for row in beside.values()
                    if row.family == "post-training" and row.density is None and row.num_seeds >= ours.num_seeds
                ]
                best = sorted(after, key=lambda row: row.value.mean, reverse=ours.metric == "accuracy")[:1]
                rivals = [metric_text(beside[name]) if name in beside else "–" for name in HEADLINES]
                told = [f"{metric_text(row)} (`{row.method}`, {percent(row.train_flops_ratio)})" for row in best]
                apart = [_marked(ours.differences.get(name), ours.metric) for name in HEADLINES]
                spent = (percent(ours.train_flops_ratio), percent(ours.seconds_ratio))
                cells = (
                    task,
                    percent(ours.budget),
                    dense,
                    *rivals,
                    *(told or ["–"]),
                    metric_text(ours),
                    *spent,
                    *apart,
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def task_sections() -> str:
    """A section for every results folder, with its tables."""
    folders = sorted(path.parent for path in RESULTS.glob("*/results.jsonl"))
    return "\n\n".join(f"## `{folder.name}`\n\n{methods_table(folder, judged=True)}" for folder in folders)


def _threads(environment: dict[str, object]) -> str:
    return f"{environment['threads']} thread{'s' * (str(environment['threads']) != '1')}"


def overhead_table() -> str:
    """Setpoint's own cost, from results/overhead.json."""
    data = json.loads((RESULTS / "overhead.json").read_text(encoding="utf-8"))
    lines = ["| what | measured |", "|---|---|"]
    for name, row in data["sensing"].items():
        low, high = row["slowdown_quartiles"]
        often = "each step" if row["sensed_every"] == 1 else f"one step in {row['sensed_every']}"
        lines.append(
            f"| sensing in {often}, share of a dense `{name}` step ({duration(row['step_seconds'])}) | median "
            f"{row['sensing_share_median']:.2%}, mean {row['sensing_share_mean']:.2%} "
            f"(step with / without: {row['slowdown_median']:+.2%}, quartiles {low:+.2%} to {high:+.2%}) |"
        )
    resnet = data["resnet50"]
    lines += [
        f"| `find_groups(resnet50)`, best of {len(resnet['find_groups_seconds'])} | "
        f"{min(resnet['find_groups_seconds']):.2f} s |",
        f"| resize of ResNet-50 with AdamW state | {resnet['resize_seconds']:.2f} s, "
        f"{resnet['resize_in_steps']:.2f} of a training step at batch {resnet['batch']} |",
        f"| `import setpoint` beside `import torch` | {data['import']['added_seconds_median']:+.2f} s |",
        "",
        f"{data['environment']['cpu']}, {_threads(data['environment'])}, seed {data['seed']}, torch "
        f"{data['environment']['torch']}, {data['date'][:10]}.",
    ]
    return "\n".join(lines)


LIBRARIES = {"setpoint": "Setpoint", "torch_pruning": "Torch-Pruning"}
STAGES = {
    "build": "the model could not be built, copied or trained before the cut",
    "discovery": "an error in the discovery",
    "cut": "an error in the cut",
    "removed": "too little removed",
    "training": "training forward or backward fails after the cut",
    "shapes": "outputs of other shapes after the cut",
    "time": "no answer within the processor time",
    "died": "the process died",
}
COVERAGE_COLUMNS = ("suite", "library", "passed", "discovery", "exact", "tied", "frozen", "optimizer")


def coverage_table(path: Path) -> str:
    """Both libraries on every suite, what stopped them, and each of Setpoint's failures."""
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"| {' | '.join(COVERAGE_COLUMNS)} |", f"|{'---|' * len(COVERAGE_COLUMNS)}"]
    suites = {suite: None for suite in (record["suite"] for record in data["models"])}
    for suite in [*suites, "all"]:
        records = [record for record in data["models"] if suite in (record["suite"], "all")]
        lines += [_coverage_row(suite, library, records) for library in LIBRARIES]
    stages = {library: Counter(record[library]["stage"] for record in data["models"]) for library in LIBRARIES}
    lines += ["", f"| what stopped it | {' | '.join(LIBRARIES.values())} |", "|---|---|---|"]
    for stage, meaning in STAGES.items():
        if any(counts[stage] for counts in stages.values()):
            lines.append(f"| {meaning} | {' | '.join(str(stages[library][stage]) for library in LIBRARIES)} |")
    failures = [
        (record, f"{mine['stage']}: {mine['reason']}")
        for record in data["models"]
        if not (mine := record["setpoint"])["passed"]
    ]
    lines += ["", f"Setpoint fails on {len(failures)} of {len(data['models'])} models:" if failures else "No failures."]
    lines += [""] * bool(failures) + [f"* {r['suite']} `{r['model']}`: {_code(reason)}" for r, reason in failures]
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    about = data["environment"]
    lines += [
        "",
        f"{about['cpu']}, {_threads(about)} a model, {data['workers']} at a time, {data['limit_seconds']:g} s and "
        f"{data['memory_gib']:g} GiB a model (twice that, alone, where it was too little), seed {data['seed']}, "
        f"{data['date'][:10]}; {versions}.",
    ]
    return "\n".join(lines)


def suites_table(folder: Path) -> str:
    """What `setpoint inspect --suite` found in each family, and every failure."""
    columns = (
        "suite",
        "passed",
        "prunable parameters, median",
        "outside embeddings",
        "discovery, median",
        "largest error",
    )
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    failures: list[str] = []
    about: dict[str, Any] = {}
    for name in ("torchvision", "timm", "transformers", "plain"):
        data = json.loads((folder / f"suite-{name}.json").read_text(encoding="utf-8"))
        about = {**data["environment"], **{key: data[key] for key in ("date", "seed", "workers")}}
        largest = max(each["error"] for each in data["models"] if each["passed"])
        lines.append(
            f"| {name} | {data['passed']} / {data['total']} ({data['passed'] / data['total']:.1%}) | "
            f"{data['prunable_params_share_median']:.1%} | {data['prunable_outside_embeddings_median']:.1%} | "
            f"{duration(data['seconds_median'])} | {largest:.1e} |"
        )
        failures += [f"* {name} `{each['model']}`: {_code(each['reason'])}" for each in data["failures"]]
    lines += ["", "Not passed:" if failures else "All passed.", *([""] * bool(failures)), *failures, ""]
    lines.append(
        f"{about['cpu']}, {_threads(about)} a model, {about['workers']} at a time, seed {about['seed']}, torch "
        f"{about['torch']}, "
        f"{about['date'][:10]}."
    )
    return "\n".join(lines)


def discovery_table(path: Path) -> str:
    """How long `find_groups` takes, and what memory."""
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| model | parameters | ops | groups | find_groups | ms per op | memory, in models |", f"|{'---|' * 7}"]
    for row in data["models"]:
        lines.append(
            f"| `{row['model']}` | {human(row['params'])} | {row['ops']} | {row['groups']} | "
            f"{duration(row['seconds_median'])} | {1000 * row['seconds_median'] / row['ops']:.2f} | "
            f"{row['peak_growth_in_models']:.2f} |"
        )
    return "\n".join([*lines, "", _made_on(data)])


def predictions_table(latency: Path, memory: Path) -> str:
    """How far predicted seconds and bytes are from measured ones."""
    lines = [
        "| what | model | median error | within 10 % | largest error | mean error, signed | widths | time to build |",
        f"|{'---|' * 8}",
    ]
    about = []
    parts = (("seconds of a step", latency, "models"), ("of an inference", latency, "inference"))
    for what, path, part in (*parts, ("bytes of a step", memory, "models")):
        if not path.exists():
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        about.append(_made_on(data))
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
            f"| the largest metered latency over its limit, at landing | {found['over_budget']:+.1%} |",
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
            f"{found['memory_over_limit']:+.1%}, {'landed' if found['landed'] else 'not landed'} |"
        )
    return "\n".join([*lines, "", f"Task `{data['task']}`, {data['steps']} steps. {_made_on(data)}"])


def distributed_table(path: Path) -> str:
    """What ranks tell each other at a decision, and a resize, beside a step, by number of ranks; and a run's share."""
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
    note = (
        f"{cores} cores: with more ranks than that, processes wait for each other's time, and rows say little about it."
    )
    return "\n".join([*lines, "", f"{note} {_made_on(data)}"])


RUN_STEPS, RUN_DECISIONS = 1000, 15
PICTURE = ROOT / "docs" / "pictures" / "finetune.svg"
PICTURED = (
    "dense",
    *(f"{method} 0.5" for method in ("small-long", "filter-first", "cubic", "torch-pruning-norm", "setpoint")),
)
"""Lines of the picture, as many as a legend has room for: of each kind of rival that cuts units the best one there."""


def soak_table(path: Path) -> str:
    """What long checks said at their end."""
    if not path.exists():
        return "Not run yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| check | outcome | said | for | on |", "|---|---|---|---:|---|"]
    for name, each in data["checks"].items():
        outcome = "passed" if each["passed"] else "**failed**"
        lines.append(f"| {name} | {outcome} | {each['said']} | {duration(each['seconds'])} | {each['date'][:10]} |")
    return "\n".join([*lines, "", _made_on(data)])


def compiled_table(path: Path) -> str:
    """Whole runs with and without torch.compile, dense and pruned."""
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| task | run | whole run | first step | step at first | step at the end | cuts | compiled again | for |",
        f"|---|---|{'---:|' * 7}",
    ]
    for task, runs in data["runs"].items():
        for name, rounds in runs.items():
            middle = {key: statistics.median(row[key] for row in rounds) for key in rounds[0] if key != "landed"}
            ends = [row["seconds"] for row in rounds]
            apart = f" ({duration(min(ends))} to {duration(max(ends))})" if len(ends) > 1 else ""
            keys = ("first_step_seconds", "dense_step_seconds", "last_step_seconds")
            again = f"{middle['recompiles']:g} | {duration(middle['recompile_seconds'])}"
            lines.append(
                f"| {task}, {data['steps'][task]:,} steps | {name} | {duration(middle['seconds'])}{apart} | "
                f"{' | '.join(duration(middle[key]) for key in keys)} | {middle['resizes']:g} | "
                f"{again if middle['recompiles'] else '– | –'} |"
            )
    how = f"Medians of {len(rounds)} rounds" if len(rounds) > 1 else "One run each"
    return "\n".join([*lines, "", f"{how}. {_made_on(data)}"])


def _pairs(rows: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """Accuracy of the latency budget and of FLOPs budgets at its seconds, by seed."""
    return [(row["latency"]["accuracy"], row["flops_accuracy"]) for row in rows]


def _fit(fits: bool) -> str:
    return "fits" if fits else "does not fit"


def _coverage_row(suite: str, library: str, records: list[dict[str, Any]]) -> str:
    outcomes = [record[library] for record in records]
    seconds = [each["seconds"] for each in outcomes if each["seconds"] is not None]
    cut = [each for each in outcomes if each["stage"] in ("training", "shapes", "done")]
    cells = [
        suite,
        LIBRARIES[library],
        f"{sum(each['passed'] for each in outcomes)} / {len(outcomes)}",
        duration(statistics.median(seconds)) if seconds else "–",
        f"{sum(each['exact'] is True for each in outcomes)} / {sum(each['passed'] for each in outcomes)}",
        *(_share(each[demand] for each in cut) for demand in ("tied", "frozen", "optimizer")),
    ]
    return f"| {' | '.join(cells)} |"


def _share(values: Iterable[bool | None]) -> str:
    """How many hold, of those that could be asked."""
    known = [value for value in values if value is not None]
    return f"{sum(known)} / {len(known)}" if known else "–"


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
                told += f" ({_told([r['after'][place] - carried[s]['after'][place] for s, r in runs.items()])})"
            cells.append(told)
        before = statistics.fmean(run["before"] for run in runs.values())
        lines.append(f"| {data['states']} to {kept} | {way} | {before:.3f} | {' | '.join(cells)} |")
    told = f"Means over {_seeds(data)}; in parentheses the paired difference to `carry` with its 95 % interval."
    return "\n".join([*lines, "", f"{told} {_made_on(data)}"])


def state_regrowth_table(path: Path) -> str:
    """Loss of runs without and with regrowth of states."""
    data = json.loads(path.read_text(encoding="utf-8"))
    without, back = ({r["seed"]: r for r in data["runs"] if r["regrow"] == wanted} for wanted in (False, True))
    lines = ["| regrowth | FLOPs of the run | states that came back | loss | difference |", "|---|---|---|---|---|"]
    for name, runs in (("off", without), ("on", back)):
        apart = _told([run["loss"] - without[seed]["loss"] for seed, run in runs.items()]) if runs is back else "–"
        share = statistics.fmean(run["train_flops"] / without[seed]["train_flops"] for seed, run in runs.items())
        came = statistics.fmean(run["regrown_units"] for run in runs.values())
        loss = statistics.fmean(run["loss"] for run in runs.values())
        lines.append(f"| {name} | {share:.1%} | {came:.1f} | {loss:.3f} | {apart} |")
    told = f"Means over {_seeds(data)} of {data['steps']} steps; the difference is paired, with its 95 % interval."
    return "\n".join([*lines, "", f"{told} {_made_on(data)}"])


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
        apart = _told([r["loss"] - found["ranking"][seed]["loss"] for seed, r in runs.items()])
        share = f"{mean(r['flops_ratio'] for r in runs.values()):.1%}"
        loss = f"{mean(r['loss'] for r in runs.values()):.3f}"
        lines.append(f"| {way} | {share} | {after} | {loss} | {apart if way != 'ranking' else '–'} |")
    told = f"Means over {_seeds(data)} of {data['steps']} steps, differences with their 95 % interval; losses in nats."
    return "\n".join([*lines, "", f"{told} {_made_on(data)}"])


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
    return "\n".join([*lines, "", _made_on(data)])


def states_table(folder: Path) -> str:
    """Accuracy, states and seconds of the methods that drop states, and how far Setpoint's are ahead, seed by seed."""
    if not (folder / "results.jsonl").exists():
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
            ahead.append("–" if row is each else _marked(difference(by_label[each.label], cells), row.metric))
        lines.append(f"| `{row.method}` | {metric_text(row)} | {told} | {time} | {' | '.join(ahead)} |")
    return "\n".join([*lines, "", about(results.cells, rows)])


def sparse_table(folder: Path, density: str = "0.1") -> str:
    """Methods at one density of the weights, beside the static mask and one-shot pruning, by seed."""
    results = read_results(folder)
    cells = [cell for cell in results.cells if cell.method.endswith(f"@density={density}")]
    by_label = series(cells)
    rows = [row for row in summary_rows(results) if row.method in by_label]
    rivals = {name: by_label[f"{name}@density={density}"] for name in ("static", "set", "magnitude-oneshot")}
    told = ("accuracy on test", "density", "FLOPs / step in theory", "training FLOPs in theory")
    lines = [f"| method | {' | '.join((*told, *(f'to `{name}`' for name in rivals)))} |", f"|---|{'---:|' * 7}"]
    for row in rows:
        shares = [percent(share) for share in (row.density, row.theoretical_ratio, row.theoretical_train_ratio)]
        apart = []
        for rival in rivals.values():
            ours = by_label[row.method]
            apart.append("–" if rival is ours else _marked(difference(ours, rival), row.metric))
        lines.append(f"| `{row.method.split('@')[0]}` | {metric_text(row)} | {' | '.join((*shares, *apart))} |")
    seeds = ", ".join(map(str, sorted({cell.seed for cell in cells})))
    machine = _rows_made_on([{**cell.environment, "date": cell.date} for cell in cells])
    return "\n".join([*lines, "", f"Seeds {seeds}, differences with 95 % intervals; {machine}"])


def tuning_table() -> str:
    """The metric on validation data by learning rate, from the sweeps in results/tuning."""
    folders = sorted(path.parent for path in RESULTS.glob("tuning/*/results.jsonl"))
    by_folder = {folder.name: read_results(folder).cells for folder in folders}
    cells = [cell for of_folder in by_folder.values() for cell in of_folder]
    rates = sorted({_rate(cell) for cell in cells})
    lines = [
        f"| task | method | FLOPs | {' | '.join(f'{rate:g} x' for rate in rates)} |",
        f"|---|---|---:|{'---:|' * len(rates)}",
    ]
    found: dict[tuple[str, str, float | None], dict[float, list[Cell]]] = {}
    for name, of_folder in by_folder.items():
        for cell in of_folder:
            key = (name, cell.method.partition("@")[0], cell.budget)
            found.setdefault(key, {}).setdefault(_rate(cell), []).append(cell)
    for (task, method, budget), by_rate in sorted(found.items(), key=lambda each: (*each[0][:2], -(each[0][2] or 1))):
        row = {rate: next(iter(summary_rows(Results(tuple(runs))))) for rate, runs in by_rate.items()}
        texts = [metric_text(row[rate]) if rate in row else "–" for rate in rates]
        lines.append(f"| {task} | `{method}` | {percent(budget or 1.0)} | {' | '.join(texts)} |")
    seeds = ", ".join(map(str, sorted({cell.seed for cell in cells if cell.seed is not None})))
    machine = _rows_made_on([{**cell.environment, "date": cell.date} for cell in cells])
    return "\n".join([*lines, "", f"Seed{'s' * (',' in seeds)} {seeds}; {machine}"])


def _rate(cell: Cell) -> float:
    """The learning rate of a run of a sweep, relative to its method's."""
    found = re.search(r"@learning_rate=([\d.]+)", cell.method)
    return float(found[1]) if found else 1.0


def validation_table() -> str:
    """How far Setpoint lies from its rivals on the validation data at the end of each run, by seed, beside the test."""
    names = ("dense", *HEADLINES)
    lines = [
        f"| task | FLOPs | data | {' | '.join(f'to `{name}`' for name in names)} |",
        "|---|---:|---|---:|---:|---:|",
    ]
    others = ["| task | FLOPs | to | validation | test |", "|---|---:|---|---:|---:|"]
    for folder in sorted(path.parent for path in RESULTS.glob("*/results.jsonl")):
        groups = series(read_results(folder).cells)
        for ours in (cells for cells in groups.values() if cells[0].method == "setpoint"):
            task, share, metric = ours[0].task, percent(ours[0].budget), ours[0].metric
            rivals = {
                cells[0].method: cells
                for cells in groups.values()
                if cells[0].budget in (None, ours[0].budget) and "@density" not in cells[0].method
            }
            found = {
                name: [difference(ours, cells, of) for of in (_last_validation, lambda cell: cell.value)]
                for name, cells in rivals.items()
            }
            for number, split in enumerate(("validation", "test")):
                texts = [_marked(found[name][number], metric) if name in found else "–" for name in names]
                lines.append(f"| {task} | {share} | {split} | {' | '.join(texts)} |")
            for name, (validation, test) in found.items():
                if name not in (*names, "setpoint") and validation and test and validation.clear != test.clear:
                    others.append(
                        f"| {task} | {share} | `{name}` | {_marked(validation, metric)} | {_marked(test, metric)} |"
                    )
    told = "Of the other methods, those for which one interval excludes 0 and the other does not:"
    return "\n".join([*lines, "", told, "", *others, "", "Seeds and machines are those of the tables below."])


def _marked(found: Difference | None, metric: str) -> str:
    """A difference with its interval, bold where that excludes 0."""
    if found is None:
        return "–"
    text = interval_text(found, metric)
    return f"**{text}**" if found.clear else text


def _last_validation(cell: Cell) -> float | None:
    """The metric on the validation data at the end of a run."""
    points = [point for point in cell.history if point.split == "validation"]
    return None if not points else points[-1].accuracy if cell.metric == "accuracy" else points[-1].loss


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
        if "held" not in row:
            found.setdefault((row["task"], row["budget"]), {}).setdefault(row["method"], {})[row["seed"]] = row
    for (task, budget), methods in found.items():
        default = methods["setpoint"]
        for method, by_seed in methods.items():
            metric, seeds = by_seed[min(by_seed)]["metric"], sorted(by_seed.keys() & default.keys())
            scale = 100 if metric == "accuracy" else 1
            value = statistics.fmean(row["value"] for row in by_seed.values())
            told = f"{value:.2%}".replace("%", " %") if metric == "accuracy" else f"{value:.4f}"
            flops = statistics.fmean(by_seed[seed]["train_flops"] / default[seed]["train_flops"] for seed in seeds)
            apart = _told([scale * (by_seed[seed]["value"] - default[seed]["value"]) for seed in seeds])
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
    return "\n".join([*lines, "", _rows_made_on(data["rows"])])


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
    return "\n".join([*lines, "", _rows_made_on([row for row in data["rows"] if "held" in row])])


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
    return "\n".join([*lines, "", _made_on(data)])


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
    return "\n".join([*lines, "", _made_on(data)])


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


def _seeds(data: dict[str, Any]) -> str:
    """How many seeds there are, and which."""
    seeds = sorted({run["seed"] for run in data["runs"]})
    return f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"


def _made_on(data: dict[str, Any]) -> str:
    """On what, and when."""
    about = data["environment"]
    return f"{about['cpu']}, {_threads(about)}, torch {about['torch']}, {data['date'][:10]}."


def _told(pairs: Sequence[float]) -> str:
    """Mean of paired differences and half of the 95 % interval about it."""
    found = paired(pairs)
    return f"{found.mean:+.3f}" + ("" if found.high is None else f" ± {found.high - found.mean:.3f}")


def _rows_made_on(rows: Sequence[dict[str, Any]]) -> str:
    """On what, and when, where each row tells for itself."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(f"{row['cpu']}, {_threads(row)}, torch {row['torch']}", set()).add(row["date"][:10])
    return "; ".join(f"{machine}, {' and '.join(sorted(dates))}" for machine, dates in found.items()) + "."


def _code(text: str) -> str:
    """Text of an error as a span of code."""
    return f"`{text.replace('`', chr(39))}`"


def filled(text: str) -> str:
    """The page with every marked part as the result files say."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        made: dict[str, Callable[[], str]] = {
            "suites": lambda: suites_table(RESULTS / "coverage"),
            "discovery": lambda: discovery_table(RESULTS / "discovery.json"),
            "coverage": lambda: coverage_table(RESULTS / "coverage" / "torch_pruning.json"),
            "overhead": overhead_table,
            "state-regrowth": lambda: state_regrowth_table(RESULTS / "state-regrowth.json"),
            "mamba2": lambda: mamba2_table(RESULTS / "mamba2.json"),
            "ssm": lambda: ssm_table(RESULTS / "ssm.json"),
            "moments": lambda: moments_table(RESULTS / "moments.json"),
            "predictions": lambda: predictions_table(RESULTS / "latency.json", RESULTS / "memory.json"),
            "real-budgets": lambda: real_budgets_table(RESULTS / "real_budgets.json"),
            "distributed": lambda: distributed_table(RESULTS / "distributed.json"),
            "soak": lambda: soak_table(RESULTS / "soak.json"),
            "compiled": lambda: compiled_table(RESULTS / "compiled.json"),
            "states": lambda: states_table(RESULTS / "smnist-196"),
            "calibration": lambda: calibration_table(RESULTS / "calibration.json"),
            "ablation": lambda: ablation_table(RESULTS / "ablation.json"),
            "returns": lambda: returns_table(RESULTS / "returns.json"),
            "price": lambda: price_table(RESULTS / "price.json"),
            "feedback": lambda: feedback_table(RESULTS / "ablation.json"),
            "tuning": tuning_table,
            "sparse": lambda: sparse_table(RESULTS / "cifar10-mini"),
            "goals": goals_table,
            "validation": validation_table,
            "headline": headline_table,
            "tasks": task_sections,
        }
        table = made[name]() if name in made else methods_table(RESULTS / name)
        return f"{match[1]}{table}\n{match[3]}"

    return MARKER.sub(fill, text)


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            stale.append(page.name)
            if not check:
                page.write_text(filled(text), encoding="utf-8")
    with TemporaryDirectory() as folder:
        drawn = write_picture(RESULTS / "finetune", Path(folder) / PICTURE.name, labels=PICTURED)
        if drawn.read_text(encoding="utf-8") != PICTURE.read_text(encoding="utf-8"):
            stale.append(PICTURE.name)
            if not check:
                PICTURE.write_bytes(drawn.read_bytes())
    if check and stale:
        sys.exit(f"{', '.join(stale)} not as the result files say: run python benchmarks/readme.py")


if __name__ == "__main__":
    main()
