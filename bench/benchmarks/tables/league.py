"""Blocks of the league: Setpoint's default against the best rival of each cell, in a table, sentences and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy import stats

from setpoint.report.numbers import NOTHING, percent
from setpoint_bench.report.statistics import Difference, paired
from tables.renderer import RESULTS, Record, marked, record_block, rows_made_on, svg, table

DENSE, NEIGHBOUR, OURS = "dense", "neighbour", "setpoint-at-once"
MINE = ("setpoint", "fitted-first")
"""How names of Setpoint's own methods begin: `compress` is one, too."""
FILE = "league.json"
TASKS = {
    "clothing-mobilenet": "MobileNetV2, photographs of clothes",
    "clothing-lite0": "EfficientNet-Lite0, photographs of clothes",
    "banking77": "MiniLM-L6, BANKING77",
    "resnet56": "ResNet-56, CIFAR-10 as JPEG copies, 3 passes",
}
BUDGETS = {0.5: "half", 0.25: "a quarter"}
Row = Mapping[str, Any]


def plain(method: str) -> str:
    """A method's name without words.

    >>> plain("cubic+taught+trained")
    'cubic'
    """
    return method.partition("+")[0]


def comparable(rows: Sequence[Row], budget: float | None, words: str, length: int) -> dict[str, dict[int, Row]]:
    """Rows of one budget, one length and the same words, by method and seed."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        own = row["method"].removeprefix(plain(row["method"])).removeprefix("+")
        if (row["budget"], own, row["length"]) == (budget, words, length):
            found.setdefault(row["method"], {})[row["seed"]] = row
    return found


def best_rivals(rows: Sequence[Row], words: str = "taught", length: int = 1) -> dict[float, tuple[str, str]]:
    """By budget, Setpoint's default and the rival with the highest mean on the seeds that both have."""
    found = {}
    for budget in BUDGETS:
        here = comparable(rows, budget, words, length)
        ours = next((method for method in here if plain(method) == OURS), None)
        if ours is None:
            continue
        means = {
            method: statistics.fmean(by_seed[seed]["value"] for seed in by_seed.keys() & here[ours].keys())
            for method, by_seed in here.items()
            if not plain(method).startswith(MINE) and by_seed.keys() & here[ours].keys()
        }
        # A rival with fewer seeds is not compared with one that has them all.
        most = max((len(here[method]) for method in means), default=0)
        full = {method: mean for method, mean in means.items() if len(here[method]) == most}
        if full:
            found[budget] = ours, max(sorted(full), key=full.__getitem__)
    return found


def apart(one: Mapping[int, Row], other: Mapping[int, Row], key: str = "value") -> list[float]:
    """The differences of a number by seed."""
    return [one[seed][key] - other[seed][key] for seed in sorted(one.keys() & other.keys()) if key in one[seed]]


def cells(data: Record) -> Iterator[dict[str, Any]]:
    """What is known of each cell: the rows of Setpoint, of the best rival, of dense, and their differences."""
    for task in (name for name in TASKS if name in data["tasks"]):
        rows = data["tasks"][task]["runs"]
        unsized = comparable(rows, None, "taught", 1)
        plainly = comparable(rows, None, "", 1)
        for budget, (ours, rival) in best_rivals(rows).items():
            here = comparable(rows, budget, "taught", 1)
            pairs = apart(here[ours], here[rival])
            yield {
                "task": task,
                "budget": budget,
                "ours": here[ours],
                "rival": here[rival],
                "name": plain(rival),
                "dense": unsized.get(f"{DENSE}+taught") or plainly.get(DENSE, {}),
                "neighbour": unsized.get(f"{NEIGHBOUR}+taught", {}),
                "pairs": pairs,
                "p": float(stats.ttest_1samp(pairs, 0.0).pvalue) if len(set(pairs)) > 2 else None,
            }


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number (Holm, 1979); None stays.

    >>> holm([0.01, 0.04, None])
    [0.02, 0.04, None]
    """
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    found: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (value, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        found[place] = highest
    return found


def _mean(by_seed: Mapping[int, Row], key: str = "value") -> str:
    values = [100 * row[key] for row in by_seed.values() if row.get(key) is not None]
    if not values:
        return NOTHING
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _ms(by_seed: Mapping[int, Row], key: str = "ms") -> str:
    return next((f"{row[key]:.2f}" for row in by_seed.values() if key in row), NOTHING)


@record_block("league", FILE)
def league(data: Record) -> str:
    """The cells: accuracies, the paired difference with its interval, its corrected p, milliseconds and int8."""
    found = list(cells(data))
    rows = []
    for cell, p in zip(found, holm([cell["p"] for cell in found]), strict=True):
        about = data["tasks"][cell["task"]]
        before = f", {percent(about['before'])} before training" if cell["task"] == "resnet56" else ""
        rows.append(
            {
                "model, data": f"{TASKS[cell['task']]}{before}",
                "FLOPs / step": BUDGETS[cell["budget"]],
                "dense": _mean(cell["dense"]),
                "Setpoint": _mean(cell["ours"]),
                "best rival": f"{_mean(cell['rival'])}, `{cell['name']}`",
                "difference, points": marked(paired(cell["pairs"]), "accuracy"),
                "p, Holm": NOTHING if p is None else f"{p:.3f}",
                "ms: dense, Setpoint, rival": ", ".join(_ms(cell[each]) for each in ("dense", "ours", "rival")),
                "int8: dense, Setpoint, rival": ", ".join(
                    f"{_mean(cell[each], 'int8').partition(' ')[0]} ({_ms(cell[each], 'int8_ms')} ms)"
                    for each in ("dense", "ours", "rival")
                ),
                "other pretrained net": f"{_mean(cell['neighbour'])} ({_ms(cell['neighbour'])} ms)",
                "seeds": str(len(cell["pairs"])),
            }
        )
    made = [{**each["environment"], "date": each["date"]} for each in data["tasks"].values()]
    return table(rows, f"Accuracies in % on test data. {rows_made_on(made)}", left=2)


@record_block("league-sentences", FILE)
def sentences(data: Record) -> str:
    """Four sentences: rivals, dense, milliseconds and int8, and the other pretrained net."""
    found = list(cells(data))
    verdicts = [paired(cell["pairs"]) for cell in found]
    corrected = [p is not None and p < 0.05 for p in holm([cell["p"] for cell in found])]
    ahead = [each.clear and each.mean > 0 for each in verdicts]
    behind = sum(each.clear and each.mean < 0 for each in verdicts)
    sure = sum(a and b for a, b in zip(ahead, corrected, strict=True))
    told = [
        f"Setpoint is clearly ahead of the best rival in {sum(ahead)} of {len(found)} cells and clearly behind in "
        f"{behind}; corrected for the number of cells, ahead in {sure}."
    ]
    costs = []
    for budget, words in BUDGETS.items():
        lost = [
            100 * statistics.fmean(pairs)
            for cell in found
            if cell["budget"] == budget and (pairs := apart(cell["ours"], cell["dense"]))
        ]
        if lost:
            costs.append(f"at {words} of the FLOPs by {min(lost):+.1f} to {max(lost):+.1f} points")
    told.append(f"From dense, trained for as many steps, it differs {' and '.join(costs)}.".replace("-", "−"))
    shares = [_share(cell, "ms") for cell in found] + [_share(cell, "int8_ms") for cell in found]
    known = [share for share in shares if share is not None]
    lost = [statistics.fmean(row["int8"] - row["value"] for row in rows) for cell in found if (rows := _both(cell))]
    if known and lost:
        told.append(
            f"In ONNX Runtime it takes {min(known):.0%} to {max(known):.0%} of the dense milliseconds, and int8 "
            f"changes its accuracy by {100 * min(lost):+.1f} to {100 * max(lost):+.1f} points.".replace("-", "−")
        )
    against = [paired(pairs) for cell in found if (pairs := apart(cell["ours"], cell["neighbour"]))]
    if against:
        better = sum(each.clear and each.mean > 0 for each in against)
        worse = sum(each.clear and each.mean < 0 for each in against)
        told.append(
            f"Against the other pretrained net it is clearly ahead in {better} of {len(against)} cells, clearly behind "
            f"in {worse}."
        )
    return "\n".join(f"* {each}" for each in told)


def _share(cell: Mapping[str, Any], key: str) -> float | None:
    ours, dense = (next((row[key] for row in cell[each].values() if key in row), None) for each in ("ours", "dense"))
    return ours / dense if ours and dense else None


def _both(cell: Mapping[str, Any]) -> list[Row]:
    return [row for row in cell["ours"].values() if "int8" in row]


@record_block("league-failures", FILE)
def failures(data: Record) -> str:
    """Which methods did not run, with their error."""
    rows = [
        {"task": f"`{task}`", "method": f"`{name}`", "error": error.replace("|", "\\|")}
        for task, found in data["tasks"].items()
        for name, error in found["failures"].items()
    ]
    return table(rows, left=3) if rows else "All methods ran."


COLORS = {"Setpoint": "#3f7cac", "best rival": "#d1603d", "other pretrained net": "#6b8f47"}
LEFT, TOP, WIDE, HIGH = 70, 40, 700, 330
X_TITLE, Y_TITLE = "share of the dense milliseconds in ONNX Runtime", "accuracy − dense, points"


def chart() -> str | None:
    """The picture: points against dense with 95 % intervals, over the share of its milliseconds; None without data."""
    file = RESULTS / FILE
    dots = [] if not file.is_file() else list(_dots(json.loads(file.read_text(encoding="utf-8"))))
    if not dots:
        return None
    points = [100 * each for _, _, found, _ in dots for each in (found.low or found.mean, found.high or found.mean)]
    low, high = min(0.0, *points), max(0.0, *points)
    most = max(1.0, *(share for _, share, _, _ in dots))

    def at(share: float, points: float) -> tuple[float, float]:
        return LEFT + WIDE * share / most, TOP + HIGH * (high - points) / (high - low or 1)

    zero = at(0, 0)[1]
    parts = [
        f'<path class="axis" d="M{LEFT} {zero:.1f}H{LEFT + WIDE}"/>',
        f'<text x="{LEFT}" y="{zero - 5:.1f}">dense</text>',
    ]
    parts += [
        f'<text x="{LEFT - 8}" y="{at(0, points)[1] + 4:.1f}" text-anchor="end">{points:+.1f}</text>'
        for points in (low, high)
    ]
    for tenth in range(0, round(10 * most) + 1, 2):
        parts.append(
            f'<text x="{at(tenth / 10, 0)[0]:.1f}" y="{TOP + HIGH + 20}" text-anchor="middle">{10 * tenth} %</text>'
        )
    for kind, share, found, title in dots:
        x, y = at(share, 100 * found.mean)
        ends = [at(share, 100 * end)[1] for end in (found.low, found.high) if end is not None] or [y, y]
        parts.append(f'<g stroke="{COLORS[kind]}" fill="{COLORS[kind]}"><title>{title}</title>')
        parts.append(f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="5"/></g>')
    for place, (kind, color) in enumerate(COLORS.items()):
        parts.append(f'<circle cx="{LEFT + 160 * place + 6}" cy="14" r="5" fill="{color}"/>')
        parts.append(f'<text x="{LEFT + 160 * place + 16}" y="18">{kind}</text>')
    parts.append(f'<text x="{LEFT + WIDE / 2}" y="{TOP + HIGH + 42}" text-anchor="middle">{X_TITLE}</text>')
    parts.append(f'<text transform="translate(16 {TOP + HIGH / 2}) rotate(-90)" text-anchor="middle">{Y_TITLE}</text>')
    return svg(parts, LEFT + WIDE + 30, TOP + HIGH + 54, "accuracy over milliseconds")


def _dots(data: Record) -> Iterator[tuple[str, float, Difference, str]]:
    """Kind, share of the dense milliseconds, difference to dense, and what the pointer reads."""
    seen = set[tuple[str, str]]()
    for cell in cells(data):
        dense_ms = next((row["ms"] for row in cell["dense"].values() if "ms" in row), None)
        for kind, key in (("Setpoint", "ours"), ("best rival", "rival"), ("other pretrained net", "neighbour")):
            ms = next((row["ms"] for row in cell[key].values() if "ms" in row), None)
            pairs = apart(cell[key], cell["dense"])
            if dense_ms is None or ms is None or not pairs or (key == "neighbour" and (cell["task"], key) in seen):
                continue
            seen.add((cell["task"], key))
            share = BUDGETS[cell["budget"]] if key != "neighbour" else ""
            yield kind, ms / dense_ms, paired(pairs), f"{TASKS[cell['task']]}, {kind} {share}".strip()
