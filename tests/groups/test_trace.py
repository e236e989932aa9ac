"""What is coupled with what: groups of small models, checked place by place."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import setpoint
from groups.zoo import GPT, MODELS, ConcatCNN, DepthwiseCNN, PlainCNN, ResidualCNN, SeparateAttention, images
from setpoint.errors import ExampleError, ExportError, GroupError, LoopError
from setpoint.groups.group import Group
from setpoint.groups.trace import find_groups, trace


def by_name(groups: tuple[Group, ...]) -> dict[str, Group]:
    return {group.name: group for group in groups}


def places(group: Group) -> dict[tuple[str, int | None], str]:
    return {(piece.tensor, piece.dim): piece.role for piece in group.slices}


def test_convolution_batch_norm_and_flatten() -> None:
    """A channel owns its filter, its batch norm entries and, behind a flatten, a block of the next layer's inputs."""
    groups = by_name(find_groups(PlainCNN(), images()))
    assert {name: group.num_units for name, group in groups.items()} == {
        "features.0": 8,
        "features.4": 12,
        "head.1": 10,
    }
    channel = places(groups["features.4"])
    assert channel[("features.4.weight", 0)] == "produce"
    assert channel[("features.5.running_var", 0)] == "carry"
    assert channel[("head.1.weight", 1)] == "consume"
    flat = next(piece for piece in groups["features.4"].slices if piece.tensor == "head.1.weight")
    assert flat.index.tolist() == [unit for unit in range(12) for _ in range(4)]
    assert all(group.lossless for group in groups.values())


def test_residual_sum_couples_both_sides() -> None:
    """What is added together is dropped together; the inner channels of a block are free."""
    groups = by_name(find_groups(ResidualCNN(), images()))
    assert set(groups) == {"stem", "blocks.0.conv1", "blocks.1.conv1", "blocks.1.conv2"}
    stem = places(groups["stem"])
    assert stem[("blocks.0.conv2.weight", 0)] == "produce"
    assert stem[("blocks.1.shortcut.weight", 1)] == "consume"
    assert places(groups["blocks.1.conv2"])[("blocks.1.shortcut.weight", 0)] == "produce"


def test_depthwise_and_grouped_convolutions() -> None:
    """A depthwise filter goes with its channel; of a grouped convolution whole groups go."""
    groups = by_name(find_groups(DepthwiseCNN(), images()))
    assert places(groups["expand"])[("depthwise.weight", 0)] == "carry"
    assert places(groups["expand"])[("project.weight", 1)] == "consume"
    stream = groups["stem"]
    assert stream.num_units == 4, "8 channels in 4 groups of the norm and of the convolution"
    bound = {(size.module, size.place) for size in stream.sizes}
    assert {
        ("norm", "num_groups"),
        ("norm", "num_channels"),
        ("grouped", "groups"),
        ("grouped", "in_channels"),
    } <= bound


def test_concatenation_keeps_exact_positions() -> None:
    """Branches of a concatenation are separate groups, each at its own offset; data channels in between stay."""
    groups = by_name(find_groups(ConcatCNN(), images()))
    left = next(piece for piece in groups["left"].slices if piece.tensor == "out.weight")
    right = next(piece for piece in groups["right"].slices if piece.tensor == "bn.running_mean")
    assert left.index.tolist() == [0, 1, 2, 3, 4, 5] + [-1] * 7
    assert right.index.tolist() == [-1] * 9 + [0, 1, 2, 3]


def test_fused_attention_drops_whole_heads() -> None:
    """With fused q/k/v a head owns three runs of rows and one run of the projection's columns."""
    groups = by_name(find_groups(GPT(), (torch.randint(0, 20, (3, 8)),)))
    heads = groups["h.0.attn.c_attn"]
    assert (heads.what, heads.num_units, heads.lossless) == ("head", 4, True)
    fused = next(piece for piece in heads.slices if piece.tensor == "h.0.attn.c_attn.weight")
    assert fused.index.tolist() == 3 * [head for head in range(4) for _ in range(4)]
    assert places(heads)[("h.0.attn.c_proj.weight", 1)] == "consume"
    assert groups["h.1.mlp.0"].what == "neuron"


def test_residual_stream_under_a_norm_is_not_lossless() -> None:
    """Features that a LayerNorm runs over form a group that is not lossless, and says why; tied weights are one."""
    groups = find_groups(GPT(), (torch.randint(0, 20, (3, 8)),))
    (stream,) = [group for group in groups if not group.lossless]
    assert stream.what == "feature"
    assert any("a LayerNorm runs over these channels" in note for note in stream.notes)
    assert {piece.tensor for piece in stream.slices} >= {"wte.weight", "wpe.weight", "ln_f.weight"}
    assert not any(piece.tensor == "lm_head.weight" for piece in stream.slices)


def test_a_norm_with_an_epsilon_of_its_own() -> None:
    """The number in the place of a bias is none, and the module's name says nothing of the kind of norm."""
    layer = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 2))
    (group,) = find_groups(nn.Sequential(OrderedDict(layer=layer)), (torch.zeros(2, 4),))
    assert group.notes == ("an RMSNorm runs over these channels (layer.1: rms_norm)",)


def test_separate_projections_and_gated_mlp() -> None:
    """Separate q, k and v of a head go together, and so do gate and up of a gated neuron; attributes are bound."""
    groups = by_name(find_groups(SeparateAttention(), (torch.randn(3, 6, 24),)))
    heads = groups["q"]
    assert heads.num_units == 4
    assert {("q.weight", 0), ("k.weight", 0), ("v.weight", 0), ("o.weight", 1)} == set(places(heads))
    assert ("", "heads") in {(size.module, size.place) for size in heads.sizes}
    assert set(places(groups["gate"])) >= {("gate.weight", 0), ("up.weight", 0), ("down.weight", 1)}


def test_outputs_and_inputs_are_frozen() -> None:
    """Dims that reach an output or come from an input are in no group, and the trace says why."""
    result = trace(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), (torch.zeros(2, 4),))
    assert [group.name for group in result.groups] == ["0"]
    assert any("output" in frozen.reason for frozen in result.frozen)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.linalg.matrix_exp(self.a(x).view(-1, 2, 2)).reshape(-1, 4)
        return self.c(F.relu(self.b(mixed)))


def test_unknown_op_freezes_what_it_touches_by_name() -> None:
    """An op without a rule freezes its operands, is named, and leaves the rest prunable."""
    result = trace(Unknown(), (torch.zeros(2, 4),))
    assert [group.name for group in result.groups] == ["b"]
    assert [frozen.place for frozen in result.frozen if "no rule" in frozen.reason] == ["model: linalg_matrix_exp"]


@pytest.mark.parametrize("name", MODELS)
def test_discovery_leaves_the_model_alone(name: str) -> None:
    """Parameters, buffers, mode, gradients and the global random state are as before."""
    build, example = MODELS[name]
    model, inputs = build(), example()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    find_groups(model, inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def example_errors() -> list[tuple[Any, str]]:
    return [
        ((torch.zeros(2, 5),), "does not accept"),
        ((torch.zeros(2, 4), torch.zeros(2)), "does not accept"),
        (torch.zeros(2, 4), r"example=\(x,\)"),
        ({"wrong": torch.zeros(2, 4)}, "does not accept"),
        ((torch.zeros(2, 4, device="meta"),), "meta.*cpu"),
    ]


@pytest.mark.parametrize(("example", "message"), example_errors())
def test_bad_example_is_named(example: Any, message: str) -> None:
    """A wrong shape, number, form or device of inputs is the example's fault, and the error says what it got."""
    with pytest.raises(ExampleError, match=message):
        find_groups(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), example)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_module_is_refused_by_name() -> None:
    """Claim: where PyTorch would only say that hooks are not supported, the error names the module and the way out."""
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)))
    model = nn.Sequential(nn.Linear(6, 6), scripted)
    with pytest.raises(ExportError, match=r"'1' is a ScriptModule, which takes no hooks"):
        find_groups(model, (torch.randn(4, 6),))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("made", ["script", "trace", "export", "export.module"])
def test_a_model_without_code_is_refused_in_words(made: str) -> None:
    """Claim: find_groups, attach and compress say to give the model as it was before torch.jit or torch.export."""
    plain, x = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)), torch.randn(4, 6)
    model: Any = {
        "script": lambda: torch.jit.script(plain),
        "trace": lambda: torch.jit.trace(plain, x),
        "export": lambda: torch.export.export(plain, (x,)),
        "export.module": lambda: torch.export.export(plain, (x,)).module(),
    }[made]()
    words = "before torch|model must be a torch.nn.Module, got"
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.raises((ExportError, ValueError), match=words):
        setpoint.compress(model, [x], 0.5)
    if made != "export.module":  # whose graph can be followed
        with pytest.raises((ExportError, GroupError), match=words):
            find_groups(model, (x,))
        with pytest.raises((ExportError, LoopError), match=words):
            setpoint.attach(model, optimizer, 0.5, total_steps=10)
