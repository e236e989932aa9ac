"""The page of an inspection: budgets within reach, where the parameters are, groups, and what is frozen and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from setpoint.messages import counted
from setpoint.report.drawing import ink
from setpoint.report.figures import BLUE, FAINT, ORANGE
from setpoint.report.names import along, fold, some
from setpoint.report.numbers import NOTHING, human, percent, share
from setpoint.report.page import document, html_table, pair, save, width

MOST_ROWS = 24
"""How many modules have a row each; of more, those that hold them have."""
_LONG = 110
"""Number of letters of a reason that are shown unfolded."""
KINDS = {
    BLUE: "of units that may be pruned",
    ORANGE: "of units that are not pruned",
    FAINT: "of no unit: always stays",
}


def write_inspection(found: Mapping[str, Any], out: Path) -> Path:
    """Write the page of an inspection, given as `inspect.json` holds it; it needs no network and no other file."""
    return save(render_inspection(found), out)


def render_inspection(found: Mapping[str, Any]) -> str:
    """The HTML of an inspection."""
    model = str(found["model"])
    shapes = ", ".join("×".join(map(str, shape)) for shape in found["inputs"])
    return document(
        model,
        f"<header><h1>Setpoint <span>inspection</span></h1><p>{escape(model)} on {escape(shapes)}</p></header>\n"
        f"<section>\n<h2>{escape(model)}</h2>\n{_reach(found)}{_parameters(found)}"
        f"{_groups(found['groups'])}{_frozen(found['frozen'])}</section>\n",
    )


def _reach(found: Mapping[str, Any]) -> str:
    """Dense and cheapest costs, as a table with bars."""
    pruned = [group for group in found["groups"] if not group["kept_whole"]]
    units, whole = sum(group["num_units"] for group in pruned), len(found["groups"]) - len(pruned)
    lines = []
    for title, name, unit in (("FLOPs per training step", "flops", "FLOPs"), ("parameters", "params", "")):
        dense, fewest = found[name], found[f"cheapest_{name}"]
        bar = width(1.0, fewest / dense if dense else 1.0)
        lines.append([title, bar, human(dense, unit), human(fewest, unit), share(fewest, dense)])
    about = (
        f"{counted(len(pruned), 'group')} with {counted(units, 'unit')} may be pruned, with "
        f"{percent(found['prunable_params_share'])} of the parameters; {counted(whole, 'group')} "
        f"{'is' if whole == 1 else 'are'} not pruned. The outline is the dense model; the filled part is what "
        "remains with every group that may be pruned at its fewest units, and no budget below it can be met."
    )
    about += "" if found["verified"] else " <b>Not verified</b>: the cuts were not tried on a copy of the model."
    listing = html_table(("", "", "dense", "fewest", "of dense"), lines, classes="architecture")
    return (
        f'<figure><h4>Budgets within reach</h4><div class="bare">{listing}</div>'
        f"<figcaption>{about}</figcaption></figure>\n"
    )


def parameters_by_kind(found: Mapping[str, Any]) -> dict[str, Counter[str]]:
    """By module, the numbers of its parameters by colour of `KINDS`; as deep as there is room for."""
    whole = {group["name"] for group in found["groups"] if group["kept_whole"]}
    paths = [part["tensor"].rpartition(".")[0].split(".") for part in found["parts"]]
    rows: dict[str, Counter[str]] = {}
    for depth in range(max(map(len, paths), default=0), 0, -1):
        rows = {}
        for path, part in zip(paths, found["parts"], strict=True):
            kind = FAINT if not part["group"] else ORANGE if part["group"] in whole else BLUE
            rows.setdefault(".".join(path[:depth]), Counter())[kind] += part["params"]
        if len(rows) <= MOST_ROWS:
            break
    return rows


def _parameters(found: Mapping[str, Any]) -> str:
    """Parameters by module, as a table with bars."""
    rows = parameters_by_kind(found)
    if not rows:
        return ""
    largest = max(kinds.total() for kinds in rows.values())
    lines = []
    for module, kinds in rows.items():
        parts = "".join(
            f'<b style="width:{100 * kinds[kind] / largest:.2f}%;background:{ink(kind)}"></b>'
            for kind in KINDS
            if kinds[kind]
        )
        num = kinds.total()
        shown = [human(num), share(num, found["params"]), share(kinds[BLUE], num)]
        lines.append([escape(module) or "itself", f'<i class="share">{parts}</i>', *shown])
    keys = "".join(f'<li><i class="dot" style="color:{ink(color)}"></i>{text}</li>' for color, text in KINDS.items())
    listing = html_table(("module", "", "parameters", "of all", "may go"), lines, classes="architecture")
    return (
        f'<figure><h4>Where the parameters are</h4><ul class="legend">{keys}</ul><div class="bare">{listing}</div>'
        "<figcaption>A parameter along units of two groups counts once: for the one that may be pruned, and of two of "
        "those for the one that writes it.</figcaption></figure>\n"
    )


def _units(group: Mapping[str, Any]) -> str:
    several = group.get("each", 1) > 1 and group["what"] == "channel"  # older files lack it
    return f"units of {group['each']} channels" if several else f"{group['what']}s"


def _groups(groups: Sequence[Mapping[str, Any]]) -> str:
    if not groups:
        return "<h3>Groups</h3>\n<p>No units were found that could be dropped.</p>\n"
    places = {
        group["name"]: "".join(f"<li>{escape(place)}</li>" for place in fold(along(*each) for each in group["places"]))
        for group in groups
    }
    lines = [
        [
            escape(group["name"]),
            pair(f"{group['num_units']:,}", _units(group)),
            f"{group['min_units']:,}",
            f"{group['multiple_of']}",
            pair(human(group["params"]), percent(group["params_share"])),
            percent(group["flops_share"]),
            escape(some(group["kept_whole"].split("; "))) or NOTHING,
            f"<details><summary>{len(group['places'])}</summary><ul>{places[group['name']]}</ul></details>",
        ]
        for group in groups
    ]
    titles = ("group", "units", "fewest", "in steps of", "parameters", "FLOPs", "not pruned because", "places")
    return (
        f'<h3>Groups</h3>\n<div class="scroll">{html_table(titles, lines, classes="inspected")}</div>\n'
        '<p class="caption">Parameters lie along a unit of the group; one may lie along units of two groups. FLOPs: '
        "the share that is gone when this group alone is cut to its fewest units.</p>\n"
    )


def _frozen(frozen: Sequence[Mapping[str, str]]) -> str:
    if not frozen:
        return ""
    reasons: dict[str, list[str]] = {}
    for each in frozen:
        reasons.setdefault(each["reason"], []).append(each["place"])
    lines = [[_folded(why), f"{len(at)}", "<br>".join(map(escape, fold(at)))] for why, at in reasons.items()]
    listing = html_table(("not pruned because", "places", "where"), lines, classes="inspected frozen")
    return f'<h3>Frozen</h3>\n<div class="scroll">{listing}</div>\n'


def _folded(reason: str) -> str:
    if len(reason) <= _LONG:
        return escape(reason)
    first = reason[:_LONG].rpartition(" ")[0] or reason[:_LONG]
    return f"<details><summary>{escape(first)} …</summary>{escape(reason)}</details>"
