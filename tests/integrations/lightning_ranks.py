"""A run of Lightning on two ranks, and the rest of one from its third epoch: Lightning starts this script once more."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from setpoint.integrations.lightning import SetpointCallback


class Coder(LightningModule):
    """Calls two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 6))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert dist.get_world_size() == 2
        return nn.functional.mse_loss(self.decoder(self.encoder(batch[0])), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def run(folder: Path, ckpt_path: Path | None = None) -> Tensor:
    model, callback = Coder(), SetpointCallback(0.5)
    saving = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    trainer = Trainer(
        max_epochs=10,
        callbacks=[callback, EMAWeightAveraging(decay=0.9), saving],
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(torch.randn(64, 6, generator=torch.Generator().manual_seed(0))), batch_size=8)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    assert callback.loop is not None and callback.loop.step == 40
    assert callback.summary is not None and callback.summary.budget_met
    weights = torch.cat([each.detach().flatten() for each in model.parameters()])
    both = [torch.zeros_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    assert torch.equal(*both)
    return weights


if __name__ == "__main__":
    torch.manual_seed(0)
    whole = run(Path(sys.argv[1]))
    assert torch.equal(run(Path(sys.argv[1], "again"), Path(sys.argv[1], "epoch=2.ckpt")), whole)
    print("alike")
