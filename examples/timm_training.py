"""timm: its optimizer, scheduler, EMA and checkpoints around a loop as that of its train.py, with three lines added.

It shows: the lines marked `setpoint`; `resume_checkpoint` and `load_checkpoint(use_ema=True)`, which read shapes only,
going on bit for bit; and the averaged model, pruned alike.

    pip install timm
    python examples/timm_training.py
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import timm
import timm.optim
import timm.scheduler
import timm.utils
import torch
from timm.models import load_checkpoint, resume_checkpoint
from torch import Tensor, nn

import setpoint

EPOCHS, UPDATES = 20, 2


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Noise with a brighter colour, which is its class."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(24, 3, 32, 32, generator=generator), torch.randint(3, (24,), generator=generator)
    x[torch.arange(24), y] += 0.5
    return x, y


def train(
    folder: Path, name: str = "test_resnet", resume: str = "", **settings: Any
) -> tuple[nn.Module, nn.Module, setpoint.Loop]:
    """The model, its average, and the loop, which is finished."""
    model = setpoint.resumable(timm.create_model(name, num_classes=3, **settings))  # setpoint
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    start = (resume_checkpoint(model, resume, optimizer) or 0) if resume else 0
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    if resume:
        load_checkpoint(average.module, resume, use_ema=True)
    steps = EPOCHS * UPDATES
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=steps, copies=[average.module], resume=True)  # setpoint
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=EPOCHS)
    scheduler.step(start)
    folder.mkdir(parents=True, exist_ok=True)
    saver = timm.utils.CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=str(folder), max_history=99)
    for epoch in range(start, EPOCHS):
        for update in range(UPDATES):
            x, y = batch(epoch * UPDATES + update)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=float(epoch))
    loop.finish()  # setpoint
    return model, average.module, loop


def main() -> None:
    """Train, and go on from an early checkpoint."""
    torch.manual_seed(0)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        model, average, loop = train(Path(folder, "whole"))
        assert loop.summary is not None and loop.summary.budget_met
        print(f"{loop.summary.final_flops / loop.summary.dense_flops:.3f} of the dense FLOPs; channels: {loop.widths}")
        again, other, _ = train(Path(folder, "again"), resume=str(Path(folder, "whole", "checkpoint-3.pth.tar")))
        for one, two in ((model, again), (average, other)):
            assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
        print("gone on from epoch 3: the same weights and averages to the bit")


if __name__ == "__main__":
    main()
