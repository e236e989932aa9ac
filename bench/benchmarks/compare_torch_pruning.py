"""Setpoint beside Torch-Pruning: every model of the suites cut in half by both, in one run, judged alike.

    python bench/benchmarks/compare_torch_pruning.py --workers 2

Each library works in processes of its own, on one thread, within a limit of processor time and of memory; one that
dies or exceeds them is replaced; what ran out of memory is repeated at the end, alone and with twice as much. Finished
models are kept in OUT.partial, and a second start goes on from there: a library is asked again only if something that
its outcome follows from has changed. OUT is written when all are done.
Needs `pip install setpoint-bench`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import threading
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
from contenders import REMOVED_SHARE, Outcome, first_line
from libraries import LIBRARIES, best
from torch import nn

import setpoint
from setpoint_bench import coverage
from setpoint_bench.catalogue import task_named
from setpoint_bench.coverage import TOLERANCE
from setpoint_bench.environment import environment
from setpoint_bench.sweep import SUITES, suite_named

OUT = Path(__file__).resolve().parents[2] / "results" / "coverage" / "torch_pruning.json"
_MODELS_PER_PROCESS = 12
_START_SECONDS = 120.0
"""Processor time in which a process imports everything."""
_PATIENCE = 20
"""On a busy machine a job may take this many times its processor time; a process that waits for ever ends there."""


def serve(connection: Connection, library: str, suites: list[str], memory_gib: float) -> None:
    """Work off jobs (suite, model): a pair (whether done, record so far) at every stage."""
    if library == "torch_pruning":
        os.environ["TIMM_FUSED_ATTN"] = "0"  # its examples ask for this
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    known = {suite: suite_named(suite) for suite in suites}
    best(library, lambda: (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),)))
    connection.send((True, {}))
    while True:
        suite, model = connection.recv()
        report = best(library, known[suite][model], lambda now: connection.send((False, now)))
        connection.send((True, report))


class Worker:
    """A process that works off jobs of one library, started anew when it was ended or has done its share."""

    def __init__(self, library: str, suites: list[str], memory_gib: float) -> None:
        self.arguments = library, suites, memory_gib
        self.process: Any = None
        self.jobs_left = 0

    def start(self) -> None:
        """A fresh process, ready for a job."""
        self.stop()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.jobs_left = _MODELS_PER_PROCESS
        if self._answer(_START_SECONDS)[0] != "done":
            raise RuntimeError(f"the process for {self.arguments[0]} does not start")

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def run(self, suite: str, model: str, limit_seconds: float) -> dict[str, Any]:
        """The record of one job, whatever becomes of it."""
        if self.process is None or not self.jobs_left:
            self.start()
        self.jobs_left -= 1
        self.connection.send((suite, model))
        end, record = self._answer(limit_seconds)
        if end == "done":
            return record
        self.stop()
        reason = f"no answer within {limit_seconds:g} s" if end == "time" else "its process died (out of memory?)"
        if record.get("passed"):  # only the comparison with the masked twin was not finished
            return record | {"exact_reason": reason}
        return asdict(Outcome()) | record | {"stage": end, "reason": f"{reason}, at {record.get('stage', 'build')}"}

    def _answer(self, limit_seconds: float) -> tuple[str, dict[str, Any]]:
        """How it ended, "done", "time" or "died", and the last record."""
        record: dict[str, Any] = {}
        begun, deadline = self._processor_seconds(), time.monotonic() + _PATIENCE * limit_seconds
        try:
            while self._processor_seconds() - begun < limit_seconds and time.monotonic() < deadline:
                if self.connection.poll(0.5):
                    done, record = self.connection.recv()
                    if done:
                        return "done", record
            return "time", record
        except (EOFError, OSError, psutil.NoSuchProcess):
            return "died", record

    def _processor_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


def versions() -> dict[str, str]:
    """Versions of the libraries, and digests of the code that an outcome follows from."""
    names = ("setpoint", "torch-pruning", "torch", "torchvision", "timm", "transformers")
    source, here = Path(setpoint.__file__).parent, Path(__file__).parent
    own = [
        *source.glob("groups/**/*.py"),
        *source.glob("actuator/*.py"),
        Path(coverage.__file__),
    ]
    return {
        **{name: version(name) for name in names},
        "setpoint source": _digest(own),
        "judge": _digest([here / "contenders.py", here / "libraries.py"]),
    }


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def stands(library: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an earlier outcome of a library can be kept: all that it follows from is the same."""
    own = {"setpoint", "setpoint source"} if library == "torch_pruning" else set()
    same = all(earlier["versions"].get(name) == now["versions"][name] for name in now["versions"].keys() - own)
    return same and all(earlier[key] == now[key] for key in ("limit_seconds", "memory_gib"))


Place = tuple[str, str]
"""Suite and model."""


def compare(
    todo: Mapping[Place, Mapping[str, Any]],
    libraries: set[str],
    workers: int,
    suites: list[str],
    limit_seconds: float,
    memory_gib: float,
) -> Iterator[dict[str, Any]]:
    """The record of each place, as it comes; `todo` holds what is known of it already, by library."""
    lanes = threading.local()
    started: list[Worker] = []

    def record(place: Place) -> dict[str, Any]:
        if not hasattr(lanes, "workers"):
            lanes.workers = {library: Worker(library, suites, memory_gib) for library in LIBRARIES}
            started.extend(lanes.workers.values())
        suite, model = place
        outcomes = dict(todo[place])
        for library in LIBRARIES:
            if library in outcomes or library not in libraries:
                continue
            try:
                outcomes[library] = lanes.workers[library].run(suite, model, limit_seconds)
            except RuntimeError as error:
                lanes.workers[library].stop()
                outcomes[library] = asdict(Outcome(stage="died", reason=first_line(error)))
        return {"suite": suite, "model": model, **outcomes}

    try:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(record, todo)
    finally:
        for worker in started:
            worker.stop()


def ran_out_of_memory(record: Mapping[str, Any]) -> bool:
    """Whether a library ended for want of memory."""
    texts = [f"{record[each]['reason']} {record[each]['exact_reason']}" for each in LIBRARIES if each in record]
    return any(sign in text for sign in ("alloc_cpu", "MemoryError", "process died") for text in texts)


def summary(records: list[dict[str, Any]]) -> Iterator[str]:
    """One line per suite and library."""
    for suite in dict.fromkeys(record["suite"] for record in records):
        for library in LIBRARIES:
            outcomes = [record[library] for record in records if record["suite"] == suite]
            seconds = [each["seconds"] for each in outcomes if each["seconds"] is not None]
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
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="whose turn it is; by default both")
    parser.add_argument("--workers", type=int, default=2, help="models at a time")
    parser.add_argument("--limit-seconds", type=float, default=120.0, help="processor time for a model in a library")
    parser.add_argument("--memory-gib", type=float, default=9.0, help="memory of each process")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    suites = arguments.suites.split(",")
    libraries = set(arguments.libraries.split(","))
    limit_seconds = arguments.limit_seconds
    chosen = set(filter(None, arguments.models.split(",")))
    places = [(s, m) for s in suites for m in suite_named(s) if not chosen or m in chosen]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": 0,
        "environment": environment(task_named("digits")),
        "versions": versions(),
        "limit_seconds": arguments.limit_seconds,
        "memory_gib": arguments.memory_gib,
        "workers": arguments.workers,
        "removed_share": REMOVED_SHARE,
        "tolerance": TOLERANCE,
    }
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    kept: dict[Place, dict[str, Any]] = {}
    for path in (arguments.out, partial):
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"models": []}
        for record in earlier["models"]:
            standing = {each: record[each] for each in LIBRARIES if each in record and stands(each, earlier, result)}
            kept.setdefault((record["suite"], record["model"]), {}).update(standing)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    def write(path: Path) -> None:
        result["models"] = [{"suite": s, "model": m, **kept[s, m]} for s, m in places if kept.get((s, m))]
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        path.with_name(path.name + ".new").write_text(text, encoding="utf-8")
        path.with_name(path.name + ".new").replace(path)

    def work_off(todo: Mapping[Place, Mapping[str, Any]], workers: int, memory_gib: float) -> None:
        for number, record in enumerate(compare(todo, libraries, workers, suites, limit_seconds, memory_gib), 1):
            kept[record["suite"], record["model"]] = {each: record[each] for each in LIBRARIES if each in record}
            write(partial)
            ends = {each: record[each]["reason"][:60] or "passed" for each in LIBRARIES if each in record}
            print(f"{number}/{len(todo)} {record['suite']} {record['model']}: {ends}", flush=True)

    todo = {place: kept.get(place, {}) for place in places}
    todo = {place: done for place, done in todo.items() if libraries - done.keys()}
    work_off(todo, arguments.workers, arguments.memory_gib)
    if any(LIBRARIES.keys() - kept[place].keys() for place in places):
        sys.exit(f"the other library is still to do; what there is lies in {partial}")
    again = {place: {} for place in places if ran_out_of_memory(kept[place])}
    work_off(again, 1, 2 * arguments.memory_gib)
    if versions() != result["versions"]:
        sys.exit(f"the code changed during the run, so {partial} is not made {arguments.out}: start again")
    write(arguments.out)
    partial.unlink(missing_ok=True)
    print("\n".join(summary(result["models"])))


if __name__ == "__main__":
    main()
