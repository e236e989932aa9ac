"""Long runs of what may not fail: thousands of resizes, killed runs, set-ups of training, on one rank and on several.

    python bench/benchmarks/soak.py --out results/soak.json
    python bench/benchmarks/soak.py --only resized killed

Each check is a process of its own, and its last line says what it saw. In the file, what is not run again stays.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from record import keep

TESTS = Path(__file__).parents[2] / "tests"


def commands(resizes: int, kills: int) -> dict[str, list[str]]:
    """What is run, by name."""
    ranks = str(TESTS / "distributed" / "ranks.py")
    return {
        "resized": [str(TESTS / "faults" / "resized.py"), "--count", str(resizes)],
        "killed": [str(TESTS / "faults" / "killed.py"), "--count", str(kills)],
        "four ranks": ["-W", "ignore", ranks, "twin:4", "sharded_twin:4"],
        "matrix on 1 rank": ["-W", "ignore", ranks, "matrix:1"],
        "matrix on 2 ranks": ["-W", "ignore", ranks, "matrix:2"],
    }


def outcome(command: list[str]) -> dict[str, Any]:
    """What a check said at the end, whether it passed, and how long it took."""
    begun = time.perf_counter()
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=settings)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    passed = done.returncode == 0
    said = lines[-1] if lines else ""
    if not passed:
        print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
    seconds, date = time.perf_counter() - begun, datetime.now(UTC).isoformat(timespec="seconds")
    return {"passed": passed, "said": said, "seconds": seconds, "date": date}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--resizes", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", nargs="+", default=None, help="names of checks")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if args.out is not None and args.out.exists():
        found = json.loads(args.out.read_text(encoding="utf-8"))["checks"]
    for name, command in commands(args.resizes, args.kills).items():
        if args.only is None or name in args.only:
            found[name] = outcome(command)
            keep({"checks": found}, args.out, shown={name: found[name]})
    sys.exit(not all(each["passed"] for each in found.values()))


if __name__ == "__main__":
    main()
