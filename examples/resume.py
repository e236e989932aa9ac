"""Resuming a plain PyTorch loop: torch.save and load_state_dict as ever, with resume=True in one line.

pip install ./setpoint
python examples/resume.py
"""

from __future__ import annotations

import tempfile

import torch
from torch import nn

import setpoint

STEPS = 80


def train(file: str, *, resume: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=STEPS, resume=True)  # the one line
    first = 0
    if resume:
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    for step in range(first, STEPS):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == STEPS // 3 and not resume:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, file)
    print(loop.finish())
    return model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        whole, again = (train(f"{folder}/run.pt", resume=resume).state_dict() for resume in (False, True))
        print("bit for bit the same:", all(torch.equal(whole[name], again[name]) for name in whole))
