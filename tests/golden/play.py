"""Plays golden runs, in a process that has made no gradients yet: those on ranks are forked from it, first of all."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import setpoint
from golden import runs
from golden.facts import facts_of
from golden.models import mlp

NAMES = (*runs.RANKS, *runs.ALONE, *(f"{name}-resumed" for name in runs.RESUMED))
LIMIT_S = 300


def kept_as(name: str) -> str:
    """Under which name the facts of a run are kept: a run that was resumed has those of the whole one."""
    return name.removesuffix("-resumed")


def play(names: Sequence[str] = NAMES) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Name, facts and seconds of each of these runs.

    Raises:
        RuntimeError: for ranks that have failed or do not agree.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"no golden run is called {', '.join(unknown)}: choose from {', '.join(NAMES)}")
    prepare()
    for name in sorted(names, key=NAMES.index):
        begin = time.perf_counter()
        if name in runs.RANKS:
            facts = on_ranks(name)
        else:
            seed()
            how = runs.resumed if name.endswith("-resumed") else runs.played
            facts = facts_in(how, runs.ALONE[kept_as(name)])
        yield name, facts, time.perf_counter() - begin


def facts_in(how: Callable[[Any], runs.Training], build: Callable[[], runs.Training]) -> dict[str, Any]:
    run = how(build)
    copies = {f"copy{number}": each for number, each in enumerate(run.copies)}
    return facts_of(run.loop, {"model": run.model, **copies}, run.digits)


def prepare() -> None:
    """One thread, no op that is left to chance, no warnings; everything imported that ranks will need."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    setpoint.find_groups(mlp(4, 4, 4), (torch.zeros(2, 4),))


def seed() -> None:
    """Runs seed themselves; this is for what should not be drawn from and is."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def on_ranks(name: str, count: int = 2) -> dict[str, Any]:
    """Facts of a run on several ranks, which must be the same on each."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [fork.Process(target=one_rank, args=(name, rank, count, folder)) for rank in range(count)]
        for each in ranks:
            each.start()
        until = time.monotonic() + LIMIT_S
        for each in ranks:
            each.join(max(0.0, until - time.monotonic()))
            each.kill()
            each.join()
        if any(each.exitcode for each in ranks):
            raise RuntimeError(f"a rank of the golden run {name} has failed: see above")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
    for part in ("header", "plan", "words", "weights"):
        if any(each[part] != found[0][part] for each in found):
            raise RuntimeError(f"the ranks of the golden run {name} do not agree in their {part}")
    return dict(found[0])


def one_rank(name: str, rank: int, count: int, folder: str) -> None:
    """One rank in a process of its own, which ends whatever happens."""
    try:
        store, timeout = f"file://{folder}/store", timedelta(seconds=LIMIT_S)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timeout)
        seed()
        facts = facts_in(runs.played, runs.RANKS[name])
        (Path(folder) / f"{rank}.json").write_text(json.dumps(facts))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
