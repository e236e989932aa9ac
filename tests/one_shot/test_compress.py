"""A trained model is cut at once, without training, and what reads the cut units is fitted anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import setpoint
import setpoint.one_shot.compress as compressing
from setpoint.actuator.refit import fit_map, refit
from setpoint.errors import BudgetError, ExampleError, GroupError, LoopError, OptimizerError
from setpoint.groups.group import Group, Slice
from setpoint.one_shot.forward import moments_on
from setpoint.sensor import moments as gathered


class Block(nn.Module):
    """A residual block with BatchNorms."""

    def __init__(self, outer: int, inner: int) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv2d(outer, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.down, self.last = nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last(self.down(torch.relu(self.norm(self.up(x))))))


class Attention(nn.Module):
    """A block with heads, and a feed-forward net behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.ModuleList(nn.Linear(12, 12) for _ in range(3)), nn.Linear(12, 12)
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, 3)).transpose(1, 2) for each in self.qkv)
        x = self.norm(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.down(F.gelu(self.up(x)))


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def _image_net() -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()
    return nn.Sequential(
        *stem, Block(12, 16), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10)
    )


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(pixels).float().view(-1, 1, 8, 8)[order] / 16, torch.from_numpy(labels)[order]


@cache
def _trained() -> nn.Module:
    """A net that has learnt the digits."""
    model, (x, y) = _image_net(), _digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for start_ in [*range(0, 1200, 60)] * 3:
        optimizer.zero_grad()
        F.cross_entropy(model(x[start_ : start_ + 60]), y[start_ : start_ + 60]).backward()
        optimizer.step()
    return model


def _batches() -> list[tuple[Tensor, Tensor]]:
    x, y = _digits()
    return [(x[each : each + 100], y[each : each + 100]) for each in range(0, 1200, 100)]


@torch.no_grad()
def _accuracy(model: nn.Module) -> float:
    x, y = _digits()
    right = (model.eval()(x[1200:]).argmax(1) == y[1200:]).float().mean()
    model.train()
    return float(right)


@pytest.mark.parametrize("even", [False, True])
def test_half_of_the_flops_cost_little(even: bool, tmp_path: Path) -> None:
    """Claim: half of the FLOPs cost at most two points on digits; the model that comes out is saved and loaded as any
    other.
    """
    model = copy.deepcopy(_trained())
    dense = _accuracy(model)
    found = setpoint.compress(model, _batches(), "50% flops", even=even)
    assert _accuracy(model) > dense - 0.02
    assert found.after["flops"] <= found.limit == 0.5 * found.before["flops"]
    assert sum(p.numel() for p in model.parameters()) == found.after["params"]
    assert "compressed to" in str(found)
    setpoint.save(model, tmp_path / "small.safetensors")
    again = setpoint.load(tmp_path / "small.safetensors", into=_image_net())
    x = _digits()[0][:5]
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("build", "shape"),
    [(_image_net, (60, 1, 8, 8)), (lambda: nn.Sequential(Attention(), nn.Linear(12, 3)), (6, 5, 12))],
    ids=["images", "heads"],
)
def test_the_cut_model_equals_its_masked_twin(
    build: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: outputs and gradients are those of the dense model that was fitted anew and masked, to 1e-10."""
    torch.manual_seed(0)
    model, x = build().double(), torch.randn(shape).double()
    twins: list[nn.Module] = []

    def noted(twin: nn.Module, *args: Any) -> Any:
        twins.append(copy.deepcopy(twin))
        return shrink(twin, *args)

    shrink = compressing.shrink
    monkeypatch.setattr(compressing, "shrink", noted)
    found = setpoint.compress(model, [x, x + 0.1], "60% params")
    assert found.widths != found.dense_widths and found.refitted
    for training in (True, False):
        outputs, gradients = [], []
        for each in (model, *twins):
            given = x.clone().requires_grad_()
            outputs.append(each.train(training)(given))
            outputs[-1].square().sum().backward()
            gradients.append(given.grad)
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_weights_are_those_of_ridge_regression() -> None:
    """Claim: what stays is fitted as least squares with a pull towards the weights that were there."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 6).double() @ torch.randn(6, 6).double(), torch.randn(6, 3).double()
    stays = torch.tensor([True, False, True, True, False, True])
    ridge = 0.01 * x.square().sum(0).mean()
    rows = torch.cat([x[:, stays], ridge.sqrt() * torch.eye(4).double()])
    target = torch.cat([x @ weight, ridge.sqrt() * weight[stays]])
    expected = torch.linalg.lstsq(rows, target).solution
    torch.testing.assert_close(fit_map(x.mT @ x, stays) @ weight, expected)
    torch.testing.assert_close(fit_map(x.mT @ x, torch.ones(6, dtype=torch.bool)) @ weight, weight)


def test_units_that_repeat_others_are_all_that_goes() -> None:
    """Claim: of a layer whose units all occur twice, half goes and the outputs stay, bias and all."""
    model = _mlp(6, 16, 4)
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[8:] = tensor[:8]
    x = torch.randn(400, 6)
    before = model(x)
    assert setpoint.compress(model, [x], "50% flops").widths == {"0": 8}
    assert (model(x) - before).square().mean() < 1e-3 * before.square().mean()


def test_no_more_data_is_read_than_asked_for() -> None:
    """Claim: reading ends with the batch that makes up the number."""
    read: list[int] = []

    def data() -> Iterator[Tensor]:
        for number in range(100):
            read.append(number)
            yield torch.randn(10, 4)

    assert setpoint.compress(_mlp(4, 8, 2), data(), 0.5, num_samples=25).num_samples == 30 and read == [0, 1, 2]


@contextmanager
def _unchanged(model: nn.Module, error: type[Exception], words: str) -> Iterator[None]:
    """Inside, this error is raised, which leaves tensors, gradients and modes of the model as they were."""

    def found() -> list[Any]:
        gradients = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
        modes = [module.training for module in model.modules()]
        return [{name: tensor.tolist() for name, tensor in model.state_dict().items()}, gradients, modes]

    before = found()
    with pytest.raises(error, match=words):
        yield
    assert found() == before


def test_nothing_is_lost_where_it_fails() -> None:
    """Claim: after an exception in the middle weights, statistics and modes are as they were; so is chance at last."""
    model, x = _image_net(), torch.randn(64, 1, 8, 8)
    chance = torch.get_rng_state()
    model[3].eval()
    with _unchanged(model, ExampleError, "fails on batch 1 of the data"):
        setpoint.compress(model, [x, torch.randn(64, 2, 8, 8)], 0.5)
    assert model[1].momentum == 0.1
    torch.set_rng_state(chance)
    setpoint.compress(model, [x], 0.5)
    assert torch.equal(torch.get_rng_state(), chance) and model[1].momentum == 0.1


X = torch.zeros(10, 4)
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"budget": "8 ms latency"}, BudgetError, "compress takes one budget of flops, params or a runtime"),
    ({"budget": "2x faster"}, BudgetError, "is not understood: .* resources are flops, params$"),
    ({"budget": 0.01}, BudgetError, "cannot be reached"),
    ({"data": 5}, ExampleError, "data is an int: give batches"),
    ({"data": []}, ExampleError, "data has no batch"),
    ({"data": [3]}, ExampleError, "a batch is a tensor"),
    ({"data": X}, ExampleError, "whose parts are single samples: give batches"),
    ({"data": TensorDataset(X)}, ExampleError, "whose parts are single samples: give batches"),
    ({"data": (X, X)}, ExampleError, "write .*for one batch of inputs and labels"),
    ({"data": [X.double()]}, ExampleError, "the model takes the first batch neither .*dtype"),
    ({"model": [X]}, ValueError, r"write compress\(model, data, budget\)"),
    ({"model": _mlp(4, 8, 2).to("meta")}, LoopError, "'0.weight' is on the meta device"),
    ({"data": [X.to("meta")]}, ExampleError, "batch 0 of the data is on the meta device"),
    ({"num_samples": 0}, ValueError, "num_samples"),
    ({"groups": [Group("other", "unit", 3, ())]}, GroupError, "is not one of this model's"),
]


@pytest.mark.parametrize(("given", "error", "words"), REFUSALS, ids=[words for *_, words in REFUSALS])
def test_what_cannot_be_done_is_refused_by_name(given: Any, error: type[Exception], words: str) -> None:
    """Claim: other resources, no data, budgets out of reach and odd groups are refused, and say what to give."""
    call = {"model": _mlp(4, 8, 2), "data": [X], "budget": 0.5, **given}
    with pytest.raises(error, match=words):
        setpoint.compress(**call)


def test_models_that_cannot_be_cut_are_refused() -> None:
    """Claim: a model that nothing can fit again, and one in training, are refused."""
    transposed = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 2, 1))
    with pytest.raises(GroupError, match="read by something else than linear layers"):
        setpoint.compress(transposed, [torch.randn(2, 1, 3, 3)], 0.5)
    model = _mlp(4, 8, 2)
    loop = setpoint.attach(model, torch.optim.SGD(model.parameters()), 0.5, example=(X,), total_steps=10)
    with pytest.raises(LoopError, match="has a loop already"):
        setpoint.compress(model, [X], 0.5)
    loop.detach()


def test_a_budget_that_is_met_changes_nothing() -> None:
    """Claim: where no unit goes, weights and the statistics of BatchNorms stay to the bit."""
    model = _image_net()
    before = copy.deepcopy(model.state_dict())
    compressed = setpoint.compress(model, [torch.randn(20, 1, 8, 8)], "100% flops")
    assert compressed.widths == compressed.dense_widths and not compressed.refitted
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_statistics_count_samples_and_not_batches() -> None:
    """Claim: a BatchNorm's new mean is that of all samples where the last batch is short; one sample is left out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(255, 4) * torch.arange(1.0, 256.0)[:, None]
    setpoint.compress(model, [x[:126], x[126:252], x[252:254], x[254:]], 0.5)
    torch.testing.assert_close(model[0].running_mean, x[:254].mean(0))
    variances = [each.var(0) * len(each) for each in (x[:126], x[126:252], x[252:254])]
    torch.testing.assert_close(model[0].running_var, sum(variances) / 254)
    with pytest.raises(ExampleError, match="fails on batch 0 of the data .*more than 1 value"):
        setpoint.compress(model.eval(), [each[None] for each in x[:8]], 0.3)


@pytest.mark.parametrize(("place", "number"), [(0, float("nan")), (1, float("nan")), (1, float("inf"))])
def test_a_number_that_is_none_is_found_in_the_data(place: int, number: float) -> None:
    """Claim: NaN and infinity are refused with the number of their batch, and the model stays as it was."""
    model, batches = _image_net(), [torch.randn(20, 1, 8, 8) for _ in range(2)]
    batches[place][3, 0, 2, 2] = number
    with _unchanged(model, ExampleError, f"batch {place} of the data holds NaN or infinity"):
        setpoint.compress(model, batches, 0.5)


def test_infinity_inside_the_model_is_named() -> None:
    """Claim: where weights make infinity of good data, the error names what reads it; weights with NaN are named."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias.fill_(3e38)
        model[2].weight.fill_(3e38)
    with _unchanged(model, ExampleError, "2 is given NaN or infinity on the data"):
        setpoint.compress(model, [torch.randn(20, 4)], 0.5, verify=False)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(GroupError, match="the weights 0.weight hold NaN or infinity"):
        setpoint.compress(model, [torch.randn(20, 4)], 0.5)


class Taught(nn.Module):
    """A model that returns its loss, and runs only with targets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.b(torch.relu(self.a(x))), labels)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x + y)))


class OfList(TwoInputs):
    def forward(self, both: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(*both)


class WithMask(TwoInputs):
    def forward(self, x: Tensor, y: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        assert scale is None and y is not None, "labels are no input, and a mask is one"
        return super().forward(x, y)


ONE, OTHER, LABELS = torch.randn(64, 8), torch.randn(64, 8), torch.randint(0, 2, (64,))
BATCHES: dict[str, tuple[type[nn.Module], Any]] = {
    "labels that it needs": (Taught, (ONE, LABELS)),
    "labels that it needs by name": (Taught, {"x": ONE, "labels": LABELS}),
    "labels that it does not know": (TwoInputs, {"x": ONE, "y": OTHER, "labels": LABELS}),
    "flat": (TwoInputs, (ONE, OTHER, LABELS)),
    "no labels": (TwoInputs, (ONE, OTHER)),
    "inner tuple": (TwoInputs, ((ONE, OTHER), LABELS)),
    "inner list": (TwoInputs, ([ONE, OTHER], LABELS)),
    "one list": (OfList, ([ONE, OTHER], LABELS)),
    "a mask that it could do without": (WithMask, (ONE, OTHER, LABELS)),
}


@pytest.mark.parametrize("form", BATCHES)
def test_a_model_takes_batches_as_a_loader_gives_them(form: str) -> None:
    """Claim: inputs may be named, all parts of a tuple but the last, all of them, or a tuple or list of their own;
    labels are given only to a model that does not run without, and what lies before them also to one that would.
    """
    kind, batch = BATCHES[form]
    compressed = setpoint.compress(kind(), [batch], "60% flops")
    assert compressed.after["flops"] <= 0.6 * compressed.before["flops"] and compressed.refitted == ("b",)


def test_an_optimizer_that_has_stepped_goes_on() -> None:
    """Claim: its state is cut with the weights: each moment is that of the unit that stayed."""
    model = _mlp(4, 16, 2)
    optimizer, x = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.randn(64, 4)
    model(x).square().mean().backward()
    optimizer.step()
    moments, weights = optimizer.state[model[0].weight]["exp_avg"].clone(), model[0].weight.detach().clone()
    setpoint.compress(model, [x], 0.5, optimizer=optimizer)
    stayed = [int((weights == row).all(1).nonzero()) for row in model[0].weight.detach()]
    assert len(stayed) == 8
    torch.testing.assert_close(optimizer.state[model[0].weight]["exp_avg"], moments[stayed], rtol=0, atol=0)
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("which", ["another model", "none", "Adafactor"])
def test_an_optimizer_of_another_model_is_refused(which: str) -> None:
    """Claim: it is refused before anything is done, and so is what is none, and what cannot be cut, by name."""
    model = _mlp(4, 16, 2)
    others: dict[str, Any] = {"another model": torch.optim.AdamW(nn.Linear(2, 2).parameters()), "none": "x"}
    optimizer = others.get(which) or torch.optim.Adafactor(model.parameters())
    with _unchanged(model, OptimizerError, "Adafactor" if which == "Adafactor" else "."):
        setpoint.compress(model, [torch.randn(64, 4)], 0.5, optimizer=optimizer)


def test_wide_inputs_are_fitted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: in blocks each part of the inputs is fitted by ridge regression of its own, and the bias adds up."""
    torch.manual_seed(0)
    x = torch.randn(512, 8).double() + 0.5
    stays = np.array([True, False, True, True, False, True, True, False])
    layer = nn.Linear(8, 3).double()
    weight, bias = layer.weight.detach().T.clone(), layer.bias.detach().clone()
    monkeypatch.setattr(gathered, "_AT_ONCE", 4)
    model = nn.Sequential(layer)
    group = Group("in", "unit", 8, (Slice("0.weight", 1, "consume", np.arange(8)),))
    moments = moments_on(model, gathered.find_readers(model, (group,)), [(x,)], "batch")
    assert refit((model,), (group,), {"in": stays}, moments) == ("0",)
    shift = torch.zeros(3).double()
    for block in slice(0, 4), slice(4, 8):
        rows = torch.cat([x[:, block], torch.ones(512, 1)], 1)
        moment = rows.T @ rows
        moment[:4, :4] += 0.01 * moment.diagonal()[:4].mean() * torch.eye(4)
        kept = torch.from_numpy(np.append(stays[block], True))
        target = (moment @ torch.cat([weight[block], torch.zeros(1, 3)]))[kept]
        found = torch.linalg.solve(moment[kept][:, kept], target)
        expected = torch.zeros(4, 3).double()
        expected[kept[:-1]] = found[:-1]
        torch.testing.assert_close(layer.weight.detach().T[block], expected)
        shift += found[-1]
    torch.testing.assert_close(layer.bias.detach(), bias + shift)


def test_a_decoder_loses_heads_though_it_keeps_a_cache_by_default() -> None:
    """Claim: keys and values that a decoder would keep do not hold its heads, in compress and in attach."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes)
    tokens = torch.randint(3, 50, (8, 12))
    model = transformers.LlamaForCausalLM(config)
    assert config.use_cache
    compressed = setpoint.compress(model, [{"input_ids": tokens}], "30%")
    heads = {name: width for name, width in compressed.widths.items() if "self_attn" in name}
    assert len(heads) == 2 and max(heads.values()) < 4
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (model.eval().generate(tokens[:2, :4], use_cache=each, **how) for each in (True, False))
    assert torch.equal(with_cache, without)
    dense = transformers.LlamaForCausalLM(config)
    loop = setpoint.attach(
        dense, torch.optim.AdamW(dense.parameters()), 0.3, example={"input_ids": tokens}, total_steps=10
    )
    assert sum("self_attn" in name for name in loop.widths) == 2
    loop.detach()


def test_a_model_is_compressed_twice() -> None:
    """Claim: a fraction is one of the model before it was ever cut."""
    model, x = _mlp(4, 32, 2), torch.randn(100, 4)
    setpoint.compress(model, [x], 0.5)
    assert setpoint.compress(model, [x], 0.25).widths == {"0": 8}
    assert np.isclose(model[0].out_features, 8)


@pytest.mark.parametrize("seed", range(3))
def test_fits_are_exact_under_autocast(seed: int) -> None:
    """Claim: forwards run as autocast says, and moments are no less exact: the fit succeeds, and is about the same."""
    torch.manual_seed(seed)
    x, model = torch.randn(256, 3, 8, 8), nn.Sequential(Block(3, 32), nn.Flatten(), nn.Linear(192, 10))
    model(x)  # statistics
    other, dense = copy.deepcopy(model), copy.deepcopy(model).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        setpoint.compress(model, [x], 0.5)
    setpoint.compress(other, [x], 0.5)
    with torch.no_grad():
        rounded, exact = (float((dense(x) - each.eval()(x)).square().mean()) for each in (model, other))
    assert rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(("rows", "thin"), [(4, True), (16, False)])
def test_too_few_rows_for_a_fit_are_warned_of(rows: int, thin: bool) -> None:
    """Claim: below a quarter of a row for each input that is fitted, a warning names the layer and both numbers."""
    model = _mlp(16, 64, 4)
    with pytest.warns(UserWarning, match="2 is given 4 rows for 64 inputs") if thin else nullcontext():
        setpoint.compress(model, [torch.randn(rows, 16)], 0.5)


def test_single_rows_before_a_batch_norm_are_named_as_such() -> None:
    """Claim: the error says how many rows to give."""
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(ExampleError, match="Give two rows or more: a batch norm needs them"):
        setpoint.compress(model, list(torch.randn(64, 8).split(1)), 0.5)


def test_units_that_no_data_come_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: where only units could be cut whose readers the data do not come to, the error says so."""
    model = _mlp(8, 32, 4)
    monkeypatch.setattr(compressing, "unit_scores", lambda *_: {"0": np.full(32, np.inf)})
    with _unchanged(model, BudgetError, r"the data do not come to what reads \['0'\]"):
        setpoint.compress(model, [torch.randn(64, 8)], 0.5)


class FixedBatch(nn.Module):
    """A net that runs on eight rows and on no fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of each row."""
        scores: Tensor = self.down(torch.relu(self.up(x.reshape(8, -1, 32))))
        return scores


def test_a_model_of_one_batch_size_is_cut() -> None:
    """Claim: cuts are tried on all rows where the model does not run on few, as attach does, also for regrowth."""
    torch.manual_seed(0)
    data = [(torch.randn(8, 3, 32),) for _ in range(4)]
    model = FixedBatch()
    compressed = setpoint.compress(model, data, "50% flops")
    assert compressed.after["flops"] <= compressed.limit < compressed.before["flops"]
    model = FixedBatch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = setpoint.PricedController(regrow=True)
    setpoint.attach(model, optimizer, 0.5, example=data[0], total_steps=9, controller=controller).detach()


def test_an_interrupt_leaves_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: wherever Ctrl-C comes, ahead of or behind any call that `compress` makes from its scores on, model,
    optimizer, gradients and hooks are as before; `compress` returns only what is whole.
    """
    calls = at = 0

    def counting(function: Any) -> Any:
        def counted(*given: Any, **named: Any) -> Any:
            nonlocal calls
            for take in (lambda: None, lambda: function(*given, **named)):
                result, calls = take(), calls + 1
                if calls == at:
                    raise KeyboardInterrupt
            return result

        return counted

    for name in (
        "moments_on",
        "unit_scores",
        "refit",
        "mask",
        "run",
        "shrink",
        "carry_sizes",
        "widths_of",
        "samples_in",
        "Compressed",
    ):
        monkeypatch.setattr(compressing, name, counting(getattr(compressing, name)))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(64, 6)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()

    def held() -> str:
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
        state = optimizer.state_dict(), model, model.training, len(model._state_dict_hooks), vars(model).keys()
        return str(([None if tensor is None else tensor.tolist() for tensor in tensors], state))

    before = held()
    with suppress(StopIteration):
        while True:
            at, calls = at + 1, 0
            with suppress(KeyboardInterrupt):
                compressing.compress(model, [x], 0.5, optimizer=optimizer, verify=False)
                raise StopIteration
            assert held() == before, at
    assert at > 18 and model[0].out_features < 16


def test_an_error_on_the_way_leaves_gradients_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: masks zero gradients in place, and an error after that brings them back."""
    model, x = _mlp(4, 16, 2), torch.randn(64, 4)
    model(x).square().mean().backward()
    monkeypatch.setattr(compressing, "shrink", Mock(side_effect=RuntimeError("no memory")))
    with _unchanged(model, RuntimeError, "no memory"):
        setpoint.compress(model, [(x,)], "50% flops")


def _small_images(norms_in_training: bool, statistics: int = 40) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A net that knows which quadrant is bright, and its data; its norms may be constants of other data."""
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (512,))
    images = 3.0 + torch.randn(512, 1, 8, 8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 2.0
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 4)),
    )
    for _ in range(statistics):
        model(torch.randn(32, 1, 8, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(6):
        for x, y in zip(images.split(32), labels.split(32), strict=True):
            model.train()
            for norm in (model[1], model[4]):
                norm.train(norms_in_training)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval(), list(zip(images.split(64), labels.split(64), strict=True))


def _accuracy_on(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    return float(torch.cat([model(x).argmax(1) == y for x, y in data]).double().mean())


@pytest.mark.parametrize("statistics", [40, 0])
def test_norms_that_were_constants_stay_constants(statistics: int) -> None:
    """Claim: a net that was fine-tuned with its norms in eval mode keeps statistics and accuracy, with a warning; so
    does one that was trained so from the beginning, whose statistics are the first ones.
    """
    model, data = _small_images(norms_in_training=False, statistics=statistics)
    before, means = _accuracy_on(model, data), set(model[1].running_mean.tolist())
    with pytest.warns(UserWarning, match="count as constants of the training"):
        setpoint.compress(model, data, "90% flops")
    assert before > 0.9 and _accuracy_on(model, data) > before - 0.03
    assert set(model[1].running_mean.tolist()) <= means


def test_norms_that_were_trained_get_new_statistics() -> None:
    """Claim: of an ordinary net the statistics become those of the cut model, without a warning."""
    model, data = _small_images(norms_in_training=True)
    before = _accuracy_on(model, data)
    setpoint.compress(model, data, "60% flops")
    given: list[Tensor] = []
    model[4].register_forward_pre_hook(lambda norm, args: given.append(args[0]))
    assert before > 0.9 and _accuracy_on(model, data) > before - 0.05
    kept = model[4].running_mean.clone()
    given.clear()
    with torch.no_grad():
        for x, _ in data:
            model.train()(x)  # each norm divides by the batch, as while statistics are renewed
    torch.testing.assert_close(kept, torch.cat(given).mean((0, 2, 3)))


class TwoTasks(nn.Module):
    """A trunk with two heads, of which a forward takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.main, self.aux, self.aux_norm = (
            nn.Conv2d(16, 8, 3, padding=1),
            nn.Conv2d(16, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, task: str = "main") -> Tensor:
        """Scores of one task."""
        x = torch.relu(self.norm(self.trunk(x)))
        x = self.main(x) if task == "main" else self.aux_norm(self.aux(x))
        scores: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return scores


def test_what_the_data_do_not_reach_is_told_and_left_alone() -> None:
    """Claim: weights that may read cut units are named, their norm keeps its statistics, and they are not refitted."""
    torch.manual_seed(0)
    model = TwoTasks()
    for _ in range(20):
        model(2 + torch.randn(32, 3, 8, 8), "aux")
        model(2 + torch.randn(32, 3, 8, 8))
    kept = model.aux_norm.running_mean.clone()
    with pytest.warns(UserWarning, match="the example does not reach aux.weight"):
        compressed = setpoint.compress(model, [(2 + torch.randn(32, 3, 8, 8),) for _ in range(4)], "60% flops")
    assert torch.equal(model.aux_norm.running_mean, kept) and set(compressed.refitted) == {"main", "head"}
