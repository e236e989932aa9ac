"""A record: what a benchmark found, with its environment and date, as JSON on the screen and in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from setpoint.bench.environment import machine


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
