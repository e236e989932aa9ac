"""What the scripts beside this file begin with: handwritten digits and a convolutional network, cut while it trains.

pip install ./setpoint scikit-learn
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import setpoint

STEPS = 160

torch.manual_seed(0)
torch.set_num_threads(1)
pixels, labels = load_digits(return_X_y=True)
images, classes = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train_images, train_classes, test_images, test_classes = images[:1200], classes[:1200], images[1200:], classes[1200:]


def batches(count: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches in the order of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        rows = torch.randint(len(train_images), (64,), generator=generator)
        yield train_images[rows], train_classes[rows]


def accuracy(scores: Callable[[Tensor], Any]) -> float:
    """Share of the test images for which the right class has the highest score."""
    with torch.no_grad():
        return float((torch.as_tensor(scores(test_images)).argmax(1) == test_classes).float().mean())


model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loop = setpoint.attach(model, optimizer, 0.5, total_steps=STEPS)
for x, y in batches(STEPS):
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
loop.finish()
model.eval()
example = test_images[:1]
