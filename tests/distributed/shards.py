"""Checks of models that `fully_shard` has spread over ranks; each is a function that every rank runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import setpoint
from distributed.training import (
    attached,
    batch,
    build,
    caught,
    everywhere,
    reads_as_alone,
    regrowing,
    same_as_alone,
    share,
    story,
    train,
    whole,
)
from golden.models import Sampled
from loop.test_regrowth import Net, Scripted
from setpoint.actuator import shrink as shrink_module
from setpoint.errors import CheckpointError, LoopError, RankError
from setpoint.host import sharded as sharding
from setpoint.sensor.magnitude import MagnitudeSensor
from setpoint.sensor.reading import Traits
from setpoint.weights.masking import Masking

HALF = setpoint.Budget.fraction(0.5, of="flops")
DROP = {3: {"up": [1, 5], "stem": [4]}, 5: {"up": [0], "wide": [7]}}


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    """A model of which some modules are communicated by themselves, and the rest together."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = (model.wide, model.up, [model.mix, model.stream]) if isinstance(model, Sampled) else (model.inner,)
    for part in parts:
        fully_shard(part, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def contents(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """All weights and moments, whole."""
    tensors = [*model.parameters(), *(v for p in model.parameters() for v in optimizer.state[p].values())]
    return [whole(tensor.detach()).clone() for tensor in tensors]


def sharded_twin() -> None:
    """Losses, plans, weights and moments are those of one process on the same batches, over cuts and returns."""
    model = sharded(build())
    parameters = list(model.parameters())
    same_as_alone(model, contents, rtol=1e-6)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


class Recomputed(Sampled):
    """The net that keeps no activations of some layers, but computes them again."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.mix(torch.relu(checkpoint(self.wide, x, use_reentrant=False))).mean((2, 3))
        up = checkpoint(self.up, self.stream(x), use_reentrant=False)
        return self.head(x + self.down(nn.functional.gelu(up)))


def sharded_options() -> None:
    """However it was sharded: after cuts it trains on, bit for bit, like the small model sharded afresh that way; hooks
    on parameters, and modules, go on as well.
    """
    setpoint.regrowth.regrowing._PROBE_SHARE = 0.0  # what is computed again would miss the resting units
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    goes_on_like_a_fresh_one(Sampled, reshard_after_forward=False)
    goes_on_like_a_fresh_one(Sampled, momentum=True, dtype=torch.bfloat16, reshard_after_forward=True, mp_policy=low)
    goes_on_like_a_fresh_one(Recomputed)
    goes_on_like_a_fresh_one(Sampled, compiled=True)


def goes_on_like_a_fresh_one(
    kind: type[nn.Module],
    momentum: bool = False,
    compiled: bool = False,
    dtype: torch.dtype = torch.float64,
    shard: Callable[..., nn.Module] = sharded,
    **settings: Any,
) -> None:
    """After cuts it trains on, bit for bit, like the small model sharded afresh with these settings."""

    def make(model: nn.Module) -> tuple[nn.Module, Any, Any]:
        model = shard(model, **settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
        if momentum:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, torch.compile(model, backend="eager") if compiled else model

    folder = everywhere(tempfile.mkdtemp())[0]
    model, optimizer, called = make(build(kind))
    _, loop = attached(called, Scripted(DROP, regrow=False), share(0)[0], optimizer=optimizer, verify=True)
    seen: set[Any] = set()
    model.up.register_forward_pre_hook(lambda module, *_: seen.add((module.weight.dtype, *module.weight.shape)))
    model.up.weight.register_post_accumulate_grad_hook(lambda p: seen.add(tuple(p.grad.shape)))
    train(called, optimizer, loop, range(6), share)
    assert loop.widths == {"stem": 7, "wide": 19, "up": 21}, loop.widths
    assert {(dtype, n, 12) for n in (24, 22, 21)} | {(n, 12) for n in (24, 22, 21)} == seen
    assert np.isfinite(loop.reading().saliency["up"]).all() and loop.reading().saliency["up"].min() > 0
    loop.detach()
    with setpoint.unsharded(model):
        if dist.get_rank() == 0:
            setpoint.save(model, f"{folder}/small")
    dist.barrier()
    fresh, other, called_fresh = make(setpoint.load(f"{folder}/small", into=build(kind)))
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local())
        other.state[b] = {key: value.clone() for key, value in optimizer.state[a].items()}
    ours = train(called, optimizer, None, range(6, 9), share)
    assert ours == train(called_fresh, other, None, range(6, 9), share)
    assert all(torch.equal(a, b) for a, b in zip(contents(model, optimizer), contents(fresh, other), strict=True))


def sharded_invisible() -> None:
    """With a budget of 1.0 it trains bit for bit as without; the model may be called in between."""

    def run(attach: bool) -> tuple[list[float], list[Tensor]]:
        model = sharded(build())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        whole_budget = setpoint.Budget.fraction(1.0, of="flops")
        loop = attached(model, None, share(0)[0], optimizer=optimizer, budget=whole_budget)[1] if attach else None
        losses = []
        for step in range(4):
            losses += train(model, optimizer, loop, range(step, step + 1), share)
            with torch.no_grad():
                losses.append(model(share(9)[0]).sum().item())
        return losses, contents(model, optimizer)

    (losses, tensors), (expected, others) = run(True), run(False)
    assert losses == expected and all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def sharded_failures() -> None:
    """A cut or a return that fails on one rank, wherever, is put back on all, to the last bit, and the run goes on."""
    rank = dist.get_rank()
    model = sharded(build())
    script = Scripted({3: {"up": [1, 4]}, 6: {"up": [0]}, 9: {"up": [2]}}, {12: {"up": [1]}, 14: {"up": [4]}})
    optimizer, loop = attached(model, script, share(0)[0])
    run = (model, optimizer, loop)
    train(*run, range(5), share)

    def no_memory(*args: Any) -> None:
        raise MemoryError("of the host")

    for step, (where, name) in {
        6: (shrink_module, "swap"),
        9: (sharding, "_sharded_anew"),
        12: (shrink_module, "swap"),
        14: (sharding, "_sharded_anew"),
    }.items():
        before: list[Tensor] = []
        handle = optimizer.register_step_post_hook(lambda *_, seen=before: seen.extend(contents(model, optimizer)))
        list_of_hooks = optimizer._optimizer_step_post_hooks
        list_of_hooks.move_to_end(handle.id, last=False)
        train(*run, range(loop.step, step - 1), share)
        before.clear()
        works = getattr(where, name)
        setattr(where, name, no_memory if rank else works)
        text = "host" if rank else "failed on rank 1 with MemoryError: of the host"
        error = MemoryError if rank else RankError
        caught(error, text, lambda step=step: train(*run, range(step - 1, step), share))
        setattr(where, name, works)
        handle.remove()
        after = contents(model, optimizer)
        assert loop.widths["up"] == model.up.out_features and len(before) == len(after)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        optimizer.zero_grad()
    assert loop.control.actuator.reserve.resting["up"].nonzero()[0].tolist() == [1, 4]
    assert np.isfinite(train(*run, range(14, 16), share)).all()
    loop.detach()


def sharded_adapters() -> None:
    """Outgoing weights that are frozen from the beginning are read through hooks, as in one process, over a cut."""
    # Not clipped: what hooks read of a sharded model has the scale of gradients as they arrive.
    reads_as_alone(sharded, largest_norm=1e9)


def sharded_buffers() -> None:
    """Running statistics, which each rank has of its own, rest and come back on the rank whose they are."""
    setpoint.regrowth.regrowing._PROBE_SHARE = 1.0
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(build(Net), mesh=mesh)
    units = [1, 4, 9]

    def data(step: int) -> tuple[Tensor, Tensor]:
        x, y = share(step)
        return x * (1 + dist.get_rank()), y

    optimizer, loop = attached(model, Scripted({3: {"inner.0": units}}, {6: {"inner.0": units}}), data(0)[0])
    statistics = model.inner[1].running_mean  # type: ignore[index, union-attr]
    train(model, optimizer, loop, range(2), data)
    seen: list[Tensor] = []
    handle = optimizer.register_step_pre_hook(lambda *_: seen.append(statistics.clone()))
    train(model, optimizer, loop, range(2, 6), data)
    handle.remove()
    loop.detach()
    assert len(seen[-1]) == len(statistics) - len(units)
    torch.testing.assert_close(statistics[units], seen[0][units], rtol=0, atol=0)
    assert len({tuple(each) for each in everywhere(statistics[units].tolist())}) == dist.get_world_size()


def sharded_resume() -> None:
    """A run goes on bit for bit in freshly built sharded models, from a checkpoint that `torch.distributed.checkpoint`
    has written and the loop's state beside it, while units rest and rise, with what each rank had for itself.
    """
    setpoint.regrowth.regrowing._PROBE_SHARE = 1.0

    def start(resumes: bool) -> dict[str, Any]:
        model, ema = sharded(build()), sharded(build())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
        if resumes:  # PyTorch makes the optimizer's state by a step, which the loop must not count
            get_state_dict(model, optimizer)
        _, loop = attached(model, regrowing(), share(0)[0], optimizer=optimizer, copies=(ema,))
        return {"model": model, "optimizer": optimizer, "loop": loop, "ema": ema}

    def states(parts: dict[str, Any]) -> dict[str, Any]:
        model, optimizer = get_state_dict(parts["model"], parts["optimizer"])
        return {"model": model, "optimizer": optimizer, "ema": parts["ema"].state_dict()}

    def go(parts: dict[str, Any], steps: range) -> list[float]:
        return train(*(parts[name] for name in ("model", "optimizer", "loop")), steps, share)

    folder, own = Path(everywhere(tempfile.mkdtemp())[0]), f"loop-{dist.get_rank()}.pt"
    run = start(resumes=False)
    for step in (7, 18):
        go(run, range(run["loop"].step, step))
        reserve = run["loop"].control.actuator.reserve
        total = sum(rest.count * rest.values.itemsize for rest in reserve.tensors.values())
        each = everywhere(reserve.num_bytes)
        assert reserve.origins() and sum(each) == total > 0
        assert max(each) - min(each) <= 8 * dist.get_world_size() * len(reserve.tensors)
        with torch.no_grad():
            run["model"](share(0)[0])  # which leaves some of it whole
        dcp.save(states(run), checkpoint_id=folder / f"{step}")
        torch.save(run["loop"].state_dict(), folder / f"{step}" / own)
    rest = go(run, range(18, 28))
    for step in (7, 18):
        again = start(resumes=True)
        again["loop"].load_state_dict(torch.load(folder / f"{step}" / own, weights_only=True))
        found = states(again)
        dcp.load(found, checkpoint_id=folder / f"{step}")
        set_state_dict(
            again["model"],
            again["optimizer"],
            model_state_dict=found["model"],
            optim_state_dict=found["optimizer"],
        )
        assert again["loop"].step == step
        assert go(again, range(step, 28))[-len(rest) :] == rest
        assert story(again["loop"]) == story(run["loop"]) and len(story(run["loop"])) > 10
        for name in ("model", "ema"):
            for a, b in zip(again[name].parameters(), run[name].parameters(), strict=True):
                assert torch.equal(a.to_local(), b.to_local())


def sharded_own_states() -> None:
    """`torch.distributed.checkpoint.state_dict` reads and writes a cut model and its optimizer, sharded and whole, in
    the middle of a run; a dense model that is sharded refuses a cut state by name, and takes it if it is cut before.
    """
    model = sharded(build())
    optimizer, loop = attached(model, Scripted(DROP, regrow=False), share(0)[0])
    train(model, optimizer, loop, range(5), share)
    for options in (StateDictOptions(), StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)):
        # Copies, since shards are the model's own.
        weights = {name: each.clone() for name, each in get_model_state_dict(model, options=options).items()}
        moments = get_optimizer_state_dict(model, optimizer, options=options)
        assert (
            weights["up.weight"].shape[0] == moments["state"]["up.weight"]["exp_avg"].shape[0] == loop.widths["up"] < 24
        )
        before = contents(model, optimizer)
        with torch.no_grad():
            for each in model.parameters():
                each.mul_(2.0)
        set_model_state_dict(model, weights, options=options)
        set_optimizer_state_dict(model, optimizer, moments, options=options)
        assert all(map(torch.equal, before, contents(model, optimizer)))
    assert loop.step == 5
    train(model, optimizer, loop, range(5, 8), share)
    weights = get_model_state_dict(model)
    dense = setpoint.resumable(sharded(build()))
    caught(CheckpointError, "a sharded model cannot be cut to a state", lambda: set_model_state_dict(dense, weights))
    caught(RuntimeError, "size mismatch for", lambda: set_model_state_dict(sharded(build()), weights))
    small = sharded(setpoint.shrink_to(build(), weights, example=(share(0)[0],)))
    set_model_state_dict(small, weights)
    torch.testing.assert_close(small(share(0)[0]), model(share(0)[0]))


def sharded_copies() -> None:
    """Copies of the model are cut and regrown alike, whether they are sharded or whole."""
    setpoint.regrowth.regrowing._PROBE_SHARE = 1.0
    model, apart, together = sharded(build()), sharded(build()), build()
    script = Scripted({3: {"up": [1, 5], "wide": [0, 2]}}, {6: {"up": [5]}})
    optimizer, loop = attached(model, script, share(0)[0], copies=(apart, together), verify=True)
    train(model, optimizer, loop, range(8), share)
    assert loop.widths["up"] == 23 and together.up.weight.shape == (23, 12)
    loop.detach()
    expected = build().down.weight.detach()[:, [n for n in range(24) if n != 1]]
    expected[:, 4] = 0.0  # unit 5 came back with outgoing weights at zero
    torch.testing.assert_close(together.down.weight.detach(), expected)
    for a, b in zip(apart.parameters(), together.parameters(), strict=True):
        assert torch.equal(whole(a), b)
    torch.testing.assert_close(apart(batch(0)[0]), together(batch(0)[0]))


def sharded_refusals() -> None:
    """What cannot follow a cut is refused by name, before or at the first step, on all ranks."""
    never, x = Scripted({}, regrow=False), share(0)[0]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def refused(text: str, model: nn.Module, **settings: Any) -> None:
        caught(settings.pop("error", LoopError), text, lambda: attached(model, never, x, **settings))

    refused("shard_placement_fn", sharded(build(), shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None))
    part = build()
    fully_shard(part.up, mesh=mesh)
    refused("stem.weight outside of it", part)
    refused("single weights", sharded(build()), actuator=Masking())

    class Blind(MagnitudeSensor):
        traits = Traits(shards=False)

    refused("Blind does not say that it can read", sharded(build()), sensor=Blind())
    later = build()
    optimizer, loop = attached(later, never, x)
    sharded(later)
    caught(
        LoopError,
        "was called on the model after attach",
        lambda: train(later, optimizer, loop, range(1), share),
    )
    spread = sharded(build())
    caught(LoopError, "find_groups before", lambda: setpoint.find_groups(spread, (x,)))
    with setpoint.unsharded(spread):
        groups = setpoint.find_groups(spread, (x,))
    assert [each.name for each in groups] == ["stem", "wide", "mix", "up"]
    caught(CheckpointError, "inside `with setpoint.unsharded(model):`", lambda: setpoint.save(spread, "nowhere"))
    caught(CheckpointError, "torch.distributed.checkpoint", lambda: setpoint.save_run("nowhere", model=spread))
