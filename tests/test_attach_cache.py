"""What attach found out about a model is used again for equal models, and for no others."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.actuator import tried
from setpoint.cache import cache_folder, keep, recall
from setpoint.groups.group import Group


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SETPOINT_CACHE", "on")
    return cache_folder() / "attach"


@pytest.fixture(autouse=True)
def tries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each time that cuts are tried."""
    made: list[int] = []
    plain = tried.failing_groups

    def counted(*args: Any) -> tuple[str, ...]:
        made.append(1)
        return plain(*args)

    monkeypatch.setattr(tried, "failing_groups", counted)
    yield made


SCALE = 1.0


def scaled(x: Tensor) -> Tensor:
    return x * SCALE


class Net(nn.Module):
    def __init__(self, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.extra = heads, [1, 2]
        self.a, self.norm, self.b = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(scaled(torch.relu(self.norm(self.a(x)))))


def attached(model: nn.Module, rows: int = 4, **options: Any) -> tuple[Group, ...]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    example = (torch.randn(rows, 3),)
    loop = setpoint.attach(model, optimizer, 0.8, example=example, total_steps=10, **options)
    groups = loop.groups
    loop.detach()
    return groups


def facts(groups: tuple[Group, ...]) -> list[Any]:
    """All of the groups, as plain values."""
    return [
        (
            *(each.name, each.kind, each.num_units, each.min_units, each.multiple_of, each.only_blocks),
            *(each.lossless, each.what, each.notes),
            [(p.tensor, p.dim, p.role, p.masked, p.index.dtype, p.index.tolist()) for p in each.slices],
            [(size.module, size.place, size.index.tolist()) for size in each.sizes],
        )
        for each in groups
    ]


def test_an_equal_model_is_tried_once(tries: list[int]) -> None:
    """Claim: with other weights and numbers in the example the same groups come back untried; "always" tries them."""
    first = attached(Net())
    assert len(tries) == 1
    assert facts(attached(Net())) == facts(first)
    assert len(tries) == 1
    assert facts(attached(Net(), verify="always")) == facts(first)
    assert len(tries) == 2


def test_the_cache_can_be_turned_off(tries: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: with SETPOINT_CACHE=off nothing is written, and each model is tried."""
    monkeypatch.setenv("SETPOINT_CACHE", "off")
    attached(Net())
    attached(Net())
    assert len(tries) == 2 and not folder.exists()


def hooked(net: Net) -> Net:
    net.a.register_forward_hook(lambda module, args, output: output * 1)
    return net


def own_forward(net: Net) -> Net:
    net.forward = lambda x: net.b(torch.relu(net.norm(net.a(x))))  # type: ignore[method-assign]
    return net


def with_frozen(net: Net) -> Net:
    net.a.bias.requires_grad_(False)
    return net


def changed(net: Net, **attributes: object) -> Net:
    vars(net).update(attributes)
    return net


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "width": lambda: Net(8),
    "attribute": lambda: Net(heads=3),
    "inside an attribute": lambda: changed(Net(), extra=[1, 3]),
    "hook": lambda: hooked(Net()),
    "own forward": lambda: own_forward(Net()),
    "frozen weight": lambda: with_frozen(Net()),
    "mode": lambda: Net().eval(),
}


def test_another_model_is_tried(tries: list[int]) -> None:
    """Claim: whatever differs in a model, its own cuts are tried, even where its graph would be the same."""
    attached(Net())
    for number, (what, make) in enumerate(OTHERS.items()):
        attached(make())
        assert len(tries) == 2 + number, what


def test_another_batch_shape_is_tried(tries: list[int]) -> None:
    """Claim: shapes of the example count."""
    attached(Net())
    attached(Net(), rows=5)
    assert len(tries) == 2


def same(x: Tensor) -> Tensor:
    return x * 1.0


CHANGES: list[tuple[Any, str, object]] = [
    (Net, "forward", lambda self, x: self.b(torch.relu(self.norm(self.a(x))) * 1.0)),
    (globals(), "scaled", same),
    (globals(), "SCALE", 1),
    (nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight, self.bias)),
    (nn.functional, "relu", lambda x, inplace=False: x.relu()),
    (torch, "__version__", "2.99"),
    (setpoint, "__version__", "0.99"),
]


def test_changed_code_is_tried(tries: list[int]) -> None:
    """Claim: a method, a function or a number that the code names, PyTorch's own code, and versions count."""
    attached(Net())
    for number, (target, name, value) in enumerate(CHANGES):
        with pytest.MonkeyPatch.context() as patch:
            (patch.setitem if isinstance(target, dict) else patch.setattr)(target, name, value)  # type: ignore[operator]
            attached(Net())
        assert len(tries) == 2 + number, name


def test_values_in_a_closure_count(tries: list[int]) -> None:
    """Claim: two functions of one code that hold different values are two."""

    def net(factor: list[float]) -> Net:
        return changed(Net(), factor=lambda: factor)

    attached(net([1.0]))
    attached(net([1.0]))
    assert len(tries) == 1
    attached(net([2.0]))
    assert len(tries) == 2


def damage(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


SPOILS: list[Callable[[Path], object]] = [
    lambda file: file.write_bytes(file.read_bytes()[:-20]),
    lambda file: file.write_bytes(b"\xff\x00nothing"),
    lambda file: file.write_text("[" * 5000),
    lambda file: damage(file, lambda content: content.update(key="0" * 64)),
    lambda file: damage(file, lambda content: content.update(format=0)),
    lambda file: damage(file, lambda content: content["facts"].update(failed=[], groups=[])),
]


def test_a_damaged_file_is_not_believed(tries: list[int], folder: Path) -> None:
    """Claim: what is cut off, no text, another's or changed is found out anew, and replaced."""
    first = facts(attached(Net()))
    files = sorted(folder.iterdir())
    assert len(files) == 2
    for number, spoil in enumerate(SPOILS):
        for file in files:
            spoil(file)
        assert facts(attached(Net())) == first and len(tries) == 2 + number
    assert facts(attached(Net())) == first and len(tries) == 1 + len(SPOILS)


def test_groups_that_do_not_fit_the_model_are_not_believed(tries: list[int], folder: Path) -> None:
    """Claim: facts with a right digest that are not of this model are found out anew."""
    first = attached(Net())
    for file in folder.iterdir():
        content = json.loads(file.read_text())
        if "groups" in content["facts"]:
            content["facts"]["groups"][0][9][0][0] = "b.weight"
            keep(content["key"], content["facts"])
    assert facts(attached(Net())) == facts(first)


def test_writers_do_not_disturb_each_other() -> None:
    """Claim: whoever reads while others write gets the complete facts of one of them."""
    key, seen = "a" * 64, []

    def write(number: int) -> None:
        for _ in range(20):
            keep(key, [number] * 2000)
            seen.append(recall(key))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(found == [found[0]] * 2000 for found in seen)
    assert len(list((cache_folder() / "attach").iterdir())) == 1


def test_what_has_no_fingerprint_is_tried_each_time(tries: list[int], folder: Path) -> None:
    """Claim: a model that holds what cannot be read is attached, and nothing is kept of it."""
    for _ in range(2):
        assert attached(changed(Net(), chance=torch.Generator()))
    assert len(tries) == 2 and not folder.exists()


SOURCE = """
class Made(Net):
    def forward(self, x):
        return super().forward(x) * FACTOR
"""


def test_code_without_a_file_counts(tries: list[int]) -> None:
    """Claim: classes that were made by exec are distinguished by what their code does and names."""
    for factor, expected in ((1, 1), (1, 1), (2, 2)):
        names: dict[str, Any] = {"Net": Net, "FACTOR": factor}
        exec(SOURCE, names)
        attached(names["Made"]())
        assert len(tries) == expected


class Doubled(nn.Module):
    """With a Function of its own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(Twice.apply(torch.relu(self.a(x))))))


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_a_backward_that_no_graph_shows_counts(tries: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the code of a custom Function's backward is part of the model's."""
    attached(Doubled())
    attached(Doubled())
    assert len(tries) == 1
    monkeypatch.setattr(Twice, "backward", staticmethod(lambda ctx, grad: grad * 2.0))
    attached(Doubled())
    assert len(tries) == 2


def test_failures_are_known_too(monkeypatch: pytest.MonkeyPatch, tries: list[int]) -> None:
    """Claim: groups that failed are left uncut again, with the same warning and the same header of the ledger."""
    monkeypatch.setattr(tried, "failing_groups", lambda *args: (tries.append(1), ("2",))[1])
    headers = []
    for _ in "12":
        model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.warns(UserWarning, match="not pruned.*: 2"):
            loop = setpoint.attach(model, optimizer, 0.9, example=(torch.randn(4, 3),), total_steps=10)
        headers.append(loop.ledger.header)
        loop.detach()
    assert headers[0] == headers[1] and "2" in headers[0]["frozen"] and len(tries) == 1
