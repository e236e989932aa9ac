"""Train the network of `setpoint demo` on the old letters, and keep it in half precision where the wheel finds it.

    python bench/benchmarks/pretrain_demo.py

It prints the accuracy on other images after each epoch. Seeds are fixed; the last digits of the weights
depend on the processor.
"""

from __future__ import annotations

import torch
from torch import nn

import setpoint
from setpoint.demo.network import PRETRAINED, Network
from setpoint.demo.signs import OLD, draw

EPOCHS, EACH, BATCH, RATE = 12, 200, 64, 2e-3


def main() -> None:
    """Train, print, and save."""
    torch.manual_seed(0)
    pictures, labels = draw(OLD, EACH, seed=1)
    others, theirs = draw(OLD, 20, seed=2)
    model = Network(len(OLD)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = EPOCHS * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        model.train()
        for rows in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].view(-1, BATCH):
            loss = nn.functional.cross_entropy(model(pictures[rows]), labels[rows], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        model.eval()
        with torch.no_grad():
            right = (model(others).argmax(1) == theirs).float().mean()
        print(f"epoch {epoch + 1} of {EPOCHS}: {right:.1%}", flush=True)
    setpoint.save(model.half(), PRETRAINED)


if __name__ == "__main__":
    main()
