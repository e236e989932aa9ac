"""A pretrained network learns new letters twice: as it is, and pruned to half of its FLOPs while it trains.

    python examples/demo.py --budget 0.5 --out runs/demo

The letters are drawn by code and the weights lie in demo.safetensors, so nothing is downloaded. Both networks see the
same images in the same order. Everything that is printed is measured in the run, in under a minute on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import setpoint

PRETRAINED = Path(__file__).with_name("demo.safetensors")
"""Weights of the network after 12 epochs on 200 images of each old letter, in half precision."""
SIDE = 24
OLD, NEW = range(48), range(100, 110)
"""The letters of an invented alphabet that the network knows, and those that it learns here."""
TRAINED, TESTED, BATCH, LOOKS = 50, 40, 32, 16
"""Images of each new letter to train and to test on, images of a step, and how often the accuracy is measured."""
STROKES, PIECES, AT_ONCE = 3, 5, 64


class Block(nn.Module):
    """Two convolutions and a skip connection."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(width_in, width, 1, stride, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, width_in, h, w) to features (n, width, h / stride, w / stride)."""
        inner = self.relu(self.norm1(self.conv1(x)))
        out: Tensor = self.relu(self.norm2(self.conv2(inner)) + self.skip(x))
        return out


class Network(nn.Sequential):
    """Images (n, 1, h, w) to logits (n, classes): three blocks, each of which halves height and width."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.block1 = Block(24, 24, stride=2)
        self.block2 = Block(24, 48, stride=2)
        self.block3 = Block(48, 96, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(96, classes)


def pretrained(seed: int) -> Network:
    """The network that knows the old letters, with a new head."""
    model = Network(len(OLD))
    setpoint.load(PRETRAINED, into=model)
    torch.manual_seed(seed)
    model.head = nn.Linear(model.head.in_features, len(NEW))
    return model.float()


def draw(letters: Sequence[int], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of letters, in random order, each drawn differently: turned, sheared, moved, wobbly, on noisy paper.

    Args:
        letters: numbers in the alphabet.
        count: images of each letter.
        seed: the same seed draws the same images.

    Returns:
        Images (n, 1, 24, 24) with mean 0 and variance 1 each, and the place of each one's letter in `letters` (n).
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(letters)), count))
    shapes = np.stack([strokes_of(letter) for letter in letters])
    chunks = (labels[at : at + AT_ONCE] for at in range(0, len(labels), AT_ONCE))
    images = np.concatenate([written(shapes[chunk], rng) for chunk in chunks])
    return torch.from_numpy(images[:, None]), torch.from_numpy(labels)


def strokes_of(letter: int) -> np.ndarray:
    """Start, bend and end of each stroke (strokes, 3, 2): between points of a grid, each from where another ends."""
    rng = np.random.default_rng((2026, letter))
    grid = np.stack(np.meshgrid([-0.8, 0.0, 0.8], [-0.8, 0.0, 0.8]), axis=-1).reshape(9, 2)
    walk = rng.permutation(9)[: STROKES + 1]
    starts, ends = grid[walk[:-1]], grid[walk[1:]]
    bends = (starts + ends) / 2 + rng.normal(0, 0.45, starts.shape)
    return np.stack([starts, bends, ends], axis=1)


def written(strokes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images (n, 24, 24) of strokes (n, strokes, 3, 2): ink falls off with the distance from the nearest stroke."""
    num = len(strokes)
    points = strokes + rng.normal(0, 0.12, strokes.shape)
    scratch = rng.uniform(-1.3, 1.3, (num, 1, 1, 2)) + rng.normal(0, 0.35, (num, 1, 3, 2))  # it means nothing
    start, bend, end = np.moveaxis(np.concatenate([moved(points, rng), scratch], axis=1)[:, :, None], 3, 0)
    t = np.linspace(0, 1, PIECES + 1)[:, None]
    curve = ((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end).astype(np.float32)
    at = np.linspace(-1.4, 1.4, SIDE, dtype=np.float32)
    x, y = (axis.reshape(1, -1) for axis in np.meshgrid(at, at))
    nearest = np.full((num, SIDE * SIDE), np.inf, dtype=np.float32)
    begins, stops = (part.reshape(num, -1, 2).swapaxes(0, 1) for part in (curve[:, :, :-1], curve[:, :, 1:]))
    for begin, stop in zip(begins, stops, strict=True):
        (x0, y0), (dx, dy) = begin.T[..., None], (stop - begin).T[..., None]
        share = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx**2 + dy**2 + 1e-6), 0, 1)
        np.minimum(nearest, (x - x0 - share * dx) ** 2 + (y - y0 - share * dy) ** 2, out=nearest)
    thickness = rng.uniform(0.08, 0.16, (num, 1)).astype(np.float32)
    ink = np.exp(-nearest / (2 * thickness**2)).reshape(num, SIDE, SIDE)
    shade = (rng.normal(0, 0.15, (num, 2)) @ np.concatenate([x, y])).reshape(ink.shape)
    image = ink * rng.uniform(0.6, 1.0, (num, 1, 1)) + shade + rng.normal(0, 0.2, ink.shape)
    image = image - image.mean(axis=(1, 2), keepdims=True)
    normed: np.ndarray = (image / image.std(axis=(1, 2), keepdims=True)).astype(np.float32)
    return normed


def moved(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points (n, strokes, 3, 2), those of an image turned, sheared, stretched and moved together."""
    num = len(points)
    angle, shear = rng.uniform(-0.5, 0.5, num), rng.uniform(-0.3, 0.3, num)
    size = rng.uniform(0.65, 1.15, (num, 2))
    turn = np.stack([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    turn = turn @ np.stack([[np.ones(num), shear], [np.zeros(num), np.ones(num)]]).transpose(2, 0, 1)
    shapes: np.ndarray = np.einsum("nij,nskj->nski", turn * size[:, :, None], points)
    return shapes + rng.uniform(-0.2, 0.2, (num, 1, 1, 2))


@dataclass
class Training:
    """An ordinary training loop, with Setpoint where there is a budget. It changes as it trains."""

    model: Network
    images: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    steps: int
    seed: int
    budget: str | None = None
    accuracy: float = 0.0
    seconds: list[float] = field(default_factory=lambda: [0.0])
    """After each step; without those that measured the accuracy."""
    loop: setpoint.Loop | None = None

    def run(self) -> Iterator[int]:
        """Train, and yield the number of each step that the accuracy was measured after."""
        started = time.perf_counter()
        pictures, labels = self.images
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=self.steps)
        if self.budget is not None:
            self.loop = setpoint.attach(
                self.model, optimizer, self.budget, total_steps=self.steps, example=(pictures[:BATCH],)
            )
        self.seconds = [time.perf_counter() - started]
        order = torch.Generator().manual_seed(self.seed)
        for step in range(1, self.steps + 1):
            started = time.perf_counter()
            rows = torch.randperm(len(labels), generator=order)[:BATCH]
            loss = nn.functional.cross_entropy(self.model(pictures[rows]), labels[rows], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if self.loop is not None and step == self.steps:
                self.loop.finish()
            self.seconds.append(self.seconds[-1] + time.perf_counter() - started)
            if step == self.steps or step % max(1, self.steps // LOOKS) == 0:
                self.model.eval()
                with torch.no_grad():
                    self.accuracy = float((self.model(self.test[0]).argmax(1) == self.test[1]).float().mean())
                self.model.train()
                yield step

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step: the median over the last quarter of the training."""
        last = self.seconds[-1 - max(1, len(self.seconds) // 4) :]
        return 1e3 * statistics.median(after - before for before, after in pairwise(last))


def demo(out: Path, budget: str = "0.5", seed: int = 0, steps: int = 360) -> Path:
    """Train both, print how they stand, and write the ledger, the small model and the page."""
    torch.set_num_threads(1)  # the layers are small: on a busy machine several threads wait for each other
    print(
        f"A network that reads {len(OLD)} letters of an invented alphabet learns {len(NEW)} more, from {TRAINED} "
        f"images of each.\ndrawing the images, and trying what can be cut ...",
        flush=True,
    )
    shared = (draw(NEW, TRAINED, 2 * seed), draw(NEW, TESTED, 2 * seed + 1), steps, seed)
    dense, pruned = Training(pretrained(seed), *shared), Training(pretrained(seed), *shared, budget=budget)
    # The pruned one first: a budget out of reach is refused before anything was trained.
    for step, _ in zip(pruned.run(), dense.run(), strict=True):
        assert pruned.loop is not None
        units = f"{sum(pruned.loop.widths.values()):,} channels left"
        print(f"step {step:>4}: accuracy dense {dense.accuracy:.1%}, pruned {pruned.accuracy:.1%}, {units}", flush=True)
    assert pruned.loop is not None and pruned.loop.summary is not None
    summary = pruned.loop.summary
    print(f"\n{summary}\n")
    rows = (
        ("accuracy on test images", f"{pruned.accuracy:.1%}", f"{dense.accuracy:.1%}"),
        ("FLOPs of a step", f"{summary.final_flops / 1e6:.0f} M", f"{summary.dense_flops / 1e6:.0f} M"),
        (
            "FLOPs of the training, Setpoint's own included",
            f"{summary.train_flops / 1e9:.1f} G",
            f"{summary.dense_flops * steps / 1e9:.1f} G",
        ),
        ("a step at the end", f"{pruned.step_ms:.1f} ms", f"{dense.step_ms:.1f} ms"),
        ("the whole training", f"{pruned.seconds[-1]:.1f} s", f"{dense.seconds[-1]:.1f} s"),
    )
    for title, small, large in rows:
        print(f"{title:48} {small:>8} pruned, {large:>8} dense")
    return write(out, pruned, rows)


def write(out: Path, pruned: Training, rows: Sequence[tuple[str, str, str]]) -> Path:
    """The ledger, the small model, and a page with the comparison above the run."""
    from setpoint.report.page import write_ledger_page

    assert pruned.loop is not None
    out.mkdir(parents=True, exist_ok=True)
    pruned.loop.ledger.save(out / "run.jsonl")
    setpoint.save(pruned.model, out / "small.safetensors")
    cards = "".join(
        f"<li><span>{escape(title)}</span><strong>{small}</strong><small>{large} dense</small></li>"
        for title, small, large in rows
    )
    return write_ledger_page(out / "run.jsonl", first=f'<ul class="cards">{cards}</ul>\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="0.5", help="FLOPs of a step at the end, as a fraction of the dense ones")
    parser.add_argument("--seed", type=int, default=0, help="of the images, the new head and the order")
    parser.add_argument("--steps", type=int, default=360, help="optimizer steps of each training")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything that is written")
    wanted = parser.parse_args()
    page = demo(wanted.out, wanted.budget, wanted.seed, wanted.steps)
    print(f"next: open {page} in a browser")
