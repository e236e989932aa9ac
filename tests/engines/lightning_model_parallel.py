"""A run of Lightning's ModelParallelStrategy on two ranks, as FSDP2 or with tensor parallelism: started by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

import setpoint
from setpoint.integrations.lightning import SetpointCallback


class Coder(LightningModule):
    """An MLP that is sharded, or split by tensor parallelism, when the strategy asks for it."""

    def __init__(self, tensor_parallel: bool) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 6))

    def configure_model(self) -> None:
        if self.tensor_parallel:
            styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], styles)
        else:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def run(folder: Path, tensor_parallel: bool) -> Tensor:
    torch.manual_seed(0)
    model, callback = Coder(tensor_parallel), SetpointCallback(0.5)
    sizes = (1, 2) if tensor_parallel else (2, 1)
    trainer = Trainer(
        max_epochs=10,
        callbacks=[callback, ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")],
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(*sizes, process_group_backend="gloo"),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(torch.randn(64, 6, generator=torch.Generator().manual_seed(0))), batch_size=8)
    trainer.fit(model, data, weights_only=True)
    assert dist.get_world_size() == 2 and callback.summary is not None and callback.summary.budget_met
    with setpoint.unsharded(model) as whole:
        return torch.cat([each.detach().flatten() for each in whole.parameters()])


if __name__ == "__main__":
    tensor_parallel = sys.argv[2] == "tp"
    run(Path(sys.argv[1]), tensor_parallel)
    print("trained", flush=True)
