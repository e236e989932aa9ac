"""Peak memory of a training step: predicted from widths, beside what its live tensors came to.

    python bench/benchmarks/memory.py --out results/memory.json

Needs no idle machine: bytes do not depend on what else runs.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from costs import BUILDS, Subject, random_widths, subject_named
from record import keep

from setpoint.resources.costing import cost_out
from setpoint.resources.live_bytes import peak_bytes
from setpoint.resources.replica import replica

RESULTS = Path(__file__).resolve().parents[2] / "results"


def measured(subject: Subject, widths: dict[str, int]) -> int:
    """Peak bytes of one step of a copy at these widths."""
    device = next(subject.model.parameters()).device
    trained = (subject.optimizer,)
    with replica(subject.model, trained, subject.example, subject.groups, widths, data=True) as copy:
        return peak_bytes(copy.step, copy.held(), device)


def compare(name: str, count: int) -> dict[str, Any]:
    """Predicted and measured bytes at the dense widths and at random ones."""
    subject = subject_named(name)
    cost = cost_out(subject.model, (subject.optimizer,), subject.example, subject.groups, {"memory"}).costs["memory"]
    rows = []
    for widths in random_widths(subject.groups, count, seed=1):
        rows.append({"predicted_bytes": cost.total(widths), "measured_bytes": measured(subject, dict(widths))})
    errors = [abs(row["predicted_bytes"] / row["measured_bytes"] - 1) for row in rows]
    return {"rows": rows, "median_error": statistics.median(errors), "largest_error": max(errors)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--models", default=",".join(BUILDS), help="with commas")
    parser.add_argument("--count", type=int, default=50, help="random width vectors")
    args = parser.parse_args()
    found = {name: compare(name, args.count) for name in args.models.split(",")}
    shown = {name: {key: each[key] for key in ("median_error", "largest_error")} for name, each in found.items()}
    keep({"models": found}, args.out, shown)


if __name__ == "__main__":
    main()
