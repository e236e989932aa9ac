"""Lightning: one callback prunes what a Trainer trains, whatever else the Trainer does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import setpoint
from setpoint.controller.priced import PricedController
from setpoint.errors import LoopError, NotBegunError

lightning = pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from setpoint.integrations.lightning import SetpointCallback  # noqa: E402

BATCHES, EPOCHS = 2, 20
STEPS = BATCHES * EPOCHS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*litmodels|.*tensorboardX"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:.*sync_dist=True"),
    # Lightning's own use of PyTorch.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:To get the last learning rate computed by the scheduler"),
]


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """Lightning leaves its process group, and its port in the environment, until the process ends."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Three classes of points in six dimensions."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = (self.x @ torch.randn(6, 3, generator=generator)).argmax(1)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def mlp(norm: bool = False) -> nn.Sequential:
    norms = [nn.BatchNorm1d(24)] if norm else []
    return nn.Sequential(nn.Linear(6, 24), *norms, nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


class Classifier(LightningModule):
    """Calls itself in training."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.net = mlp(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def data() -> DataLoader[Any]:
    return DataLoader(Points(BATCHES * 8), batch_size=8)


def trainer(tmp_path: Path, *callbacks: Any, kind: Any = Trainer, **settings: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": False, "default_root_dir": tmp_path, **quiet, **settings}
    return kind(callbacks=list(callbacks), **settings)


def fitted(tmp_path: Path, model: LightningModule, *callbacks: Any, **settings: Any) -> SetpointCallback:
    """The callback after a whole run that has met its budget."""
    callback = next(each for each in callbacks if isinstance(each, SetpointCallback))
    fit = {"ckpt_path": settings.pop("ckpt_path", None), "weights_only": True}
    validation = [data()] if isinstance(model, Classifier) else []
    trainer(tmp_path, *callbacks, **settings).fit(model, data(), *validation, **fit)
    assert callback.summary is not None and callback.summary.budget_met and callback.summary.resizes
    return callback


class Watch(Callback):
    """Keeps the rows of the first layer after each step and at the start of each epoch, by their dense index."""

    def __init__(self, callback: SetpointCallback) -> None:
        self.callback, self.steps, self.epochs = callback, list[Any](), list[Any]()

    def rows(self, model: Any) -> dict[int, Tensor]:
        """Weights by the index that a unit has in the dense model."""
        weight = model.net[0].weight.detach()
        try:
            origin = self.callback.loop.origin["net.0"]
        except NotBegunError:
            origin = np.arange(24)
        return {int(unit): row.clone() for unit, row in zip(origin, weight, strict=True)}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append(self.rows(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.steps.append(self.rows(pl_module))


class Save(Callback):
    """A checkpoint at the end of each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def same(left: Any, right: Any) -> bool:
    """Whether two state dicts or nested values are the same to the bit."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(each, right[key]) for key, each in left.items())
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def outcome(model: LightningModule, callback: SetpointCallback) -> Any:
    """Weights, and what was decided."""
    loop = callback.loop
    assert loop is not None
    entries = [(each.step, dict(each.widths), each.reason) for each in loop.ledger]
    return dict(model.state_dict()), entries, loop.price, loop.step


def test_one_callback_meets_the_budget_with_a_live_optimizer(tmp_path: Path) -> None:
    """Claim: total steps come from the Trainer; after the cuts every moment fits its parameter and weights move."""
    model, callback = Classifier(), SetpointCallback(0.5)
    watch = Watch(callback)
    run = trainer(tmp_path, callback, watch)
    run.fit(model, data(), data())
    assert callback.summary is not None and callback.summary.budget_met
    assert callback.loop is not None and callback.loop.total_steps == callback.loop.step == STEPS
    state = run.optimizers[0].state
    assert all(state[each]["exp_avg"].shape == each.shape for each in model.parameters())
    assert all(not torch.equal(row, watch.steps[-2][unit]) for unit, row in watch.steps[-1].items())


class Coder(LightningModule):
    """Calls its parts in training, a loss and a part that is not trained among them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4)), mlp()
        self.decoder[0] = nn.Linear(4, 24)
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self.decoder(self.encoder(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_parts_that_training_step_calls_are_cut_and_accumulation_is_seen(tmp_path: Path) -> None:
    """Claim: a module without a forward of its own is pruned within its parts; FLOPs are of an optimizer step."""
    dense = []
    for accumulate in (1, 2):
        model, callback = Coder(), SetpointCallback(0.5)
        run = trainer(tmp_path, callback, accumulate_grad_batches=accumulate)
        run.fit(model, data())
        assert callback.summary is not None and callback.summary.budget_met
        assert callback.loop is not None and callback.loop.step == STEPS // accumulate == run.global_step
        assert {"encoder.0", "decoder.0"} <= callback.loop.widths.keys()
        assert model.encoder[2].out_features == model.decoder[0].in_features == 4
        assert "forward" not in vars(model)
        dense.append(callback.summary.dense_flops)
    assert dense[1] == 2 * dense[0]


class Adversaries(LightningModule):
    """Two optimizers by hand; the second network is called more often than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 6))
        self.judge = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        noise = torch.randn(len(batch[0]), 4)
        first.zero_grad()
        self.manual_backward(-self.judge(self.generator(noise)).mean())
        first.step()
        second.zero_grad()
        fake = self.generator(noise).detach()
        self.manual_backward((self.judge(fake) - self.judge(batch[0])).mean())
        second.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.generator, self.judge)]


@pytest.mark.parametrize("module", ["", "generator"])
def test_manual_optimization_with_several_optimizers(tmp_path: Path, module: str) -> None:
    """Claim: a step is one of all optimizers, though `max_steps` counts each; one network can be pruned alone."""
    torch.manual_seed(0)
    model, callback = Adversaries(), SetpointCallback(0.5, module=module)
    run = trainer(tmp_path, callback, max_steps=60, max_epochs=-1)
    run.fit(model, data())
    assert callback.summary is not None and callback.summary.budget_met
    assert callback.loop is not None and callback.loop.step == callback.loop.total_steps == 30
    assert model.generator[0].out_features < 32
    assert (model.judge[0].out_features < 32) == (module == "")
    for optimizer in run.optimizers:
        assert all(state["exp_avg"].shape == each.shape for each, state in optimizer.state.items())


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_the_moving_average_is_right(tmp_path: Path, first: bool) -> None:
    """Claim: what `EMAWeightAveraging` leaves at the end is, for each unit that stayed, the average of its history."""
    model, callback = Classifier(), SetpointCallback(0.5)
    watch, ema = Watch(callback), EMAWeightAveraging(decay=0.9)
    fitted(tmp_path, model, *((callback, ema) if first else (ema, callback)), watch)
    for unit, row in watch.rows(model).items():
        average = watch.steps[0][unit]
        for rows in watch.steps[1:]:
            average = 0.9 * average + 0.1 * rows[unit]
        torch.testing.assert_close(row, average)


def test_stochastic_weight_averaging_is_right_and_goes_on(tmp_path: Path) -> None:
    """Claim: the same for its mean over epochs; its epoch for batch norm, without any step, is not counted; and though
    it loads its average with its own state, a run goes on bit for bit.
    """
    model, callback = Classifier(norm=True), SetpointCallback(0.5)
    watch, averaging = Watch(callback), StochasticWeightAveraging(1e-2, swa_epoch_start=3)
    fitted(tmp_path, model, callback, averaging, watch, Save(tmp_path))
    assert callback.loop is not None and callback.loop.total_steps == callback.loop.step == STEPS
    for unit, row in watch.rows(model).items():
        history = [rows[unit] for rows in watch.epochs[2:EPOCHS]]
        torch.testing.assert_close(row, torch.stack(history).mean(0))
    again, other = Classifier(norm=True), SetpointCallback(0.5)
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=3)
    fitted(tmp_path, again, other, averaging, ckpt_path=tmp_path / "3.ckpt")
    assert same(list(outcome(again, other)), list(outcome(model, callback)))


@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "averaged"])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, averaged: bool) -> None:
    """Claim: `fit(ckpt_path=...)` into a dense model, before the first cut, between cuts and after the last one."""
    model, callback = Classifier(), SetpointCallback(0.5, controller=PricedController())
    fitted(tmp_path, model, callback, Save(tmp_path), *([EMAWeightAveraging(decay=0.9)] if averaged else []))
    sizes = []
    for epoch in (0, 3, 18):
        path = tmp_path / f"{epoch}.ckpt"
        saved = torch.load(path, weights_only=True)["state_dict"]
        sizes.append(sum(each.numel() for each in saved.values()))
        torch.manual_seed(epoch + 1)
        again, other = Classifier(), SetpointCallback(0.5, controller=PricedController())
        fitted(tmp_path, again, other, *([EMAWeightAveraging(decay=0.9)] if averaged else []), ckpt_path=path)
        assert same(list(outcome(again, other)), list(outcome(model, callback)))
    assert sum(each.numel() for each in mlp().parameters()) == sizes[0] > sizes[1] > sizes[2]


@pytest.mark.filterwarnings("ignore:.*loading a checkpoint outside the 'fit' stage")
@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "averaged"])
def test_the_best_model_is_found_again(tmp_path: Path, averaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: `test(ckpt_path="best")`, and `load_from_checkpoint` after `setpoint.enable_checkpointing()`, compute what
    the model did when it was saved, be it wider than the last one; without that line the error is PyTorch's.
    """
    monkeypatch.setattr(nn.Module, "load_state_dict", nn.Module.load_state_dict)
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_top_k=-1, filename="{epoch}")
    model = Classifier()
    callbacks = [SetpointCallback(0.5), *([EMAWeightAveraging(decay=0.5)] if averaged else []), best]
    run = trainer(tmp_path, *callbacks, enable_checkpointing=True, num_sanity_val_steps=0)
    run.fit(model, data(), data())
    run.test(model, data(), ckpt_path="best", verbose=False)
    # Where a Trainer averages, it takes the weights that it would go on with.
    saved = torch.load(best.best_model_path, weights_only=True)["current_model_state" if averaged else "state_dict"]
    assert same(dict(model.state_dict()), dict(saved))
    setpoint.enable_checkpointing()
    for epoch in (0, 3, 18):
        path = tmp_path / "best" / f"epoch={epoch}.ckpt"
        loaded = Classifier.load_from_checkpoint(path)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert same(dict(loaded.state_dict()), dict(saved)) and loaded.net[0].out_features == len(saved["net.0.bias"])
        scores = [
            trainer(tmp_path, *callbacks).test(each, data(), ckpt_path=given, verbose=False)
            for callbacks, each, given in (([], loaded, None), ([SetpointCallback(0.5)], Classifier(), path))
        ]
        assert scores[0] == scores[1]


def test_on_several_devices_the_wrapper_is_given(tmp_path: Path) -> None:
    """Claim: with DDP, where `training_step` comes through the wrapper's forward, what it calls is pruned."""
    for model, widths in ((Coder(), {"encoder.0", "decoder.0", "decoder.2"}), (Classifier(), {"net.0", "net.2"})):
        callback = fitted(tmp_path, model, SetpointCallback(0.5), strategy="ddp", devices=1)
        assert callback.loop is not None and set(callback.loop.widths) == widths


@pytest.mark.slow
def test_two_ranks_go_on_alike(tmp_path: Path) -> None:
    """Claim: on two ranks, weights stay alike, and a run goes on bit for bit from between two cuts."""
    script = Path(__file__).with_name("lightning_ranks.py")
    run = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.count("alike") == 2, done.stderr[-3000:]


@pytest.mark.parametrize("example", [None, (torch.zeros(8, 6),)], ids=["recorded", "given"])
def test_a_trainer_stops_when_its_bill_is_spent(tmp_path: Path, example: Any) -> None:
    """Claim: with enough steps it ends with its bill, within it; a run that begins at its end is refused and leaves the
    model as it is, with an example or without.
    """
    bill, last = {"flops": "50%", "flops/run": "100%"}, tmp_path / "checkpoints" / "last.ckpt"
    length = {"max_epochs": 10 * EPOCHS, "enable_checkpointing": True}
    first = SetpointCallback(bill, total_steps=STEPS, example=example)
    fitted(tmp_path, Classifier(), first, ModelCheckpoint(last.parent, save_last=True, save_top_k=0), **length)
    summary = first.summary
    assert summary is not None and STEPS < summary.steps == first.loop.total_steps < 10 * STEPS
    assert 0.97 * summary.limit_run["flops"] < summary.train_flops <= summary.limit_run["flops"]
    saved = torch.load(last, weights_only=True)
    model = Classifier()
    run = trainer(tmp_path, SetpointCallback(bill, total_steps=STEPS, example=example), **length)
    with pytest.raises(LoopError, match="has spent its budget: nothing is left to train"):
        run.fit(model, data(), data(), ckpt_path=last, weights_only=True)
    assert run.global_step == summary.steps
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in model.state_dict().items())


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    """Claim: given twice, of unknown length, or watching what nobody logs: an error that says so."""
    with pytest.raises(LoopError, match="to the Trainer twice"):
        trainer(tmp_path, SetpointCallback(0.5), SetpointCallback(0.4)).fit(Coder(), data())
    with pytest.raises(LoopError, match="does not know how many optimizer steps"):
        trainer(tmp_path, SetpointCallback(0.5), max_epochs=-1).fit(Coder(), data())
    wrong = SetpointCallback(0.5, monitor="accuracy")
    with pytest.raises(LoopError, match="no such metric was logged, but train_loss, val_loss"):
        trainer(tmp_path, wrong).fit(Classifier(), data(), data())


class Fails(Coder):
    """Breaks in its fifth epoch."""

    broken = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch == 5 and not Fails.broken:
            Fails.broken = True
            raise ArithmeticError("broken")
        return super().training_step(batch, batch_idx)


def test_an_exception_leaves_the_model_free_and_its_checkpoint_whole(tmp_path: Path) -> None:
    """Claim: a run goes on from the checkpoint that an exception left, with the same model and callback or new ones."""
    saving = ModelCheckpoint(tmp_path, save_on_exception=True, save_last=True)
    model, callback = Fails(), SetpointCallback(0.5)
    run = trainer(tmp_path, callback, saving, enable_checkpointing=True)
    with pytest.raises(ArithmeticError):
        run.fit(model, data())
    fitted(tmp_path, Coder(), SetpointCallback(0.5), ckpt_path=tmp_path / "last.ckpt")
    Fails.broken = False
    model, callback = Fails(), SetpointCallback(0.5)
    with pytest.raises(ArithmeticError):
        trainer(tmp_path, callback).fit(model, data())
    assert callback.loop is not None
    setpoint.attach(model, torch.optim.SGD(model.parameters(), 0.1), 0.5, total_steps=10).detach()


def test_a_tolerance_sees_the_validation_loss(tmp_path: Path) -> None:
    """Claim: with `monitor` the metric that the model logs is the loop's validation loss."""
    callback = SetpointCallback(setpoint.Tolerance(0.1), monitor="val_loss")
    trainer(tmp_path, callback).fit(Classifier(), data(), data())
    assert callback.loop is not None and any(each.val is not None for each in callback.loop.ledger)


def test_the_other_name_of_the_package(tmp_path: Path) -> None:
    """Claim: a Trainer of `pytorch_lightning` takes the callback, too."""
    other = pytest.importorskip("pytorch_lightning")

    class Model(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        configure_optimizers = Coder.configure_optimizers

    callback = SetpointCallback(0.5)
    trainer(tmp_path, callback, kind=other.Trainer).fit(Model(), data())
    assert callback.summary is not None and callback.summary.budget_met


class Fabric:
    """A loop of one's own with Fabric: `attach` is given what `setup` returns."""

    def __init__(self, strategy: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.fabric = lightning.Fabric(accelerator="cpu", devices=1, strategy=strategy, precision="bf16-mixed")
        self.fabric.launch()
        model = setpoint.resumable(mlp())
        self.model, self.optimizer = self.fabric.setup(model, torch.optim.AdamW(model.parameters(), 1e-2))
        self.state = {"model": self.model, "optimizer": self.optimizer, "step": 0}

    def train(self, until: int, path: Path) -> None:
        batches = list(data())
        while self.state["step"] < until:
            self.fabric.save(path / f"{self.state['step']}.ckpt", self.state)
            x, y = batches[self.state["step"] % len(batches)]
            self.fabric.backward(nn.functional.cross_entropy(self.model(x), y))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state["step"] += 1


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_fabric_needs_no_callback(tmp_path: Path, strategy: str) -> None:
    """Claim: the wrappers of `fabric.setup` are looked through; `fabric.save` and `load` go on bit for bit."""
    run = Fabric(strategy, 0)
    loop = setpoint.attach(run.model, run.optimizer, 0.5, total_steps=STEPS, resume=True)
    run.train(STEPS, tmp_path)
    assert loop.finish().budget_met
    for step in (2, 8, 38):
        again = Fabric(strategy, 1)
        again.fabric.load(tmp_path / f"{step}.ckpt", again.state)
        other = setpoint.attach(again.model, again.optimizer, 0.5, total_steps=STEPS, resume=True)
        again.train(STEPS, tmp_path)
        assert other.finish().budget_met and same(dict(again.model.state_dict()), dict(run.model.state_dict()))


def test_metrics_stand_in_the_trainers_logs(tmp_path: Path) -> None:
    """Claim: what the loop measures is logged by the Trainer's own loggers, as often as they log."""
    from lightning.pytorch.loggers import CSVLogger

    callback = SetpointCallback(0.5)
    logger = CSVLogger(tmp_path)
    fitted(tmp_path, Classifier(), callback, logger=logger, log_every_n_steps=4)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    assert {f"setpoint/{name}" for name in callback.loop.metrics()} <= set(names)
    at = names.index("setpoint/step")
    assert sum(bool(row.split(",")[at]) for row in rows[1:]) >= STEPS // 4 - 1


@pytest.mark.parametrize("module", ["", "net"])
def test_a_teacher_is_one_argument(module: str, tmp_path: Path) -> None:
    """Claim: a copy of the module, or of the part that is pruned, teaches in the Trainer, and its FLOPs are counted."""
    torch.manual_seed(0)
    trained = Classifier()
    trainer(tmp_path, max_epochs=2 * EPOCHS).fit(trained, data(), data())
    overheads, others = [], []
    for teacher in (None, True, trained.get_submodule(module)):
        model = Classifier()
        model.load_state_dict(trained.state_dict())
        callback = fitted(tmp_path, model, SetpointCallback(0.5, module=module, teacher=teacher))
        overheads.append(callback.summary.overhead_flops)
        others.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert overheads[1] == overheads[2] > overheads[0]
    assert torch.equal(others[1], others[2]) and not torch.equal(others[0], others[1])
