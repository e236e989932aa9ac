"""Lightning: one callback prunes what a Trainer trains; its checkpoints, averages and best model work as ever.

It shows: `SetpointCallback(0.5)` beside a moving average and a ModelCheckpoint, `fit(ckpt_path=...)` from the middle of
a run, bit for bit, and the best model by `load_from_checkpoint`.

    pip install './setpoint[lightning]'
    python examples/lightning_trainer.py
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import setpoint
from setpoint.integrations.lightning import SetpointCallback

EPOCHS = 10


class Classifier(LightningModule):
    """A module as any other: nothing in it knows of pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 16))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Calls two parts of the module, both of which are pruned."""
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.encoder(x)), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """What ModelCheckpoint watches."""
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.head(self.encoder(x)), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Its states shrink with the model."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def data(seed: int) -> DataLoader[Any]:
    """Points of three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=32)


def fit(folder: Path, ckpt_path: Path | None = None) -> tuple[Classifier, SetpointCallback, ModelCheckpoint]:
    """A run, or the rest of one."""
    model, callback = Classifier(), SetpointCallback(0.5)
    best = ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1, filename="{epoch}")
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=[callback, EMAWeightAveraging(decay=0.9), best],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data(0), data(1), ckpt_path=ckpt_path, weights_only=True)
    return model, callback, best


def main() -> None:
    """Train, go on from the third epoch, and load the best model."""
    with tempfile.TemporaryDirectory() as folder:
        model, callback, best = fit(Path(folder, "whole"))
        assert callback.loop is not None and callback.summary is not None and callback.summary.budget_met
        share = callback.summary.final_flops / callback.summary.dense_flops
        print(f"{share:.3f} of the dense FLOPs; units: {callback.loop.widths}")

        again, _, _ = fit(Path(folder, "again"), ckpt_path=Path(folder, "whole", "epoch=2.ckpt"))
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        print("gone on from epoch 2: the same weights to the bit")

        setpoint.enable_checkpointing()
        loaded = Classifier.load_from_checkpoint(best.best_model_path)
        print(
            f"best model: {Path(best.best_model_path).name}, {loaded.encoder[0].out_features} units in its first layer"
        )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # Lightning's advice on workers, loggers and the like
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
