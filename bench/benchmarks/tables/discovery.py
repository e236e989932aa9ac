"""Tables on which models Setpoint finds groups in, and how fast."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from setpoint.report.numbers import duration
from tables.words import code_span, threads_text

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


WORDS = {
    "it is normalised over (": "a LayerNorm runs over these channels (",
    "batch norm averages over it": "batch norm averages over this dim",
    "a mean or variance runs over it": "a mean or variance runs over this dim",
    "this side of it is summed against data, which has no units": "input of the network, or other data",
    "it reaches the model's output": "output of the network",
    "the other factor of this dim is the one that is pruned": "a reshape joins this dim with one that is pruned, "
    "such as heads",
    "met by data of fixed size": "data of a fixed size meets this dim",
}
"""Reasons as recorded, and as Setpoint gives them by now; the norms among the recorded ones are LayerNorms."""


def _reason(text: str) -> str:
    for recorded, now in WORDS.items():
        text = text.replace(recorded, now)
    return code_span(text)


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
    lines += [""] * bool(failures) + [f"* {r['suite']} `{r['model']}`: {_reason(reason)}" for r, reason in failures]
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    about = data["environment"]
    lines += [
        "",
        f"{about['cpu']}, {threads_text(about)} a model, {data['workers']} at a time, {data['limit_seconds']:g} s and "
        f"{data['memory_gib']:g} GiB a model (twice that, alone, where it was too little), seed {data['seed']}, "
        f"{data['date'][:10]}; {versions}.",
    ]
    return "\n".join(lines)


def models_cut_table(path: Path) -> str:
    """In one row how many models each library cuts, after which they train on in the shapes that were promised."""
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    passed = [sum(record[library]["passed"] for record in models) for library in LIBRARIES]
    return "\n".join(
        [
            f"| models of four families | {' | '.join(LIBRARIES.values())} |",
            f"|---|{'---:|' * len(LIBRARIES)}",
            f"| forward and backward after a cut, of {len(models)} | {' | '.join(map(str, passed))} |",
        ]
    )


def models_cut_line(path: Path) -> str:
    """The same in sentences on two libraries and their versions, with how many of the models are Setpoint's own."""
    record = json.loads(path.read_text(encoding="utf-8"))
    models, versions = record["models"], record["versions"]
    ours, theirs = (sum(model[library]["passed"] for model in models) for library in LIBRARIES)
    own = sum(model["suite"] == "plain" for model in models)
    return (
        f"Of {len(models)} models, {own} of them our own, {ours} still ran a training forward and backward after a cut "
        f"by Setpoint {versions['setpoint']}. After a cut by Torch-Pruning {versions['torch-pruning']}, {theirs} did."
    )


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


def suites_table(folder: Path) -> str:
    """What `setpoint coverage` found in each family, and every failure."""
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
        failures += [f"* {name} `{each['model']}`: {_reason(each['reason'])}" for each in data["failures"]]
    lines += ["", "Not passed:" if failures else "All passed.", *([""] * bool(failures)), *failures, ""]
    lines.append(
        f"{about['cpu']}, {threads_text(about)} a model, {about['workers']} at a time, seed {about['seed']}, torch "
        f"{about['torch']}, "
        f"{about['date'][:10]}."
    )
    return "\n".join(lines)
