import copy

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import setpoint
from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.groups.states import selective_layer
from setpoint.states import BalancedPairs, balance
from setpoint.states.hankel import HankelSensor
from setpoint.states.selective import SelectiveSensor
from setpoint_bench.models import LRU
from states.systems import balance_and_shrink

TOKENS = torch.randint(0, 17, (3, 20), generator=torch.Generator().manual_seed(0))
_SIZES = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "expand": 2, "use_cache": False}
_MAMBA2 = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
kinds = pytest.mark.parametrize("kind", ["mamba", "mamba2"])


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(kind, **_SIZES, **(_MAMBA2 if kind == "mamba2" else {}))
    model = transformers.AutoModelForCausalLM.from_config(settings)
    assert isinstance(model, nn.Module)
    return model


def _states(model: nn.Module) -> tuple[Group, ...]:
    return tuple(group for group in setpoint.find_groups(model, {"input_ids": TOKENS}) if group.kind == "state")


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


@kinds
def test_states_are_ranked_by_their_averaged_gramians(kind: str) -> None:
    """A state that is never read has saliency 0, and the ranking beats the opposite one when half of them go."""
    model = _model(kind)
    (group,) = _states(model)
    assert selective_layer(model, group) == ("backbone.layers.0.mixer", kind)
    mixer = model.get_submodule("backbone.layers.0.mixer")
    with torch.no_grad():  # states of very different size
        spread = torch.logspace(0, -2, 8)
        if kind == "mamba":
            mixer.x_proj.weight[-8:] *= spread[:, None] * 20
            mixer.x_proj.weight[-5] = 0.0
        else:
            mixer.in_proj.weight[-12:-4] *= spread[:, None] * 20
            mixer.in_proj.weight[-9] = 0.0
            mixer.conv1d.bias[-5] = 0.0
    sensor = SelectiveSensor({"input_ids": TOKENS})
    assert sensor.readable((group,), model) == (group,)
    model.train()
    reading = sensor.read(sensor.init((group,), model), (group,), 1)
    assert model.training and not reading.calibrated and reading.finite()
    saliency = reading.saliency[group.name]
    assert saliency.shape == (8,) and (saliency >= 0).all() and saliency[3] == 0.0
    want = _logits(model)
    errors = []
    for order in (np.argsort(-saliency), np.argsort(saliency)):
        small = copy.deepcopy(model)
        keep = np.zeros(8, dtype=bool)
        keep[order[:4]] = True
        setpoint.shrink(small, None, (group,), {group.name: keep})
        errors.append(float((_logits(small) - want).square().mean()))
    assert errors[0] < 0.1 * errors[1]


def test_one_mode_has_the_value_of_its_formula() -> None:
    """With a constant step size, B, C and input, saliency is (d b u)^2 c^2 / (1 - a^2)^2, summed over channels."""
    from setpoint.states.selective import _Tokens

    ones = torch.ones(5, 2)
    found = _Tokens(3 * ones, 0.5 * ones, 2 * ones[:, :1], 4 * ones[:, :1], torch.tensor([[-1.0], [-2.0]])).energies()
    room = [1 - np.exp(-1.0), 1 - np.exp(-2.0)]
    assert float(found) == pytest.approx(sum((0.5 * 2 * 3) ** 2 * 16 / each**2 for each in room), rel=1e-5)


def test_heads_of_mamba2_go_one_by_one() -> None:
    """Where there are more heads than channels in each, heads are the units: with their step size, rate and skip."""
    torch.manual_seed(0)
    settings = transformers.Mamba2Config(**_SIZES, num_heads=8, head_dim=4, n_groups=1, chunk_size=8)
    model = transformers.Mamba2ForCausalLM(settings)
    groups = setpoint.find_groups(model, {"input_ids": TOKENS})
    (heads,) = (group for group in groups if group.what == "head")
    setpoint.shrink(model, None, groups, {heads.name: np.arange(8) % 4 > 0})
    mixer = model.backbone.layers[0].mixer
    assert mixer.A_log.shape == mixer.dt_bias.shape == mixer.D.shape == (6,)
    assert mixer.out_proj.weight.shape == (16, 24) and torch.isfinite(_logits(model)).all()


@kinds
def test_selective_states_have_no_balanced_coordinates(kind: str) -> None:
    """Handed to the path of linear time-invariant layers they are refused, with what to use; nothing is changed."""
    model = _model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (states,) = _states(model)
    with pytest.raises(GroupError, match=r"mixer' are selective.*SelectiveSensor"):
        HankelSensor(num_samples=3).init((states,), model)
    basis = {states.name: BalancedPairs(balance(LRU(2, states.num_units).state_space()))}
    with pytest.raises(GroupError, match="no balanced coordinates"):
        balance_and_shrink(model, None, (states,), {states.name: np.arange(states.num_units) < 4}, basis)
    optimizer = torch.optim.AdamW(model.parameters())
    example, budget = {"input_ids": TOKENS}, setpoint.Budget.fraction(0.9, of="params")
    with pytest.raises(GroupError, match=r"HankelSensor cannot read it \(the sensor ranks no states like these\)"):
        setpoint.attach(
            model, optimizer, budget, example=example, total_steps=9, groups=(states,), sensor=HankelSensor(3)
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_mamba2_is_pruned_to_half_of_its_parameters() -> None:
    """States and heads go together for one budget, with the default sensors, and the run lands."""
    model = _model("mamba2")
    example = {"input_ids": TOKENS}
    groups = setpoint.find_groups(model, example)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    budget = setpoint.Budget.fraction(0.5, of="params")
    with setpoint.attach(
        model, optimizer, budget, example=example, total_steps=30, groups=groups, allow_lossy=True
    ) as loop:
        for _ in range(30):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    (states,) = (group.name for group in groups if group.kind == "state")
    assert loop.summary is not None and loop.summary.budget_met and loop.widths[states] < 8
