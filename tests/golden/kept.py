"""What is kept of the golden runs: digests for the eye and for git, and the facts behind them."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from golden.facts import SHOWN, digest

HERE = Path(__file__).parent
DIGESTS, FACTS = HERE / "digests.json", HERE / "facts.json"


def environment() -> dict[str, str]:
    """On what the digits of a float depend."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": next(iter(names), platform.processor()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def digests_of(facts: dict[str, Any]) -> dict[str, Any]:
    """One digest a section, and some numbers that a person can read."""
    everything = {**facts["plan"], **facts["numbers"]}
    return {
        **{section: digest(values) for section, values in facts.items()},
        "shown": {name: everything[name] for name in SHOWN},
    }


def read() -> tuple[dict[str, Any], dict[str, str]]:
    """Facts by run, and the environment in which they were recorded."""
    facts = {name: rejoined(rows) for name, rows in json.loads(FACTS.read_text()).items()}
    return facts, json.loads(DIGESTS.read_text())["environment"]


def read_digests() -> dict[str, Any]:
    """Digests by run."""
    return dict(json.loads(DIGESTS.read_text())["runs"])


def write(facts: dict[str, Any]) -> None:
    """Keep these runs, and no others, as recorded in this environment."""
    rows = ",\n".join(f"{json.dumps(name)}: {lines(each)}" for name, each in sorted(facts.items()))
    FACTS.write_text("{\n" + rows + "\n}\n")
    digests = {name: digests_of(each) for name, each in sorted(facts.items())}
    DIGESTS.write_text(json.dumps({"environment": environment(), "runs": digests}, indent=1) + "\n")


def lines(facts: dict[str, Any]) -> str:
    """JSON with a line for each entry and each section, so that git shows what has changed."""
    rows = []
    for section, values in facts.items():
        rows += [[section, None, {key: each for key, each in values.items() if key != "entries"}]]
        rows += [[section, number, entry] for number, entry in enumerate(values.get("entries", []))]
    return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"


def rejoined(rows: list[Any]) -> dict[str, Any]:
    """The facts that `lines` wrote."""
    facts: dict[str, Any] = {}
    for section, number, values in rows:
        if number is None:
            facts[section] = dict(values)
        else:
            facts[section].setdefault("entries", []).append(values)
    return facts
