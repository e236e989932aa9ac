"""Blocks from the runs of `setpoint bench` in results/: comparisons of methods, task by task."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from setpoint.report.numbers import NOTHING, percent
from setpoint_bench.report import folder
from setpoint_bench.report.columns import metric_text, share_text
from setpoint_bench.report.folder import RESULTS as RESULTS_FILE
from setpoint_bench.report.packed import file_of
from setpoint_bench.report.results import Cell
from setpoint_bench.report.statistics import difference
from setpoint_bench.report.summary import SETPOINT, Row, summary_rows
from tables.records import models_cut, seconds_met
from tables.renderer import RESULTS, SPECS, block, marked, rows_made_on, svg, table

LONGER = ("-long", "-longer", "-taught", "-trained", "-alone")
"""How names of methods end that train for longer, or are taught by a dense run."""
PRETRAINED = {
    "resnet56": ("ResNet-56, CIFAR-10", "resnet20"),
    "banking77": ("MiniLM-L6, BANKING77", "banking77-three-layers"),
    "clothing": ("EfficientNet-Lite0, photographs of clothes", ""),
}
"""By results folder what a table calls the model, and the folder of the small pretrained model where there is one."""
FINE_TUNED = (*PRETRAINED, "finetune", "finetune-text")
"""The results folders of tasks that start from a pretrained model."""

# Many tables show the same runs: each folder is read once.
read_results = cache(folder.read_results)


@cache
def rows_of(name: str) -> tuple[Row, ...]:
    """The summary of a folder of results/."""
    return summary_rows(read_results(RESULTS / name))


def folders(root: Path = RESULTS) -> list[Path]:
    """The folders with results, by name."""
    return sorted(path for path in root.iterdir() if file_of(path, RESULTS_FILE).is_file())


# Every method on a task that is fine-tuned.


def methods_of(name: str) -> str:
    """By method its metric at half and at a quarter of the FLOPs, and how far that is from Setpoint's; best first."""
    cells = read_results(RESULTS / name).cells
    assert len({tuple(map(cell.environment.get, ("torch", "dtype"))) for cell in cells}) == 1, name
    dense, found = _dense(name), dict[str, dict[float | None, Row]]()
    for row in rows_of(name):
        if row.density is None and row.method != "dense":
            found.setdefault(row.method, {})[row.budget] = row
    sign = -1 if dense.metric == "accuracy" else 1

    def rank(of: Mapping[float | None, Row]) -> tuple[bool, float]:
        return 0.25 not in of, sign * (of.get(0.25) or next(iter(of.values()))).value.mean

    lines = []
    for method, of in sorted(found.items(), key=lambda each: rank(each[1])):
        line = {"method": f"`{method}`"}
        for budget, words in ((0.5, "half"), (0.25, "quarter")):
            row = of.get(budget, of.get(None))
            line[words] = _with_seeds(row) if row else NOTHING
            line[f"{words} − Setpoint"] = marked(row.differences.get(SETPOINT), row.metric) if row else NOTHING
            line[f"training FLOPs, {words}"] = percent(row.train_flops_ratio) if row else NOTHING
        lines.append(line)
    about = rows_made_on([{**cell.environment, "date": cell.date} for cell in cells])
    return table(lines, f"Dense: {metric_text(dense)} ({dense.num_seeds} seeds). {about}")


SPECS.update({f"task-{name}": partial(methods_of, name) for name in FINE_TUNED})

# From scratch.


@block("scratch")
def scratch() -> str:
    """On tasks from scratch Setpoint, dense, small models and the best cut after training, and what Setpoint cost."""
    lines = []
    for path in folders():
        rows = rows_of(path.name)
        for ours in (row for row in rows if row.method == SETPOINT and path.name not in FINE_TUNED):
            here = {row.method: row for row in rows if row.budget in (ours.budget, None)}
            after = [row for row in here.values() if row.family == "post-training" and row.density is None]
            best = sorted(after, key=lambda row: row.value.mean, reverse=ours.metric == "accuracy")[:1]
            shown = {"dense": here.get("dense"), "small": here.get("small"), "small, longer": here.get("small-long")}
            shown |= {"cut after training": best[0] if best else None, "Setpoint": ours}
            lines.append(
                {
                    "task": ours.task,
                    "FLOPs / step": percent(ours.budget),
                    **{words: NOTHING if row is None else _with_seeds(row) for words, row in shown.items()},
                    "Setpoint − small, longer": marked(ours.differences.get("small-long"), ours.metric),
                    "training FLOPs": percent(ours.train_flops_ratio),
                    "training seconds": share_text(ours.seconds_share),
                }
            )
    return table(lines)


# Fine-tuned pretrained models.


def _of_equal_steps(name: str) -> list[Row]:
    """Rows of a results folder, but for masks, and for methods that train longer or are taught."""
    return [row for row in rows_of(name) if row.density is None and not row.method.partition("@")[0].endswith(LONGER)]


def _cells(name: str, method: str, budget: float | None) -> list[Cell]:
    return [cell for cell in read_results(RESULTS / name).cells if (cell.method, cell.budget) == (method, budget)]


def _dense(name: str) -> Row:
    return next(row for row in rows_of(name) if row.method == "dense")


def _best_of_families(rows: Sequence[Row]) -> dict[str, Row | None]:
    """The best row of Setpoint, of the baselines that prune during training, and of the cuts after training."""
    kinds = {"Setpoint": SETPOINT, "baseline": "open-loop", "cut after training": "post-training"}
    by_name = sorted(rows, key=lambda row: row.method)  # of equal means always the same
    return {
        kind: max(
            (row for row in by_name if row.family == family), key=lambda row: round(row.value.mean, 9), default=None
        )
        for kind, family in kinds.items()
    }


def _clearly_ahead(row: Row, rivals: Sequence[Row]) -> bool:
    """Whether each of them is behind the row by an interval that excludes 0; known of Setpoint's rows."""
    behind = [rival.differences.get(row.method) for rival in rivals]
    return bool(behind) and all(found is not None and found.high is not None and found.high < 0 for found in behind)


@block("readme")
def readme() -> str:
    """Fine-tuned pretrained models at two budgets; below, how many models are cut and how many deadlines are met."""
    rows = []
    for name, (model, small) in PRETRAINED.items():
        for budget in (0.5, 0.25):
            mine, rival = _default(name, budget), _best_rival(name, budget)
            found = difference(_cells(name, mine.method, budget), _cells(name, rival.method, budget))
            rows.append(
                {
                    "fine-tuned model": model,
                    "FLOPs / step": percent(budget),
                    "dense": _with_spread(_dense(name)),
                    "Setpoint": f"{_with_spread(mine)}, {percent(mine.train_flops_ratio)}",
                    "best baseline": f"{_with_spread(rival)}, {percent(rival.train_flops_ratio)}",
                    "difference, points": marked(found, mine.metric),
                    "smaller pretrained model": _with_spread(rows_of(small)[0]) if small else NOTHING,
                }
            )
    return table(rows, f"* {models_cut()}\n* {seconds_met()}")


def _default(name: str, budget: float) -> Row:
    """The row of the default, one cut at the start, with the training FLOPs of gradual cuts; or that of those."""
    known = {row.method: row for row in rows_of(name) if row.budget == budget}
    return known.get(f"{SETPOINT}-at-once-long") or known[SETPOINT]


def _best_rival(name: str, budget: float) -> Row:
    best = _best_of_families([row for row in _of_equal_steps(name) if row.budget == budget])
    return max((row for kind, row in best.items() if row and kind != "Setpoint"), key=lambda row: row.value.mean)


def _with_spread(row: Row) -> str:
    return f"{metric_text(row)} ({row.num_seeds})"


@block("pretrained")
def pretrained() -> str:
    """All that was measured of the pretrained models: one column a model, the best of a budget in bold."""
    columns = {words: _pretrained_column(name, small) for name, (words, small) in PRETRAINED.items()}
    whats = next(iter(columns.values()))
    return table(
        {"accuracy on test data": what, **{words: column[what] for words, column in columns.items()}} for what in whats
    )


def _pretrained_column(name: str, small: str) -> dict[str, str]:
    """The accuracies of one model, by what they are of."""
    rows, dense = _of_equal_steps(name), _dense(name)
    found = {"dense, fine-tuned": _with_seeds(dense)}
    for budget, words in ((0.5, "half of the FLOPs"), (0.25, "a quarter")):
        best = _best_of_families([row for row in rows if row.budget == budget])
        for kind, row in best.items():
            text = NOTHING if row is None else _with_seeds(row) + (f", `{row.method}`" if kind != "Setpoint" else "")
            rivals = [rival for rival in best.values() if rival is not None and rival is not row]
            found[f"{words}: {kind}"] = f"**{text}**" if row is not None and _clearly_ahead(row, rivals) else text
        mine, rival = _cells(name, SETPOINT, budget), best["baseline"]
        apart = difference(mine, _cells(name, rival.method, budget) if rival else ())
        found[f"{words}: Setpoint − baseline, points"] = marked(apart, dense.metric)
        apart = difference(mine, _cells(small, "dense", None) if small else ())
        found[f"{words}: Setpoint − small pretrained model, points"] = marked(apart, dense.metric)
    found["small pretrained model"] = NOTHING
    if small:
        row = rows_of(small)[0]
        share = (row.final_flops or math.nan) / (dense.final_flops or math.nan)
        found["small pretrained model"] = f"{_with_seeds(row)}, {percent(share)} of the FLOPs"
    spent_by_ours = [percent(row.train_flops_ratio) for row in rows if row.method == SETPOINT]
    found["training FLOPs of Setpoint"] = " and ".join(sorted(spent_by_ours, reverse=True))
    return found


def _with_seeds(row: Row) -> str:
    text = percent(row.value.mean) if row.metric == "accuracy" else f"{row.value.mean:.3f}"
    return f"{text} ({row.num_seeds})"


@block("bill")
def bill() -> str:
    """Fine-tuning for as many steps as the dense run's training FLOPs pay for, against equal steps and dense."""
    rows = []
    for name, (model, _) in PRETRAINED.items():
        for here in _with_longer_runs(name):
            ours = here["setpoint-long"]
            runs = {method: _cells(name, row.method, row.budget) for method, row in here.items()}
            shown = {"equal steps": "setpoint", "equal compute": "setpoint-long", "baseline": "cubic-long"}
            rows.append(
                {
                    "model": model.partition(",")[0],
                    "FLOPs / step": percent(ours.budget),
                    "dense": _with_seeds(here["dense"]),
                    **{
                        words: _with_seeds(here[method]) if method in here else NOTHING
                        for words, method in shown.items()
                    },
                    **{
                        f"equal compute − {words}": marked(
                            difference(runs["setpoint-long"], runs.get(method, ())), ours.metric
                        )
                        for words, method in (
                            ("equal steps", "setpoint"),
                            ("dense", "dense"),
                            ("baseline", "cubic-long"),
                        )
                    },
                }
            )
    return table(rows)


@block("expected")
def expected() -> str:
    """Points of accuracy that a cut takes from the pretrained models, at equal steps and at equal training FLOPs."""
    lines = []
    for name, (model, _) in PRETRAINED.items():
        dense, line = _cells(name, "dense", None), {"model": model}
        for budget, words in ((0.5, "half"), (0.25, "a quarter")):
            for method, how in ((SETPOINT, "equal steps"), (f"{SETPOINT}-long", "equal compute")):
                line[f"{words}, {how}"] = marked(difference(_cells(name, method, budget), dense), "accuracy")
        lines.append(line)
    return table(lines)


def _with_longer_runs(name: str) -> Iterator[dict[str, Row]]:
    """By method, the rows of each budget at which Setpoint trained for longer; of several learning rates the best."""
    for budget in (0.5, 0.25):
        here = {"dense": _dense(name)}
        for row in sorted((row for row in rows_of(name) if row.budget == budget), key=lambda row: row.value.mean):
            here[row.method.partition("@")[0]] = row
        if "setpoint-long" in here:
            yield here


# The first cut.


@block("at-once")
def at_once() -> str:
    """One cut against gradual cuts, at equal training FLOPs and at equal steps, by seed."""
    rows = []
    for path in folders():
        for budget in (0.5, 0.25):
            here = {row.method: row for row in rows_of(path.name) if row.budget == budget}
            if "setpoint-at-once-long" not in here:
                continue
            shown = {
                "gradual": "setpoint",
                "at once, equal FLOPs": "setpoint-at-once-long",
                "at once, equal steps": "setpoint-at-once",
            }
            runs = {words: _cells(path.name, method, budget) for words, method in shown.items()}
            start = {"task": here["setpoint"].task, "FLOPs / step": percent(budget)}
            for words, method in shown.items():
                start[words] = f"{metric_text(here[method])} ({percent(here[method].train_flops_ratio)})"
                if words != "gradual":
                    found = difference(runs[words], runs["gradual"])
                    start[f"{words.removeprefix('at once, ')} − gradual"] = (
                        f"{marked(found, here[method].metric)} ({found.num if found else 0})"
                    )
            rows.append(start)
    return table(rows, left=2)


# From a trained model.

RECIPE = {
    "from pretrained, equal steps": "setpoint-at-once",
    "from pretrained, dense FLOPs": "setpoint-at-once-longer",
    "from trained, no teacher": "setpoint-from-trained-alone",
    "from trained, own teacher": "setpoint-from-trained",
}
"""Steps of the recipe of docs/best-small-model.md, in order, and their methods."""


def _recipe() -> Iterator[tuple[str, float, dict[str, Row]]]:
    """Folder, budget and rows of each task on which all of the recipe was run."""
    for path in folders():
        for budget in (0.5, 0.25):
            here = {row.method: row for row in rows_of(path.name) if row.budget == budget}
            if "setpoint-from-trained" in here:
                yield path.name, budget, here


def recipe_picture() -> str:
    """Each step of the recipe as points of accuracy against dense, a line for each task, as SVG."""
    colors, left, wide, step = ("#8a94a3", "#3f7cac", "#d1603d", "#6b8f47"), 150, 560, 44
    found = [
        (_dense(name).task, [100 * (here[method].value.mean - _dense(name).value.mean) for method in RECIPE.values()])
        for name, _, here in _recipe()
    ]
    low = min(0.0, *(min(points) for _, points in found)) - 0.5
    parts, bottom = list[str](), 30 + step * len(found)

    def at(points: float) -> float:
        return left + wide * (points - low) / (0.5 - low)

    for points in range(math.ceil(low), 1):
        parts.append(f'<path class="axis" d="M{at(points):.1f} 30V{bottom}"/>')
        label = f"{points} points" if points else "dense"
        parts.append(f'<text x="{at(points):.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    for line, (task, values) in enumerate(found):
        y = 30 + step * (line + 0.5)
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{task}</text>')
        for number, points in enumerate(values):
            place = y + 7 * (number - 1.5)
            title = f"{task}, {list(RECIPE)[number]}: {points:+.2f} points"
            dot = f'<circle cx="{at(points):.1f}" cy="{place}" r="5" fill="{colors[number]}">'
            parts.append(f"{dot}<title>{title}</title></circle>")
    for number, words in enumerate(RECIPE):
        x = 12 + 180 * number
        parts.append(f'<circle cx="{x}" cy="12" r="5" fill="{colors[number]}"/><text x="{x + 9}" y="16">{words}</text>')
    return svg(parts, 740, bottom + 26, "accuracy against dense by step")


@block("best-small")
def best_small() -> str:
    """What each step of the recipe brings: one cut, the model trained before, the FLOPs of a dense run, a teacher."""
    rows = []
    for name, budget, here in _recipe():
        dense = _dense(name)
        runs = {method: _cells(name, method, budget) for method in RECIPE.values()}
        alone, taught = runs["setpoint-from-trained-alone"], runs["setpoint-from-trained"]
        differences = {
            "trained − pretrained": difference(alone, runs["setpoint-at-once-longer"]),
            "teacher − none": difference(taught, alone),
            "pretrained − dense": difference(runs["setpoint-at-once-longer"], _cells(name, "dense", None)),
        }
        rows.append(
            {
                "task": dense.task,
                "FLOPs / step": percent(budget),
                "dense": metric_text(dense),
                **{words: metric_text(here[method]) if method in here else NOTHING for words, method in RECIPE.items()},
                **{
                    words: marked(found, dense.metric) + (f" ({found.num})" if found and found.num > 2 else "")
                    for words, found in differences.items()
                },
            }
        )
    return table(rows, left=2)


# Learning rates.


@block("tuning")
def tuning() -> str:
    """The best learning rate of each method on the pretrained models at a quarter of the FLOPs, on validation data."""
    lines = dict[str, dict[str, str]]()
    for name, (words, _) in PRETRAINED.items():
        # ResNet-56 was swept at an earlier rate first, and then at that of the recipe.
        swept = {"resnet56": "resnet56-0.04"}.get(name, name)
        found = dict[str, dict[float, list[Cell]]]()
        for cell in read_results(RESULTS / "tuning" / swept).cells:
            if cell.task == name and cell.budget == 0.25:
                found.setdefault(cell.method.partition("@")[0], {}).setdefault(_rate(cell), []).append(cell)
        for method, by_rate in sorted(found.items()):
            means = {rate: statistics.fmean(cell.value for cell in runs) for rate, runs in by_rate.items()}
            rate = max(means, key=lambda each: means[each])
            if len(means) > 1:
                text = f"{rate:g} x ({percent(means[rate])})"
                lines.setdefault(method, {"method": f"`{method}`"})[words] = text
    return table(lines.values())


def _rate(cell: Cell) -> float:
    """The learning rate of a run of a sweep, relative to its recipe's."""
    found = re.search(r"@learning_rate=([\d.]+)", cell.method)
    return float(found[1]) if found else 1.0
