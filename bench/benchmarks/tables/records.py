"""Blocks from single records in results/: what Setpoint itself costs, which models it cuts, what long checks said."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

import setpoint
from setpoint.report.numbers import MINUS, NOTHING, duration, human, percent
from setpoint_bench.report.statistics import paired
from setpoint_bench.sweep import SUITES
from tables.renderer import (
    RESULTS,
    ROOT,
    SPECS,
    Record,
    block,
    made_on,
    marked,
    record_block,
    rows_made_on,
    table,
    threads_text,
)

# What descends from a trained parent.


def _descent(data: Record) -> tuple[dict[tuple[str, float], list[list[Record]]], str]:
    """By task and size, the rows of each seed with their parent's first; and what they were made on."""
    found: dict[tuple[str, float], list[list[Record]]] = {}
    for key, run in data["runs"].items():
        parent, *rows = run["rows"]
        for size in sorted({row["size"] for row in rows}, reverse=True):
            own = [parent, *(row for row in rows if row["size"] == size)]
            found.setdefault((key.partition(",")[0], size), []).append(own)
    return found, rows_made_on([{**run["environment"], "date": run["date"]} for run in data["runs"].values()])


@record_block("family", "family.json")
def family(data: Record) -> str:
    """By task and size, the model made from the next larger one and the one made from the parent, and their FLOPs."""
    found, made = _descent(data)
    rows = []
    for (task, size), runs in found.items():
        score, shares = dict[str, list[float]](), dict[str, list[float]]()
        for parent, *made_of in runs:
            for row in (parent, *made_of):
                score.setdefault(row["what"], []).append(100 * row["accuracy"])
                shares.setdefault(row["what"], []).append(row["train_flops"] / parent["train_flops"])
        mean = {what: statistics.fmean(values) for what, values in score.items()}
        rows.append(
            {
                "task": task,
                "FLOPs / step": percent(size),
                "parent": f"{mean['parent']:.2f} %",
                "from the next larger": f"{mean['descended']:.2f} %",
                "from the parent": f"{mean['alone']:.2f} %",
                "difference": f"{mean['descended'] - mean['alone']:+.2f}".replace("-", MINUS),
                "training FLOPs, of the parent's": percent(statistics.fmean(shares["descended"])),
                "seeds": str(len(runs)),
            }
        )
    return table(rows, made, left=2)


def _length_for(loss: float, known: Sequence[tuple[float, float]]) -> float:
    """Steps or FLOPs at which a loss is reached, on lines through the logarithms of those of known losses."""
    losses, lengths = zip(*known, strict=True)
    return math.exp(float(np.interp(loss, losses, np.log(lengths))))


@record_block("parent", "parent.json")
def parent(data: Record) -> str:
    """By size and length, losses of derived models and of models from scratch, each at the best of its rates."""
    found, made = _descent(data)
    rows = []
    for (task, size), runs in found.items():
        losses, shares = dict[tuple[str, float], list[float]](), dict[tuple[str, float], list[float]]()
        for first, *children in runs:
            for what, share in dict.fromkeys((row["what"], row["share"]) for row in children):
                best = min((r for r in children if (r["what"], r["share"]) == (what, share)), key=lambda r: r["loss"])
                losses.setdefault((what, share), []).append(best["loss"])
                shares.setdefault((what, share), []).append(best["train_flops"] / first["train_flops"])
        loss, flops = ({key: statistics.fmean(of) for key, of in found.items()} for found in (losses, shares))
        scratch = sorted((loss[key], key[1], flops[key]) for key in loss if key[0] == "from scratch")
        for (what, share), seeds in losses.items():
            line = {
                "task": task,
                "FLOPs / step": percent(size),
                "model": what,
                "steps, of the parent's": percent(share),
                "training FLOPs, of the parent's": percent(flops[what, share]),
                "loss on test": f"{loss[what, share]:.3f}",
                "parent's loss": f"{statistics.fmean(run[0]['loss'] for run in runs):.3f}",
                "seeds": str(len(seeds)),
            }
            if what == "derived":
                steps, spent = (_length_for(loss[what, share], [(row[0], row[of]) for row in scratch]) for of in (1, 2))
                line["from scratch, for the same loss"] = (
                    f"{steps / share:.0f}x the steps, {spent / flops[what, share]:.0f}x the FLOPs"
                )
            rows.append(line)
    return table(rows, made, left=3)


# Eight bits.


@record_block("int8", "int8.json")
def int8(data: Record) -> str:
    """By task, model and way to quantize, accuracy on the test set, and milliseconds in turns with the dense floats."""
    names = {"dense": "dense", "cut": "cut", "aware": "cut, quantization-aware"}
    ways = {"fp32": "fp32", "static": "int8, static", "dynamic": "int8, dynamic"}
    cells, made = [], []
    for task, found in data["tasks"].items():
        made.append({**found["environment"], "date": found["date"]})
        for row in found["rows"]:
            _, seconds, _ = row["seconds_quartiles"]
            low, share, high = row["of_dense_quartiles"]
            cells.append(
                {
                    "task": f"`{task}`",
                    "model": names[row["model"]],
                    "numbers": ways[row["way"]],
                    "FLOPs": percent(row["flops"] / found["rows"][0]["flops"]),
                    "accuracy": f"{row['accuracy']:.1%}",
                    "milliseconds": f"{1e3 * seconds:.2f}",
                    "of dense fp32": f"{share:.2f} ({low:.2f} to {high:.2f})",
                    "MB": f"{row['bytes'] / 1e6:.2f}",
                }
            )
    vnni = " and ".join(sorted({"with VNNI" if each["vnni"] else "without VNNI" for each in made}))
    note = (
        "Test data, one seed. ONNX Runtime, batch 1, one thread, the files of a task in turns: median of the thread's "
        "time, and median and quartiles of its ratio to that of dense fp32 in the same turn. "
        f"Processor {vnni}. {rows_made_on(made)}"
    )
    return table(cells, note, left=3)


# Budgets of seconds in a runtime.


@record_block("equal-seconds", "equal_seconds.json")
def equal_seconds(data: Record) -> str:
    """By task, accuracy of models that take as long, and what the other two differ from the budget of seconds by."""
    names = {"seconds": "half of the seconds", "flops": "FLOPs", "even": "FLOPs, even widths on multiples of 16"}
    cells, made = [], []
    for task, found in data["tasks"].items():
        made.append({**found["environment"], "date": found["date"]})
        runs = {way: [row for row in found["rows"] if row["way"] == way] for way in names}
        for way, rows in runs.items():
            scores = [100 * row["accuracy"] for row in rows]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0
            pairs = [row["accuracy"] - own["accuracy"] for row, own in zip(rows, runs["seconds"], strict=True)]
            shares = [row["of_dense_quartiles"][1] for row in rows]
            cells.append(
                {
                    "task": f"`{task}`",
                    "budget": names[way],
                    "of the dense seconds": f"{statistics.fmean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})",
                    "FLOPs left": percent(statistics.fmean(row["flops"] for row in rows) / found["dense_flops"]),
                    "accuracy": f"{statistics.fmean(scores):.2f} ± {spread:.2f} %",
                    "− half of the seconds": NOTHING if way == "seconds" else marked(paired(pairs), "accuracy"),
                    "seeds": str(len(rows)),
                }
            )
    note = "Test data. Files at batch 1 on one thread of ONNX Runtime, in turns with the dense one. "
    return table(cells, note + rows_made_on(made), left=2)


@record_block("runtimes", "runtimes.json")
def runtimes(data: Record) -> str:
    """By net, runtime and share: what the finished model's file takes, and how far the file is from what was asked."""

    def shown(row: Record) -> dict[str, str]:
        low, high = row["quartiles"]
        return {
            "net": row["net"],
            "runtime": row["runtime"],
            "asked": f"{row['share']:.0%}",
            "the file takes": f"{row['ratio']:.1%} ({low:.1%} to {high:.1%})",
            "FLOPs left": f"{row['flops_ratio']:.1%}",
            "constant part": f"{row['constant']:.0%}",
            "saved seconds / FLOPs": f"{(1 - row['ratio']) / (1 - row['flops_ratio']) / (1 - row['constant']):.2f}",
            "the clock": f"{row['attach_seconds'] + row['deciding_seconds']:.0f} s",
        }

    rows = sorted(data["rows"], key=lambda row: (row["net"], row["runtime"], -row["share"]))
    under = sorted(1 - row["ratio"] / row["share"] for row in rows)
    over = [-each for each in under if each < 0]
    note = (
        "Of the dense model's seconds, in turns; in brackets the quartiles over turns. One run each. The median one is "
        f"{statistics.median(under):.1%} below what was asked, at most {under[-1]:.1%}. {len(over)} of {len(rows)} are "
        f"over it, by at most {max(over, default=0.0):.1%}. "
    )
    about = [{**data["environment"], "date": row["date"]} for row in rows]
    return table(map(shown, rows), note + rows_made_on(about), left=2)


# What Setpoint itself costs.


@record_block("overhead", "overhead.json")
def overhead(data: Record) -> str:
    """Sensing, own work in whole runs, and single pieces of work."""
    runs = data["whole_runs"]
    about = [{**run["environment"], "date": run["date"]} for run in runs.values()]
    pairs = [*_sensing(data["sensing"]), *_whole_runs(runs), *_single_pieces(data)]
    note = f"Whole runs: {rows_made_on(about)} The rest: {made_on(data)} Seed {data['seed']}."
    return table(({"what": what, "measured": measured} for what, measured in pairs), note, left=2)


def _sensing(tasks: Mapping[str, Record]) -> Iterator[tuple[str, str]]:
    for name, row in tasks.items():
        low, high = row["slowdown_quartiles"]
        often = "each step" if row["sensed_every"] == 1 else f"one step in {row['sensed_every']}"
        yield (
            f"sensing in {often}, share of a dense `{name}` step ({duration(row['step_seconds'])})",
            f"median {row['sensing_share_median']:.2%}, mean {row['sensing_share_mean']:.2%} (step with / without: "
            f"{row['slowdown_median']:+.2%}, quartiles {low:+.2%} to {high:+.2%})",
        )


def _whole_runs(tasks: Mapping[str, Record]) -> Iterator[tuple[str, str]]:
    for name, row in tasks.items():
        # Versions that kept what discovery had found ran twice; `first` is the run that found everything itself.
        runs = [run.get("first", run) for run in row["runs"]["now"]]
        took = duration(statistics.median(run["seconds"] for run in runs))
        yield f"own work in a run of `{name}`, {row['steps']:,} steps, {took}", _share_of_runs(runs)


def _share_of_runs(runs: Sequence[Mapping[str, float]]) -> str:
    shares = [run["own_seconds"] / run["seconds"] for run in runs]
    spread = f" ({min(shares):.2%} to {max(shares):.2%})" if len(shares) > 1 else ""
    return f"{statistics.median(shares):.2%}{spread}"


def _single_pieces(data: Record) -> Iterator[tuple[str, str]]:
    resnet, imported = data["resnet50"], data["import"]["added_seconds_median"]
    found, cut = resnet["find_groups_seconds"], resnet["resize_seconds"]
    yield f"`find_groups(resnet50)`, best of {len(found)}", f"{min(found):.2f} s"
    steps = f"{resnet['resize_in_steps']:.2f} of a training step at batch {resnet['batch']}"
    yield "resize of ResNet-50 with AdamW state", f"{cut:.2f} s, {steps}"
    yield "`import setpoint`, after `import torch`", f"{imported:+.2f} s"


@record_block("attach", "attach.json")
def attach(data: Record) -> str:
    """What attach takes on each processor, in seconds and training steps."""
    rows: list[Record] = []
    for machine in data["machines"]:
        for name, row in machine["models"].items():
            measured = {"FLOPs": row, **{key: row[key] for key in ("latency", "memory", "energy") if key in row}}
            about = {**machine["environment"], "model": f"`{name}`"}
            rows += [{**about, **found, "budget": budget} for budget, found in measured.items()]
    cells = dict[tuple[str, str], dict[str, str]]()
    for row in sorted(rows, key=lambda row: row["budget"] != "FLOPs"):
        cell = {"budget": row["budget"], "model": row["model"]}
        cells.setdefault((row["budget"], row["model"]), cell)[row["cpu"].partition(" Processor")[0]] = _taken(row)
    return table(cells.values(), f"{data['what'].capitalize()}. Seed {data['seed']}. {rows_made_on(rows)}", left=2)


def _taken(row: Record) -> str:
    found = row["cold"]
    shown = duration(found["seconds_median"])
    if "steps_median" not in found:  # of a model without weights no training step was timed
        return shown
    return f"{shown}, {found['steps_median']:.1f} steps"


# Long checks, frameworks, GPUs.


@record_block("soak", "soak.json")
def soak(data: Record) -> str:
    """Which long checks have passed."""
    cells = [
        {
            "check": name,
            "outcome": "passed" if check["passed"] else "**failed**",
            "date": check["date"][:10],
        }
        for name, check in data["checks"].items()
    ]
    return table(cells, made_on(data), left=3)


@record_block("frameworks", "frameworks.json")
def frameworks(data: Record) -> str:
    """By framework the lines that are added to its script, and what works; a cell counts tests that passed."""
    cells = [
        {
            "framework": " ".join(filter(None, (name, found["version"]))),  # a script has no version
            "lines added": str(found["lines"]),
            **{what: f"**{text}**" if text.startswith("fails") else text for what, text in found["cells"].items()},
        }
        for name, found in data["frameworks"].items()
    ]
    return table(cells, made_on(data))


@record_block("gpu", "gpu.json")
def gpu(data: Record) -> str:
    """By network and mode, seconds of a step over the dense network's; once a network, bytes, joules and own work."""
    rows = []
    for name, found in data["networks"].items():
        if "why_not" in found:
            rows.append({"network": name, "mode": f"not measured: {found['why_not']}"})
            continue
        seconds, flops, run = found["step_seconds"], found["flops"], found["run"]
        for mode, dense in seconds["dense"].items():
            rows.append(
                {
                    "network": name,
                    "mode": mode,
                    "dense step": f"{1e3 * statistics.median(dense):.1f} ms",
                    "even": _turns_share(seconds["even"][mode], dense),
                    "**Setpoint**": f"**{_turns_share(seconds['Setpoint'][mode], dense)}**",
                    "FLOPs, even / Setpoint": " / ".join(
                        percent(flops[a] / flops["dense"]) for a in ("even", "Setpoint")
                    ),
                }
            )
        peaks = found["peak_bytes"]
        rows[-1] |= {
            what: _share_of_dense({arm: peak[part] for arm, peak in peaks.items()})
            for what, part in (("peak memory", "whole"), ("weights and states", "held"), ("memory of a step", "step"))
        }
        rows[-1]["joules of a step"] = _share_of_dense(found["step_joules"])
        rows[-1]["own work"] = f"{percent(run['overhead_seconds'] / run['seconds'])} of {run['steps']} steps"
    return table(rows, f"{data['hardware']}, seed {data['seed']}; {made_on(data)}", left=2)


def _turns_share(ours: Sequence[float], dense: Sequence[float]) -> str:
    """The median of the ratios of a turn, and their range."""
    ratios = [one / other for one, other in zip(ours, dense, strict=True)]
    return f"{percent(statistics.median(ratios))} ({percent(min(ratios))} to {percent(max(ratios))})"


def _share_of_dense(by_arm: Mapping[str, float | None]) -> str:
    ours, dense = by_arm["Setpoint"], by_arm["dense"]
    return percent(ours / dense) if ours and dense else NOTHING


# Which models are cut.


@block("models-cut")
def models_cut() -> str:
    """How many models each library cuts, after which they train on in the shapes that were promised."""
    record = json.loads((RESULTS / "coverage" / "torch_pruning.json").read_text(encoding="utf-8"))
    models, versions = record["models"], record["versions"]
    ours, theirs = (sum(model[library]["passed"] for model in models) for library in ("setpoint", "torch_pruning"))
    own = sum(model["suite"] == "plain" for model in models)
    return (
        f"Of {len(models)} models, {own} of them our own, {ours} still ran a training forward and backward after a cut "
        f"by Setpoint {versions['setpoint']}. After a cut by Torch-Pruning {versions['torch-pruning']}, {theirs} did."
    )


@block("seconds-met")
def seconds_met() -> str:
    """How many files are within a budget of seconds, and by how much."""
    rows = json.loads((RESULTS / "runtimes.json").read_text(encoding="utf-8"))["rows"]
    under = sorted(1 - row["ratio"] / row["share"] for row in rows)
    nets, runtimes = ({row[what] for row in rows} for what in ("net", "runtime"))
    return (
        f"{sum(each >= 0 for each in under)} of {len(rows)} finished files were within their budget of milliseconds, "
        f"the median one by {statistics.median(under):.1%}: {len(nets)} nets in {', '.join(sorted(runtimes))}."
    )


@block("suites")
def suites() -> str:
    """What `setpoint coverage` found in each family, and every failure."""
    files = {name: RESULTS / "coverage" / f"suite-{name}.json" for name in SUITES}
    records: dict[str, Record] = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    cells = [
        {
            "suite": name,
            "passed": f"{data['passed']} / {data['total']} ({data['passed'] / data['total']:.1%})",
            "prunable parameters, median": f"{data['prunable_params_share_median']:.1%}",
            "outside embeddings": f"{data['prunable_outside_embeddings_median']:.1%}",
            "discovery, median": duration(data["seconds_median"]),
            "largest error": f"{max(model['error'] for model in data['models'] if model['passed']):.1e}",
        }
        for name, data in records.items()
    ]
    failures = [
        f"* {name} `{model['model']}`: `{model['reason'].replace('`', chr(39))}`"
        for name, data in records.items()
        for model in data["failures"]
    ]
    said = ["Not passed:", "\n".join(failures)] if failures else ["All passed."]
    last = records[SUITES[-1]]
    about = last["environment"]
    made = (
        f"{about['cpu']}, {threads_text(about)} a model, {last['workers']} at a time, seed {last['seed']}, torch "
        f"{about['torch']}, {last['date'][:10]}."
    )
    return "\n\n".join([table(cells, left=6), *said, made])


@record_block("scale", "scale.json")
def scale(data: Record) -> str:
    """By model and number of ranks, bytes that a rank receives, and as a share of those of a step of training."""

    def of_step(row: Record, name: str) -> str:
        share, size = 100 * row[name] / row["step"], row[name]
        amount = f"{size / 1e9:,.1f} GB" if size > 1e9 else f"{size / 1e6:,.1f} MB"
        return f"{amount} ({share:.0f} %)" if share > 1 else f"{amount} ({share:.4f} %)"

    columns = {
        "sensing": "sensing a step",
        "deciding": "a decision",
        "moments": "the first decision, extra",
        "cut": "a cut",
    }
    rows = (
        {
            "model": row["model"],
            "ranks": f"{row['ranks']:,}",
            "a step of training": f"{row['step'] / 1e9:,.1f} GB",
            **{title: of_step(row, name) for name, title in columns.items()},
        }
        for row in data["large"]
    )
    ranks = sorted({row["ranks"] for row in data["counted"]})
    same = all(abs(row["bytes"] - row["foretold"]) < 1e-6 for row in data["counted"])
    said = (
        f"A small model on {ranks[0]} to {ranks[-1]} ranks, {len(data['counted'])} steps: the bytes that were counted "
        f"{'are' if same else 'are not'} those of the formula in each."
    )
    return table(rows, f"{said} Made by `bench/benchmarks/scale.py`, torch {data['environment']['torch']}.")


# The reference.


def reference(ring: str) -> str:
    """The names of a page of the API reference, each with its arguments and the first sentence of its docstring."""
    page = (ROOT / "docs" / "api" / f"{ring}.md").read_text(encoding="utf-8")
    return table(map(_described, re.findall(r"^::: (\S+)$", page, re.MULTILINE)), left=2)


def _described(dotted: str) -> dict[str, str]:
    module, _, name = dotted.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    shown = f"setpoint.{name}" if getattr(setpoint, name, None) is found else dotted
    if inspect.isfunction(found):
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        parameters = inspect.signature(found).parameters.values()
        shown += f"({', '.join(stars.get(parameter.kind, '') + parameter.name for parameter in parameters)})"
    text = " ".join((inspect.getdoc(found) or "").split("\n\n")[0].split())
    first = re.split(r"(?<=[.;:]) (?=[A-Z])", text)[0].replace("|", r"\|")
    return {"name": f"`{shown}`", "what it is": first}


SPECS.update({f"api-{ring}": partial(reference, ring) for ring in ("use", "extend")})


@record_block("first-cut", "first-cut.json")
def first_cut(data: Record) -> str:
    """By task and seed, gradual cuts and one cut at once, each with its share of the dense training FLOPs."""
    by_run = {(row["task"], row["seed"], row["how"]): row for row in data["rows"]}

    def shown(task: str, seed: int, how: str) -> str:
        row = by_run.get((task, seed, how))
        return NOTHING if row is None else f"{row['value']:.1%} ({row['train_flops_ratio']:.2f})"

    kinds = {"gradual": "gradual", "at once": "at once, same steps", "at once, longer": "at once, 1.4 x the steps"}
    rows = (
        {"task": task, "seed": str(seed), **{words: shown(task, seed, how) for how, words in kinds.items()}}
        for task, seed in sorted({(row["task"], row["seed"]) for row in data["rows"]})
    )
    return table(rows, f"{data['note']} {made_on(data)}")


@record_block("first-share", "first-cut.json")
def first_share(data: Record) -> str:
    """By task and share of the way that the first cut goes, the mean over seeds and each of them."""
    runs: dict[tuple[str, float], list[Record]] = {}
    for row in data["shares"]["rows"]:
        runs.setdefault((row["task"], row["first"]), []).append(row)
    rows = (
        {
            "task": task,
            "steps": str(of[0]["steps"]),
            "of the way at once": percent(first),
            "on validation": f"{statistics.fmean(each['value'] for each in of):.1%}",
            "by seed": ", ".join(f"{each['value']:.1%}" for each in of),
            "training FLOPs, of all at once": percent(of[0]["train_flops"] / runs[task, 1.0][0]["train_flops"]),
        }
        for (task, first), of in runs.items()
    )
    return table(rows, made_on(data["shares"]))


@record_block("rounding", "rounding.json")
def rounding(data: Record) -> str:
    """By way to cut, the share of the FLOPs and of the seconds in ONNX Runtime."""
    rows = []
    for row in data["rows"]:
        low, share, high = row["of_dense_quartiles"]
        rows.append(
            {
                "MobileNetV2 cut by": row["model"],
                "FLOPs left": percent(row["flops_ratio"]),
                "of the dense seconds": f"{share:.2f} ({low:.2f} to {high:.2f})",
                "milliseconds": f"{1e3 * row['seconds']:.2f}",
            }
        )
    versions = ", ".join(f"{package} {version}" for package, version in data["versions"].items())
    return table(rows, f"Medians and quartiles over turns. {versions}, {made_on(data)}")


@record_block("families", "families.json")
def families(data: Record) -> str:
    """By family of models the cheapest model that can be reached, what is cut, and the seconds of finding it."""
    cells = [
        {
            "family": family,
            "model": f"`{row['model'].partition(':')[2]}`",
            "cut are": ", ".join(f"{unit}s" for unit in row["units"]),
            "least FLOPs": percent(row["flops_share"]),
            "least parameters": percent(row["params_share"]),
            "attach": duration(row["seconds"]),
        }
        for family, row in data["families"].items()
    ]
    return table(cells, made_on(data), left=3)


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


@record_block("coverage", "coverage/torch_pruning.json")
def coverage(data: Record) -> str:
    """Both libraries on every suite, what stopped them, and each of Setpoint's failures."""
    models = data["models"]
    suites = [*dict.fromkeys(model["suite"] for model in models), "all"]
    passed = []
    for suite in suites:
        for library, words in LIBRARIES.items():
            outcomes = [model[library] for model in models if suite in (model["suite"], "all")]
            passed.append({"suite": suite, "library": words, **_demands_met(outcomes)})
    stopped = {words: Counter(model[library]["stage"] for model in models) for library, words in LIBRARIES.items()}
    reasons = [
        {"what stopped it": meaning, **{words: str(counts[stage]) for words, counts in stopped.items()}}
        for stage, meaning in STAGES.items()
        if any(counts[stage] for counts in stopped.values())
    ]
    failed = [(model, model["setpoint"]) for model in models if not model["setpoint"]["passed"]]
    failures = [
        f"* {model['suite']} `{model['model']}`: {_code(found['stage'] + ': ' + found['reason'])}"
        for model, found in failed
    ]
    heading = f"Setpoint fails on {len(failed)} of {len(models)} models:" if failed else "No failures."
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    about = data["environment"]
    made = (
        f"{about['cpu']}, {threads_text(about)} a model, {data['workers']} at a time, {data['limit_seconds']:g} s and "
        f"{data['memory_gib']:g} GiB a model (twice that, alone, where it was too little), seed {data['seed']}, "
        f"{data['date'][:10]}; {versions}."
    )
    parts = [table(passed, left=8), table(reasons, left=3), heading, "\n".join(failures), made]
    return "\n\n".join(filter(None, parts))


def _demands_met(outcomes: Sequence[Record]) -> dict[str, str]:
    """How many models pass, how fast groups are found, and how many cut models meet each demand."""
    seconds = [outcome["seconds"] for outcome in outcomes if outcome["seconds"] is not None]
    passed = [outcome for outcome in outcomes if outcome["passed"]]
    cut = [outcome for outcome in outcomes if outcome["stage"] in ("training", "shapes", "done")]
    return {
        "passed": f"{len(passed)} / {len(outcomes)}",
        "discovery": duration(statistics.median(seconds)) if seconds else NOTHING,
        "exact": f"{sum(outcome['exact'] is True for outcome in outcomes)} / {len(passed)}",
        **{demand: _of_known(outcome[demand] for outcome in cut) for demand in ("tied", "frozen", "optimizer")},
    }


def _of_known(values: Iterable[bool | None]) -> str:
    """How many hold, of those that could be asked."""
    known = [value for value in values if value is not None]
    return f"{sum(known)} / {len(known)}" if known else NOTHING


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"


@record_block("growth", "growth.json")
def growth(data: Record) -> str:
    """Discovery, a decision and a cut against depth and width, and the line through the depths, on one machine."""
    machine = data["machines"][-1]
    cells = [
        {
            "layers": str(row["layers"]),
            "width": f"{row['width']:,}",
            "parameters": human(row["params"]),
            "groups": str(row["groups"]),
            "units": f"{row['units']:,}",
            **{kind: duration(row[f"{kind}_s"]) for kind in ("discovery", "decision", "cut")},
        }
        for row in machine["models"]
    ]
    return table(cells, _line_through_depths(machine))


def _line_through_depths(machine: Record) -> str:
    deep = [row for row in machine["models"] if row["width"] == machine["models"][0]["width"]]
    # A cut that was measured once may hold a full collection of Python's garbage: no line goes through such cuts.
    repeated = [kind for kind in ("discovery", "decision", "cut") if all(f"{kind}_s" in r["rounds"] for r in deep)]
    once = "" if "cut" in repeated else "Each cut was measured once, and may hold a collection of Python's garbage. "
    layers = [row["layers"] for row in deep]
    slopes = {kind: statistics.linear_regression(layers, [row[f"{kind}_s"] for row in deep])[0] for kind in repeated}
    fitted = ", ".join(f"{kind} {duration(slope)} a layer" for kind, slope in slopes.items())
    return f"Least squares over the depths: {fitted}. {once}Seed {machine['seed']}. {made_on(machine)}"


@record_block("structures", "structures.json")
def structures(data: Record) -> str:
    """By structure the time of the search for groups, and the bytes that sensing, a cut and training take."""
    names = {"llama": "Llama 3 8B", "mixtral": "Mixtral 8x7B", "qwen2_moe": "Qwen1.5-MoE-A2.7B"}
    rows = [
        {
            "structure": names.get(row["model"], row["model"]),
            "parameters": human(row["parameters"]),
            "search for groups": duration(row["search_s"]),
            "groups": str(row["groups"]),
            "units": ", ".join(f"{count:,} {unit}s" for unit, count in row["units"].items()),
            "weights in 16 bit": f"{human(row['weights_bytes'])}B",
            "AdamW's moments": f"{human(row['adamw_bytes'])}B",
            "saliencies": f"{human(row['saliency_bytes'])}B",
            "second moments": f"{human(row['moments_bytes'])}B",
        }
        for row in data["rows"]
    ]
    return table(rows, made_on(data))


@record_block("smollm2", "smollm2.json")
def smollm2(data: Record) -> str:
    """Perplexity of each run of SmolLM2 on held-out files, on general text, and on the dense model's own answers."""
    texts = {"domain test": "held-out files", "Shakespeare": "tiny Shakespeare", "answers": "own answers"}
    rows = [
        {
            "run": row["run"],
            "parameters outside of embeddings": f"{row['share']:.0%}",
            **{words: f"{row['perplexity'][name]:.2f}" for name, words in texts.items()},
        }
        for row in data["rows"]
    ]
    first = data["rows"][0]
    made = f"{first['cpu']}, {first['date'][:10]}, transformers {first['packages']['transformers']}"
    return table(rows, f"Perplexity after {first['steps']} steps, seed {first['seed']}. {made}.")
