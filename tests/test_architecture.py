"""The house keeps its shape: leaves that the road does not know, no private doors, few frames to the tensor."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import setpoint

SRC = Path(setpoint.__file__).resolve().parent

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

LEAVES = {"configs", "one_shot", "regrowth", "gates", "weights", "states", "resources", "report", "integrations"}


def sources(folder: str = "") -> list[Path]:
    return sorted((SRC / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere: inside functions and under TYPE_CHECKING, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{each.name}" for each in node.names)


def test_nothing_below_attach_knows_a_leaf() -> None:
    """Claim: only attach.py, the leaves themselves, integrations, the command line and the package's own window do."""
    free = {"attach.py", "__init__.py", "cli.py", "__main__.py"}
    for file in sources():
        name = file.relative_to(SRC)
        if str(name) in free or name.parts[0] in LEAVES:
            continue
        known = [each for each in imports(file) if each.startswith("setpoint.")]
        assert not [each for each in known if each.split(".")[1] in LEAVES], name


def test_nobody_reads_anothers_private_attributes() -> None:
    """Claim: an attribute that a class of Setpoint keeps to itself is read in the file of that class only."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sources()}
    owned: dict[str, set[Path]] = {}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            if own and isinstance(node.ctx, ast.Store) and node.attr.startswith("_") and not node.attr.endswith("__"):
                owned.setdefault(node.attr, set()).add(file)
            method = isinstance(node, ast.FunctionDef) and node.args.args and node.args.args[0].arg in ("self", "cls")
            if method and node.name.startswith("_") and not node.name.endswith("__"):
                owned.setdefault(node.name, set()).add(file)
    found = []
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or node.attr not in owned or file in owned[node.attr]:
                continue
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.append(f"{file.relative_to(SRC)}:{node.lineno} {ast.unparse(node)}")
    assert not found


def test_no_file_is_opened_as_a_pickle() -> None:
    """Claim: nothing in the wheel or in the benchmark unpickles; `torch.load` is called with weights_only=True only."""
    harness = [file for file in (SRC.parents[1] / "bench").rglob("*.py") if "tests" not in file.parts]
    opened = []
    for file in [*sources(), *harness]:
        opened += [f"{file}: import {each}" for each in imports(file) if each.split(".")[0] in PICKLES]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.jit.load", "np.load"):
                given = {each.arg: ast.unparse(each.value) for each in node.keywords}
                safe = given.get("weights_only") == "True" or ast.unparse(node.func) == "np.load" and not given
                opened += [] if safe else [f"{file}:{node.lineno} {ast.unparse(node)}"]
    assert not opened


def test_few_frames_lie_between_the_hook_and_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: at most 8 of Setpoint's frames, from the optimizer's hook to `tensor.set_`."""
    model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2)), torch.randn(16, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    setpoint.attach(model, optimizer, 0.5, example=(x,), total_steps=40)
    deepest, plain = list[list[str]](), torch.Tensor.set_

    def counted(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        names = [each.function for each in inspect.stack(0) if each.filename.startswith(str(SRC))]
        deepest.append(names)
        return plain(tensor, *args)

    monkeypatch.setattr(torch.Tensor, "set_", counted)
    for _ in range(40):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert deepest and max(map(len, deepest)) <= 8, max(deepest, key=len)


def test_listed_slow_tests_are_there() -> None:
    """Claim: tests/slow.txt is sorted, and each line is a test that its file defines: nothing is listed in vain."""
    root = Path(__file__).parents[1]
    listed = (root / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines()
    assert listed == sorted(set(listed))
    for line in listed:
        file, _, name = line.partition("::")
        assert f"def {name.partition('[')[0]}(" in (root / file).read_text(encoding="utf-8"), line
