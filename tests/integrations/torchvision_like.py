"""A script of the shape of torchvision's references/classification/train.py, with three lines added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import setpoint
from golden.models import ResNet

EPOCHS, STEPS = 20, 2


class ExponentialMovingAverage(AveragedModel):
    """As in its utils.py."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        def ema_avg(avg: Tensor, value: Tensor, num: Any) -> Tensor:
            return decay * avg + (1 - decay) * value

        super().__init__(model, "cpu", ema_avg, use_buffers=True)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(2, (8,), generator=generator)


def train(folder: Path, resume: str = "") -> tuple[nn.Module, nn.Module, setpoint.Loop]:
    """`main` and `train_one_epoch` in one: the model, its average, and the loop, which is finished."""
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=8, gamma=0.3)
    model_ema, start_epoch = ExponentialMovingAverage(model, decay=0.9), 0
    copies, total = [model_ema.module], EPOCHS * STEPS
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=total, copies=copies, resume=True)  # setpoint
    if resume:
        checkpoint = torch.load(resume, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        start_epoch = checkpoint["epoch"] + 1
        model_ema.load_state_dict(checkpoint["model_ema"])
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in range(start_epoch, EPOCHS):
        model.train()
        for step in range(STEPS):
            image, target = batch(epoch * STEPS + step)
            output = model(image)
            loss = nn.functional.cross_entropy(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model_ema.update_parameters(model)
        lr_scheduler.step()
        states = {"model": model, "optimizer": optimizer, "lr_scheduler": lr_scheduler, "model_ema": model_ema}
        checkpoint = {**{name: each.state_dict() for name, each in states.items()}, "epoch": epoch}
        torch.save(checkpoint, folder / f"model_{epoch}.pth")
    loop.finish()  # setpoint
    return model, model_ema.module, loop
