"""The page of an inspection: a map of the model's parameters, its groups, and what is frozen and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from setpoint.report import figures
from setpoint.report.draft import Draft, document, html_table, pair, place_of, save
from setpoint.report.figures import BLUE, FAINT, ORANGE, Figure, plotly_script
from setpoint.report.names import along, fold, some
from setpoint.report.numbers import NOTHING, human, percent, share

MODULES = "#e6edf5"
"""Colour of the frames that modules draw around their parts."""
_HEIGHT = 620
_LONG = 110
"""Number of letters of a reason that are shown unfolded."""
LEGEND = (
    (BLUE, "along units that may be pruned"),
    (ORANGE, "along units of a group that is left whole"),
    (FAINT, "along no unit: always stays"),
)


def write_inspection(found: Mapping[str, Any], out: Path) -> Path:
    """Write the page of an inspection, given as `inspect.json` holds it. The file needs no network and no other file.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    return save(render_inspection(found, plotly_script()), out)


def render_inspection(found: Mapping[str, Any], script: str) -> str:
    """The HTML of an inspection; `script` is JavaScript that defines `Plotly`."""
    model = str(found["model"])
    shapes = ", ".join("×".join(map(str, shape)) for shape in found["inputs"])
    body = Draft(
        f"<header><h1>Setpoint <span>inspection</span></h1><p>{escape(model)} on {escape(shapes)}</p></header>\n"
        f"<section>\n<h2>{escape(model)}</h2>\n{_cards(found)}"
    )
    if not found["verified"]:
        body += Draft('<p class="caption">Not verified: the cuts were not tried on a copy of the model.</p>\n')
    keys = "".join(f'<li><i data-color="{color}"></i>{escape(text)}</li>' for color, text in LEGEND)
    body += place_of(
        "map",
        parameter_map(found),
        "Where the parameters are",
        f'<ul class="legend">{keys}</ul>Areas are numbers of parameters. Click a module to go into it, '
        "and the bar above to come back.",
    )
    return document(model, body + Draft(_groups(found["groups"]) + _frozen(found["frozen"]) + "</section>\n"), script)


def parameter_map(found: Mapping[str, Any]) -> Figure | None:
    """A treemap of modules, and in each the groups along whose units its parameters lie; None without parameters."""
    groups = {group["name"]: group for group in found["groups"]}
    boxes: dict[tuple[str, str], int] = {}
    for part in found["parts"]:
        key = (part["tensor"].rpartition(".")[0], part["group"])
        boxes[key] = boxes.get(key, 0) + part["params"]
    if not boxes:
        return None
    total = sum(boxes.values())
    modules = {"": 0}  # those on the way to a box, from the root down, with their parameters
    for (module, _), params in boxes.items():
        names = module.split(".") if module else []
        for path in (".".join(names[:depth]) for depth in range(len(names) + 1)):
            modules[path] = modules.get(path, 0) + params
    alone = {module for module, _ in boxes if sum(other == module for other, _ in boxes) == 1}
    alone -= {_parent(module) for module in modules if module}
    nodes = []
    for module, params in modules.items():
        if module not in alone:
            name = module.removeprefix(_parent(module)).lstrip(".") if module else str(found["model"])
            nodes.append((module or "/", name, "" if not module else _parent(module) or "/", params, MODULES, module))
    for (module, name), params in boxes.items():
        if module in alone:
            node = (module, module.removeprefix(_parent(module)).lstrip("."), _parent(module) or "/")
        else:
            node = (f"{module}\n{name}", name or "stays whole", module or "/")
        color, about = _kind(name, groups)
        nodes.append((*node, params, color, f"{module}<br>{about}" if module else about))
    ids, labels, parents, values, colors, texts = zip(*nodes, strict=True)
    pairs = zip(values, texts, strict=True)
    trace = {
        "type": "treemap",
        "ids": list(ids),
        "labels": [figures.escape(label) for label in labels],
        "parents": list(parents),
        "values": list(values),
        "branchvalues": "total",
        "marker": {"colors": list(colors), "line": {"width": 1}, "pad": {"t": 20, "l": 3, "r": 3, "b": 3}},
        "tiling": {"packing": "squarify", "pad": 1},
        "textinfo": "label+text",
        "text": [human(value) for value in values],
        "hovertext": [f"<b>{human(n)}</b> parameters, {percent(n / total)}<br>{text}" for n, text in pairs],
        "hovertemplate": "<b>%{label}</b><br>%{hovertext}<extra></extra>",
        "pathbar": {"visible": True, "thickness": 24},
    }
    return Figure([trace], {"height": _HEIGHT, "margin": {"l": 0, "r": 0, "t": 28, "b": 4}})


def _parent(module: str) -> str:
    return module.rpartition(".")[0]


def _kind(name: str, groups: Mapping[str, Any]) -> tuple[str, str]:
    if not name:
        return FAINT, "along no unit of any group"
    group = groups[name]
    units = f"group {figures.escape(name)}: {group['num_units']} {group['what']}s"
    if group["kept_whole"]:
        return ORANGE, f"{units}, left whole"
    return BLUE, f"{units}, at least {group['min_units']}"


def _cards(found: Mapping[str, Any]) -> str:
    pruned = [group for group in found["groups"] if not group["kept_whole"]]
    units, whole = sum(group["num_units"] for group in pruned), len(found["groups"]) - len(pruned)
    fewest = {name: found[f"cheapest_{name}"] for name in ("params", "flops")}
    shown = (
        ("groups that may be pruned", f"{len(pruned)}", f"{units:,} units; {whole} left whole"),
        ("parameters", human(found["params"]), f"{percent(found['prunable_params_share'])} along units that may go"),
        ("fewest parameters", human(fewest["params"]), f"{share(fewest['params'], found['params'])} of dense"),
        ("FLOPs per training step", human(found["flops"], "FLOP"), "forward and backward"),
        ("fewest FLOPs", human(fewest["flops"], "FLOP"), f"{share(fewest['flops'], found['flops'])} of dense"),
    )
    items = "".join(
        f"<li><span>{escape(title)}</span><strong>{escape(value)}</strong><small>{escape(note)}</small></li>"
        for title, value, note in shown
    )
    return f'<ul class="cards">{items}</ul>\n'


def _groups(groups: Sequence[Mapping[str, Any]]) -> str:
    if not groups:
        return "<h3>Groups</h3>\n<p>No units were found that could be dropped.</p>\n"
    places = {g["name"]: "".join(f"<li>{escape(along(*each))}</li>" for each in g["places"]) for g in groups}
    lines = [
        [
            escape(group["name"]),
            pair(f"{group['num_units']:,}", f"{group['what']}s"),
            f"{group['min_units']:,}",
            f"{group['multiple_of']}",
            pair(human(group["params"]), percent(group["params_share"])),
            percent(group["flops_share"]),
            escape(some(group["kept_whole"].split("; "))) or NOTHING,
            f"<details><summary>{len(group['places'])}</summary><ul>{places[group['name']]}</ul></details>",
        ]
        for group in groups
    ]
    titles = ("group", "units", "fewest", "in steps of", "parameters", "FLOPs", "left whole because", "places")
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
    listing = html_table(("stays whole because", "places", "where"), lines, classes="inspected frozen")
    return f'<h3>Frozen</h3>\n<div class="scroll">{listing}</div>\n'


def _folded(reason: str) -> str:
    if len(reason) <= _LONG:
        return escape(reason)
    first = reason[:_LONG].rpartition(" ")[0] or reason[:_LONG]
    return f"<details><summary>{escape(first)} …</summary>{escape(reason)}</details>"
