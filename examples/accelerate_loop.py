"""Accelerate: attach to what `prepare` returns; `save_state` and `load_state` carry widths and the loop.

pip install ./setpoint accelerate
python examples/accelerate_loop.py
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from torch import nn

import setpoint

STEPS = 60


def train(folder: str, *, resume: bool) -> nn.Module:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x, x[:, :4].argmax(1))
    loader = torch.utils.data.DataLoader(data, batch_size=32)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=STEPS, resume=True)  # the one line
    step = 0
    if resume:
        accelerator.load_state(folder)
        step = STEPS // 2
    while step < STEPS:
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            step += accelerator.sync_gradients
            if step == STEPS // 2 and accelerator.sync_gradients and not resume:
                accelerator.save_state(folder)
            if step == STEPS:
                break
    print(loop.finish())
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        shapes = [[tuple(p.shape) for p in train(folder, resume=resume).parameters()] for resume in (False, True)]
        print("the resumed run ends with the same widths:", shapes[0] == shapes[1])
