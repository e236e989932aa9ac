"""Packs a folder of runs into tables that can be committed, and adds it to those that are there.

    python bench/benchmarks/pack.py runs/digits results/digits

The tables hold the last line of every run and of its timing, and whole histories. Of the ledgers those stay that pages
and pictures show: of each method named the first seed at each budget, if judged on test data. The folder of runs stays
as it is. docs/results-format.md describes both.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from setpoint_bench.report.folder import HISTORY, LEDGER, RESULTS, TIMING, cell_folder, read_lines, read_results
from setpoint_bench.report.packed import HISTORIES, SUFFIX, file_of, packed_history, read_histories, write_packed
from setpoint_bench.report.summary import SETPOINT
from setpoint_bench.results import held

Row = dict[str, Any]
Rows = dict[tuple[Any, ...], Row]


def last_rows(folder: Path, name: str) -> Rows:
    """The lines of a file of a folder, packed or not, by task, method, budget and seed: of several the last one."""
    path, found = file_of(folder, name), Rows()
    for row in read_lines(path, name, [], whole=name == RESULTS) if path.is_file() else ():
        key = (row["task"], row["method"], row.get("budget"), row.get("seed"))
        found.pop(key, None)
        found[key] = row
    return found


def histories(folder: Path, rows: Rows) -> dict[str, list[Row]]:
    """The lines of the histories of these rows, by the cells' folders."""
    found = read_histories(folder)
    for row in rows.values():
        home = cell_folder(folder, row)
        if home is not None and (home / HISTORY).is_file():
            found[row["folder"]] = read_lines(home / HISTORY, HISTORY, [])
    return found


def shown(rows: Rows, methods: Collection[str]) -> list[Row]:
    """The rows whose ledgers are shown: of each of these methods the first seed at each budget of a task."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows.values(), key=lambda row: row.get("seed") or 0):
        if row["method"] in methods and row.get("split", "test") == "test":
            found.setdefault((row["task"], row["method"], row.get("budget")), row)
    return list(found.values())


def merged(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> dict[Any, Any]:
    """Both, the new ones last and in place of old ones."""
    return {key: value for key, value in old.items() if key not in new} | dict(new)


def pack(source: Path, target: Path, methods: Collection[str]) -> None:
    """Add the runs of a folder to the tables of another, which need not be there yet, with ledgers of these methods."""
    for remark in read_results(source).remarks:
        print(f"{source}: {remark}", file=sys.stderr)
    target.mkdir(parents=True, exist_ok=True)
    old, new = last_rows(target, RESULTS), last_rows(source, RESULTS)
    rows, timings = merged(old, new), merged(last_rows(target, TIMING), last_rows(source, TIMING))
    points = {**histories(target, old), **{row.get("folder"): [] for row in new.values()}, **histories(source, new)}
    for row in new.values():
        if (outdated := cell_folder(target, row)) is not None:
            (outdated / LEDGER).unlink(missing_ok=True)
    for row in shown(new, methods):
        home = cell_folder(source, row)
        if home is not None and (home / LEDGER).is_file():
            (target / row["folder"]).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(home / LEDGER, target / row["folder"] / LEDGER)
    folders = [row["folder"] for row in rows.values() if points.get(row.get("folder"))]
    write_packed(target / HISTORIES, (packed_history(folder, points[folder]) for folder in folders))
    if timings:
        write_packed(target / f"{TIMING}{SUFFIX}", timings.values())
    write_packed(target / f"{RESULTS}{SUFFIX}", rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that `setpoint bench --out` wrote")
    parser.add_argument("tables", type=Path, help="folder of the tables, such as results/digits")
    parser.add_argument("--ledgers", default=SETPOINT, help="methods whose ledgers stay, with commas")
    args = parser.parse_args()
    if (args.tables / RESULTS).exists():
        sys.exit(f"{args.tables} holds runs: name a folder for the tables, such as results/{args.runs.name}")
    with held(args.runs):
        pack(args.runs, args.tables, args.ledgers.split(","))


if __name__ == "__main__":
    main()
