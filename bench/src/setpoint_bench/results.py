"""Results: one line of JSON per finished cell, and the history of each cell in its own folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from setpoint.checkpoint.plain import fields_of, json_object
from setpoint_bench.report.folder import SCHEMA, SCHEMAS, read_lines
from setpoint_bench.report.packed import SUFFIX, file_of
from setpoint_bench.task import BenchError

FILE = "results.jsonl"
HISTORY = "history.jsonl"
LEDGER = "ledger.jsonl"
MODEL = "model.safetensors"
LOCK = ".lock"


@dataclass(frozen=True)
class Result:
    """What one cell (task, method, budget, seed) came to.

    docs/results-format.md says what each field is, in which unit, and when it is None.
    """

    task: str
    method: str
    budget: float | None
    seed: int
    metric: str
    value: float
    split: str
    final_flops: float
    claimed_flops: float | None
    final_params: int
    train_flops: float
    seconds: float
    evaluation_seconds: float
    overhead_seconds: float
    overhead_flops: float
    resizes: int
    budget_met: bool | None
    steps: int
    widths: Mapping[str, int]
    dense_widths: Mapping[str, int]
    environment: Mapping[str, str | int]
    date: str
    folder: str
    dense_flops: float | None = None
    family: str = ""
    task_steps: int | None = None
    clock: str = "interleaved"
    theoretical_flops: float | None = None
    theoretical_train_flops: float | None = None
    density: float | None = None
    energy_j: float | None = None
    break_even_step: int | None = None
    notes: str = ""
    unit: str | None = None
    fingerprint: str = ""
    schema: int = field(default=SCHEMA)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from writing into it until the end.

    Raises:
        BenchError: the folder cannot be made or is packed, or another process is at work in it.
    """
    if (packed := file_of(folder, FILE)).suffix == SUFFIX:
        raise BenchError(
            f"{folder} is packed ({packed.name}) and is only read: name another folder with --out, and add its runs "
            "with bench/benchmarks/pack.py"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise BenchError(
            f"another setpoint bench is at work in {folder}: wait for it, or name another --out"
        ) from error
    except OSError as error:
        raise BenchError(f"--out {folder} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    mend(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def append_result(folder: Path, result: Result) -> None:
    append_line(folder / FILE, dataclasses.asdict(result))


def mend(path: Path) -> None:
    """End a whole last line that lacks its end; cut off half a line after the last line's end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if _is_whole(content[end:]):
            file.write(b"\n")
        elif end < len(content):
            file.truncate(end)


def _is_whole(line: bytes) -> bool:
    """Whether a line is a JSON object, or the half that a crash left of one."""
    try:
        return json_object(line.decode()) is not None
    except UnicodeDecodeError:
        return False


def load_results(folder: Path) -> tuple[Result, ...]:
    """The finished cells of a folder, in order; none where there is no results file yet.

    A half-written last line is left out. A cell that was repeated counts once, the last time.

    Raises:
        BenchError: the folder was written by another version of Setpoint.
        ReportError: the file is damaged.
    """
    path = file_of(folder, FILE)
    found: dict[tuple[object, ...], Result] = {}
    for row in read_lines(path, FILE, [], whole=True) if path.exists() else ():
        result = _parsed(row, path)
        key = (result.task, result.method, result.budget, result.seed)
        # Popped first, so that a repeated run stands where it was written last.
        found.pop(key, None)
        found[key] = result
    return tuple(found.values())


def _parsed(row: dict[str, Any], path: Path) -> Result:
    if row.get("schema") not in SCHEMAS:
        raise BenchError(
            f"{path} has schema {row.get('schema')!r}, this version of Setpoint continues folders of schema "
            f"{' and '.join(map(str, SCHEMAS))}: name another folder with --out"
        )
    if "value" in row and row["value"] is None:  # how others write what is no number
        row["value"] = math.nan
    try:
        return Result(**fields_of(Result, row))
    except (TypeError, ValueError) as error:
        raise BenchError(
            f"{path} has a damaged line ({error}): delete that line, or name another folder with --out"
        ) from error


def exact(value: float) -> str:
    """A number in the fewest digits that identify it.

    >>> exact(0.25), exact(1.0), exact(1 / 3)
    ('0.25', '1', '0.3333333333333333')
    """
    return repr(float(value)).removesuffix(".0")
