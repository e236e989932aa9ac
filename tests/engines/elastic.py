"""A run that torchrun starts again after a worker was killed: python -m torch.distributed.run --max-restarts 1 ...

elastic.py FOLDER whole      nobody is killed
elastic.py FOLDER killed     the second rank kills itself once, after six steps
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import setpoint

STEPS = 12


def main(folder: Path, name: str) -> None:
    # Now and then gloo's ranks do not find each other after a restart: the time-out lets torchrun start them once more.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    rank, file, mark = dist.get_rank(), folder / f"{name}.run", folder / "mark"
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randn(STEPS, 2, 4, 16, generator=torch.Generator().manual_seed(1))
    loop = setpoint.attach(model, optimizer, "50% flops", total_steps=STEPS, example=(data[0, rank],))
    if file.exists():
        setpoint.load_run(file, model=model, optimizer=optimizer, loop=loop)
        print(f"continues from step {loop.step}", flush=True)
    for step in range(loop.step, STEPS):
        x = data[step, rank]
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if name == "killed" and rank == 1 and step == 5 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            setpoint.save_run(file, model=model, optimizer=optimizer, loop=loop)
        dist.barrier()
    summary = loop.finish()
    assert summary.budget_met and summary.resizes and summary.steps == STEPS
    if rank == 0:
        # Wall-clock seconds are another machine's, or this one's on another day.
        entries = [replace(entry, seconds=0.0, own_seconds={}) for entry in loop.ledger]
        weights = [each.tolist() for each in model.parameters()]
        (folder / f"{name}.ledger").write_text(f"{entries}\n{loop.ledger.header}\n{weights}", encoding="utf-8")
    dist.barrier()
    os._exit(0)  # after all files are written


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
