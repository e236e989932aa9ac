"""Optimizers inside wrappers: Accelerate's, Lightning's, Fabric's and others, by classes that look like theirs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import setpoint
from loop.test_regrowth import Scripted
from setpoint.errors import LoopError, OptimizerError
from setpoint.host.find import real_optimizers


class Accelerated(torch.optim.Optimizer):
    """As Accelerate's: an Optimizer that never calls the constructor of one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class _Lightning:
    """As Lightning's and Fabric's: of a class made for it, which inherits from the optimizer's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state_dict)


class Noam:
    """No Optimizer, but steps one, at a rate of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.base_optimizer, self.count = optimizer, 0

    def step(self) -> None:
        self.count += 1
        for settings in self.base_optimizer.param_groups:
            settings["lr"] = 0.01 * min(self.count / 5, 1.0)
        self.base_optimizer.step()

    def zero_grad(self) -> None:
        self.base_optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)


class Lookahead(torch.optim.Optimizer):
    """Keeps slow weights beside the state of the optimizer that it steps."""

    def __init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        super().__init__(base_optimizer.param_groups, {})
        self.base_optimizer = base_optimizer
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)


class Several:
    """Steps two optimizers, in a list."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = list(optimizers)

    def step(self) -> None:
        for each in self.optimizers:
            each.step()

    def zero_grad(self) -> None:
        for each in self.optimizers:
            each.zero_grad()


WRAPPERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda optimizer: optimizer,
    "accelerate": Accelerated,
    "lightning": _Lightning,
    "noam": Noam,
    "two of them": lambda optimizer: Accelerated(_Lightning(optimizer)),  # type: ignore[arg-type]
}


def attached(model: nn.Module, optimizer: Any) -> setpoint.Loop:
    return setpoint.attach(
        model,
        optimizer,
        setpoint.Budget.fraction(0.9, of="params"),
        example=(torch.zeros(8, 6),),
        total_steps=12,
        controller=Scripted({3: {"0": [1, 4]}, 6: {"2": [0]}}, regrow=False),
        verify=False,
    )


def trained(wrap: Callable[[torch.optim.Optimizer], Any], steps: Iterable[int] = range(10)) -> tuple[Any, ...]:
    """Model, optimizer as its user has it, and loop, after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 3))
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=0.01))
    loop = attached(model, optimizer)
    train(model, optimizer, steps)
    return model, optimizer, loop


def train(model: nn.Module, optimizer: Any, steps: Iterable[int]) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_optimizer_is_seen(name: str, tmp_path: Path) -> None:
    """Claim: the loop counts every step of an optimizer inside a wrapper, cuts its state, and lets the wrapper go on
    with it, to the same weights as without the wrapper; and a run file takes the wrapper for what is in it.
    """
    model, optimizer, loop = trained(WRAPPERS[name])
    assert loop.step == 10 and loop.widths == {"0": 22, "2": 23}
    moments = [state["exp_avg"].shape for state in optimizer.state_dict()["state"].values()]
    assert moments == [parameter.shape for parameter in model.parameters()]
    if name != "noam":
        plain = trained(WRAPPERS["none"])[0]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    setpoint.save_run(tmp_path / "run", model=model, optimizer=optimizer, loop=loop)
    loop.detach()
    again, other, resumed = trained(WRAPPERS[name], range(0))
    setpoint.load_run(tmp_path / "run", model=again, optimizer=other, loop=resumed)
    assert resumed.step == 10 and resumed.widths == loop.widths
    train(again, other, range(10, 12))
    assert resumed.step == 12


def test_an_optimizer_and_its_wrapper_are_one() -> None:
    """Given with its wrapper, the optimizer is not waited for twice."""
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 3))
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    loop = attached(model, [Accelerated(inner), inner])
    train(model, inner, range(4))
    assert loop.step == 4 and loop.widths == {"0": 22, "2": 24}


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (Lookahead, "Lookahead keeps a state in addition to that of the SGD in it"),
        (lambda inner: Accelerated(Lookahead(inner)), "Lookahead keeps a state in addition to that of the SGD in it"),
        (
            lambda inner: Several(inner, torch.optim.Adam(inner.param_groups[0]["params"])),
            r"several optimizers \(SGD, Ad",
        ),
        (lambda inner: torch.optim.lr_scheduler.StepLR(inner, 2), "must be a torch.optim.Optimizer or a sequence"),
        (lambda inner: None, "must be a torch.optim.Optimizer or a sequence"),
        (lambda inner: [], "at least one"),
    ],
)
def test_what_would_not_follow_is_refused(wrap: Callable[[torch.optim.Optimizer], Any], words: str) -> None:
    """Claim: a wrapper that is no mere wrapper is refused by name, whatever is around it."""
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    with pytest.raises(OptimizerError, match=words):
        real_optimizers(wrap(torch.optim.SGD(model.parameters(), lr=0.01)))


def test_deepspeed_is_refused_by_name() -> None:
    """Claim: an engine, a model in ZeRO 3 and an optimizer of DeepSpeed, in a wrapper or not, are refused by name, with
    what to use; by classes that look like theirs.
    """
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    adam = torch.optim.Adam(model.parameters())
    engine: Any = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module, example = model, (torch.ones(2, 4),)
    kind: Any = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    kind.step, kind.zero_grad = Accelerated.step, Accelerated.zero_grad
    inner = kind()
    inner.optimizer = adam
    for given in (inner, Accelerated(inner)):
        with pytest.raises(OptimizerError, match=r"DeepSpeedZeroOptimizer keeps its state.*fully_shard"):
            setpoint.attach(model, given, 0.5, total_steps=9, example=example)
    with pytest.raises(LoopError, match=r"DeepSpeedEngine is not supported.*fully_shard"):
        setpoint.attach(engine, adam, 0.5, total_steps=9, example=example)
    model[0].weight.ds_id = 0  # as ZeRO 3 marks weights
    with pytest.raises(LoopError, match="DeepSpeedEngine is not supported"):
        setpoint.attach(model, adam, 0.5, total_steps=9, example=example)
