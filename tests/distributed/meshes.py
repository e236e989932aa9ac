"""Checks of models on meshes of two dims, and of tensor parallelism; each is a function that every rank runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import setpoint
from distributed.shards import contents, goes_on_like_a_fresh_one
from distributed.training import (
    attached,
    batch,
    build,
    caught,
    everywhere,
    same_as_alone,
    share,
    story,
    train,
    uneven,
)
from golden.models import Sampled
from loop.test_regrowth import Scripted
from setpoint.actuator import shrink as shrink_module
from setpoint.controller.priced import PricedController
from setpoint.controller.schedule import Schedule
from setpoint.errors import LoopError, RankError


def square(names: tuple[str, str] = ("copies", "shards")) -> Any:
    """A mesh of two dims, of two ranks each where there are four."""
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=names)


def hybrid(model: nn.Module, **settings: Any) -> nn.Module:
    """Sharded over two ranks, with as many copies of the shards as ranks allow (HSDP)."""
    for part in (model.wide, model.up, [model.mix, model.stream]):
        fully_shard(part, mesh=square(), **settings)
    return fully_shard(model, mesh=square(), **settings)


def hybrid_twin() -> None:
    """HSDP: losses, plans, weights and moments are those of one process, over cuts and returns."""
    model = hybrid(build())
    parameters = list(model.parameters())
    same_as_alone(model, contents, rtol=1e-6)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


class Tokens(nn.Module):
    """A small transformer, of 36 tokens of two features, whose forward asks for as many heads as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.last = nn.Linear(2, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2).mT[:, ::6])
        y = self.norm(x)
        q, k, v = (part(y).unflatten(-1, (-1, 3)).transpose(1, 2) for part in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(heads)
        return self.head((x + self.down(nn.functional.gelu(self.up(self.last(x))))).mean(1))


PLAN: dict[str, Any] = {name: ColwiseParallel for name in ("q", "k", "v", "up")} | dict.fromkeys(
    ("o", "down"), RowwiseParallel
)


def parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Attention and MLP split over ranks by tensor parallelism."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    return parallelize_module(model, mesh, {name: style() for name, style in PLAN.items()})


def both(model: nn.Module) -> nn.Module:
    """Tensor parallelism over two ranks, and `fully_shard` over the others."""
    mesh = square(("dp", "tp"))
    parallel(model, mesh["tp"])
    for part in ([model.q, model.k, model.v, model.o], model.up):
        fully_shard(part, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


DROP = {2: {"up": [0, 1, 2, 5]}, 4: {"q": [1, 2, 3, 6]}}


def _cut_as_alone(spread: Any, shares: int, rtol: float = 1e-12, **settings: Any) -> None:
    """Losses, readings, widths, weights and moments are those of one process on the same global batches."""

    def data(step: int) -> tuple[Tensor, Tensor]:
        x, y = batch(step)
        own = dist.get_rank() * shares // dist.get_world_size()
        return x.chunk(shares)[own], y.chunk(shares)[own]

    found = []
    for alone in (False, True):
        model = build(Tokens) if alone else spread(build(Tokens))
        taken = batch if alone else data
        chosen = {"controller": Scripted(DROP, regrow=False), "verify": True, **settings}
        optimizer, loop = attached(model, chosen.pop("controller"), taken(0)[0], **chosen)
        losses = train(model, optimizer, loop, range(8), taken, largest_norm=np.inf)
        if not alone:
            losses = [sum(each) / len(each) for each in zip(*everywhere(losses), strict=True)]
        found.append((losses, loop.reading().saliency, loop.widths, contents(model, optimizer), story(loop)))
        if not alone:
            with setpoint.unsharded(model):
                small = model(batch(9)[0])
        else:
            torch.testing.assert_close(small, model(batch(9)[0]), rtol=rtol, atol=1e-12)
        loop.detach()
    (losses, saliency, widths, tensors, plans), (losses_alone, alone, widths_alone, others, plans_alone) = found
    assert widths == widths_alone and plans == plans_alone and plans, (widths, widths_alone)
    torch.testing.assert_close(losses, losses_alone, rtol=rtol, atol=0)
    for name, values in alone.items():
        torch.testing.assert_close(torch.tensor(saliency[name]), torch.tensor(values), rtol=1e3 * rtol, atol=1e-18)
    for a, b in zip(tensors, others, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


def tensor_parallel() -> None:
    """Attention and MLP under tensor parallelism: all is as in one process to 1e-12, over cuts in even shards."""
    _cut_as_alone(parallel, 1)


def two_dims() -> None:
    """The same under `fully_shard` as well, each over its own dim of the mesh."""
    _cut_as_alone(both, dist.get_world_size() // 2)


def refitted() -> None:
    """The usual cut, with which layers are refitted from what all ranks were given, is that of one process."""
    groups = setpoint.find_groups(build(Tokens), (batch(0)[0],))
    in_blocks = [replace(each, multiple_of=2, only_blocks=True, min_units=2) for each in groups if each.name != "stem"]
    usual = {"controller": PricedController(Schedule.at_once()), "groups": in_blocks}
    _cut_as_alone(parallel, 1, 1e-9, **usual)


def hybrid_options() -> None:
    """HSDP, offloaded to the CPU and in mixed precision: after cuts it trains on, bit for bit, like the small model
    sharded afresh that way; so does one dim with offload, and tensor parallelism under `fully_shard`.
    """
    setpoint.regrowth.regrowing._PROBE_SHARE = 0.0
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    host = CPUOffloadPolicy(pin_memory=False)
    goes_on_like_a_fresh_one(Sampled, shard=hybrid, reshard_after_forward=False)
    goes_on_like_a_fresh_one(Sampled, shard=hybrid, dtype=torch.bfloat16, mp_policy=low, offload_policy=host)
    goes_on_like_a_fresh_one(Sampled, momentum=True, offload_policy=host)


def uneven_batches() -> None:
    """Batches that are smaller on some ranks, and in some steps: all ranks cut alike, and go on."""
    model = fully_shard(build(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    script = Scripted({2: {"up": [1, 5]}, 4: {"wide": [7]}}, regrow=False)
    optimizer, loop = attached(model, script, share(0)[0])
    assert np.isfinite(train(model, optimizer, loop, range(6), uneven)).all()
    assert all(each == (story(loop), loop.widths) for each in everywhere((story(loop), loop.widths)))
    assert loop.widths["up"] == 22 and loop.widths["wide"] == 19
    loop.detach()


def lost_in_a_cut() -> None:
    """Where a rank dies in the middle of a cut, the others stop with an error that says so."""
    optimizer, loop = attached(model := parallel(build(Tokens)), Scripted(DROP, regrow=False), batch(0)[0])
    if dist.get_rank() == 1:
        shrink_module.swap = lambda *_: os._exit(0)
    words = "a rank was lost at the cut after step 2"
    caught(RankError, words, lambda: train(model, optimizer, loop, range(3), batch, largest_norm=np.inf))


def mesh_refusals() -> None:
    """What does not fit on a mesh is refused by name on every rank, before the first step."""
    never, count = Scripted({}, regrow=False), dist.get_world_size()

    def refused(error: type[Exception], text: str, model: nn.Module, **settings: Any) -> None:
        caught(error, text, lambda: attached(model, never, batch(0)[0], **settings))
        assert everywhere(dist.get_rank()) == list(range(count))

    uneven = build(Tokens)
    uneven.up, uneven.down = nn.Linear(8, 15).double(), nn.Linear(15, 8).double()
    refused(LoopError, f"the 15 units of group 'up' are split over {count} ranks", parallel(uneven))
    torch.manual_seed(dist.get_rank())
    refused(RankError, "rank 1 in weights", parallel(Tokens().double()))


def _state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def resume_elsewhere() -> None:
    """A run that four ranks have saved under `fully_shard` goes on from the very same weights and moments on two ranks,
    on a mesh of two dims, and under tensor parallelism, to the same losses and cuts as on the four.
    """
    assert dist.get_world_size() == 4
    folder, line = everywhere(tempfile.mkdtemp())[0], init_device_mesh("cpu", (4,))
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("apart", "shards"))["shards"]

    def over(mesh: Any) -> Callable[[nn.Module], nn.Module]:
        return lambda model: fully_shard(model, mesh=mesh)

    def start(spread: Callable[[nn.Module], nn.Module], resumes: bool) -> tuple[Any, Any, setpoint.Loop]:
        model = spread(build(Tokens))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
        if resumes:
            get_state_dict(model, optimizer)
        # FLOPs are counted on the share of a rank of those on which the run began.
        sensor, script = (
            setpoint.TaylorSensor(num_samples=16),
            Scripted({**DROP, 6: {"up": [0, 1, 2, 3]}}, regrow=False),
        )
        return model, *attached(model, script, batch(0)[0][:4], optimizer=optimizer, sensor=sensor)

    def go(run: tuple[Any, ...], steps: range, shares: int, own: int) -> list[float]:
        return train(
            *run, steps, lambda step: tuple(part.chunk(shares)[own] for part in batch(step)), largest_norm=np.inf
        )

    run = start(over(line), False)
    go(run, range(5), 4, dist.get_rank())
    dcp.save(_state(*run[:2]), checkpoint_id=folder)
    saved, state = contents(*run[:2]), run[2].state_dict()
    losses = np.mean(everywhere(go(run, range(5, 8), 4, dist.get_rank())), 0)
    for spread, group, shares, own in (
        (over(pairs), pairs.get_group(), 2, dist.get_rank() % 2),
        (over(square()), None, 4, dist.get_rank()),
        (parallel, None, 1, 0),
        (both, None, 2, dist.get_rank() // 2),
    ):
        again = start(spread, True)
        again[2].load_state_dict(state)
        found = _state(*again[:2])
        dcp.load(found, checkpoint_id=folder, process_group=group)
        set_state_dict(*again[:2], model_state_dict=found["model"], optim_state_dict=found["optimizer"])
        assert all(map(torch.equal, contents(*again[:2]), saved)) and again[2].step == 5
        others = np.mean(everywhere(go(again, range(5, 8), shares, own)), 0)
        np.testing.assert_allclose(others, losses, rtol=1e-12)
        assert story(again[2]) == story(run[2]) and len(story(run[2])) == 3
