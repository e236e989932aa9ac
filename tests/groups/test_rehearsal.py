"""Rehearsals: few forwards, on copies without data, that leave the model and its hooks alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from setpoint.groups.rehearsal import Rehearsal
from setpoint.groups.trace import find_groups


class AsksForValues(nn.Module):
    """A forward whose code depends on a value, which tensors without data cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum().item() > 0 else x


def kinds_of(rehearsal: Rehearsal) -> list[torch.device]:
    """The device of the first weight of every copy that one run made."""
    devices: list[torch.device] = []
    rehearsal.run(lambda twin: devices.append(next(twin.parameters()).device))
    return devices


def test_the_kind_of_tensors_that_was_enough_is_kept() -> None:
    """A forward that asks for values is tried on meta, fake and real tensors once, and then on real ones only."""
    rehearsal = Rehearsal(AsksForValues(), (torch.ones(2, 4),))
    assert len(kinds_of(rehearsal)) == 3
    assert kinds_of(rehearsal) == [torch.device("cpu")]
    assert rehearsal.run() == ((2, 3),)
    assert kinds_of(Rehearsal(nn.Linear(4, 3), (torch.ones(2, 4),))) == [torch.device("meta")]


def test_hooks_of_the_user_are_neither_run_nor_copied() -> None:
    """A hook that cannot be copied is no obstacle, and never runs; weight norm's own computes the weight."""
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

    class Hook:
        def __deepcopy__(self, memo: object) -> Hook:
            raise AssertionError("copied")

        def __call__(self, *_: object) -> None:
            raise AssertionError("run")

    layer.register_forward_hook(Hook())
    assert Rehearsal(layer, (torch.ones(2, 4),)).run() == ((2, 3),)
    assert len(layer._forward_hooks) == 1


class Branching(nn.Module):
    """A stream under a norm and neurons beside it; other code in training than in evaluation, if `branch`."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.branch = branch
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.norm(self.embed(x))).relu()
        return self.second(x * 2 if self.branch and self.training else x)


@pytest.mark.parametrize(("branch", "modes"), [(False, [0, 0, 0, 1, 0]), (True, [0, 0, 0, 1, 0, 1])])
def test_the_other_mode_is_tried_again_only_if_it_runs_other_code(
    branch: bool, modes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense model, its written sizes, the lossless cut in both modes, and the whole cut in one or in both."""
    ran: list[int] = []
    run = Rehearsal._run

    def noted(self: Rehearsal, kind: Any, prepare: Callable[[nn.Module], None], other_mode: bool) -> Any:
        ran.append(int(other_mode))
        return run(self, kind, prepare, other_mode)

    monkeypatch.setattr(Rehearsal, "_run", noted)
    assert [group.lossless for group in find_groups(Branching(branch), (torch.ones(2, 4),))] == [False, True]
    assert ran == modes


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_without_data_answers_as_with_data(training: bool) -> None:
    """Claim: shapes are those of real tensors, and statistics or weights of another width are refused as there."""
    for norm, shape in ((nn.BatchNorm2d(4), (2, 4, 3, 5)), (nn.BatchNorm1d(4), (6, 4))):
        norm.train(training)
        rehearsal = Rehearsal(norm, (torch.randn(shape),))
        assert kinds_of(rehearsal) == [torch.device("meta")] and rehearsal.run() == (torch.Size(shape),)
        with pytest.raises(RuntimeError, match="running_mean should contain"):
            Rehearsal(norm, (torch.randn(2, 5, *shape[2:]),)).run()


def test_transformers_need_no_fake_tensors() -> None:
    """Claim: a model of transformers, which asks whether tensors have data, runs on the meta device."""
    transformers = pytest.importorskip("transformers")
    known = transformers.utils.import_utils.is_fake_tensor
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    model = transformers.BertModel(transformers.AutoConfig.for_model("bert", **sizes))
    tokens = torch.zeros(2, 3, dtype=torch.long)
    rehearsal = Rehearsal(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    assert kinds_of(rehearsal) == [torch.device("meta")]
    assert transformers.utils.import_utils.is_fake_tensor is known


class Answered(nn.Module):
    """A forward of the operations that are answered by a shape alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.channels = nn.LayerNorm((3, 4)), nn.Linear(4, 6), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        normed, mixed = self.norm(x), self.linear(x[:, 0])
        return normed, mixed, self.channels(x), nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_shapes_answered_without_arithmetic_are_those_of_the_forward() -> None:
    """Claim: norms, products and attention have the shapes that the model itself returns."""
    model, x = Answered(), torch.randn(2, 3, 4)
    assert Rehearsal(model, (x,)).run() == tuple(each.shape for each in model(x))


@pytest.mark.parametrize(
    ("place", "shape"),
    [("norm.weight", (2, 4)), ("norm.bias", (3, 3)), ("linear.weight", (6, 5)), ("linear.bias", (5,))],
)
def test_sizes_that_do_not_fit_are_refused_as_by_torch(place: str, shape: tuple[int, ...]) -> None:
    """Claim: a cut that leaves an operation with wrong sizes raises, though no arithmetic is done."""
    owner, name = place.split(".")

    def prepare(twin: nn.Module) -> None:
        setattr(twin.get_submodule(owner), name, nn.Parameter(torch.empty(shape)))

    with pytest.raises(RuntimeError):
        Rehearsal(Answered(), (torch.randn(2, 3, 4),)).run(prepare)


def norm_of(x: Tensor, width: int = 3, training: bool = True) -> tuple[Tensor, ...]:
    """A batch norm as torch calls it itself, which checks no sizes."""
    weight, mean = torch.ones(width), torch.zeros(width)
    return torch.native_batch_norm(x, weight, weight, mean, weight, training, 0.1, 1e-5)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "a norm": norm_of,
    "a norm that knows its statistics": lambda x: norm_of(x, training=False),
    "a softmax": lambda x: torch._safe_softmax(x, -1),
    "a softmax across": lambda x: torch._safe_softmax(x.transpose(0, 1), -1),
    "a softmax in float64": lambda x: torch._safe_softmax(x, -1, torch.float64),
    "a product": lambda x: torch.addmm(x[0, 0], x[0], x[0].t() @ x[0]),
    "a sum": lambda x: x + x.transpose(0, 1).contiguous().transpose(0, 1),
    "a single number": lambda x: (torch.tensor(2.0) + torch.tensor(1.0)).item() * x,
}


@pytest.mark.parametrize("call", CALLS)
def test_fake_tensors_are_answered_as_real_ones(call: str) -> None:
    """Claim: shapes, strides and dtypes of what is answered by a shape are those of real tensors."""
    found: list[list[Any]] = []

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made = CALLS[call](x)
            made = made if isinstance(made, tuple) else (made,)
            found.append([(each.shape, each.stride(), each.dtype) for each in made])
            return x

    x = torch.randn(4, 3, 4)
    Calls()(x)
    Rehearsal(Calls(), (x,)).run(exactly=True)
    assert found[0] == found[1]


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "a norm of other channels": lambda x: norm_of(x, width=2),
    "a softmax along no dim": lambda x: torch._safe_softmax(x, 3),
    "a product of two dtypes": lambda x: torch.addmm(x[0, 0], x[0].bfloat16(), x[0].t() @ x[0]),
}


@pytest.mark.parametrize("call", WRONG)
def test_what_torch_refuses_is_refused_on_fake_tensors(call: str) -> None:
    """Claim: no answer by a shape stands where torch, given fake tensors, raises or gives another dtype."""

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made = WRONG[call](x)
            assert not isinstance(made, Tensor) or made.dtype == x.dtype
            return x

    rehearsal = Rehearsal(Calls(), (torch.randn(4, 3, 4),))
    if call == "a product of two dtypes":
        rehearsal.run(exactly=True)  # torch answers in float32
    else:
        with pytest.raises((RuntimeError, IndexError)):
            rehearsal.run(exactly=True)


def tensors_of_all_kinds(dtype: torch.dtype) -> list[Tensor]:
    """Contiguous, transposed, channels last, expanded, sliced and single entries; some dims have length 1."""
    x = torch.ones(2, 3, 4, 5, dtype=dtype)
    return [
        x,
        x.transpose(1, 2),
        x.contiguous(memory_format=torch.channels_last),
        x[:, :1].expand(2, 3, 4, 5),
        x[:, :, ::2],
        torch.ones(1, 1, 4, 1, dtype=dtype),
        torch.ones(3, 1, dtype=dtype),
        torch.ones(4, 5, dtype=dtype),
        torch.ones((), dtype=dtype),
    ]


ELEMENTWISE: list[Callable[[Tensor], Tensor]] = [
    lambda x: x * 2,
    lambda x: x * 2.0,
    lambda x: x + 1.5,
    lambda x: x + True,
    lambda x: 1 - x * 1j,
    lambda x: x**3,
    lambda x: x**2.0,
    torch.tanh,
    nn.functional.gelu,
    lambda x: torch.mul(x, torch.tensor(2.0, dtype=torch.float64)),
    lambda x: torch.add(x, torch.tensor(3)),
    lambda x: torch.where(x > 0, torch.tensor(0.0), torch.tensor(1.0)),
    lambda x: torch.where(x > 0, torch.tensor(0.0), torch.tensor(1.0, dtype=torch.float64)),
    lambda x: x.softmax(-1),
    torch.tril,
    lambda x: torch.tril(x, 1),
    lambda x: nn.functional.layer_norm(x, x.shape[-1:]),
    lambda x: x.relu() if x.dim() < 2 else nn.functional.batch_norm(x, None, None, training=True),
]


class Answers(nn.Module):
    """Takes down what each operation returns on tensors of all kinds, or that it fails."""

    def __init__(self, *, pairs: bool) -> None:
        super().__init__()
        self.weight, self.pairs, self.found = nn.Parameter(torch.ones(3, 3)), pairs, []

    def forward(self, *tensors: Tensor) -> Tensor:
        for each in tensors:
            functions = ELEMENTWISE
            if self.pairs:
                functions = [lambda x, y=y: x + y for y in tensors] + [lambda x, y=y: x * y for y in tensors]
            for function in functions:
                try:
                    made = function(each)
                    self.found.append((tuple(made.shape), made.stride(), made.dtype, made.requires_grad))
                except (RuntimeError, NotImplementedError, IndexError, ValueError) as error:
                    self.found.append(type(error))
        return self.weight.sum()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("exactly", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64])
def test_operations_answer_as_torch_does(dtype: torch.dtype, exactly: bool, pairs: bool) -> None:
    """On copies without data, shapes, strides, types and failures are torch's own, of tensors with data or without."""
    others = [torch.ones(2, 3, 4, 5, dtype=torch.float64)] if pairs else []
    given = (*tensors_of_all_kinds(dtype), *others)
    model = Answers(pairs=pairs)
    model(*given)
    with_data, twins = list(model.found), []
    model.found.clear()
    if exactly:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(*map(mode.from_tensor, given))
    else:
        with torch.device("meta"):
            model(*(each.to("meta") for each in given))
    without_data = list(model.found)
    model.found.clear()
    Rehearsal(model, given).run(twins.append, exactly=exactly)
    answers = zip(twins[-1].found, with_data, without_data, strict=True)
    strange = [(number, got, *wanted) for number, (got, *wanted) in enumerate(answers) if got not in wanted]
    assert not strange


class Scaled(nn.Module):
    """Multiplies by half of a sparse table."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("table", torch.eye(2).to_sparse_csr())

    def forward(self, x: Tensor) -> Tensor:
        return (self.table * 0.5) @ self.layer(x)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_has_no_strides_is_left_to_torch() -> None:
    """Arithmetic on a compressed sparse tensor needs no copy with data."""
    assert Rehearsal(Scaled(), (torch.ones(2, 4),)).run(exactly=True) == ((2, 3),)


def test_a_condition_must_be_one() -> None:
    """`torch.where` refuses floats as a condition on copies without data, as it does on all others."""

    class Chooses(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.where(x, torch.tensor(0.0), torch.tensor(1.0)).sum()

    with pytest.raises(RuntimeError, match="condition"):
        Rehearsal(Chooses(4, 3), (torch.ones(2, 4),)).run()
