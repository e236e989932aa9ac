"""The first cut: what training's own forwards show before it, the fit in closed form, and what is left afterwards."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.actuator.mask import mask
from setpoint.actuator.refit import refit
from setpoint.errors import LoopError
from setpoint.loop.loop import Loop
from setpoint.sensor.moments import Gathering, Moment, find_readers


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.BatchNorm2d(10)
    head = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 4)
    return nn.Sequential(*convs, nn.ReLU(), *head).double()


def _batches(count: int, rows: int = 48) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(3, 3, generator=generator).double()
    noise = (torch.randn(rows, 3, 6, 6, generator=generator).double() for _ in range(count))
    return [torch.einsum("ij,bjhw->bihw", mixing, x) for x in noise]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("recorded", [False, True])
def test_the_first_cut_is_the_masked_twin_fitted_by_the_same_moments(kind: str, recorded: bool) -> None:
    """Claim: after it outputs are those of the dense twin, fitted to what the forwards up to it gave and masked."""
    model = _net()
    twin = copy.deepcopy(model)
    optimizer, twins_optimizer = _optimizer(kind, model), _optimizer(kind, twin)
    batches = _batches(12)
    loop = setpoint.attach(model, optimizer, 0.4, total_steps=300, **({} if recorded else {"example": (batches[0],)}))
    groups = setpoint.find_groups(twin, (batches[0],))
    gathering: Any = None if recorded else Gathering(twin, find_readers(twin, groups), 3)
    for x in batches[:3]:
        assert recorded or not loop.ledger
        _step(model, optimizer, x)
        _step(twin, twins_optimizer, x)
        if gathering is None:  # without an example the first forward is over when the loop begins
            gathering = Gathering(twin, find_readers(twin, groups), 3)
    assert loop.budget_met and len(loop.ledger) == 1 and "refitted" in loop.ledger[0].reason
    sums = gathering.taken({})
    gathering.remove()
    moments = {name: Moment(blocks, gathering.norms.get(name, "")) for name, blocks in sums.items()}
    keep = {group.name: np.ones(group.num_units, bool) for group in groups}
    for name, units in loop.ledger[0].dropped.items():
        keep[name][units] = False
    refit((twin,), groups, keep, moments)
    mask(twin, twins_optimizer, groups, keep)
    for training in (True, False):
        outputs = (each.train(training)(batches[5]) for each in (model, twin))
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-10)


def test_what_goes_is_made_up_for() -> None:
    """Claim: units that repeat others cost nothing when they go, since the readers take over their weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight[8:] = model[0].weight[:8]
        model[0].bias[8:] = model[0].bias[:8]
    before, x = copy.deepcopy(model), torch.randn(256, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=100, example=(x,))
    for _ in range(2):
        _step(model, optimizer, x)
    assert loop.widths == {"0": 8}
    error = (model(x) - before(x)).square().mean() / before(x).square().mean()
    assert error.item() < 5e-3


@pytest.mark.parametrize(("most", "widest"), [(2**30, 256), (40_000, 32), (1, 4)])
def test_moments_that_take_too_much_are_in_narrower_blocks(
    monkeypatch: pytest.MonkeyPatch, most: int, widest: int
) -> None:
    """Claim: all moments take no more than a limit or the weights; the ledger says how wide their blocks are."""
    monkeypatch.setattr("setpoint.sensor.moments._MOST_BYTES", most)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 256), nn.Tanh(), nn.Linear(256, 3))
    x = torch.randn(64, 6)
    (reader,) = find_readers(model, setpoint.find_groups(model, (x,)))
    assert reader.widest == widest and reader.num_bytes <= max(most, sum(p.nbytes for p in model.parameters()))
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=100, example=(x,))
    for _ in range(2):
        _step(model, optimizer, x)
    assert loop.budget_met and (f"in blocks of at most {widest} inputs" in loop.ledger[0].reason) == (widest < 256)
    assert (model(x) - before(x)).square().mean() < 0.5 * before(x).square().mean()


def test_norms_have_the_statistics_of_the_cut_model() -> None:
    """Claim: behind a layer that was refitted, running statistics are those of the cut model on the batches seen."""
    model, batches = _net(), _batches(1, rows=200)
    for norm in (model[1], model[4]):
        norm.momentum = 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = batches[0]
    (first,) = [group for group in setpoint.find_groups(model, (x,)) if group.name == "0"]
    setpoint.attach(model, optimizer, "90% params", total_steps=60, example=(x,), groups=(first,))
    for _ in range(2):
        _step(model, optimizer, x)
    mean, variance = model[4].running_mean.clone(), model[4].running_var.clone()
    assert model[0].out_channels < 12
    model(x)
    torch.testing.assert_close(mean, model[4].running_mean, rtol=0.05, atol=0.05)
    torch.testing.assert_close(variance, model[4].running_var, rtol=0.15, atol=0.0)


def test_the_fit_of_an_average_is_the_average_of_the_fits() -> None:
    """Claim: an averaged copy is fitted by the same map, so that it stays the average."""
    model, batches = _net(), _batches(4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn(p.shape).double())
    average = copy.deepcopy(model)
    with torch.no_grad():
        for p, a, b in zip(average.parameters(), model.parameters(), other.parameters(), strict=True):
            p.copy_((a + b) / 2)
    groups = setpoint.find_groups(model, (batches[0],))
    readers = find_readers(model, groups)
    gathering = Gathering(model, readers, 1)
    model(batches[0])
    moments = {name: Moment(blocks) for name, blocks in gathering.taken({}).items()}
    keep = {group.name: np.arange(group.num_units) % 3 > 0 for group in groups}
    assert len(refit((model, other, average), groups, keep, moments)) == 3
    for p, a, b in zip(average.parameters(), model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, (a + b) / 2)


def test_an_average_in_eval_mode_has_the_statistics_of_the_cut_model() -> None:
    """Claim: BatchNorm statistics of a copy follow the fit where those of the model do, in any mode of the copy."""
    averages = []
    for training in (True, False):
        model, batches = _net(), _batches(3)
        average = torch.optim.swa_utils.AveragedModel(model).train(training)
        optimizer = _optimizer("sgd", model)
        loop = setpoint.attach(model, optimizer, 0.4, total_steps=300, example=(batches[0],), copies=[average])
        for x in batches:
            _step(model, optimizer, x)
        assert loop.budget_met
        averages.append(average.state_dict())
    for tensors in zip(*(average.values() for average in averages), strict=True):
        torch.testing.assert_close(*tensors)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_fit_does_not_depend_on_the_unit_of_the_inputs(bias: bool, scale: float) -> None:
    """Claim: inputs times c and their reader's weights divided by c give the same function after the fit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 9, generator=generator, dtype=torch.float64) + 1
    keep, outputs = {"0": np.arange(9) % 3 > 0}, []
    for c in (1.0, scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 4, bias=bias)).double()
        groups = setpoint.find_groups(model, (x,))
        with torch.no_grad():
            model[0].weight.copy_(c * torch.eye(9))
            model[0].bias.zero_()
            model[1].weight /= c
        gathering = Gathering(model, find_readers(model, groups), 1)
        model(x)
        refit((model,), groups, keep, {name: Moment(blocks) for name, blocks in gathering.taken({}).items()})
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_in_the_calibration_does_not_matter(inplace: bool) -> None:
    """Claim: with dropout active the cut model is as near to the dense one on held-out data as with dropout off."""
    generator = torch.Generator().manual_seed(0)
    seen, held_out = (torch.randn(2048, 6, generator=generator) @ torch.randn(6, 20, generator=generator)).chunk(2)
    torch.manual_seed(0)
    sizes, dropout = ((20, 48), (48, 32)), partial(nn.Dropout, 0.1, inplace)
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU(), dropout())]
    dense = nn.Sequential(*layers, nn.Linear(32, 4))
    groups = setpoint.find_groups(dense, (seen,))
    keep = {group.name: np.arange(group.num_units) % 3 > 0 for group in groups}
    expected, errors = dense.eval()(held_out), []
    for active in (True, False):
        model = copy.deepcopy(dense).train()
        model[2].train(active)
        model[5].train(active)
        gathering = Gathering(model, find_readers(model, groups), 1)
        model(seen)
        refit((model,), groups, keep, {name: Moment(blocks) for name, blocks in gathering.taken({}).items()})
        mask(model, _optimizer("sgd", model), groups, keep)
        errors.append((model.eval()(held_out) - expected).norm().item())
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_micro_batches_count_together_and_forwards_without_gradients_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Claim: halves of a batch, checkpointed and with an evaluation before them, give the moments of the whole."""
    from torch.utils.checkpoint import checkpoint

    monkeypatch.setattr("setpoint.sensor.moments._FORWARDS", 1e9)  # all rows, however many layers make of them

    model, (x,) = _net(), _batches(1)
    for norm in (model[1], model[4]):
        norm.eval()
    readers = find_readers(model, setpoint.find_groups(model, (x,)))
    whole, parts = Gathering(model, readers, 1), Gathering(model, readers, 2)
    model(x)
    expected = whole.taken({})
    parts.forget()
    with torch.no_grad():
        model(x + 1)
    for half in x.chunk(2):
        checkpoint(model, half.requires_grad_(), use_reentrant=True).sum().backward()
    found = parts.taken({})
    assert found.keys() == expected.keys()
    for name, blocks in found.items():
        torch.testing.assert_close(blocks, expected[name])


def test_a_copy_of_the_model_and_a_pickled_one_gather_nothing() -> None:
    """Claim: forwards of a deep copy, such as an average made in training, do not count."""
    import pickle

    model, (x,) = _net(), _batches(1)
    gathering = Gathering(model, find_readers(model, setpoint.find_groups(model, (x,))), 1)
    copy.deepcopy(model)(x)
    pickle.loads(pickle.dumps(model))(x)
    assert not gathering.taken({})
    model(x)
    assert gathering.taken({})


def test_wide_inputs_are_gathered_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: blocks hold the moment's own blocks, and cross terms count as zero."""
    from setpoint.sensor import moments as own

    monkeypatch.setattr(own, "_AT_ONCE", 12)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 2)).double(), torch.randn(64, 4).double()
    gathering = Gathering(model, find_readers(model, setpoint.find_groups(model, (x,))), 1, always=True)
    hidden = torch.tanh(model[0](x))
    model(x)
    (blocks,) = gathering.taken({}).values()
    assert [len(block) for block in blocks] == [13, 13]
    exact = hidden.T @ hidden
    found = Moment(blocks).of_columns(np.arange(6, 18))
    torch.testing.assert_close(found[:6, :6], exact[6:12, 6:12])
    torch.testing.assert_close(found[6:, 6:], exact[12:18, 12:18])
    assert not found[:6, 6:].any()


def _run(steps: int, state: Any = None, stop: int | None = None) -> tuple[Loop, nn.Module, Any]:
    model = _net()
    optimizer = _optimizer("adamw", model)
    batches = _batches(steps)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=steps, example=(batches[0],))
    if state is not None:
        loop.load_state_dict(state["loop"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for x in batches[loop.step : stop]:
        _step(model, optimizer, x)
    return (
        loop,
        model,
        {"loop": loop.state_dict(), "model": copy.deepcopy(model.state_dict()), "optimizer": optimizer.state_dict()},
    )


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_run_goes_on_within_its_calibration(at: int) -> None:
    """Claim: interrupted before the first cut, at it and behind it, a run is the same to the last bit."""
    expected, model, _ = _run(400, stop=8)
    before, _, state = _run(400, stop=at)
    before.detach()
    found, resumed, _ = _run(400, state, stop=8)
    assert [entry.step for entry in expected.ledger] == [4]
    assert [entry.dropped for entry in found.ledger] == [entry.dropped for entry in expected.ledger]
    assert found.ledger[0].spent_run == expected.ledger[0].spent_run
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_gradients_that_are_not_finite_put_the_first_cut_off() -> None:
    """Claim: with NaN in the batch before it, the first cut waits for good steps, and the ledger says why."""
    model, batches = _net(), _batches(6)
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=200, example=(batches[0],))
    _step(model, optimizer, batches[0])
    before = copy.deepcopy(model.state_dict())
    (model(batches[1]).square().mean() * torch.nan).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.load_state_dict(before)
    assert not loop.budget_met and "NaN or infinite gradients" in loop.ledger[-1].reason
    optimizer.state.clear()
    _step(model, optimizer, batches[2])
    assert loop.budget_met and loop.step == 3


def test_batches_that_are_not_finite_put_the_first_cut_off() -> None:
    """Claim: where gradients are mended but all inputs hold NaN, the first cut waits, and the ledger says why."""
    model, batches = _net(), _batches(5)
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=200, example=(batches[0],))
    before = copy.deepcopy(model.state_dict())
    for step, x in enumerate(batches):
        if step == 3:
            model.load_state_dict(before)
        model(x * torch.nan if step < 3 else x).square().mean().backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.nan_to_num_(0.0)
        optimizer.step()
        optimizer.zero_grad()
        assert loop.budget_met == (step >= 3)
    assert "has been given numbers" in loop.ledger[0].reason


@pytest.mark.parametrize("where", ["functional", "compiled"])
def test_layers_that_run_no_hooks_are_cut_without_a_fit(where: str) -> None:
    """Claim: weights that are read outside of their layers, or in compiled code, put the first cut off by two steps."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 64), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(nn.functional.linear(x, self.up.weight, self.up.bias))
            return nn.functional.linear(hidden, self.down.weight, self.down.bias)

    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)) if where == "compiled" else Net(),
        torch.randn(32, 4),
    )
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=1000, example=(x,))
    called = torch.compile(model, backend="eager") if where == "compiled" else model
    while not loop.budget_met:
        _step(called, optimizer, x)
    first, last = loop.ledger[0], loop.ledger[-1]
    assert "no layer that reads units has been given" in first.reason and last.step <= first.step + 2
    assert "0 layers refitted" in last.reason


def test_moments_are_let_go_where_nothing_is_cut() -> None:
    """Claim: a model within its budget keeps no moments; a cut for a later budget is not fitted with old ones."""
    model, batches = _net(), _batches(60)
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 1.0, total_steps=1000, example=(batches[0],))
    for x in batches[:20]:
        _step(model, optimizer, x)
    assert loop.budget_met and loop.reading().moments is None and loop.widths == loop.dense_widths
    loop.budget = 0.5
    while not loop.budget_met:
        _step(model, optimizer, batches[loop.step % 60])
    assert loop.widths != loop.dense_widths and "refitted" not in loop.ledger[-1].reason


def _steps_on(batches: list[Tensor], model: nn.Module, total_steps: int) -> Loop:
    """Steps without an example; those on a bad batch leave the model as it was."""
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=total_steps)
    for x in batches:
        good = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        _step(model, optimizer, x)
        if not x.isfinite().all():
            model.load_state_dict(good[0])
            optimizer.load_state_dict(good[1])
    return loop


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loop_begins_with_the_first_good_batch(bad: float) -> None:
    """Claim: recorded batches with NaN or infinity are passed over with one warning, and change nothing."""
    model, same, batches = _net(), _net(), _batches(5)
    spoilt = [torch.where(torch.arange(48)[:, None, None, None] == 7, bad, x) for x in batches[:2]]
    with pytest.warns(UserWarning, match="begins at the next good batch, of up to 10 steps") as caught:
        loop = _steps_on([*spoilt, *batches], model, 200)
    assert len(caught) == 1 and loop.budget_met and loop.step == 5
    assert _steps_on(batches, same, 200).ledger[0].dropped == loop.ledger[0].dropped
    assert all(map(torch.equal, model.parameters(), same.parameters()))


def test_bad_batches_are_passed_over_for_three_steps_or_a_twentieth_of_the_run() -> None:
    """Claim: where no good batch comes, the loop ends with the error that an example with NaN gets."""
    bad = torch.full_like(_batches(1)[0], torch.nan)
    with pytest.warns(UserWarning, match="up to 3 steps"):
        loop = _steps_on([bad] * 3, _net(), 20)
        assert loop.step == 0
        loop.detach()
        with pytest.raises(LoopError, match="the example holds NaN or infinity"):
            _steps_on([bad] * 4, _net(), 20)


def test_a_model_that_takes_nan_begins_at_once() -> None:
    """Claim: NaN for what is missing is no bad batch where the model's outputs are numbers."""

    class Filling(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            filled: Tensor = super().forward(x.nan_to_num())
            return filled

    torch.manual_seed(0)
    model, x = Filling(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(32, 6)
    x[3, 2] = torch.nan
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=100)
    _step(model, optimizer, x)
    assert loop.step == 1
    loop.detach()


@pytest.mark.parametrize("recorded", [False, True])
def test_a_run_of_one_step_is_cut_at_its_end(recorded: bool) -> None:
    """Claim: a run as short as its calibration meets its budget all the same; its last step leaves no hook."""
    model, (x,) = _net(), _batches(1)
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=1, **({} if recorded else {"example": (x,)}))
    before = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert before
    _step(model, optimizer, x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert loop.finish().budget_met


def test_too_few_rows_are_warned_of() -> None:
    """Claim: where the first batches hold too few rows for the fit, a warning names a layer and both numbers."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 2)), torch.randn(1, 4)
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=100, example=(x,))
    with pytest.warns(UserWarning, match="too few to fit 1 layer well: 2 is given 2 rows for 256 inputs"):
        for _ in range(2):
            _step(model, optimizer, x)
    loop.detach()


@pytest.mark.parametrize(
    ("inputs", "warned"),
    [
        (lambda step: (torch.ones(8, 4),), True),
        (lambda step: (torch.full((8, 4), float(step)),), False),  # batches differ
        (lambda step: (torch.randn(8, 4), torch.ones(8, 4)), False),  # the second input is a mask
        (lambda step: (torch.ones(8, 4), torch.arange(4.0)), False),  # not all inputs hold samples
        (lambda step: (torch.ones(1, 4),), False),
        (lambda step: (torch.ones(4),), False),
    ],
)
def test_samples_that_are_all_alike_are_warned_of(inputs: Any, warned: bool) -> None:
    """Claim: one warning says that the first cut knows one input only; other constants are ordinary."""

    class Net(nn.Sequential):
        def forward(self, x: Tensor, weights: Tensor | float = 1.0) -> Tensor:
            found: Tensor = super().forward(x * weights)
            return found

    torch.manual_seed(0)
    model = Net(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=100, example=inputs(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            model(*inputs(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            loop.reading()
    assert loop.budget_met
    assert (
        sum("are all the same, so the first cut knows one input only" in str(each.message) for each in caught) == warned
    )


@pytest.mark.parametrize("kind", ["tensor", "log_softmax", "logits", "tokens", "squares"])
@pytest.mark.parametrize(("classes", "rows", "warned"), [(1, 16, True), (2, 16, False), (1, 4, False)])
def test_targets_of_one_class_are_warned_of(kind: str, classes: int, rows: int, warned: bool) -> None:
    """Claim: the gradient of a cross-entropy at the output shows that all targets, at least 32, are of one class."""

    class Output(dict[str, Tensor]):
        logits = property(lambda self: self["logits"])

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            found = found.log_softmax(-1) if kind == "log_softmax" else found
            return Output(logits=found) if kind == "logits" else found

    torch.manual_seed(0)
    model = Net(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = _optimizer("sgd", model)
    shape = (2, rows // 2, 4) if kind == "tokens" else (rows, 4)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=300, example=(torch.randn(shape),))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            output = model(torch.randn(shape))
            logits = (output.logits if kind == "logits" else output).flatten(0, -2)
            y = torch.arange(len(logits)) % classes
            loss = (nn.functional.nll_loss if kind == "log_softmax" else nn.functional.cross_entropy)(logits, y)
            if kind == "squares":  # of one class or not, this is no cross-entropy
                loss = (logits - 5.0 * nn.functional.one_hot(y, 2)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loop.budget_met
    said = sum("all of one class, so the first cut knows this class only" in str(each.message) for each in caught)
    assert said == (warned and kind != "squares")


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_first_batch_that_is_smaller_than_others_is_warned_of(rows: int) -> None:
    """Claim: where later batches have at least twice the rows of the first one, a warning says what that comes to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            _step(model, optimizer, torch.randn(32 if step else rows, 4))
    said = [str(each.message) for each in caught if "times what the first one had" in str(each.message)]
    assert bool(said) == (2 * rows <= 32) and all(f"a batch has {32 / rows:g} times" in each for each in said)
    loop.detach()


def _loss_of_one(model: nn.Module, weights: Any, one: Tensor) -> Tensor:
    loss: Tensor = torch.func.functional_call(model, weights, (one[None],)).square().mean()
    return loss


def test_forwards_of_an_export_and_of_single_samples_do_not_count() -> None:
    """Claim: what a user traces, exports or differentiates sample by sample before the cut leaves the run as it is."""
    runs = []
    for disturbed in (False, True):
        model, batches = _net(), _batches(4)
        for norm in (model[1], model[4]):
            norm.eval()
        optimizer = _optimizer("sgd", model)
        loop = setpoint.attach(model, optimizer, 0.5, total_steps=200, example=(batches[0],))
        for x in batches:
            if disturbed and not loop.budget_met:
                torch.export.export(model, (x,))
                weights = {name: p.detach() for name, p in model.named_parameters()}
                of_one = torch.func.grad(partial(_loss_of_one, model))
                torch.func.vmap(of_one, in_dims=(None, 0))(weights, x)
            _step(model, optimizer, x)
        runs.append([p.detach().clone() for p in model.parameters()])
        assert loop.budget_met and "refitted" in loop.ledger[0].reason
        loop.detach()
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("training", [True, False])
def test_forwards_in_another_mode_than_trainings_do_not_count(training: bool) -> None:
    """Claim: an evaluation with gradients between the first steps leaves the run as it is, in any mode of training."""
    runs = []
    for disturbed in (False, True):
        model, batches = _net().train(training), _batches(3)
        for norm in (model[1], model[4]):
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        optimizer = _optimizer("sgd", model)
        loop = setpoint.attach(model, optimizer, 0.5, total_steps=200, example=(batches[0],))
        for x in batches:
            if disturbed:
                model.train(not training)(x + 1)
                model.train(training)
            _step(model, optimizer, x)
        assert loop.budget_met and "refitted" in loop.ledger[0].reason
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *runs))


def test_a_batch_that_is_not_finite_leaves_the_others_and_the_norms() -> None:
    """Claim: a forward on infinity before each step is left out of the moments, and no running statistic is NaN."""
    model, batches = _net(), _batches(3)
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=200, example=(batches[0],))
    for x in batches:
        model.eval()(x * float("inf"))
        model.train()
        _step(model, optimizer, x)
    assert loop.budget_met and all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_weights_that_an_optimizer_keeps_another_version_of_are_not_fitted() -> None:
    """Claim: Lookahead's slow weights would undo a fit, so a cut leaves both as they are."""
    model, batches = _net(), _batches(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for p in model.parameters():
        optimizer.state[p]["slow"] = p.detach().clone()
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=200, example=(batches[0],))
    for x in batches:
        _step(model, optimizer, x)
    assert "0 layers refitted" in loop.ledger[0].reason


def test_without_a_forward_or_a_gradient_the_first_cut_waits() -> None:
    """Claim: a layer that is frozen for the first steps is waited for, up to 5 % of the run."""
    model, batches = _net(), _batches(30)
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=1000, example=(batches[0],))
    model[3].requires_grad_(False)
    model[8].requires_grad_(False)
    for step, x in enumerate(batches):
        if step == 25:
            model.requires_grad_(True)
        assert (loop.widths == loop.dense_widths) == (step <= 25)
        _step(model, optimizer, x)
    assert "no gradient has been seen of" in loop.ledger[0].reason and loop.ledger[-1].step == 26


def test_gradual_is_what_it_was() -> None:
    """Claim: `Schedule.gradual()` comes down in eight cuts, without a fit."""
    model, batches = _net(), _batches(60)
    optimizer = _optimizer("sgd", model)
    gradual = setpoint.PricedController(setpoint.Schedule.gradual())
    loop = setpoint.attach(model, optimizer, 0.4, total_steps=60, example=(batches[0],), controller=gradual)
    for x in batches:
        _step(model, optimizer, x)
    assert sum(bool(entry.dropped) for entry in loop.ledger) > 3
    assert not any("fitted" in entry.reason for entry in loop.ledger)
    assert loop.finish().budget_met


@pytest.mark.parametrize("budget", ["50% flops per run", {"flops": "25%", "flops/run": "60%"}])
def test_a_budget_of_the_run_is_spent_from_the_first_cut_on(budget: Any) -> None:
    """Claim: a share of the run is used up, and with one for steps too the length is known from the first cut on."""
    model, batches = _net(), _batches(200)
    optimizer = _optimizer("sgd", model)
    loop = setpoint.attach(model, optimizer, budget, total_steps=200, example=(batches[0],))
    steps = 0
    lengths = set()
    while steps < loop.total_steps:
        _step(model, optimizer, batches[steps % 200])
        steps += 1
        if steps > 4:
            lengths.add(loop.total_steps)
    assert len(lengths) == 1
    summary = loop.finish()
    assert summary.budget_met
    spent, limit = summary.spent_run["flops"], summary.limit_run["flops"]
    assert 0.9 * limit < spent <= limit
