"""A record: what a benchmark found, with its environment and date, as JSON on the screen and in a file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from setpoint_bench.environment import machine


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, in eight digits."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=8", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def keep(found: Mapping[str, Any], out: Path | None, shown: Mapping[str, Any] | None = None) -> None:
    """Write a record where a file is given, and print it.

    Args:
        found: what the benchmark found.
        out: the file, or None.
        shown: what to print instead of all of it.
    """
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**machine(), "threads": torch.get_num_threads()},
    }
    record = {**about, **found}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record if shown is None else shown))


def keep_rows(rows: Sequence[Mapping[str, Any]], out: Path | None) -> None:
    """Write a record of rows, each with its task; rows of other tasks that the file holds stay."""
    old = json.loads(out.read_text(encoding="utf-8"))["rows"] if out is not None and out.exists() else []
    measured = {row["task"] for row in rows}
    kept = [row for row in old if row["task"] not in measured]
    keep({"rows": [*kept, *rows]}, out, shown={"rows": len(rows)})
