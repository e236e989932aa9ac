"""Figures of the report as plain Plotly specifications: curves of the runs, and their seconds by part."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Trace = dict[str, Any]

GREY, BLUE, ORANGE = "#667085", "#0b62a8", "#c2570c"
OTHERS = ("#00795c", "#a2407f", "#8a6d00", "#4a4ab8")
FAINT, INK = "#c9d1dc", "#1c2430"
DARK = {
    GREY: "#a3acb9",
    BLUE: "#5eb1f5",
    ORANGE: "#f0944d",
    OTHERS[0]: "#3fc9a0",
    OTHERS[1]: "#e08cc0",
    OTHERS[2]: "#d9b93a",
    OTHERS[3]: "#a3a3ff",
    FAINT: "#3a4554",
    INK: "#e6eaf0",
    "#e6edf5": "#1b2530",
}
"""The same colours on a dark page. All pairs differ in lightness too, for readers who cannot see the hue."""

AXES = {"step": "optimizer step", "seconds": "training time (s)", "flops": "training FLOPs"}


@dataclass(frozen=True)
class Figure:
    """A Plotly specification, and the other abscissas its curves can be drawn against.

    Args:
        layout: the page fills in colours and fonts.
        abscissas: by name of the axis, its title and the x values of every trace.
    """

    data: Sequence[Trace]
    layout: Mapping[str, Any]
    abscissas: Mapping[str, tuple[str, Sequence[Sequence[float | None]]]] = field(default_factory=dict)


def plotly_script() -> str:
    """The Plotly library as JavaScript.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the report needs plotly, which is not installed: pip install "setpoint[report]"', name="plotly"
        ) from error
    return str(get_plotlyjs())


def scatter(mode: str, name: str, points: Iterable[tuple[Any, Any]], hover: str, **more: Any) -> Trace:
    """Lines or markers at (x, y) points, with the text that shows under the pointer."""
    x, y = zip(*points, strict=True) if (points := list(points)) else ((), ())
    found = {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y)}
    return found | {"hovertemplate": f"{hover}<extra></extra>"} | more


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
    """A layout with titled axes and a legend above the plot."""
    return {
        "height": height,
        "margin": {"l": 64, "r": 24, "t": 36, "b": 48},
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": {"title": {"text": x_title}, "zeroline": False, "automargin": True},
        "yaxis": {"title": {"text": y_title}, "zeroline": False, "automargin": True},
        **more,
    }


def escape(text: str) -> str:
    """Text for Plotly's labels, which interpret some HTML and `%{...}` placeholders."""
    return html.escape(text).replace("{", "&#123;")
