"""The golden runs: each function builds one training run and attaches Setpoint to it; the rest is common to all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import setpoint
import setpoint.regrowth.regrowing
from golden.models import GPT, ResNet, Sampled, mlp
from setpoint.gates.gated import GatedController
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading
from setpoint.weights.masking import Masking
from setpoint_bench.models.lru import SequenceClassifier

HALF = setpoint.Budget.fraction(0.5, of="flops")
GRADUAL = setpoint.PricedController(setpoint.Schedule.gradual())  # of all but the runs that begin with the cut


@dataclass
class Training:
    """A run that is ready to begin."""

    model: nn.Module  # as the user calls it, in its wrapper if it has one
    optimizers: tuple[torch.optim.Optimizer, ...]
    loop: setpoint.Loop
    # Of a step, by its number from 0: one loss for each backward pass. No other state than the model's.
    losses: Callable[[int], Iterable[Tensor]]
    steps: int
    observed: Callable[[int, float], float] | None = None  # what the loop is told of a step's loss; None for nothing
    copies: tuple[AveragedModel, ...] = ()  # averaged after each step
    digits: int = 12  # significant ones, that are compared

    def train(self, first: int, last: int) -> None:
        """The user's own loop."""
        for step in range(first, last):
            total = 0.0
            for loss in self.losses(step):
                loss.backward()
                total += loss.item()
            if self.observed is not None:
                self.loop.observe(loss=self.observed(step, total))
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for each in self.copies:
                each.update_parameters(self.model)

    def parts(self) -> dict[str, Any]:
        """All that a run file holds."""
        optimizers = {f"optimizer{number}": each for number, each in enumerate(self.optimizers)}
        copies = {f"copy{number}": each for number, each in enumerate(self.copies)}
        return {"model": self.model, "loop": self.loop, **optimizers, **copies}


def played(build: Callable[[], Training]) -> Training:
    """The run from its beginning to its end."""
    run = build()
    run.train(0, run.steps)
    run.loop.finish()
    return run


def resumed(build: Callable[[], Training]) -> Training:
    """The same run, which is saved in its middle, built anew and goes on from the file."""
    run = build()
    half = run.steps // 2
    run.train(0, half)
    with tempfile.TemporaryDirectory() as folder:
        setpoint.save_run(Path(folder) / "run", **run.parts())
        again = build()
        setpoint.load_run(Path(folder) / "run", **again.parts())
    again.train(half, again.steps)
    again.loop.finish()
    return again


def adamw(model: nn.Module, rate: float = 0.01) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=rate, eps=1e-6)


def seeded(step: int) -> torch.Generator:
    """Chance that belongs to a step."""
    return torch.Generator().manual_seed(1000 + step)


def told(step: int, loss: float) -> float:
    return loss


def begun(
    model: nn.Module,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    goal: Any = HALF,
    optimizer: torch.optim.Optimizer | None = None,
    observed: Callable[[int, float], float] | None = None,
    digits: int = 12,
    **settings: Any,
) -> Training:
    """A run that classifies the batch of each step; by AdamW, if nothing else is said."""
    optimizer = optimizer or adamw(model)
    settings = {"controller": GRADUAL, **settings}

    def losses(step: int) -> list[Tensor]:
        x, y = batch(step)
        return [F.cross_entropy(model(x), y)]

    loop = setpoint.attach(model, optimizer, goal, example=(batch(0)[0],), total_steps=steps, **settings)
    return Training(model, (optimizer,), loop, losses, steps, observed, digits=digits)


# On one process.


def readme() -> Training:
    """The README's MLP and budget, in float32 as there."""
    torch.manual_seed(0)
    model = mlp(16, 256, 4)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 16, generator=seeded(step))
        return x, x[:, :4].argmax(1)

    return begun(model, batch, 100, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), digits=6)


def images(step: int, count: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, 8, 8, generator=seeded(step), dtype=torch.float64)
    return x, (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1, 0, 0] > 0).long()


def resnet() -> Training:
    """Convolutions, batch norm, residual sums, SGD with momentum."""
    torch.manual_seed(0)
    model = ResNet().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    return begun(model, images, 80, optimizer=optimizer, observed=told)


def gpt(controller: Any = GRADUAL) -> Training:
    """Attention heads and feed-forward neurons."""
    torch.manual_seed(0)
    model = GPT().double()
    optimizer = adamw(model, 3e-3)

    def tokens(step: int) -> Tensor:
        first = torch.randint(16, (8, 1), generator=seeded(step))
        return (first + torch.arange(9) * (1 + first % 3)) % 16

    def losses(step: int) -> list[Tensor]:
        x = tokens(step)
        return [F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())]

    settings = {"example": (tokens(0)[:, :-1],), "total_steps": 80}
    loop = setpoint.attach(model, optimizer, HALF, controller=controller, **settings)
    return Training(model, (optimizer,), loop, losses, 80, told)


def vectors(step: int, count: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 8, generator=seeded(step), dtype=torch.float64)
    return x, x[:, :4].argmax(1)


class Misled:
    """A Taylor sensor that calls the most salient units the least until a step, and tells the truth from there on."""

    def __init__(self, until: int) -> None:
        self.inner, self.until = setpoint.TaylorSensor(64), until

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def read(self, state: Any, groups: tuple[Group, ...], step: int) -> Reading:
        """The reading, upside down at first."""
        reading = self.inner.read(state, groups, step)
        wrong = {name: values.max() + values.min() - values for name, values in reading.saliency.items()}
        return replace(reading, saliency=wrong) if step < self.until else reading


def regrowth() -> Training:
    """Useful units that a wrong reading has dropped are probed and come back."""
    assert hasattr(setpoint.regrowth.regrowing, "_PROBE_SHARE"), "say here where the share of probing stands now"
    setpoint.regrowth.regrowing._PROBE_SHARE = 0.05  # the run is too short to pay for probing out of one percent
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 4)).double()
    controller = setpoint.PricedController(regrow=True)
    settings = {"controller": controller, "sensor": Misled(87)}
    return begun(model, partial(vectors, count=32), 400, setpoint.Budget.fraction(0.4, of="flops"), **settings)


def gates() -> Training:
    """Learned gates, on batches large enough to pay for their network."""
    torch.manual_seed(0)
    return begun(mlp(8, 32, 4).double(), partial(vectors, count=2048), 200, controller=GatedController())


def two_four() -> Training:
    """Single weights in blocks of four inputs, masked and exchanged."""
    torch.manual_seed(0)
    model = ResNet(8).double()
    settings = {"groups": setpoint.find_weights(model, "2:4"), "actuator": Masking("2:4"), "controller": None}
    return begun(model, images, 60, setpoint.Budget.fraction(0.7, of="flops"), **settings)


def states() -> Training:
    """A state-space model whose states are balanced before some go."""
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, num_channels=4, num_states=16, num_blocks=2).double()

    def sequences(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 12, 1, generator=seeded(step), dtype=torch.float64)
        return x, (x.sum((1, 2)) > 0).long() + (x[:, 0, 0] > 0.8).long()

    return begun(model, sequences, 60, optimizer=adamw(model, 3e-3), observed=told)


def fitted(goal: Any, steps: int, observed: Callable[[int, float], float] | None = told, **settings: Any) -> Training:
    """A small teacher is fitted, to whatever goal."""
    torch.manual_seed(0)
    model = mlp(8, 32, 4).double()
    optimizer = adamw(model, 3e-3)
    teacher = torch.randn(8, 4, dtype=torch.float64)

    def losses(step: int) -> list[Tensor]:
        x, _ = vectors(step)
        return [(model(x) - torch.tanh(x @ teacher)).square().mean()]

    loop = setpoint.attach(model, optimizer, goal, example=(vectors(0)[0],), total_steps=steps, **settings)
    return Training(model, (optimizer,), loop, losses, steps, observed)


def run_budget() -> Training:
    """A budget for the whole run, for which the last cut waits."""
    return fitted(setpoint.Budget.fraction(0.545, of="flops", per="run"), 200, controller=GRADUAL)


def price() -> Training:
    """A price, from which the size follows."""
    return fitted(setpoint.Price(0.05, of="flops"), 200)


def tolerance() -> Training:
    """A tolerance of the loss, narrow enough that cuts are taken back."""
    return fitted(setpoint.Tolerance(loss=0.002), 500)


def taken_back() -> Training:
    """A budget, and a loss that leaves its trend after a cut: the cut is taken back, once."""
    controller = setpoint.PricedController(setpoint.Schedule(warmup=0.2, settle=0.6, num_cuts=8))
    return fitted(HALF, 400, lambda step, loss: loss + 3.0 * (step >= 105), controller=controller)


def two_optimizers(controller: Any = GRADUAL) -> Training:
    """Two optimizers, two backward passes a step, an averaged copy, and budgets on two resources."""
    torch.manual_seed(0)
    model = ResNet(8).double()
    weights, rest = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
    optimizers = (torch.optim.SGD(weights, lr=0.05, momentum=0.9), torch.optim.RMSprop(rest, lr=1e-3))
    copy = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def losses(step: int) -> Iterable[Tensor]:
        x, y = images(step)
        for some, labels in zip(x.chunk(2), y.chunk(2), strict=True):
            yield F.cross_entropy(model(some), labels) / 2

    goals = (setpoint.Budget.fraction(0.6, of="flops"), setpoint.Budget.fraction(0.5, of="params"))
    settings = {"example": (images(0)[0],), "total_steps": 60, "controller": controller}
    loop = setpoint.attach(model, optimizers, goals, copies=(copy,), **settings)
    return Training(model, optimizers, loop, losses, 60, copies=(copy,))


def first_cut() -> Training:
    """Convolutions and batch norms, of which the first cut is most of the run; it is resumed behind that."""
    torch.manual_seed(0)
    return begun(ResNet().double(), images, 60, goal="30% flops", observed=told, controller=None)


def first_cut_gpt() -> Training:
    """Heads and neurons that go at once."""
    return gpt(None)


def first_cut_copies() -> Training:
    """An averaged copy is fitted along, budgets are two."""
    return two_optimizers(None)


def compiled() -> Training:
    """A model in torch.compile, whose code is made again after cuts."""
    torch.manual_seed(0)
    return begun(torch.compile(mlp(8, 32, 4).double(), backend="eager"), vectors, 40)


# On two ranks.


def share(step: int) -> tuple[Tensor, Tensor]:
    """This rank's part of a batch."""
    x = torch.randn(16, 2, 6, 6, generator=seeded(step), dtype=torch.float64)
    y = (x[:, 0].mean((1, 2)) > 0).long() + (x[:, 1, 0, 0] > 0.5).long()
    return x.chunk(dist.get_world_size())[dist.get_rank()], y.chunk(dist.get_world_size())[dist.get_rank()]


def ddp() -> Training:
    """Two ranks in DistributedDataParallel."""
    torch.manual_seed(0)
    return begun(DistributedDataParallel(Sampled().double()), share, 30, observed=told)


def fsdp() -> Training:
    """Two ranks of a model that fully_shard has spread over them."""
    torch.manual_seed(0)
    model = Sampled().double()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.wide, model.up, [model.mix, model.stream], model):
        fully_shard(part, mesh=mesh)
    return begun(model, share, 30, observed=told)


RANKS: dict[str, Callable[[], Training]] = {each.__name__: each for each in (ddp, fsdp)}
_ALONE = (readme, resnet, gpt, regrowth, gates, two_four, states, run_budget, price, tolerance, taken_back)
_FIRST = (first_cut, first_cut_gpt, first_cut_copies)
ALONE: dict[str, Callable[[], Training]] = {
    each.__name__: each for each in (*_ALONE, two_optimizers, compiled, *_FIRST)
}
RESUMED = ("readme", "regrowth", "two_four", "tolerance", "two_optimizers", "first_cut_copies")
"""Runs that are also played with a stop in their middle: nothing may differ."""
