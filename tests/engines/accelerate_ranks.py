"""A run of Accelerate on two ranks, and the rest of one from its fifth step: started by torchrun, as DDP or FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path

import fsdp_on_cpu
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, TensorDataset

import setpoint

STEPS = 12


def run(folder: Path, fsdp: bool, resume: bool = False) -> tuple[Tensor, setpoint.Loop]:
    torch.manual_seed(0)
    AcceleratorState._reset_state(True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False) if fsdp else None
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    data = TensorDataset(torch.randn(96, 16), torch.randint(4, (96,)))
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4))
    assert isinstance(model, FSDPModule) == fsdp
    own = folder / f"loop-{dist.get_rank()}.pt"
    if fsdp and resume:  # PyTorch makes the optimizer's state by a step, which the loop must not count
        get_optimizer_state_dict(model, optimizer.optimizer)
    example = (data.tensors[0][:4],)
    loop = setpoint.attach(model, optimizer, "50% flops", total_steps=STEPS, example=example, resume=not fsdp)
    if resume:
        if fsdp:
            loop.load_state_dict(torch.load(own, weights_only=True))
        accelerator.load_state(str(folder / "5"))
    for step, (x, y) in enumerate(loader):
        if not loop.step <= step < STEPS:
            continue
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        if loop.step == 5 and not resume:
            accelerator.save_state(str(folder / "5"))
            torch.save(loop.state_dict(), own)
    summary = loop.finish()
    assert summary.budget_met and summary.resizes and summary.steps == STEPS
    with setpoint.unsharded(accelerator.unwrap_model(model)) as whole:
        return torch.cat([each.detach().flatten() for each in whole.parameters()]), loop


if __name__ == "__main__":
    fsdp_on_cpu.allow()
    whole, loop = run(Path(sys.argv[1]), sys.argv[2] == "fsdp2")
    again, other = run(Path(sys.argv[1]), sys.argv[2] == "fsdp2", resume=True)
    assert dist.get_world_size() == 2 and torch.equal(whole, again)
    assert [entry.dropped for entry in loop.ledger] == [entry.dropped for entry in other.ledger]
    print("alike", flush=True)
