"""Setpoint beside Torch-Pruning: every model of the suites cut in half by both, in one run, judged alike.

    python bench/benchmarks/compare_torch_pruning.py --workers 2

Each library cuts each model in a process of its own, on one thread, within a limit of processor time and of memory.
Finished models are kept in OUT.partial, one a line, and a second start goes on from there; OUT is written when all are
done. Needs `pip install setpoint-bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from contenders import REMOVED_SHARE, Outcome
from libraries import LIBRARIES, best
from torch import nn

from setpoint_bench.catalogue import task_named
from setpoint_bench.coverage import TOLERANCE
from setpoint_bench.environment import code_version, environment
from setpoint_bench.sweep import SUITES, suite_named

OUT = Path(__file__).resolve().parents[2] / "results" / "coverage" / "torch_pruning.json"
PATIENCE = 20
"""On a busy machine a process may take this many times its processor time; one that waits for ever ends there."""


def cut_one(library: str, suite: str, model: str, limit_seconds: int, memory_gib: float) -> None:
    """Cut one model in this process, and print what is known of it at every stage, one JSON object a line."""
    if library == "torch_pruning":
        os.environ["TIMM_FUSED_ATTN"] = "0"  # its examples ask for this
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    memory = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what a model prints is no answer
        # A tiny model first, so that neither the limit nor the seconds of a discovery hold imports.
        best(library, lambda: (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),)))
        seconds = round(time.process_time()) + limit_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        found = best(library, suite_named(suite)[model], lambda now: print(json.dumps(now), file=answers, flush=True))
    print(json.dumps(found), flush=True)


def outcome_of(library: str, suite: str, model: str, limit_seconds: int, memory_gib: float) -> dict[str, Any]:
    """The record of one job, whatever becomes of its process."""
    command = [sys.executable, __file__, "--one", library, suite, model]
    command += ["--limit-seconds", str(limit_seconds), "--memory-gib", str(memory_gib)]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=PATIENCE * limit_seconds
        )
        answers, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        answers, code = error.stdout or b"", -signal.SIGXCPU
    lines = answers.splitlines()
    record: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if code == 0:
        return record
    end, reason = "died", "its process died (out of memory?)"
    if code == -signal.SIGXCPU:
        end, reason = "time", f"no answer within {limit_seconds} s"
    if record.get("passed"):  # only the comparison with the masked twin was not finished
        return record | {"exact_reason": reason}
    return asdict(Outcome()) | record | {"stage": end, "reason": f"{reason}, at {record.get('stage', 'build')}"}


def main() -> None:
    """Compare, print a line for each model, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default=",".join(SUITES), help="comma-separated; by default all")
    parser.add_argument("--models", default="", help="comma-separated; by default all of each suite")
    parser.add_argument("--workers", type=int, default=2, help="models at a time")
    parser.add_argument("--limit-seconds", type=int, default=120, help="processor time for a model in a library")
    parser.add_argument("--memory-gib", type=float, default=9.0, help="memory of each process")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", nargs=3, metavar=("LIBRARY", "SUITE", "MODEL"), help="cut this in this process")
    arguments = parser.parse_args()
    limits = arguments.limit_seconds, arguments.memory_gib
    if arguments.one:
        cut_one(*arguments.one, *limits)
        return
    chosen = set(filter(None, arguments.models.split(",")))
    places = [(s, m) for s in arguments.suites.split(",") for m in suite_named(s) if not chosen or m in chosen]
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    lines = partial.read_text(encoding="utf-8").splitlines() if partial.exists() else []
    models = {(model["suite"], model["model"]): model for model in map(json.loads, lines)}

    def record(place: tuple[str, str]) -> dict[str, Any]:
        suite, model = place
        return {"suite": suite, "model": model, **{name: outcome_of(name, *place, *limits) for name in LIBRARIES}}

    todo = [place for place in places if place not in models]
    with ThreadPoolExecutor(arguments.workers) as pool, partial.open("a", encoding="utf-8") as file:
        for number, found in enumerate(pool.map(record, todo), start=1):
            models[found["suite"], found["model"]] = found
            print(json.dumps(found), file=file, flush=True)
            ends = {library: found[library]["reason"][:60] or "passed" for library in LIBRARIES}
            print(f"{number}/{len(todo)} {found['suite']} {found['model']}: {ends}", flush=True)
    packages = ("setpoint", "torch-pruning", "torch", "torchvision", "timm", "transformers")
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": 0,
        "environment": environment(task_named("digits")),
        "versions": {**{name: version(name) for name in packages}, "code": code_version()},
        "limit_seconds": arguments.limit_seconds,
        "memory_gib": arguments.memory_gib,
        "workers": arguments.workers,
        "removed_share": REMOVED_SHARE,
        "tolerance": TOLERANCE,
        "models": [models[place] for place in places],
    }
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.unlink()
    passed = {library: sum(models[place][library]["passed"] for place in places) for library in LIBRARIES}
    print(f"passed of {len(places)}: {passed}; readme.py makes the tables from {arguments.out}")


if __name__ == "__main__":
    main()
