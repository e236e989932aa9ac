"""A latency budget: a convolutional network whose optimizer step is to take two thirds of the time, on this machine.

pip install ./setpoint
python examples/latency_budget.py
"""

from __future__ import annotations

import torch
from torch import nn

import setpoint

STEPS = 120

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    block = [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x = torch.randn(32, 3, 16, 16)
    y = x.mean((2, 3)).argmax(1)
    with setpoint.attach(model, optimizer, "66% latency", example=(x,), total_steps=STEPS) as loop:
        for _ in range(STEPS):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(loop.summary)
