"""A loop's metrics in loggers, and its ledger in a file that grows."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import setpoint
from golden.models import mlp
from setpoint.errors import LoopError, UsageError
from setpoint.integrations import log_to

STEPS = 20


class Run:
    """A loop on an MLP, which may have begun, and what trains it."""

    def __init__(self, *, begun: bool = False, controller: Any = None) -> None:
        torch.manual_seed(0)
        self.model = mlp(6, 24, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.x, self.y = torch.randn(16, 6), torch.randint(0, 3, (16,))
        settings: dict[str, Any] = {"controller": controller, **({"example": (self.x,)} if begun else {})}
        self.loop = setpoint.attach(self.model, self.optimizer, 0.5, total_steps=STEPS, verify=False, **settings)

    def train(self, steps: int = STEPS) -> setpoint.Loop:
        """Train, telling the loss."""
        for _ in range(steps):
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
            self.loop.observe(loss=loss)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.loop


class Calls:
    """What stand-ins note: metrics and steps."""

    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, float], int | None]] = []
        self.axes: list[tuple[str, str | None]] = []


class WandbRun(Calls):
    """The methods of `wandb.Run` that are used, with its signatures."""

    def define_metric(self, name: str, step_metric: str | None = None, **_: Any) -> None:
        self.axes.append((name, step_metric))

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        self.rows.append((data, step))


class TrackioRun(Calls):
    """The same of `trackio.Run`."""

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows.append((metrics, step))


class MlflowModule(Calls):
    """The same of the module `mlflow`, and of Lightning's loggers."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((metrics, step))


def test_tensorboard_gets_every_metric_at_every_step(tmp_path: Path) -> None:
    """Claim: a real SummaryWriter's files hold each metric at each step, under the prefix."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    run, writer = Run(), SummaryWriter(str(tmp_path))
    log_to(run.loop, writer)
    loop = run.train()
    loop.finish()
    writer.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert {f"setpoint/{name}" for name in loop.metrics()} == set(found.Tags()["scalars"])
    cost = found.Scalars("setpoint/cost/flops")
    assert [each.step for each in cost] == list(range(1, STEPS + 1))
    assert cost[-1].value == pytest.approx(loop.metrics()["cost/flops"]) and cost[-1].value < cost[0].value


def test_tensorboard_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the name makes a writer of its own, in the folder where TensorBoard keeps runs, once there is a step."""
    monkeypatch.chdir(tmp_path)
    run = Run()
    log_to(run.loop, "tensorboard")
    assert not list(tmp_path.iterdir())
    run.train().finish()  # closes what nobody else has at hand
    (events,) = tmp_path.glob("runs/*/events*")
    assert b"setpoint/units" in events.read_bytes()


@pytest.mark.parametrize("kind", [WandbRun, TrackioRun, MlflowModule], ids=lambda kind: kind.__name__)
def test_every_logger_gets_the_metrics(kind: type[Calls]) -> None:
    """Claim: known by its methods, each gets all metrics after each step; W&B by an axis of its own."""
    run, to = Run(), kind()
    log_to(run.loop, to)
    loop = run.train()
    loop.finish()
    last = {f"setpoint/{name}": value for name, value in loop.metrics().items()}
    assert [row["setpoint/step"] for row, _ in to.rows] == list(range(1, STEPS + 1))
    assert to.rows[-1][0].keys() == last.keys() and to.rows[-1][0]["setpoint/width/0"] == last["setpoint/width/0"]
    assert [step for _, step in to.rows] == [None if kind is WandbRun else n for n in range(1, STEPS + 1)]
    assert to.axes == ([("setpoint/step", None), ("setpoint/*", "setpoint/step")] if kind is WandbRun else [])


def test_mlflow_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the name is the module, which logs to its active run; of names only the signs stay that it takes."""
    to, module, run = MlflowModule(), ModuleType("mlflow"), Run()
    vars(module).update(log_metrics=to.log_metrics)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    log_to(run.loop, "mlflow", prefix="run[1]#")
    run.train(3)
    assert [step for _, step in to.rows] == [1, 2, 3] and to.rows[0][0]["run_1__units"] > 0


def test_every_so_many_steps_and_each_decision() -> None:
    """Claim: `every` thins out steps between decisions; each decision and the end are there; `stop` ends it."""
    run, few, stopped = Run(), TrackioRun(), TrackioRun()
    log_to(run.loop, few, every=7, prefix="")
    stop = log_to(run.loop, stopped)
    run.train(3)
    stop()
    loop = run.train(STEPS - 3)
    loop.finish()
    decided = {entry.step for entry in loop.ledger}
    assert [step for _, step in few.rows] == sorted({7, 14, STEPS} | decided) and "units" in few.rows[0][0]
    assert len(few.rows) < STEPS and len(stopped.rows) == 3


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_logger_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: at once, one sentence says what to install, and nothing is logged to."""
    monkeypatch.setitem(sys.modules, name, None)
    for module in [each for each in sys.modules if each.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    run = Run()
    with pytest.raises(ModuleNotFoundError, match=f"is not installed: pip install {name}"):
        log_to(run.loop, name)


def _finished() -> setpoint.Loop:
    run = Run()
    run.train().finish()
    return run.loop


NO_LOGGER = "log_to cannot log to .*give a SummaryWriter.*'wandb'"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        *[
            (lambda what=what: log_to(Run().loop, what), UsageError, NO_LOGGER)
            for what in ("tensorbord", 3, None, ["x"])
        ],
        (lambda: log_to(Run().loop, TrackioRun(), every=0), ValueError, "every is a number of steps"),
        (lambda: log_to(Run().loop, TrackioRun(), every=True), ValueError, "every is a number of steps"),
        (lambda: log_to(_finished(), TrackioRun()), LoopError, "before loop.finish"),
        (lambda: log_to(Run().loop, "nowhere/run.jsonl"), FileNotFoundError, "there is no folder .*nowhere"),
    ],
)
def test_what_cannot_be_logged_is_refused_at_once(call: Any, error: type[Exception], words: str) -> None:
    """Claim: what is no logger, an interval that is none, a run that is over, and a missing folder are named."""
    with pytest.raises(error, match=words):
        call()


def test_the_ledger_grows_in_its_file(tmp_path: Path) -> None:
    """Claim: after every step the file is a ledger with all decisions so far, and at the end what `save` writes."""
    run, path = Run(begun=True), tmp_path / "run.jsonl"
    log_to(run.loop, str(path))
    assert len(setpoint.Ledger.load(path)) == 0
    for _ in range(STEPS):
        run.train(1)
        assert len(setpoint.Ledger.load(path)) == int(run.loop.metrics()["decisions"])
    run.loop.finish()
    run.loop.ledger.save(tmp_path / "saved.jsonl")
    assert path.read_bytes() == (tmp_path / "saved.jsonl").read_bytes()
    assert any(entry.loss_after is not None for entry in setpoint.Ledger.load(path))


def test_what_cannot_be_written_does_not_end_training(tmp_path: Path) -> None:
    """Claim: a folder that vanished is warned of once, with what to do; later the file has the whole ledger."""
    run, path = Run(begun=True, controller=setpoint.PricedController()), tmp_path / "logs" / "run.jsonl"
    path.parent.mkdir()
    log_to(run.loop, path)
    shutil.rmtree(path.parent)
    with pytest.warns(UserWarning, match="log_to cannot write to .*FileNotFoundError.*make its folder") as caught:
        run.train(STEPS - 2)
    assert len(caught) == 1
    path.parent.mkdir()
    run.train(2).finish()
    assert list(setpoint.Ledger.load(path)) == list(run.loop.ledger) and len(run.loop.ledger) > 1


def test_a_run_that_goes_on_has_its_whole_ledger(tmp_path: Path) -> None:
    """Claim: the file of a run that was killed is written anew from the state, and goes on from there."""
    first, path = Run(begun=True, controller=setpoint.PricedController()), tmp_path / "run.jsonl"
    log_to(first.loop, path)
    first.train(4)
    state = first.loop.state_dict()
    first.train(2)
    again = Run(begun=True, controller=setpoint.PricedController())
    log_to(again.loop, path)
    again.loop.load_state_dict(state)
    again.train(STEPS - 4)
    again.loop.finish()
    steps = [entry.step for entry in setpoint.Ledger.load(path)]
    assert steps == [entry.step for entry in again.loop.ledger] and min(steps) <= 4 < max(steps)
