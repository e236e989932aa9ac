"""The table of what was measured on a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gpu import FINE

from setpoint.report.numbers import NOTHING, percent
from tables.words import made_on


def gpu_table(file: Path) -> str:
    """A row for each network and mode: seconds of a step beside the dense network's, and what the run itself took."""
    if not file.is_file():
        return "No GPU has been measured yet: `results/gpu.json` does not exist."
    data = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "| network | mode | dense step | even | **Setpoint** | in the blocks of a CPU | FLOPs of the three "
        "| peak memory | weights and states | memory that a step adds | joules of a step | own work of the run |",
        f"|---|---|{'---:|' * 10}",
    ]
    for name, found in data["networks"].items():
        if "why_not" in found:
            lines.append(f"| {name} | not measured: {found['why_not']} |{' |' * 10}")
            continue
        seconds, flops, run = found["step_seconds"], found["flops"], found["run"]
        shares = " / ".join(percent(flops[arm] / flops["dense"]) for arm in ("even", "Setpoint", FINE))
        for mode in seconds["dense"]:
            dense = seconds["dense"][mode]
            cells = (
                name,
                mode,
                f"{1e3 * median(dense):.1f} ms",
                _share(seconds["even"][mode], dense),
                f"**{_share(seconds['Setpoint'][mode], dense)}**",
                _share(seconds[FINE][mode], dense) if mode in seconds[FINE] else NOTHING,
                shares,
                *(_ratio(_part(found, part)) if mode == "eager" else NOTHING for part in ("whole", "held", "step")),
                _ratio(found["step_joules"]) if mode == "eager" else NOTHING,
                percent(run["overhead_seconds"] / run["seconds"]) + f" of {run['steps']} steps",
            )
            lines.append(f"| {' | '.join(cells)} |")
    sparse = data["semi_structured"]
    if sparse is None:
        told = "not measured, the script was stopped before"
    elif "forward_seconds" in sparse:
        turns = sparse["forward_seconds"]
        told = (
            f"linear layers of width {sparse['width']:,} take {_share(turns['2:4'], turns['dense'])} of the dense time"
        )
    else:
        told = f"not measured, {sparse['why_not']}"
    return "\n".join(
        [*lines, "", f"2:4 weights: {told}.", "", f"{data['hardware']}, seed {data['seed']}; {made_on(data)}"]
    )


def _share(ours: Sequence[float], dense: Sequence[float]) -> str:
    """The median of the ratios of a turn, and their range."""
    ratios = [each / other for each, other in zip(ours, dense, strict=True)]
    return f"{percent(median(ratios))} ({percent(min(ratios))} to {percent(max(ratios))})"


def _part(found: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The bytes of one part of the peak, by network."""
    return {arm: each[part] for arm, each in found["peak_bytes"].items()}


def _ratio(values: Mapping[str, Any]) -> str:
    return percent(values["Setpoint"] / values["dense"]) if values["Setpoint"] and values["dense"] else NOTHING
