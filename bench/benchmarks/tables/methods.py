"""Tables of `setpoint bench` runs: methods beside each other, task by task."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from setpoint.report.numbers import NOTHING, percent, signed
from setpoint_bench.report.columns import metric_text, share_text
from setpoint_bench.report.folder import RESULTS
from setpoint_bench.report.markdown import task_text
from setpoint_bench.report.packed import file_of
from setpoint_bench.report.results import Cell, Results
from setpoint_bench.report.statistics import Difference, difference, mean, share_of
from setpoint_bench.report.summary import FAMILIES, SETPOINT, Row, clock_of, rounds_of, series, summary_rows
from tables.discovery import models_cut_line
from tables.read import read_results
from tables.words import marked, rows_made_on


def methods_table(folder: Path) -> str:
    """Tables of a results folder with what they were measured on."""
    results = read_results(folder)
    rows = summary_rows(results)
    for (
        task
    ) in results.tasks():  # seconds compare on one machine only; what was learned, with one version and precision
        timed = {json.dumps(cell.timing.environment) for cell in results.of(task) if cell.timing}
        assert len(timed) <= 1, f"{folder}: timed on several machines"
        ran = {tuple(cell.environment.get(key) for key in ("torch", "dtype")) for cell in results.of(task)}
        assert len(ran) == 1, f"{folder}: runs of several versions: {ran}"
    return "\n\n".join(
        task_text(results.of(task), [row for row in rows if row.task == task]) for task in results.tasks()
    )


TASK_PAGE = """# `{name}`

`python bench/benchmarks/readme.py` generates this page from `results/{name}`. [Tasks](../tasks.md) describes the task.
[Results](../results.md#how-to-read-the-tables) says how to read the tables.

{tables}
"""


def task_pages(root: Path) -> dict[str, str]:
    """By name, the page of every results folder, with its tables."""
    return {folder.name: TASK_PAGE.format(name=folder.name, tables=methods_table(folder)) for folder in _folders(root)}


def task_links(root: Path) -> str:
    """A link to the page of every results folder."""
    return "\n".join(f"* [`{folder.name}`](tasks/{folder.name}.md)" for folder in _folders(root))


MOST_APART = 0.02
"""Of two costs, by how much they may differ and still count as equal."""
HEADLINES = ("small", "small-long")


def headline_table(root: Path) -> str:
    """Setpoint on every task at every budget, beside dense, small, and the best that is pruned after training."""
    lines = [f"| task | FLOPs | dense | {' | '.join(f'`{name}`' for name in HEADLINES)} | cut after | Setpoint |"]
    lines.append(f"|---|{'---:|' * 6}")
    for ours, beside in _setpoint_rows(root):
        rivals = [beside.get(name) for name in ("dense", *HEADLINES)]
        texts = [NOTHING if row is None else _mean_text(row) for row in (*rivals, _best_cut_after(ours, beside))]
        lines.append(f"| {ours.task} | {percent(ours.budget)} | {' | '.join(texts)} | {_mean_text(ours)} |")
    return "\n".join(lines)


def apart_table(root: Path) -> str:
    """How far Setpoint is from the small models on every task at every budget, by seed."""
    lines = [f"| task | FLOPs | {' | '.join(f'to `{name}`' for name in HEADLINES)} |", "|---|---:|---:|---:|"]
    for ours, _ in _setpoint_rows(root):
        texts = [marked(ours.differences.get(name), ours.metric) for name in HEADLINES]
        lines.append(f"| {ours.task} | {percent(ours.budget)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def spent_table(root: Path) -> str:
    """What Setpoint's runs cost, as shares of dense, beside the best method that cuts after training."""
    lines = ["| task | FLOPs | training FLOPs | training time | cut after | its training FLOPs |"]
    lines.append("|---|---:|---:|---:|---|---:|")
    for ours, beside in _setpoint_rows(root):
        best = _best_cut_after(ours, beside)
        rival = (NOTHING, NOTHING) if best is None else (f"`{best.method}`", percent(best.train_flops_ratio))
        texts = (percent(ours.train_flops_ratio), share_text(ours.seconds_share), *rival)
        lines.append(f"| {ours.task} | {percent(ours.budget)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _setpoint_rows(root: Path) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Setpoint's rows, and beside each the other methods of its task at its budget, and dense."""
    for folder in _folders(root):
        rows = summary_rows(read_results(folder))
        for ours in (row for row in rows if row.method == "setpoint"):
            mine = [row for row in rows if row.task == ours.task and row.budget in (ours.budget, None)]
            yield ours, {row.method: row for row in mine}


def _best_cut_after(ours: Row, beside: Mapping[str, Row]) -> Row | None:
    """The best method that cuts units after training."""
    after = [row for row in beside.values() if row.family == "post-training" and row.density is None]
    best = sorted(after, key=lambda row: row.value.mean, reverse=ours.metric == "accuracy")
    return best[0] if best else None


def _mean_text(row: Row) -> str:
    """The metric without its standard deviation."""
    return re.sub(r" ± [\d.]+", "", metric_text(row)) + " (one seed)" * (row.num_seeds == 1)


PRETRAINED = {
    "resnet56": ("ResNet-56, CIFAR-10", "resnet20"),
    "banking77": ("MiniLM-L6, BANKING77", "banking77-three-layers"),
    "clothing": ("EfficientNet-Lite0, photographs of clothes", ""),
}
"""By results folder what a table calls the model, and the folder of the small pretrained model where there is one."""


SMALL = {small for _, small in PRETRAINED.values() if small}
"""Tasks of the small pretrained models."""


def readme_table(root: Path) -> str:
    """Fine-tuned pretrained models at two budgets; below, an over-trained small model, and models that are cut."""
    heads = ("FLOPs / step", "Setpoint", "best open loop", "dense", "seeds", "more steps")
    lines = [f"| fine-tuned model | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for folder, (model, _) in PRETRAINED.items():
        rows = _of_equal_steps(root / folder)
        cells_of = _cells_by_method(root / folder)
        full_bill = cells_of("dense", None)
        dense = next(row for row in rows if row.method == "dense")
        for budget in (0.5, 0.25):
            best = _best_of_families([row for row in rows if row.budget == budget])
            mine, *rivals = [row for row in best.values() if row is not None]
            rival = max(rivals, key=lambda row: row.value.mean)
            ours = f"{_accuracy(mine)} %"
            seeds = [str(row.num_seeds) for row in (mine, rival, dense)]
            cells = (
                model,
                percent(budget),
                f"**{ours}**" if _clearly_ahead(mine, [rival]) else ours,
                f"{_accuracy(rival)} %",
                f"{_accuracy(dense)} %",
                seeds[0] if len(set(seeds)) == 1 else " / ".join(seeds),
                _beside_dense(cells_of(f"{SETPOINT}-long", budget), full_bill),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"* {models_cut_line(root / 'coverage' / 'torch_pruning.json')}"])


LONGER = ("-long", "-taught")
"""How names of methods end that train for longer, or are taught by a dense run."""


def _of_equal_steps(folder: Path) -> list[Row]:
    """Rows of a results folder, but for masks, and for methods that train longer or are taught."""
    rows = summary_rows(read_results(folder))
    return [row for row in rows if row.density is None and not row.method.partition("@")[0].endswith(LONGER)]


def _cells_by_method(folder: Path) -> Callable[[str, float | None], list[Cell]]:
    """The runs of a method at a budget."""
    cells = read_results(folder).cells
    return lambda method, budget: [cell for cell in cells if (cell.method, cell.budget) == (method, budget)]


def _beside_dense(ours: Sequence[Cell], dense: Sequence[Cell]) -> str:
    """The mean in per cent, and in brackets that of the dense runs with the same seeds."""
    seeds = {cell.seed for cell in ours}
    means = [
        f"{100 * statistics.fmean(cell.value for cell in cells):.1f} %"
        for cells in (ours, [cell for cell in dense if cell.seed in seeds])
        if cells
    ]
    return f"{means[0]} (dense {means[1]})" if len(means) == 2 else NOTHING


def bill_table(root: Path) -> str:
    """Fine-tuning for as many steps as the dense run's training FLOPs pay for, beside equal steps and the dense run."""
    methods = ("setpoint", "setpoint-long", "cubic-long")
    others = ("setpoint", "dense", "cubic-long")
    heads = [
        *(f"`{each}`" for each in methods),
        "training FLOPs, of dense",
        *(f"`setpoint-long` − `{each}`" for each in others),
    ]
    lines = [
        f"| model | FLOPs / step | dense | {' | '.join(heads)} |",
        f"|---|{'---:|' * (2 + len(heads))}",
    ]
    for folder, (model, _) in PRETRAINED.items():
        rows, cells_of = summary_rows(read_results(root / folder)), _cells_by_method(root / folder)
        dense = next(row for row in rows if row.method == "dense")
        for budget in (0.5, 0.25):
            here: dict[str, Row] = {"dense": dense}
            for row in sorted((row for row in rows if row.budget == budget), key=lambda row: row.value.mean):
                here[row.method.partition("@")[0]] = row  # of several learning rates the best
            if "setpoint-long" not in here:
                continue
            long = here["setpoint-long"]
            cells = {each: cells_of(row.method, row.budget) for each, row in here.items()}
            found = (_with_seeds(here[each]) if each in here else NOTHING for each in methods)
            apart = (
                marked(difference(cells["setpoint-long"], cells[each]), long.metric) if each in here else NOTHING
                for each in others
            )
            start = (model.partition(",")[0], percent(budget), _with_seeds(dense))
            lines.append(f"| {' | '.join((*start, *found, percent(long.train_flops_ratio), *apart))} |")
    return "\n".join(lines)


def _accuracy(row: Row) -> str:
    return f"{100 * row.value.mean:.1f}"


def _best_of_families(rows: Sequence[Row]) -> dict[str, Row | None]:
    """The best row of Setpoint, of the open loops and of the cuts after training, in this order."""
    kinds = {"Setpoint": SETPOINT, "open loop": "open-loop", "cut after training": "post-training"}
    by_name = sorted(rows, key=lambda row: row.method)  # of equal means always the same
    return {
        kind: max(
            (row for row in by_name if row.family == family), key=lambda row: round(row.value.mean, 9), default=None
        )
        for kind, family in kinds.items()
    }


def pretrained_table(root: Path) -> str:
    """The same with all that was measured: one column a model, the best of a budget in bold."""
    columns = []
    for folder, (_, small) in PRETRAINED.items():
        rows = _of_equal_steps(root / folder)
        columns.append(_pretrained_column(rows, root / small if small else None))
    lines = [
        f"| accuracy on test data | {' | '.join(words for words, _ in PRETRAINED.values())} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    return "\n".join(lines + [f"| {name} | {' | '.join(each[name] for each in columns)} |" for name in columns[0]])


def _pretrained_column(rows: Sequence[Row], small: Path | None) -> dict[str, str]:
    """The accuracies of one model, by what they are of."""
    dense = next(row for row in rows if row.method == "dense")
    found = {"dense, fine-tuned": _with_seeds(dense)}
    for budget, words in ((0.5, "half of the FLOPs"), (0.25, "a quarter")):
        best = _best_of_families([row for row in rows if row.budget == budget])
        for kind, row in best.items():
            text = NOTHING if row is None else _with_seeds(row) + (f", `{row.method}`" if kind != "Setpoint" else "")
            rivals = [each for each in best.values() if each is not None and each is not row]
            found[f"{words}: {kind}"] = f"**{text}**" if row is not None and _clearly_ahead(row, rivals) else text
    found["small pretrained model"] = NOTHING
    if small is not None:
        row = summary_rows(read_results(small))[0]
        share = (row.final_flops or math.nan) / (dense.final_flops or math.nan)
        found["small pretrained model"] = f"{_with_seeds(row)}, {percent(share)} of the FLOPs"
    spent = [percent(row.train_flops_ratio) for row in rows if row.method == SETPOINT]
    found["training FLOPs of Setpoint"] = " and ".join(sorted(spent, reverse=True))
    return found


def _clearly_ahead(row: Row, rivals: Sequence[Row]) -> bool:
    """Whether each of them is behind the row by an interval that excludes 0; known of Setpoint's rows."""
    behind = [each.differences.get(row.method) for each in rivals]
    return bool(behind) and all(each is not None and each.high is not None and each.high < 0 for each in behind)


def _with_seeds(row: Row) -> str:
    return f"{percent(row.value.mean)} ({row.num_seeds})"


def ahead_table(root: Path, *, split: str = "test") -> str:
    """How far Setpoint is ahead of every method at the same budget, by seed: one row a method, one column a task."""
    of = (lambda cell: cell.value) if split == "test" else _last_validation

    def entry(ours: Sequence[Cell], theirs: Sequence[Cell]) -> str:
        return _ahead(difference(ours, theirs, of), ours[0].metric) + _cost_mark(ours, theirs)

    return _matrix(root, "`setpoint` ahead of", entry)


def seconds_table(root: Path) -> str:
    """Setpoint's training seconds / those of every method at the same budget, in the same form."""

    def entry(ours: Sequence[Cell], theirs: Sequence[Cell]) -> str:
        if clock_of([*ours, *theirs]) != "timed":
            return NOTHING
        found = share_of(rounds_of(ours, "timed"), rounds_of(theirs, "timed"))
        if found is None:
            return NOTHING
        text = f"{found.value:.2f}"
        return f"**{text}**" if found.low > 1 or found.high < 1 else text

    return _matrix(root, "seconds of `setpoint` / of", entry)


def _of_a_rate(method: str) -> bool:
    """Whether nothing but the learning rate is set in a method's name."""
    return all(each.startswith("learning_rate=") for each in method.split("@")[1:])


def _matrix(root: Path, heading: str, entry: Callable[[Sequence[Cell], Sequence[Cell]], str]) -> str:
    """Setpoint beside every method at the same budget: one row a method, one column a task and budget."""
    columns: list[str] = []
    rows: dict[tuple[int, str], dict[str, str]] = {}
    for folder in _folders(root):
        groups = series(read_results(folder).cells)
        for ours in (cells for cells in groups.values() if cells[0].method == "setpoint"):
            budget = ours[0].budget
            columns.append(f"{ours[0].task} {round(100 * (budget or 1.0))} %")
            for cells in groups.values():
                first = cells[0]
                if first.budget in (None, budget) and _of_a_rate(first.method) and cells is not ours:
                    key = (FAMILIES.index(first.family), first.method)
                    rows.setdefault(key, {})[columns[-1]] = entry(ours, cells)
    used = [column for column in columns if any(each.get(column, NOTHING) != NOTHING for each in rows.values())]
    lines = [f"| {heading} | {' | '.join(used)} |", f"|---|{'---:|' * len(used)}"]
    for _, method in sorted(rows, key=lambda key: key[0]):
        texts = next(found for (_, name), found in rows.items() if name == method)
        if all(texts.get(column, NOTHING) == NOTHING for column in used):
            continue
        lines.append(f"| `{method}` | {' | '.join(texts.get(column, NOTHING) for column in used)} |")
    return "\n".join(lines)


def _cost_mark(ours: Sequence[Cell], theirs: Sequence[Cell]) -> str:
    """Where a rival at the same budget ends more than 2 % cheaper, or dearer: by the FLOPs that its budget is of."""
    if theirs[0].budget is None:
        return ""
    mine, other = (mean(cell.theoretical_flops or cell.final_flops for cell in cells) for cells in (ours, theirs))
    apart = (other or 0.0) / (mine or 1.0) - 1
    return "" if abs(apart) <= MOST_APART else " ↓" if apart < 0 else " ↑"


def _ahead(found: Difference | None, metric: str) -> str:
    """By how much, better is positive: bold where the 95 % interval excludes 0, in parentheses where there is none."""
    if found is None:
        return NOTHING
    text = signed(100 * found.mean, 2) if metric == "accuracy" else signed(-found.mean, 3)
    return f"**{text}**" if found.clear else text if found.low is not None else f"({text})"


def validation_table(root: Path) -> str:
    """How far Setpoint lies from its rivals on the validation data at the end of each run, by seed, beside the test."""
    names = ("dense", *HEADLINES)
    lines = [
        f"| task | FLOPs | data | {' | '.join(f'to `{name}`' for name in names)} |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for folder in _folders(root):
        groups = series(read_results(folder).cells)
        for ours in (cells for cells in groups.values() if cells[0].method == "setpoint"):
            task, budget, metric = ours[0].task, ours[0].budget, ours[0].metric
            rivals = {cells[0].method: cells for cells in groups.values() if cells[0].budget in (None, budget)}
            for split, of in (("validation", _last_validation), ("test", lambda cell: cell.value)):
                texts = [marked(difference(ours, rivals.get(name, ()), of), metric) for name in names]
                lines.append(f"| {task} | {percent(budget)} | {split} | {' | '.join(texts)} |")
    return "\n".join([*lines, "", "Seeds and machines are those of the tables of each task."])


def _last_validation(cell: Cell) -> float | None:
    """The metric on the validation data at the end of a run."""
    points = [point for point in cell.history if point.split == "validation"]
    return None if not points else points[-1].accuracy if cell.metric == "accuracy" else points[-1].loss


def tuning_table(root: Path) -> str:
    """The metric on validation data by learning rate, from the sweeps in results/tuning."""
    folders = _folders(root / "tuning")
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
            # A folder is named for its task or a variant of it, and may hold the small rival, too.
            key = (cell.task if cell.task in SMALL else name, cell.method.partition("@")[0], cell.budget)
            found.setdefault(key, {}).setdefault(_rate(cell), []).append(cell)
    for (task, method, budget), by_rate in sorted(found.items(), key=lambda each: (*each[0][:2], -(each[0][2] or 1))):
        row = {rate: next(iter(summary_rows(Results(tuple(runs))))) for rate, runs in by_rate.items()}
        texts = [metric_text(row[rate]) if rate in row else NOTHING for rate in rates]
        lines.append(f"| {task} | `{method}` | {percent(budget or 1.0)} | {' | '.join(texts)} |")
    seeds = ", ".join(map(str, sorted({cell.seed for cell in cells if cell.seed is not None})))
    machine = rows_made_on([{**cell.environment, "date": cell.date} for cell in cells])
    return "\n".join([*lines, "", f"Seed{'s' * (',' in seeds)} {seeds}; {machine}"])


def _rate(cell: Cell) -> float:
    """The learning rate of a run of a sweep, relative to its method's."""
    found = re.search(r"@learning_rate=([\d.]+)", cell.method)
    return float(found[1]) if found else 1.0


def _folders(root: Path) -> list[Path]:
    """The folders with results, by name."""
    return sorted(path for path in root.iterdir() if file_of(path, RESULTS).is_file())
