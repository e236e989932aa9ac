"""Figures as data: traces and a layout, which `drawing` makes SVG of."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Trace = dict[str, Any]

GREY, BLUE, ORANGE = "#667085", "#0b62a8", "#c2570c"
OTHERS = ("#00795c", "#7b3fb5", "#8a6d00", "#b3306f", "#6b4c35", "#b3261e")
FAINT, INK = "#c9d1dc", "#1c2430"
DARK = {
    GREY: "#a3acb9",
    BLUE: "#5eb1f5",
    ORANGE: "#f0944d",
    OTHERS[0]: "#3fc9a0",
    OTHERS[1]: "#bd93f9",
    OTHERS[2]: "#d9b93a",
    OTHERS[3]: "#f08cb8",
    OTHERS[4]: "#c9a284",
    OTHERS[5]: "#ff8a80",
    FAINT: "#3a4554",
    INK: "#e6eaf0",
}
"""The same colours on a dark page."""

AXES = {"step": "optimizer step", "seconds": "training time (s)", "flops": "training FLOPs"}


@dataclass(frozen=True)
class Figure:
    """Traces, and the layout they share; both have the keys that Plotly gives them."""

    data: Sequence[Trace]
    layout: Mapping[str, Any]


def scatter(mode: str, name: str, points: Iterable[tuple[Any, Any]], hover: str, **more: Any) -> Trace:
    """Lines or markers at (x, y) points, with the text that shows under the pointer."""
    x, y = zip(*points, strict=True) if (points := list(points)) else ((), ())
    found = {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y)}
    return found | {"hovertemplate": hover} | more


def line(
    name: str,
    points: Sequence[tuple[float, float]],
    color: str,
    *,
    dash: str = "solid",
    width: float = 1.8,
    shape: str = "linear",
    hover: str = "%{y:.4g}",
) -> Trace:
    """A line through (step, value) points."""
    look = {"color": color, "dash": dash, "width": width, "shape": shape}
    return scatter("lines", name, points, f"<b>{name}</b> at step %{{x:,d}}<br>{hover}", line=look)


def layout(y_title: str, x_title: str = AXES["step"], height: int = 360, **more: Any) -> dict[str, Any]:
    """A layout with titled axes."""
    return {"height": height, "xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}}, **more}


def escape(text: str) -> str:
    """Text for labels, in which HTML and `%{...}` placeholders have a meaning."""
    return html.escape(text).replace("{", "&#123;")
