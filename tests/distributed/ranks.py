"""Lets several processes make checks together.

python tests/distributed/ranks.py twin:2 twin:4 ...     what to check, and on how many ranks
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import setpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from distributed import checks, clocks, meshes, shards, stops, training
from matrix import rows

TIMEOUT_S, LIMIT_S = 30, 300
LONG, LONG_S = {"matrix"}, 2 * 3600


def one_rank(names: list[str], rank: int, count: int, store: str) -> None:
    """All checks on one rank, in one group, one after the other."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=LONG_S if LONG & set(names) else TIMEOUT_S)  # compilers may take their time
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout)
    for name in names:
        next(getattr(each, name) for each in (stops, checks, clocks, shards, meshes, rows) if hasattr(each, name))()
        if not name.startswith("lost"):
            dist.barrier()
        if rank == 0:
            print(f"{name}:{count} came through", flush=True)


def in_own_process(*arguments: Any) -> None:
    """One rank in a process of its own, which ends whatever happens."""
    try:
        one_rank(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def run(count: int, names: list[str]) -> bool:
    """Let so many ranks make these checks; none of them is left behind. Whether all came through."""
    fork = multiprocessing.get_context("fork")  # what this process has imported need not be imported again
    with tempfile.TemporaryDirectory() as folder:
        made = [fork.Process(target=in_own_process, args=(names, rank, count, f"{folder}/s")) for rank in range(count)]
        for each in made:
            each.start()
        until = time.monotonic() + (LONG_S if LONG & set(names) else LIMIT_S)
        for each in made:
            each.join(max(0.0, until - time.monotonic()))
            each.kill()
            each.join()
        return not any(each.exitcode for each in made)


if __name__ == "__main__":
    setpoint.find_groups(
        training.build(), (training.batch(0)[0],)
    )  # imports the rest; no gradients, which would forbid to fork
    asked = [each.split(":") for each in sys.argv[1:]]
    counts = sorted({int(count) for _, count in asked})
    came_through = [run(ranks, [name for name, count in asked if int(count) == ranks]) for ranks in counts]
    sys.exit(0 if all(came_through) else 1)
