"""A target: a model and an example from a function of a user's file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from setpoint.errors import UsageError
from setpoint.report.target import load_target

OWN = """
import torch
from torch import nn

def helper():
    raise KeyError("no such layer")

def fails():
    return helper()

def without_inputs():
    return nn.Linear(3, 4)

def too_many():
    return nn.Linear(3, 4), 1, 2

def number():
    return 3

def fine():
    return nn.Linear(3, 4), torch.zeros(2, 3)

net = nn.Linear(3, 4)
"""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("fails", r"model.py:fails raised KeyError: 'no such layer' \(at model.py:6: \"raise KeyError"),
        ("without_inputs", "returned a model without inputs: return `model, "),
        ("too_many", "returned 3 things"),
        ("number", "returned an int: return a torch.nn.Module"),
        ("fin", "has no function 'fin': did you mean fine"),
        ("net", "net is a Linear itself: name a function without arguments that returns net"),
    ],
)
def test_what_goes_wrong_in_a_users_file_is_one_line(tmp_path: Path, function: str, said: str) -> None:
    """An exception names function, line and message; a model without inputs is asked for them and gets no images."""
    file = tmp_path / "model.py"
    file.write_text(OWN)
    with pytest.raises(UsageError, match=said):
        load_target(f"{file}:{function}")
    assert load_target(f"{file}:without_inputs", (2, 3))[1][0].shape == (2, 3)
    assert load_target(f"{file}:fine")[1][0].shape == (2, 3)


@pytest.mark.parametrize(
    ("text", "said"), [("def f(:\n", "SyntaxError"), ("import not_there\ndef f(): ...\n", "No module named")]
)
def test_a_file_that_does_not_load_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    """So does a file that Python cannot read."""
    file = tmp_path / "model.py"
    file.write_text(text)
    with pytest.raises(UsageError, match=f"{said}.* \\(at model.py:1"):
        load_target(f"{file}:f")


def test_a_file_without_the_function_is_not_run(tmp_path: Path) -> None:
    """Claim: a name that the file does not define is refused before the file is run, with the nearest name."""
    file = tmp_path / "model.py"
    file.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef build(): ...\n")
    with pytest.raises(UsageError, match="has no function 'buld': did you mean build"):
        load_target(f"{file}:buld")
    assert not (tmp_path / "ran").exists()


def test_a_shape_that_is_none_is_refused(tmp_path: Path) -> None:
    """Claim: before the file is run."""
    with pytest.raises(UsageError, match="at least 1"):
        load_target(f"{tmp_path}/nowhere.py:f", (0, 3))


def test_a_file_finds_its_neighbours_whenever_it_imports_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: neighbours are found by a function, by a forward, in a package by a dot, and from the working folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "own_layers.py").write_text("WIDTH = 32\n")
    (tmp_path / "own_ops.py").write_text("from torch import relu\n")
    (package / "net.py").write_text(
        "from torch import nn, randn\n"
        "from .own_layers import WIDTH\n"
        "from own_package.own_layers import WIDTH as SAME\n"
        "class Net(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        from own_ops import relu\n"
        "        return relu(super().forward(x))\n"
        "def build():\n"
        "    import own_layers\n"
        "    return Net(8, own_layers.WIDTH), (randn(2, 8),)\n"
    )
    model, example = load_target("own_package/net.py:build")
    assert model(*example).shape == (2, 32)
