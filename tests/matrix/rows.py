"""Rows of the matrix: set-ups of training, by optimizer, precision, accumulation, compiler and wrapper."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo as dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel as Parallel

import setpoint
from loop.test_regrowth import Scripted
from setpoint.sensor.reading import Reading

DROP = {2: {"up": [1, 5]}, 4: {"up": [0], "wide": [7, 9]}}
WIDTHS, STEPS, OVERFLOW = {"wide": 18, "up": 21}, 8, 4

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]]] = {
    "adamw": lambda parameters: [torch.optim.AdamW(parameters, lr=0.01, eps=1e-4)],
    "fused": lambda parameters: [torch.optim.AdamW(parameters, lr=0.01, eps=1e-4, fused=True)],
    "sgd": lambda parameters: [torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)],
    "two": lambda parameters: [
        torch.optim.Adam([p for p in parameters if p.dim() > 1], lr=0.01, amsgrad=True),
        torch.optim.SGD([{"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.1}], lr=0.1),
    ],
}
AXES: dict[str, tuple[Any, ...]] = {
    "optimizer": tuple(OPTIMIZERS),
    "precision": ("fp64", "fp32", "bf16", "scaled", "fp16"),
    "accumulation": (1, 3),
    "compiled": ("no", "before", "after"),
    "wrapper": ("none", "ddp", "fsdp"),
}


class Residual(nn.Module):
    """A net with a residual branch whose norm is per sample, so that a batch may be split."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.mix, self.stream = nn.Linear(8, 20), nn.Linear(20, 12), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(torch.relu(self.wide(x)))
        return self.head(x + self.down(nn.functional.gelu(self.up(self.stream(x)))))


@dataclass(frozen=True)
class Row:
    """One set-up."""

    optimizer: str  # a key of `OPTIMIZERS`
    precision: str  # "fp64", "fp32", "bf16" by autocast, "scaled": fp32 with a `GradScaler`, "fp16": autocast with one
    accumulation: int  # backward passes per step
    compiled: str  # "no", or "before" or "after" attach
    wrapper: str  # "none", "ddp", "fsdp"
    backend: str = "eager"  # of the compiler
    device: str = "cpu"

    @property
    def is_scaled(self) -> bool:
        """Whether there is a `GradScaler`; then the gradients of iteration `OVERFLOW` are infinite."""
        return self.precision in ("scaled", "fp16")

    def __str__(self) -> str:
        return "-".join(map(str, (self.optimizer, self.precision, self.accumulation, self.compiled, self.wrapper)))


def every_row(**fixed: Any) -> Iterator[Row]:
    """All of them."""
    for values in itertools.product(*AXES.values()):
        yield Row(**{**dict(zip(AXES, values, strict=True)), **fixed})


def pairwise(axes: Mapping[str, Sequence[Any]] = AXES) -> list[dict[str, Any]]:
    """Few rows in which every two values of two axes meet; each is the one that has most pairs not met yet."""
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    def pairs(row: dict[str, Any]) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(row.items(), 2))

    left, chosen = set().union(*map(pairs, rows)), []
    while left:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & left)))
        left -= pairs(chosen[-1])
    return chosen


class Run:
    """A model in the set-up of a row; it begins with these `states` of optimizers, by parameter, and of the scaler."""

    def __init__(self, row: Row, model: nn.Module, states: Sequence[Any] = (), scaler: Any = None) -> None:
        self.row, self.model, self.called = row, model, model
        if row.wrapper == "fsdp":
            mesh = init_device_mesh(row.device, (dist.get_world_size(),))
            for part in (model.wide, model.up, [model.mix, model.stream], model):
                fully_shard(part, mesh=mesh)  # type: ignore[arg-type]
        if row.wrapper == "ddp":
            self.called = Parallel(model)
        if row.compiled == "before":
            self.compile()
        self.optimizers = OPTIMIZERS[row.optimizer](list(model.parameters()))
        self.scaler = torch.amp.GradScaler(row.device, init_scale=2.0**10, enabled=row.is_scaled)  # type: ignore[attr-defined]
        if scaler is not None:
            self.scaler.load_state_dict(scaler)
        for optimizer, of_optimizer in zip(self.optimizers, states, strict=False):
            for parameter, state in zip(parameters_of(optimizer), of_optimizer, strict=True):
                optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}

    def compile(self) -> None:
        self.called = torch.compile(self.called, backend=self.row.backend)

    def states(self) -> list[list[Any]]:
        return [[each.state[parameter] for parameter in parameters_of(each)] for each in self.optimizers]

    def train(self, steps: range) -> list[float]:
        """Losses of the user's own loop."""
        losses = []
        for step in steps:
            x, y = batch(self.row, step)
            total = torch.zeros((), dtype=torch.float64)
            parts = self.row.accumulation
            for number, (some, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True), 1):
                with self.unsynchronised(number < parts), self.autocast():
                    loss = nn.functional.cross_entropy(self.called(some).float(), labels) / parts
                    loss = loss * torch.inf if self.row.is_scaled and step == OVERFLOW else loss
                    self.scaler.scale(loss).backward()
                total += loss.item()
            for optimizer in self.optimizers if self.row.optimizer != "fused" else ():  # which does so itself
                self.scaler.unscale_(optimizer)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            losses.append(total.item())
        return losses

    def autocast(self) -> AbstractContextManager[Any]:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.row.precision)
        return nullcontext() if kind is None else torch.autocast(self.row.device, kind)

    def unsynchronised(self, wanted: bool) -> AbstractContextManager[Any]:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(not wanted)
        inside = getattr(self.called, "_orig_mod", self.called)
        return inside.no_sync() if wanted and isinstance(inside, Parallel) else nullcontext()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [parameter for settings in optimizer.param_groups for parameter in settings["params"]]


def batch(row: Row, step: int) -> tuple[Tensor, Tensor]:
    """This rank's share of a step's batch."""
    generator = torch.Generator().manual_seed(100 * step + (dist.get_rank() if dist.is_initialized() else 0))
    x = torch.randn(6, 8, generator=generator, dtype=dtype_of(row))
    return x.to(row.device), (x[:, 0] > 0).long().to(row.device)


def dtype_of(row: Row) -> torch.dtype:
    return torch.float64 if row.precision == "fp64" else torch.float32


def build(row: Row) -> nn.Module:
    torch.manual_seed(0)
    return Residual().to(row.device, dtype_of(row))


def attached(run: Run) -> setpoint.Loop:
    settings = {"controller": Scripted(DROP, regrow=False), "total_steps": 40, "verify": False}
    return setpoint.attach(run.called, run.optimizers, 0.5, example=(batch(run.row, 0)[0],), **settings)


def goes_on_like_a_fresh_one(row: Row) -> None:
    """After two cuts a run goes on, bit for bit, like a fresh small model in the same set-up with the same states."""
    dynamo.reset()
    run = Run(row, build(row))
    loop = attached(run)
    if row.compiled == "after":
        run.compile()
    begun = 5 + (row.is_scaled and row.optimizer != "fused")  # a fused one is called even if it then changes nothing
    run.train(range(begun))
    assert loop.step == 5
    reading = loop.reading()
    assert reading.finite() and max(values.max() for values in reading.saliency.values()) > 0
    _of_the_right_size(row, reading, begun)
    assert loop.widths == WIDTHS, (str(row), loop.widths)
    loop.detach()
    with tempfile.TemporaryDirectory() as folder, setpoint.unsharded(run.model):
        setpoint.save(run.model, Path(folder, "small"))
        small = setpoint.load(Path(folder, "small"), into=build(row))
    fresh = Run(row, small, run.states(), run.scaler.state_dict() if run.scaler.is_enabled() else None)
    if row.compiled == "after":
        fresh.compile()
    ours, theirs = run.train(range(begun, STEPS)), fresh.train(range(begun, STEPS))
    exact = row.backend == "eager"  # other compilers may round otherwise where sizes are symbols
    torch.testing.assert_close(ours, theirs, **({"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-3, "atol": 1e-4}))
    if exact:
        with setpoint.unsharded(run.model), setpoint.unsharded(small):
            assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), small.parameters(), strict=True))


def _of_the_right_size(row: Row, reading: Reading, begun: int) -> None:
    """A reading is what it is in a plain run on the same batches: there is no factor of a scale or of ranks in it."""
    plain = Row(row.optimizer, "fp32" if row.precision != "fp64" else "fp64", 1, "no", "none", device=row.device)
    run = Run(plain, build(plain))
    loop = attached(run)
    for step in range(begun):
        run.train(range(step, step + (step != OVERFLOW or not row.is_scaled)))
    theirs = loop.reading()
    loop.detach()
    for name, values in reading.saliency.items():
        several = dist.is_initialized() and dist.get_world_size() > 1  # then their batches are others
        ratio = values.sum() / theirs.saliency[name].sum()
        assert abs(np.log(ratio)) < (np.log(100.0) if several else 0.1), (str(row), name, ratio)


def matrix() -> None:
    """All rows in which several ranks can have a part; a compiler that makes code of its own in every tenth."""
    alone = dist.get_world_size() == 1
    chosen = [row for row in every_row() if alone or row.wrapper != "none"]
    for number, row in enumerate(chosen):
        goes_on_like_a_fresh_one(row)
        if row.compiled != "no" and number % 10 == 1:
            goes_on_like_a_fresh_one(replace(row, backend="inductor"))
        if dist.get_rank() == 0:
            print(f"{number + 1} of {len(chosen)}: {row}", flush=True)
