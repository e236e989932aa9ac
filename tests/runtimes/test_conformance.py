"""Every runtime that reads a file: the same outputs as PyTorch, plausible seconds, nothing of the user's touched."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.errors import BudgetError, ExampleError, ExportError, RuntimeUnavailable, SetpointError
from setpoint.runtimes import ExecuTorch, OnnxRuntime, OpenVINO
from setpoint.runtimes.files import ByTensor, FileRuntime, Opened, opened, written

RUNTIMES = [OnnxRuntime(), OpenVINO(), ExecuTorch()]
INT8 = [OnnxRuntime(int8=True), OpenVINO(int8=True)]
each_runtime = pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda each: each.name)
each_int8 = pytest.mark.parametrize("runtime", INT8, ids=lambda each: each.name)


def conv_net(width: int = 16) -> nn.Module:
    """Convolutions and norms whose running statistics are those of the inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width, momentum=1.0), nn.ReLU(),
        nn.Conv2d(width, width, 3, groups=width, padding=1), nn.BatchNorm2d(width, momentum=1.0), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(width, 4),
    )  # fmt: skip
    net(torch.randn(8, 3, 16, 16))
    return net


class Tokens(nn.Module):
    """A block of attention over tokens, with inputs by name, one of them unused, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, tokens: Tensor, mask: Tensor, kept: bool = False, unused: Tensor | None = None) -> Any:
        x = self.embed(tokens)
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        y = self.out(mixed.transpose(1, 2).flatten(2))
        return {"hidden": x + y if kept else y, "none": None, "pooled": [y.mean(1)]}


IMAGE = (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)),)
TEXT = {
    "mask": torch.ones(1, 7, dtype=torch.bool),
    "tokens": torch.arange(7)[None],
    "kept": True,
    "unused": torch.zeros(1, 2),
}


def far(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert got.shape == want.shape
    want = want.detach()
    return float((got - want).abs().max() / want.abs().max())


def loaded(runtime: Any, model: nn.Module, example: Any) -> Opened:
    forward = runtime.load(copy.deepcopy(model).eval(), example)
    assert isinstance(forward, Opened)
    return forward


@each_runtime
@pytest.mark.parametrize(("model", "example"), [(conv_net(), IMAGE), (Tokens(), TEXT)], ids=["images", "tokens"])
def test_outputs_are_those_of_pytorch(runtime: FileRuntime, model: nn.Module, example: Any, capfd: Any) -> None:
    """Claim: the outputs are PyTorch's in eval mode, in order; one forward takes plausible seconds; nothing is said."""
    assert isinstance(runtime, FileRuntime)
    before, mode, random = copy.deepcopy(model.state_dict()), model.training, torch.get_rng_state()
    with warnings.catch_warnings(action="error"):
        forward = loaded(runtime, model, example)
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    with torch.no_grad():
        want = copy.deepcopy(model).eval()(*args, **kwargs)
    wants = [want["hidden"], want["pooled"][0]] if isinstance(want, dict) else [want]
    for got, one in zip(forward.outputs(), wants, strict=True):
        assert far(got, one) < 1e-5
    assert forward.difference < 1e-5
    began = time.perf_counter()
    assert 0 <= forward() <= time.perf_counter() - began + 0.01
    assert sum(forward() for _ in range(20)) > 0
    assert mode == model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    out, err = capfd.readouterr()
    assert out + re.sub(r"\[\w+\.cpp:\d+\].*\n", "", err) == ""  # what ExecuTorch's C++ says of the processor


@each_runtime
def test_a_cut_model_runs(runtime: FileRuntime) -> None:
    """Claim: a model that was cut in training gives the outputs that PyTorch gives, a smaller batch as well."""
    model = nn.Sequential(conv_net(32)[:6], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=6)
    for _ in range(6):
        model(IMAGE[0].expand(2, -1, -1, -1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    loop.finish()
    assert far(loaded(runtime, model, IMAGE).outputs()[0], model.eval()(*IMAGE)) < 1e-5


class Masked(nn.Module):
    """Differences and a running sum of booleans, as in the masks of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.diff(x, prepend=x[:, :1]) + x.diff(2, 1, append=x[:, :2])
        return self.linear(x) + (x > 0).cumsum(-1) + torch.cumsum(x > 1, dim=1) + steps + (x > 0).diff().sum()


def test_masks_of_transformers_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the exporter that traces, which is quick and needs no onnxscript, gives PyTorch's outputs."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    model, x = Masked(), (torch.tensor([[1.0, -1.0, 2.0, 3.0]]),)
    assert far(loaded(OnnxRuntime(), model, x).outputs()[0], model(*x)) < 1e-5


class Truncates(nn.Module):
    """An operation that the exporter that traces does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x.trunc()


@pytest.mark.parametrize("int8", [False, True])
def test_what_tracing_does_not_export_is_exported_all_the_same(int8: bool, capfd: Any) -> None:
    """Claim: the other exporter of ONNX takes over, and the first one prints nothing of its failure."""
    model, x = Truncates(), (torch.tensor([[1.0, -1.0, 2.0, 3.0]]),)
    assert far(loaded(OnnxRuntime(int8=int8), model, x).outputs()[0], model(*x)) < (0.1 if int8 else 1e-5)
    assert "".join(capfd.readouterr()) == ""


@each_int8
@pytest.mark.parametrize(("model", "example"), [(conv_net(), IMAGE), (Tokens(), TEXT)], ids=["images", "tokens"])
def test_integers_are_near(runtime: FileRuntime, model: nn.Module, example: Any, tmp_path: Any) -> None:
    """Claim: the outputs of int8 are near those of PyTorch, and not the same."""
    forward = loaded(runtime, model, example)
    want = ByTensor(copy.deepcopy(model), example).compared[0][1]
    assert 0 < max(map(far, forward.outputs(), want)) < 0.1
    assert forward.difference == pytest.approx(max(map(far, forward.outputs(), want)))


@each_runtime
def test_autocast_does_not_reach_the_file(runtime: FileRuntime) -> None:
    """Claim: a model that is loaded within autocast runs in its own precision."""
    model = nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward = loaded(runtime, model, (torch.ones(1, 8),))
        assert forward.difference < 1e-5
    assert far(forward.outputs()[0], model(torch.ones(1, 8))) < 1e-5


class Foreign(nn.Module):
    """Eigenvalues: no file holds them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eig(x)[0].real


@each_runtime
def test_what_does_not_export_is_refused(runtime: FileRuntime) -> None:
    """Claim: an operation that files cannot hold, or the runtime lacks, is refused by the runtime's name."""
    with pytest.raises((ExportError, RuntimeUnavailable), match=f"{runtime.name}.*another runtime"):
        runtime.load(Foreign(), (torch.eye(4),))


@each_runtime
def test_an_example_that_does_not_fit_is_refused(runtime: FileRuntime, tmp_path: Any) -> None:
    """Claim: an example that the model, or the file, does not take is an ExampleError with both shapes."""
    with pytest.raises(ExampleError, match="does not run on the example"):
        runtime.load(conv_net(), (torch.zeros(1, 4, 16, 16),))
    with pytest.raises(ExampleError, match=r"write example=\(x,\)"):
        runtime.load(conv_net(), torch.zeros(1, 3, 16, 16))
    file = tmp_path / f"net{runtime.suffix}"
    written(runtime.write, ByTensor(conv_net().eval(), IMAGE), file, runtime.name)
    with pytest.raises(ExampleError, match=r"\[1, 3, 16, 16\], but the example has \[2, 3, 16, 16\]"):
        opened(runtime, file, {"0": torch.zeros(2, 3, 16, 16)})
    with pytest.raises(ExampleError, match="takes 1 inputs"):
        opened(runtime, file, {"0": IMAGE[0], "1": IMAGE[0]})


class Silent(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"loss": None}


INTERRUPTED = """
import signal, torch
from setpoint.runtimes import OpenVINO
runtimes = (OpenVINO(), OpenVINO(int8=True), OpenVINO())
sessions = [each.load(torch.nn.Linear(8, 8).eval(), (torch.randn(1, 8),)) for each in runtimes]
while sessions:
    del sessions[0]
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_a_runtime_has_ended() -> None:
    """Claim: files that are closed in any order leave the process a place to handle signals; a processor with AMX shows
    whether they do.
    """
    command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "interrupted" in done.stdout, (done.returncode, done.stderr[-2000:])


@each_runtime
def test_no_outputs_no_file(runtime: FileRuntime, tmp_path: Any) -> None:
    """Claim: a forward without an output, and a file that is none, are refused."""
    with pytest.raises(ExportError, match="returns no tensor"):
        runtime.load(Silent(), IMAGE)
    file = tmp_path / f"net{runtime.suffix}"
    file.write_text("no model")
    with pytest.raises(RuntimeUnavailable, match=f"{runtime.name} cannot run {file.name}"):
        opened(runtime, file, {"0": IMAGE[0]})


@each_runtime
def test_a_missing_package_is_named(runtime: FileRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: without its package a runtime says what to install, and `import setpoint` works."""
    for module in [runtime.name, *(name for name in sys.modules if name.startswith(f"{runtime.name}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeUnavailable, match=f"pip install .*{runtime.name}"):
        runtime.load(conv_net().eval(), IMAGE)


def test_threads_and_providers_are_checked() -> None:
    """Claim: a number of threads that is none, and a provider that is not there, are refused by name."""
    with pytest.raises(ValueError, match="threads must be a positive integer, got 0"):
        OnnxRuntime(threads=0)
    with pytest.raises(RuntimeUnavailable, match="NoSuchProvider.*CPUExecutionProvider"):
        OnnxRuntime(providers=["NoSuchProvider"]).load(conv_net().eval(), IMAGE)
    assert issubclass(RuntimeUnavailable, SetpointError)
    for wrong, words in (
        (lambda: OnnxRuntime(int8="yes"), "int8 is True or False, got 'yes'"),
        (lambda: OpenVINO(int8=1), "int8 is True or False, got 1"),
        (lambda: OnnxRuntime(providers=[]), "providers is a list of names.*got \\[\\]"),
        (lambda: OpenVINO(device=None), "device is a name.*got None"),
        (lambda: setpoint.Budget.fraction(0.5, of="inference", runtime="onnx"), "did you mean onnxruntime"),
        (lambda: setpoint.cost.budget.parse_budget("8 ms onnx"), "did you mean onnxruntime"),
    ):
        with pytest.raises(BudgetError, match=words):
            wrong()


class Branches(nn.Module):
    """What it does depends on its inputs' values: a file that is traced holds one of the two branches."""

    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * (x.sin() if x.sum() > 0 else x.cos())


class ByName(nn.Module):
    def forward(self, *, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return scale * (x.sin() - y)


@each_runtime
def test_models_that_take_keywords_alone(runtime: FileRuntime) -> None:
    """Claim: a forward of keywords alone, given in another order, has PyTorch's outputs."""
    assert loaded(runtime, ByName(), {"y": torch.ones(2, 3), "scale": 2.0, "x": torch.rand(2, 3)}).difference < 1e-5


@pytest.mark.parametrize("runtime", RUNTIMES[:2], ids=lambda each: each.name)
def test_a_branch_on_values_is_found(runtime: FileRuntime) -> None:
    """Claim: outputs are compared on other values, too, where a branch that was traced is the wrong one."""
    forward = loaded(runtime, Branches(), {"x": torch.ones(2, 3)})
    assert forward.difference > 0.1
    assert "other values of its shapes" in forward.too_far("the model")
