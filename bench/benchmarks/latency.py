"""Seconds of a training step and of an inference: predicted from widths, beside what those of copies took.

    python bench/benchmarks/latency.py --out results/latency.json

The table is timed afresh. Run it on an otherwise idle machine: what else runs is in the seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from costs import BUILDS, Subject, random_widths, subject_named
from record import keep

from setpoint.resources.costing import Make, cost_out
from setpoint.resources.inference import inference_replica
from setpoint.resources.median import median_of
from setpoint.resources.replica import replica
from setpoint.spending.seconds import Stopwatch

WIDTHS_SEED = 1
RESULTS = Path(__file__).resolve().parents[2] / "results"


def measured(make: Make, widths: dict[str, int]) -> dict[str, float]:
    """Median seconds of steps of a copy at these widths, with the 95 % interval."""
    watch, times = Stopwatch(synchronize=True), []
    with make(widths, data=True) as copy:
        while len(times) < 5 or (len(times) < 30 and watch.seconds < 0.5):
            with watch:
                copy.step()
            times.append(watch.last_seconds)
    found = median_of(times)
    return {"measured_s": found.value, "low_s": found.low, "high_s": found.high}


def made(subject: Subject, resource: str) -> Make:
    """What makes copies that are trained, or that answer."""
    if resource == "inference":
        return partial(inference_replica, subject.model, subject.example, subject.groups)
    return partial(replica, subject.model, (subject.optimizer,), subject.example, subject.groups)


def compare(name: str, count: int, resource: str) -> dict[str, Any]:
    """Predicted and measured seconds at the dense widths and at random ones."""
    subject = subject_named(name)
    began = time.perf_counter()
    costing = cost_out(subject.model, (subject.optimizer,), subject.example, subject.groups, {resource})
    build_s, cost = time.perf_counter() - began, costing.costs[resource]
    rows = [
        {"predicted_s": cost.total(widths), **measured(made(subject, resource), dict(widths))}
        for widths in random_widths(subject.groups, count, seed=WIDTHS_SEED)
    ]
    errors = [abs(row["predicted_s"] / row["measured_s"] - 1) for row in rows]
    return {
        "build_s": build_s,
        "calibration_error": costing.errors.get(resource),
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "rows": rows,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "latency.json")
    parser.add_argument("--models", default=",".join(BUILDS), help="with commas")
    parser.add_argument("--count", type=int, default=50, help="random width vectors")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        found, answered = (
            {name: compare(name, args.count, resource) for name in args.models.split(",")}
            for resource in ("latency", "inference")
        )
    parts, keys = {"models": found, "inference": answered}, ("median_error", "largest_error", "build_s")
    shown = {
        part: {name: {key: each[key] for key in keys} for name, each in models.items()}
        for part, models in parts.items()
    }
    keep({"seed": WIDTHS_SEED, **parts}, args.out, shown)


if __name__ == "__main__":
    main()
