"""How the tables write machines, seeds, differences and errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from setpoint_bench.report.columns import interval_text
from setpoint_bench.report.statistics import Difference, paired


def threads_text(environment: dict[str, object]) -> str:
    """How many threads a run had."""
    return f"{environment['threads']} thread{'s' * (str(environment['threads']) != '1')}"


def seeds_text(data: dict[str, Any]) -> str:
    """How many seeds there are, and which."""
    seeds = sorted({run["seed"] for run in data["runs"]})
    return f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"


def made_on(data: dict[str, Any]) -> str:
    """On what, and when."""
    about = data["environment"]
    return f"{about['cpu']}, {threads_text(about)}, torch {about['torch']}, {data['date'][:10]}."


def rows_made_on(rows: Sequence[dict[str, Any]]) -> str:
    """On what, and when, from the rows themselves."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(f"{row['cpu']}, {threads_text(row)}, torch {row['torch']}", set()).add(row["date"][:10])
    return "; ".join(f"{machine}, {' and '.join(sorted(dates))}" for machine, dates in found.items()) + "."


def difference_text(pairs: Sequence[float]) -> str:
    """Mean of paired differences and half of the 95 % interval about it."""
    found = paired(pairs)
    return f"{found.mean:+.3f}" + ("" if found.high is None else f" ± {found.high - found.mean:.3f}")


def marked(found: Difference | None, metric: str) -> str:
    """A difference with its interval, bold where that excludes 0."""
    if found is None:
        return "–"
    text = interval_text(found, metric)
    return f"**{text}**" if found.clear else text


def code_span(text: str) -> str:
    """Text of an error as a span of code."""
    return f"`{text.replace('`', chr(39))}`"
