"""`make bench-quick` from start to end: how long it takes, and whether its runs come out as the committed ones.

python bench/benchmarks/quick.py --out results/bench-quick.json
"""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from record import keep

from setpoint_bench.results import Result, load_results

ROOT = Path(__file__).parents[2]


def compared(fresh: tuple[Result, ...], committed: tuple[Result, ...]) -> dict[str, Any]:
    """How many runs there are, how many of them are committed too, and how many of those end with the same value.

    Args:
        fresh: the runs of a task, made just now.
        committed: those of results/.

    Returns:
        Numbers of runs, the largest difference, in the metric's own unit (a fraction, or nats), and which runs differ.
    """
    known = {_key(each): each.value for each in committed}
    apart = {each.folder: abs(each.value - known[_key(each)]) for each in fresh if _key(each) in known}
    other = [name for name, difference in apart.items() if difference > 1e-9]
    return {
        "metric": fresh[0].metric,
        "runs": len(fresh),
        "committed": len(apart),
        "same": len(apart) - len(other),
        "largest_difference": max(apart.values(), default=None),
        "other": other,
    }


def _key(result: Result) -> tuple[str, float | None, int]:
    return result.method, result.budget, result.seed


def main() -> None:
    """Run it in a folder of its own, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        begun = time.perf_counter()
        subprocess.run(["make", "bench-quick", f"QUICK={folder}"], cwd=ROOT, check=True)
        seconds = time.perf_counter() - begun
        tasks = {
            path.name: compared(load_results(path), load_results(ROOT / "results" / path.name))
            for path in sorted(Path(folder).iterdir())
        }
    keep({"seconds": seconds, "tasks": tasks}, args.out)


if __name__ == "__main__":
    main()
