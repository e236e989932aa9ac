"""A training loop of one's own, pruned to half of its FLOPs by two lines, stopped and gone on with.

It shows: `setpoint.attach` with nothing but a model, an optimizer, a budget and the number of steps; a checkpoint by
`torch.save` in the middle; the same script going on from it, bit for bit; and the small model in a file of its own.

    python examples/plain_loop.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import setpoint

STEPS = 60


def build() -> nn.Module:
    """A small network for images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images with a bright quarter, which is their class."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(4, (32,), generator=generator)
    for image, label in zip(x, y.tolist(), strict=True):
        image[0, label // 2 * 4 :][:4, label % 2 * 4 :][:, :4] += 1
    return x, y


def train(file: Path, until: int = STEPS) -> tuple[nn.Module, setpoint.Loop]:
    """Train on from what is in the file, if it is there, and save."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=STEPS, resume=True)
    step = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    while step < until:
        x, y = batch(step)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, file)
    return model, loop


def main() -> None:
    """Train a quarter of the run, go on from the file, and compare with a run that was not stopped."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        _, stopped = train(Path(folder, "stopped.pt"), until=STEPS // 4)
        stopped.detach()  # this run goes on from the file
        model, loop = train(Path(folder, "stopped.pt"))
        torch.manual_seed(0)
        whole, other = train(Path(folder, "whole.pt"))
        other.finish()
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
        summary = loop.finish()
        print(f"{summary.final_flops / summary.dense_flops:.3f} of the dense FLOPs; channels: {loop.widths}")
        setpoint.save(model, Path(folder, "small.safetensors"))
        small = setpoint.load(Path(folder, "small.safetensors"), into=build()).eval()
        x, y = batch(STEPS)
        print(f"accuracy of the loaded model: {(small(x).argmax(1) == y).float().mean():.2f}")
        assert summary.budget_met and torch.equal(small(x), model.eval()(x))


if __name__ == "__main__":
    main()
