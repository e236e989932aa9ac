"""A record: what a benchmark found, with its environment and date, as JSON on the screen and in a file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
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
    """Write a record where a file is given, and print it, or what is `shown` in its place."""
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**machine(), "threads": torch.get_num_threads()},
        **found,
    }
    if out is not None:
        write(record, out)
    print(json.dumps(record if shown is None else shown))


def held_in(file: Path) -> dict[str, Any]:
    """What a file of results holds; nothing where there is none."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def write(record: Mapping[str, Any], file: Path) -> None:
    """Write a record, in a folder that is made where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
