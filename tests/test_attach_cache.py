"""What attach found out about a model is used again for equal models, and for no others."""

from __future__ import annotations

import enum
import importlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.actuator import tried
from setpoint.cache import cache_folder, keep, recall
from setpoint.errors import GroupError, UsageError
from setpoint.groups.fingerprint import fingerprint
from setpoint.groups.group import Group
from setpoint.resources import costing
from setpoint.resources.kept_tape import tape_key
from setpoint.resources.table import Table


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


@pytest.mark.parametrize("of", ["flops", "memory"])
def test_a_model_without_an_example_is_known(of: str, tries: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: where the first step gives the example, an equal model is neither tried nor recorded a second time."""
    recorded: list[int] = []
    plain = costing._tape
    monkeypatch.setattr(costing, "_tape", lambda *given: recorded.append(1) or plain(*given))
    for _ in range(2):
        model = Net(width=32)
        optimizer = torch.optim.AdamW(model.parameters())
        loop = setpoint.attach(model, optimizer, setpoint.Budget.fraction(0.8, of=of), total_steps=10)
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        assert loop.groups
        loop.detach()
    assert len(tries) == 1 and len(recorded) == (of == "memory")


@pytest.mark.parametrize("where", ["a tensor", "an optimizer"])
def test_hooks_of_the_user_make_a_model_unknown(where: str, tries: list[int]) -> None:
    """Claim: a hook of the user's on a weight is not known; one on an optimizer keeps the recorded step from being."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    key = tape_key(model, (optimizer,), (), "a fingerprint", "step")
    assert key
    if where == "a tensor":
        model.a.weight.register_hook(lambda grad: grad)
        for _ in range(2):
            attached(model)
        assert len(tries) == 2
    else:
        optimizer.register_step_pre_hook(lambda *given: None)
        assert tape_key(model, (optimizer,), (), "a fingerprint", "step") == ""


def test_the_cache_can_be_turned_off(tries: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: with SETPOINT_CACHE=off nothing is written, and each model is tried."""
    monkeypatch.setenv("SETPOINT_CACHE", "off")
    attached(Net())
    attached(Net())
    assert len(tries) == 2 and not folder.exists()


def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a folder in SETPOINT_CACHE is not taken for "on"; the error says what names the folder."""
    monkeypatch.setenv("SETPOINT_CACHE", "/tmp/cache")
    with pytest.raises(UsageError, match="'on' or 'off', got '/tmp/cache': XDG_CACHE_HOME"):
        attached(Net())


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
    assert len(files) == 3
    for number, spoil in enumerate(SPOILS):
        for file in files:
            spoil(file)
        assert facts(attached(Net())) == first and len(tries) == 2 + number
    assert facts(attached(Net())) == first and len(tries) == 1 + len(SPOILS)


@pytest.mark.parametrize("facts", [[], {}, "", 0, [1]])
def test_facts_of_another_form_are_not_believed(facts: Any, tries: list[int], folder: Path) -> None:
    """Claim: an intact file that holds something else is no reason to fail."""
    attached(Net())
    for file in folder.iterdir():
        keep(file.stem, facts)
    attached(Net())
    assert len(tries) == 2


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


def test_failures_are_found_anew(monkeypatch: pytest.MonkeyPatch, tries: list[int]) -> None:
    """Claim: groups that failed are tried again, with the same warning and header of the ledger if they fail again."""
    monkeypatch.setattr(tried, "failing_groups", lambda *args: (tries.append(1), ("2",))[1])
    headers = []
    for _ in "12":
        model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.warns(UserWarning, match="not pruned.*: 2"):
            loop = setpoint.attach(model, optimizer, 0.9, example=(torch.randn(4, 3),), total_steps=10)
        headers.append(loop.ledger.header)
        loop.detach()
    assert headers[0] == headers[1] and "2" in headers[0]["frozen"] and len(tries) == 2


class Masked(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x))).masked_fill(x[:, :1] == 0, float("-inf")).exp()
        return y / y.sum(-1, keepdim=True)


def test_numbers_of_one_example_do_not_decide_on_another() -> None:
    """Claim: where an example makes NaN, so that no cut of it can be compared, the next example is tried."""
    x = torch.rand(4, 3) + 1
    x[0, 0] = 0.0
    optimizer = torch.optim.SGD((model := Masked()).parameters(), lr=0.1)
    with pytest.raises(GroupError, match="nothing"), pytest.warns(UserWarning, match="not pruned.*: a"):
        setpoint.attach(model, optimizer, 0.8, example=(x,), total_steps=10)
    optimizer = torch.optim.SGD((model := Masked()).parameters(), lr=0.1)
    loop = setpoint.attach(model, optimizer, 0.8, example=(x + 1,), total_steps=10)
    assert [group.name for group in loop.groups] == ["a"]
    loop.detach()


LIBRARY = {
    "net.py": """
import torch
from torch import nn

SIZES, FLAG = [1, 2], None

def scaled(x):
    return x * 1.0

class Block(nn.Module):
    limit = 4

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(scaled(torch.relu(self.a(x))))
""",
    "other.py": """
import torch

def forward(self, x):
    return self.b(torch.relu(self.a(x)) * 1.0)

def scaled(x):
    return x * 1
""",
}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """An installed package with a model, and another one that has replacements for its parts."""
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = [("model_library", "net"), ("patch_library", "other")]
    for package, module in names:
        (tmp_path / "site-packages" / package).mkdir(parents=True)
        (tmp_path / "site-packages" / package / "__init__.py").touch()
        (tmp_path / "site-packages" / package / f"{module}.py").write_text(LIBRARY[f"{module}.py"])
    importlib.invalidate_caches()
    net, other = (importlib.import_module(".".join(each)) for each in names)
    yield net, other
    for package, module in names:
        del sys.modules[package], sys.modules[f"{package}.{module}"]


PATCHES: dict[str, Callable[[ModuleType, ModuleType], tuple[object, str, object]]] = {
    "method": lambda net, other: (net.Block, "forward", other.forward),
    "function": lambda net, other: (net, "scaled", other.scaled),
    "value of a class": lambda net, other: (net.Block, "limit", 5),
    "list": lambda net, other: (net, "SIZES", [1, 3]),
    "nothing": lambda net, other: (net, "FLAG", (1,)),
}


@pytest.mark.parametrize("what", list(PATCHES))
def test_what_one_library_changes_in_another_counts(
    what: str, tries: list[int], library: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: an installed model is known again, unless another package has replaced parts or values of it."""
    net, other = library
    attached(net.Block())
    attached(net.Block())
    assert len(tries) == 1
    monkeypatch.setattr(*PATCHES[what](net, other))
    attached(net.Block())
    assert len(tries) == 2


def test_an_installed_file_that_changes_counts(tries: list[int], library: tuple[ModuleType, ModuleType]) -> None:
    """Claim: code of a library that is edited and loaded again in one process is tried."""
    attached(library[0].Block())
    file = Path(str(library[0].__file__))
    file.write_text(file.read_text().replace("return x * 1.0", "return x * 1.0 + 0.0"))
    importlib.invalidate_caches()
    attached(importlib.reload(library[0]).Block())
    assert len(tries) == 2


HIDDEN = """
import numpy as np
import torch
from torch import nn

class Settings:
    __slots__ = ("way", "tables")

SETTINGS = Settings()
SETTINGS.way = 0
SETTINGS.tables = torch.tensor((0, 1)), torch.tensor((0, 2))

WAYS = {
    "factor": lambda x, y, z, way: x * (1.0 + way),
    "wiring": lambda x, y, z, way: x + (y, z)[way],
    "function": lambda x, y, z, way: (torch.relu, torch.sigmoid)[way](x),
    "method": lambda x, y, z, way: (x.relu, x.sigmoid)[way](),
    "aten": lambda x, y, z, way: (torch.ops.aten.relu, torch.ops.aten.sigmoid)[way](x),
    "overload": lambda x, y, z, way: (torch.ops.aten.relu.default, torch.ops.aten.sigmoid.default)[way](x),
    "weight": lambda x, y, z, way: x,
    "keyword": lambda x, y, z, way: nn.functional.gelu(x, approximate=("none", "tanh")[way]),
    "dim": lambda x, y, z, way: x + (x.T, x)[way].sum(),
    "slice": lambda x, y, z, way: x + y[:, (slice(0, 3), slice(3, 6))[way]].sum(1, keepdim=True),
    "slice that is set": lambda x, y, z, way: set_slice(x, y, way),
    "index of NumPy": lambda x, y, z, way: x + y[:, np.int64(way)].mean(),
    "array of NumPy": lambda x, y, z, way: x + y[:, np.array((0, 1 + way))].mean(),
    "table": lambda x, y, z, way: x + y[:, SETTINGS.tables[way]].mean(),
    "autocast": lambda x, y, z, way: under_autocast(x, way),
    "unpacked": lambda x, y, z, way: (lambda a, b, *rest: x * (a, b)[way])(*y),
}

INDEXED = ("index of NumPy", "array of NumPy", "table")

def set_slice(x, y, way):
    z = x.clone()
    z[:, (slice(0, 3), slice(3, 6))[way]] = y[:, 0:3]
    return z

def under_autocast(x, way):
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(way)):
        return (x @ x.T @ x).float()

class Block(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what
        self.a, self.b, self.c, self.d = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, given):
        x = torch.relu(self.a(given))
        y, z = (self.b(x), self.c(x)) if self.what != "weight" or SETTINGS.way else (self.c(x), self.b(x))
        read = given if self.what in INDEXED else y
        return self.d(torch.relu(WAYS[self.what](x, read, z, SETTINGS.way)) + y.relu() + z.tanh())
"""
"""A library whose settings are in a slot, which no look at its module shows."""


@pytest.mark.parametrize("address", [lambda x: x.data_ptr(), lambda x: x.untyped_storage().data_ptr()])
def test_code_that_takes_an_address_is_not_followed(address: Callable[[Tensor], int], folder: Path) -> None:
    """Claim: a forward that goes by the address of a tensor is refused by name, and never runs where it would be 0."""

    def scaled_by(x: Tensor) -> Tensor:
        assert address(x) != 0
        return x * 1.0

    for _ in range(2):
        with pytest.raises(setpoint.errors.ExportError):
            attached(changed(Net(), forward=lambda x: nn.functional.relu(scaled_by(x))))
    assert not folder.exists()


WAYS = ["factor", "wiring", "function", "method", "aten", "overload", "weight", "keyword", "dim", "slice"]
WAYS += ["slice that is set", "index of NumPy", "array of NumPy", "table", "autocast", "unpacked"]


@pytest.mark.parametrize("what", WAYS)
def test_a_forward_that_goes_another_way_is_tried(
    what: str, tries: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: where hidden settings change an operation, a number or which tensors are read, nothing is known."""
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "hidden_library.py").write_text(HIDDEN)
    importlib.invalidate_caches()
    library = importlib.import_module("hidden_library")
    monkeypatch.delitem(sys.modules, "hidden_library")
    sys.modules["hidden_library"] = library
    for way, expected in ((0, 1), (0, 1), (1, 2), (0, 2)):
        library.SETTINGS.way = way
        attached(library.Block(what))
        assert len(tries) == expected


PYTHON = {
    "metaclass": "class Meta(type):\n    flag = FLAG\nclass Made(Net, metaclass=Meta): pass",
    "singledispatch": "import functools\n@functools.singledispatch\ndef of(x): return 1\n"
    "of.register(int, lambda x: FLAG)\nclass Made(Net):\n    def forward(self, x):\n"
    "        return super().forward(x) * of(1)",
    "private slot": "class Held:\n    __slots__ = ('__flag',)\n    def __init__(self): self.__flag = FLAG\n"
    "class Made(Net):\n    held = Held()",
    "own repr": "class Number(int):\n    def __repr__(self): return 'a number'\nclass Made(Net):\n"
    "    held = Number(FLAG)",
    "attribute of a partial": "import functools\nact = functools.partial(abs)\nact.flag = FLAG\n"
    "class Made(Net):\n    held = act",
    "subclass of property": "class Lazy(property):\n    flag = FLAG\nclass Made(Net):\n    held = Lazy(lambda self: 1)",
    "end of a long pattern": "import re\nclass Made(Net):\n    held = re.compile('a' * 300 + str(FLAG))",
    "member of an enum": "import enum\nclass Way(enum.Enum):\n    ONE = 1\nWay.ONE.flag = FLAG\n"
    "class Made(Net):\n    held = Way.ONE",
    "attribute of a logger": "import logging\nlog = logging.getLogger('of this test')\nlog.flag = FLAG\n"
    "class Made(Net):\n    held = log",
}


@pytest.mark.parametrize("what", list(PYTHON))
def test_state_in_corners_of_python_counts(what: str, tries: list[int]) -> None:
    """Claim: what Python holds besides plain attributes is looked into: metaclasses, slots, partials, enums."""
    for flag, expected in ((1, 1), (1, 1), (2, 2)):
        attached(made_by(PYTHON[what], FLAG=flag))
        assert len(tries) == expected


class OwnNorm(nn.BatchNorm1d):
    """A norm with a buffer of its own."""

    def __init__(self, scale: float) -> None:
        super().__init__(6)
        self.register_buffer("scale", torch.tensor(scale))


def with_numbers(name: str, value: float) -> Net:
    net = Net()
    with torch.no_grad():
        net.state_dict()[name].fill_(value)
    return net


def with_norm(scale: float) -> Net:
    net = Net()
    net.norm = OwnNorm(scale)
    return net


NUMBERS: dict[str, tuple[Callable[[], Net], Callable[[], Net]]] = {
    "buffer of a norm of the user's": (lambda: with_norm(1.0), lambda: with_norm(2.0)),
    "sign of weights": (lambda: with_numbers("a.weight", 1.0), lambda: with_numbers("a.weight", -1.0)),
    "weights that are no numbers": (Net, lambda: with_numbers("a.weight", float("nan"))),
    "infinite weights": (Net, lambda: with_numbers("a.weight", float("inf"))),
    "variances that are no numbers": (Net, lambda: with_numbers("norm.running_var", float("nan"))),
}


@pytest.mark.parametrize("what", list(NUMBERS))
def test_numbers_that_decide_count(what: str, folder: Path) -> None:
    """Claim: what can decide whether a cut passes is in the key: other buffers, signs, and what is not finite."""
    example = (torch.randn(4, 3),)
    first, second = (fingerprint(make(), example) for make in NUMBERS[what])
    assert first and second and first != second
    assert fingerprint(NUMBERS[what][0](), example) == first


def test_attach_refuses_what_only_its_numbers_refuse(tries: list[int]) -> None:
    """Claim: roots of negative weights keep a group from being cut, also after a like model with positive ones."""

    class Rooted(nn.Module):
        def __init__(self, sign: float) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 16), nn.Linear(16, 2)
            self.scale = nn.Parameter(torch.full((16,), sign))

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = torch.relu(self.a(x)) * self.scale.sqrt()
            return self.b(hidden)

    attached(Rooted(1.0))
    with pytest.warns(UserWarning, match="not pruned"), pytest.raises(GroupError):
        attached(Rooted(-1.0))
    assert len(tries) == 2


HELPER = """
SCALE = 1.0

def split(x):
    return x{rest}
"""
"""Its graph is the same with the rest."""


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], ModuleType]]:
    """Writes a package of the user's with a helper, of the one code or of the other, and imports it anew."""
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def written(other: bool) -> ModuleType:
        rest = " if x.shape[1] <= 6 else x.flip(1)" if other else ""
        (tmp_path / "users" / "helper.py").write_text(HELPER.format(rest=rest))
        for name in ("users.helper", "users"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("users.helper")

    yield written
    for name in ("users.helper", "users"):
        sys.modules.pop(name, None)


def made_by(source: str, **names: object) -> nn.Module:
    """A net whose forward, or all that is behind it, is this source in a module `users.net`."""
    space = {"Net": Net, "nn": nn, "torch": torch, "__package__": "users", "__name__": "users.net", **names}
    exec(source, space)
    model: nn.Module = space["Made"]()  # type: ignore[operator]
    return model


def net_with(body: str, start: str = "", before: str = "") -> str:
    """Source of a net, whose forward has this body."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return f"{before}\nclass Made(Net):\n    {start}\n    def forward(self, x, ops=None):\n{lines}"


IMPORTS = {
    "from": "from users.helper import split\nreturn self.b(split(self.a(x)))",
    "from as": "from users.helper import SCALE, split as cut\nreturn self.b(cut(self.a(x)) * SCALE)",
    "module": "import users.helper\nreturn self.b(users.helper.split(self.a(x)))",
    "module as": "import users.helper as ops\nreturn self.b(ops.split(self.a(x)))",
    "from package": "from users import helper\nreturn self.b(helper.split(self.a(x)))",
    "relative": "from .helper import split\nreturn self.b(split(self.a(x)))",
    "relative package": "from . import helper as ops\nreturn self.b(ops.split(self.a(x)))",
    "inside": "def inner(x):\n    from users.helper import split\n    return split(x)\nreturn self.b(inner(self.a(x)))",
    "handed on": "from users import helper\nreturn self.b(split_by(helper, self.a(x)))",
}
SPLIT_BY = "def split_by(ops, x):\n    return ops.split(x)\n"


@pytest.mark.parametrize("how", list(IMPORTS))
def test_what_a_function_imports_counts(how: str, tries: list[int], helper: Callable[[bool], ModuleType]) -> None:
    """Claim: code that a function imports is the model's: an equal one is known, a changed one is tried."""
    for other, expected in ((False, 1), (False, 1), (True, 2)):
        helper(other)
        attached(made_by(net_with(IMPORTS[how], before=SPLIT_BY)))
        assert len(tries) == expected


HELD: dict[str, Callable[[ModuleType], nn.Module]] = {
    "attribute": lambda ops: made_by(net_with("return self.b(self.ops.split(self.a(x)))", "ops = OPS"), OPS=ops),
    "default": lambda ops: made_by(
        net_with("return self.b(ops.split(self.a(x)))").replace("ops=None", "ops=OPS"), OPS=ops
    ),
    "dict": lambda ops: made_by(net_with("return self.b(TABLE['a'].split(self.a(x)))"), TABLE={"a": ops}),
    "closure": lambda ops: made_by(
        "def make(ops):\n"
        "    class Made(Net):\n"
        "        def forward(self, x):\n"
        "            return self.b(ops.split(self.a(x)))\n"
        "    return Made\n"
        "Made = make(OPS)",
        OPS=ops,
    ),
    "table of the module": lambda ops: made_by(net_with("return self.b(OPS.__dict__['split'](self.a(x)))"), OPS=ops),
    "argument": lambda ops: made_by(net_with("return self.b(split_by(OPS, self.a(x)))", before=SPLIT_BY), OPS=ops),
}


@pytest.mark.parametrize("how", list(HELD))
def test_a_module_that_is_held_counts(how: str, tries: list[int], helper: Callable[[bool], ModuleType]) -> None:
    """Claim: a Python module of the user's that code holds as a value counts by what is in it, not by its name."""
    for other, expected in ((False, 1), (False, 1), (True, 2)):
        attached(HELD[how](helper(other)))
        assert len(tries) == expected


CHANGING = {
    "table of globals": "return self.b(globals()['scaled'](self.a(x)))",
    "computed name": "return self.b(getattr(ops or nn.functional, 'RELU'.lower())(self.a(x)))",
    "environment": "return self.b(self.a(x)) * (2 if os.environ.get('NOTHING') else 1)",
    "environment, imported": "from os import getenv\nreturn self.b(self.a(x)) * (2 if getenv('NOTHING') else 1)",
    "evaluated": "return eval('self.b(self.a(x))')",
    "clock": "return self.b(self.a(x)) * (2 if time.time() < 0 else 1)",
    "chance": "return self.b(self.a(x)) * (2 if random.random() < 0 else 1)",
    "table of modules": "return self.b(sys.modules['torch'].relu(self.a(x)))",
    "importlib": "import importlib\nreturn self.b(importlib.import_module('torch').relu(self.a(x)))",
    "method": "return self.b(self.a(x)) * self.factor()",
    "file": "return self.b(self.a(x)) * (2 if FILE.exists() else 1)",
    "machine": "import platform\nreturn self.b(self.a(x)) * (2 if platform.node() == '?' else 1)",
    "not imported yet": "if x.dim() > 9:\n    import nothing_of_this_name\nreturn self.b(self.a(x))",
}
FACTOR = "def factor(self):\n        return 2 if time.time() < 0 else 1"


@pytest.mark.parametrize("what", list(CHANGING))
def test_code_that_asks_what_may_change_is_tried_each_time(what: str, tries: list[int], folder: Path) -> None:
    """Claim: a forward that asks the environment, a clock, chance or a table by a computed name leaves nothing kept."""
    names = {"os": os, "time": time, "random": random, "sys": sys, "scaled": scaled, "FILE": Path("nothing")}
    for _ in range(2):
        attached(made_by(net_with(CHANGING[what], FACTOR if what == "method" else ""), **names))
    assert len(tries) == 2 and not folder.exists()


PLAIN = {
    "attribute of self": "return self.b(getattr(self, 'A'.lower())(x))",
    "name in the code": "return self.b(self.a(x)) * getattr(self.norm, 'factor', 1.0)",
    "activation by name": "return self.b(getattr(nn.functional, 'RELU'.lower())(self.a(x)))",
    "function of a library": "return self.b(getattr(torch, 'RELU'.lower())(self.a(x)))",
    "constant of the interpreter": "return self.b(self.a(x)) * (1 if sys.version_info > (3,) else 2)",
    "library, imported": "import math\nfrom torch import nn as n\nreturn self.b(n.functional.relu(self.a(x))) * math.e",
    "unused": "return self.b(self.a(x))",
}
UNUSED = """def __init__(self):
        super().__init__()
        self.on = bool(os.environ.get('NOTHING')) or getattr(nn, 'ReLU'.strip())()
    def train_epoch(self):
        import nothing_of_this_name
        return time.time()
"""


@pytest.mark.parametrize("what", list(PLAIN))
def test_plain_code_is_known(what: str, tries: list[int]) -> None:
    """Claim: attributes of self, functions of libraries by any name, and methods that no forward calls do no harm."""
    for _ in range(2):
        before = UNUSED if what in ("unused", "activation by name") else ""
        attached(made_by(net_with(PLAIN[what], before), os=os, time=time, sys=sys))
    assert len(tries) == 1


def test_a_member_of_an_enum_counts_with_its_class(tries: list[int]) -> None:
    """Claim: a member of an enum in an attribute counts with the code of its class, not only by its name."""
    for most, expected in ((6, 1), (6, 1), (7, 2)):
        act = enum.Enum("Act", {"RELU": "relu"})
        act.__call__ = lambda self, x, most=most: x if x.shape[1] <= most else x.flip(1)  # type: ignore[attr-defined]
        attached(changed(made_by(net_with("return self.b(self.act(self.a(x)))")), act=act.RELU))  # type: ignore[arg-type]
        assert len(tries) == expected


def noted(module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook that changes nothing."""


def stacked(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), nn.Linear(6, 2))


def with_hook() -> nn.Module:
    model = stacked(nn.Linear(3, 6))
    model.handle = model[1].register_forward_hook(noted)  # type: ignore[operator, index]
    return model


HOOKED: dict[str, Callable[[], nn.Module]] = {
    "hook": with_hook,
    "weight norm": lambda: stacked(nn.utils.parametrizations.weight_norm(nn.Linear(3, 6))),
    "weight norm by a hook": lambda: stacked(torch.nn.utils.weight_norm(nn.Linear(3, 6))),
    "spectral norm": lambda: stacked(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 6))),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("how", list(HOOKED))
def test_hooks_count_by_their_order(how: str, tries: list[int], folder: Path) -> None:
    """Claim: models with equal hooks are equal, whatever number PyTorch gave the hooks in this process."""
    for _ in range(3):
        attached(HOOKED[how]())  # type: ignore[arg-type]
    assert len(tries) == 1 and len(list(folder.iterdir())) == 3


def test_hooks_in_another_order_are_others(tries: list[int]) -> None:
    """Claim: two hooks that run the other way round are tried."""
    for prepend, expected in ((False, 1), (False, 1), (True, 2)):
        model = stacked(nn.Linear(3, 6))
        model[1].register_forward_hook(noted)  # type: ignore[operator, index]
        model[1].register_forward_hook(lambda module, args, output: output * 1, prepend=prepend)  # type: ignore[operator, index]
        attached(model)
        assert len(tries) == expected


def test_what_is_used_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: where files make room, those that were used last stay, not those that were written last."""
    monkeypatch.setattr("setpoint.cache._MOST", 3)
    keys = [letter * 64 for letter in "abcd"]
    for age, key in enumerate(keys[:3]):
        keep(key, age)
        os.utime(folder / f"{key}.json", (1000 + age, 1000 + age))
    assert recall(keys[0]) == 0
    keep(keys[3], 3)
    assert [recall(key) for key in keys] == [0, None, 2, 3]


def test_a_user_without_a_home_has_no_cache(tries: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: where no home folder is known, a model is attached, operations are timed, and nothing is kept."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    for _ in range(2):
        assert attached(Net())
    assert len(tries) == 2
    table = Table(torch.device("cpu"))
    table.keep_fit("all", [1.0])
    assert table.fit("all") == [1.0] and table.file is None


def test_models_of_a_library_are_known_in_another_process(folder: Path) -> None:
    """Claim: a model of Transformers, whose library draws an identifier in each process, has one fingerprint.

    So it has after the first `attach` of a process, which wraps methods that save and load; and where a forward with
    labels fills a config, since the user's is left alone.
    """
    pytest.importorskip("transformers")
    code = (
        "import sys, torch, transformers, setpoint\n"
        "from setpoint.groups import trace\n"
        "plain, exported = trace.export, []\n"
        "trace.export = lambda *args: exported.append(1) or plain(*args)\n"
        "sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=9)\n"
        "tokens, labels = torch.zeros(4, 8, dtype=torch.long), torch.tensor([0, 1, 0, 1])\n"
        "of_llama = transformers.LlamaForCausalLM, transformers.LlamaConfig, {'input_ids': tokens}\n"
        "of_bert = transformers.BertForSequenceClassification, transformers.BertConfig\n"
        "labelled = *of_bert, {**of_llama[2], 'labels': labels}\n"
        "for made, config, example in [of_llama] * int(sys.argv[1]) + [labelled]:\n"
        "    model = made(config(**sizes)).train()\n"
        "    optimizer = torch.optim.SGD(model.parameters())\n"
        "    setpoint.attach(model, optimizer, 0.5, example=example, total_steps=9).detach()\n"
        "assert model.config.problem_type is None\n"
        "print(len(exported))\n"
    )
    kept, exported = [], []
    for seed in "1", "2":  # so many times, too
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, seed]
        exported.append(subprocess.run(command, check=True, env=environ, capture_output=True, text=True).stdout.strip())
        kept.append(sorted(file.name for file in folder.iterdir()))
    assert exported == ["2", "0"] and kept[0] and kept[0] == kept[1]
