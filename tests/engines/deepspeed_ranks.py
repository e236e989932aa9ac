"""DeepSpeed's engine and its ZeRO optimizer on two ranks, which are refused by name on both: started by torchrun."""

from __future__ import annotations

import sys

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import setpoint
from setpoint.errors import LoopError, OptimizerError


def main(stage: int) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled first
    deepspeed.init_distributed("gloo")
    model, x = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(4, 16)
    adam = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "optimizer": adam}
    engine, optimizer, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for given, kind in ((engine, LoopError), (model, OptimizerError)):
        try:
            setpoint.attach(given, optimizer, "50% flops", total_steps=12, example=(x,))
        except kind as error:
            assert "DeepSpeed" in str(error) and "fully_shard" in str(error), error
        else:
            raise AssertionError("DeepSpeed was taken")
    engine.backward(engine(x).square().mean())  # all are as they were
    engine.step()
    assert dist.get_world_size() == 2
    print("refused", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
