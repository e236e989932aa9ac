"""Export: a file that gives PyTorch's outputs, or no file; the model stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import ExampleError, ExportError, RuntimeUnavailable
from setpoint.report.timing import time_cuts
from setpoint.resources.serving import Served
from setpoint.runtimes import Eager, OnnxRuntime, export, open_file

EXAMPLE = (torch.linspace(-1, 1, 8)[None],)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("to", "names"),
    [("onnx", {"net.onnx"}), ("openvino", {"net.xml", "net.bin"}), (OnnxRuntime(int8=True), {"net.onnx"})],
    ids=["onnx", "openvino", "int8"],
)
def test_an_export_gives_the_outputs_of_pytorch(to: str | OnnxRuntime, names: set[str], tmp_path: Path) -> None:
    """Claim: the folder has the file and nothing else; it gives PyTorch's outputs; the model is untouched."""
    model = net()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    runtime = "onnxruntime" if to == "onnx" else to
    path = tmp_path / next(name for name in names if not name.endswith(".bin"))
    exported = export(model, EXAMPLE, path, to)
    assert {each.name for each in tmp_path.iterdir()} == names
    assert exported.path == path
    assert exported.difference < (0.1 if isinstance(to, OnnxRuntime) else 1e-5)
    assert not seen
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    opened = open_file(path, EXAMPLE, runtime)
    assert all(map(torch.equal, opened.outputs(), exported.forward.outputs()))
    assert opened() >= 0
    with pytest.raises(ExampleError, match="export the model again"):
        open_file(path, (torch.zeros(3, 8),), runtime)


class Draws(nn.Module):
    """Its forward draws numbers in eval mode, too, so that no file gives the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Grows(nn.Module):
    """Each call gives ten times what the one before gave."""

    def forward(self, x: Tensor) -> Tensor:
        self.scale = 10 * getattr(self, "scale", 1)
        return x * self.scale


def test_an_export_that_differs_leaves_the_old_file(tmp_path: Path) -> None:
    """Claim: where the file's outputs are not PyTorch's, the export is refused, and what was there before stays."""
    path = tmp_path / "net.onnx"
    path.write_text("old")
    with pytest.raises(ExportError, match="differ from PyTorch's by.*nothing is written"):
        export(Draws(), EXAMPLE, path)
    with pytest.raises(ExportError, match="calibrate on real inputs; nothing is written"):
        export(Grows(), EXAMPLE, path, OnnxRuntime(int8=True))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.warns(UserWarning, match="calibrate on real inputs"):
        export(net(), EXAMPLE, path, OnnxRuntime(int8=True), tolerance=1e-9)
    assert path.stat().st_size > 100


class Uneven(nn.Module):
    """Half of what its last layer reads is huge and has no weight: integers of one scale leave nothing of the rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64)), nn.Linear(64, 4)
        self.scale = torch.ones(64).index_fill(0, torch.arange(32), 1e5)
        nn.init.zeros_(self.last.weight[:, :32])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu() * self.scale)


def test_seconds_of_another_model_are_warned_of() -> None:
    """Claim: one warning for each runtime in which the outputs are not PyTorch's, whatever is timed; none else."""
    with pytest.warns(UserWarning, match="the model in onnxruntime with int8 differ.*not this model") as seen:
        time_cuts(Uneven(), EXAMPLE, "onnxruntime")
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="outputs of the model in onnxruntime differ.*may draw numbers") as seen:
        served = Served(Draws(), EXAMPLE, OnnxRuntime())
        served.ratios(Draws(), calibrates=True)
        served.ratios(Draws())
    assert len(seen) == 1


def test_scores_that_are_masked_by_infinity_are_equal(tmp_path: Path) -> None:
    """Claim: infinities at the same places are no difference."""

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 0, float("-inf"))

    assert export(Masked(), EXAMPLE, tmp_path / "net.onnx").difference == 0


def test_a_compiled_model_is_exported(tmp_path: Path) -> None:
    """Claim: the wrapper of `torch.compile` is taken off."""
    assert export(torch.compile(net(), backend="eager"), EXAMPLE, tmp_path / "net.onnx").difference < 1e-5
    inner = net()
    inner.compile(backend="eager")
    assert export(inner, EXAMPLE, tmp_path / "net.onnx").difference < 1e-5


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((net(), EXAMPLE, "net.pt"), ExportError, "name it 'net.onnx'"),
        ((net(), EXAMPLE, "missing/net.onnx"), ExportError, "make it first"),
        ((net(), EXAMPLE, "net.onnx", "onx"), ExportError, "did you mean onnx"),
        ((net(), EXAMPLE, "net.onnx", Eager()), ExportError, "eager reads no files"),
        ((net(), (torch.zeros(1, 9),), "net.onnx"), ExampleError, "does not run on the example"),
        ((torch.zeros(1), EXAMPLE, "net.onnx"), ExportError, "before torch.jit.script"),
    ],
)
def test_bad_input_is_refused(
    arguments: tuple[object, ...], error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: each is refused by name, before anything is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        export(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    """Claim: to open what is not there is refused with its name."""
    with pytest.raises(RuntimeUnavailable, match=r"onnxruntime cannot run gone.onnx"):
        open_file(tmp_path / "gone.onnx", EXAMPLE)
