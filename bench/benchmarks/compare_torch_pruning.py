"""Setpoint beside Torch-Pruning: every model of the suites cut in half by both, in one run, judged alike.

    python bench/benchmarks/compare_torch_pruning.py --workers 2

Each library cuts each model in a process of its own, on one thread, within a limit of processor time and of memory.
Finished models are kept in OUT.partial, and a second start with the same versions goes on from there; OUT is written
when all are done. Needs `pip install setpoint-bench`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from contenders import REMOVED_SHARE, Outcome
from libraries import LIBRARIES, best
from torch import nn

from setpoint_bench.catalogue import task_named
from setpoint_bench.coverage import TOLERANCE
from setpoint_bench.environment import code_version, environment
from setpoint_bench.sweep import SUITES, suite_named

OUT = Path(__file__).resolve().parents[2] / "results" / "coverage" / "torch_pruning.json"
START_SECONDS = 120.0
"""Processor time in which a process imports everything."""
PATIENCE = 20
"""On a busy machine a job may take this many times its processor time; a process that waits for ever ends there."""


def cut_one(connection: Connection, library: str, suite: str, model: str, memory_gib: float) -> None:
    """Cut one model in this process: sends a pair (whether done, record so far) at every stage."""
    if library == "torch_pruning":
        os.environ["TIMM_FUSED_ATTN"] = "0"  # its examples ask for this
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    # A tiny model first, so that the seconds of a discovery hold no imports.
    best(library, lambda: (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),)))
    connection.send((False, {}))
    report = best(library, suite_named(suite)[model], lambda now: connection.send((False, now)))
    connection.send((True, report))


def outcome_of(library: str, suite: str, model: str, limit_seconds: float, memory_gib: float) -> dict[str, Any]:
    """The record of one job, whatever becomes of its process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=cut_one, args=(theirs, library, suite, model, memory_gib), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen when the process dies
    record: dict[str, Any] = {}
    end, limit, began = "time", START_SECONDS, time.monotonic()
    try:
        while _processor_seconds(process.pid) < limit and time.monotonic() - began < PATIENCE * limit:
            if not ours.poll(0.5):
                continue
            done, record = ours.recv()
            if done:
                return record
            if not record:  # imports are done: from here on the model's own limit counts
                limit = _processor_seconds(process.pid) + limit_seconds
    except (EOFError, OSError, psutil.NoSuchProcess):
        end = "died"
    finally:
        process.kill()
        process.join()
    reason = f"no answer within {limit_seconds:g} s" if end == "time" else "its process died (out of memory?)"
    if record.get("passed"):  # only the comparison with the masked twin was not finished
        return record | {"exact_reason": reason}
    return asdict(Outcome()) | record | {"stage": end, "reason": f"{reason}, at {record.get('stage', 'build')}"}


def _processor_seconds(pid: int | None) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def summary(records: list[dict[str, Any]]) -> Iterator[str]:
    """One line per suite and library."""
    for suite in dict.fromkeys(record["suite"] for record in records):
        for library in LIBRARIES:
            outcomes = [record[library] for record in records if record["suite"] == suite]
            seconds = [outcome["seconds"] for outcome in outcomes if outcome["seconds"] is not None]
            yield (
                f"{suite:13} {library:14} passed {sum(o['passed'] for o in outcomes)} of {len(outcomes)}, "
                f"exact {sum(o['exact'] is True for o in outcomes)}, "
                f"discovery {statistics.median(seconds) if seconds else math.nan:.2f} s"
            )


def main() -> None:
    """Compare, print a line for each model and a table, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default=",".join(SUITES), help="comma-separated; by default all")
    parser.add_argument("--models", default="", help="comma-separated; by default all of each suite")
    parser.add_argument("--workers", type=int, default=2, help="models at a time")
    parser.add_argument("--limit-seconds", type=float, default=120.0, help="processor time for a model in a library")
    parser.add_argument("--memory-gib", type=float, default=9.0, help="memory of each process")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    chosen = set(filter(None, arguments.models.split(",")))
    places = [(s, m) for s in arguments.suites.split(",") for m in suite_named(s) if not chosen or m in chosen]
    names = ("setpoint", "torch-pruning", "torch", "torchvision", "timm", "transformers")
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": 0,
        "environment": environment(task_named("digits")),
        "versions": {**{name: version(name) for name in names}, "code": code_version()},
        "limit_seconds": arguments.limit_seconds,
        "memory_gib": arguments.memory_gib,
        "workers": arguments.workers,
        "removed_share": REMOVED_SHARE,
        "tolerance": TOLERANCE,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    kept = _standing(partial, result)

    def record(place: tuple[str, str]) -> dict[str, Any]:
        limits = arguments.limit_seconds, arguments.memory_gib
        return {library: outcome_of(library, *place, *limits) for library in LIBRARIES}

    todo = [place for place in places if place not in kept]
    with ThreadPoolExecutor(arguments.workers) as pool:
        for number, (place, found) in enumerate(zip(todo, pool.map(record, todo), strict=True), start=1):
            kept[place] = found
            _write(partial, result, kept)
            ends = {library: outcome["reason"][:60] or "passed" for library, outcome in found.items()}
            print(f"{number}/{len(todo)} {' '.join(place)}: {ends}", flush=True)
    _write(arguments.out, result, {place: kept[place] for place in places})
    partial.unlink(missing_ok=True)
    print("\n".join(summary(result["models"])))


def _standing(partial: Path, result: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What an interrupted start has found, if all that it follows from is the same."""
    earlier = json.loads(partial.read_text(encoding="utf-8")) if partial.exists() else {}
    if any(earlier.get(key) != result[key] for key in ("versions", "limit_seconds", "memory_gib")):
        return {}
    return {(m["suite"], m["model"]): {library: m[library] for library in LIBRARIES} for m in earlier["models"]}


def _write(path: Path, result: dict[str, Any], kept: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    result["models"] = [{"suite": suite, "model": model, **found} for (suite, model), found in kept.items()]
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    main()
