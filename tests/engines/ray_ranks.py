"""A run of Ray Train's TorchTrainer on two workers, one of which is killed: it ends as the run that nobody stopped."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import setpoint

STEPS = 12


def train(settings: dict[str, Any]) -> None:
    """What each worker does: the run is saved after each step, and goes on from the last checkpoint."""
    torch.manual_seed(0)
    rank = ray.train.get_context().get_world_rank()
    model = prepare_model(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)))
    assert isinstance(model, DistributedDataParallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randn(STEPS, 2, 4, 16, generator=torch.Generator().manual_seed(1))
    loop = setpoint.attach(model, optimizer, "50% flops", total_steps=STEPS, example=(data[0, rank],))
    if (last := ray.train.get_checkpoint()) is not None:
        with last.as_directory() as folder:
            setpoint.load_run(Path(folder, "run"), model=model, optimizer=optimizer, loop=loop)
    for step in range(loop.step, STEPS):
        x = data[step, rank]
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 1 and step == 6 and settings["kill"] and not Path(settings["folder"], "killed").exists():
            Path(settings["folder"], "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                setpoint.save_run(Path(folder, "run"), model=model, optimizer=optimizer, loop=loop)
            ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)
    summary = loop.finish()
    assert summary.budget_met and summary.resizes and summary.steps == STEPS
    if rank == 0:
        weights = torch.cat([each.detach().flatten() for each in model.parameters()])
        entries = [(entry.step, entry.widths, entry.dropped, entry.reason) for entry in loop.ledger]
        torch.save({"weights": weights, "ledger": repr(entries)}, Path(settings["folder"], f"end-{settings['kill']}"))


if __name__ == "__main__":
    folder = sys.argv[1]
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20)
    for kill in (False, True):
        TorchTrainer(
            train,
            train_loop_config={"folder": folder, "kill": kill},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
            run_config=RunConfig(
                name=f"kill-{kill}",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=2),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        ).fit()
    whole, resumed = (torch.load(Path(folder, f"end-{kill}")) for kill in (False, True))
    assert Path(folder, "killed").exists()
    assert torch.equal(whole["weights"], resumed["weights"]) and whole["ledger"] == resumed["ledger"]
    print("alike", flush=True)
