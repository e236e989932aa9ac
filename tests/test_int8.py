"""Eight bits: the scripts of examples/int8 quantize a cut model, and torchao rounds while a loop is attached."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import setpoint
from setpoint.errors import GroupError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "int8"
SCRIPTS = sorted(FOLDER.glob("with_*.py"))
LOSS = 0.01
"""Of accuracy, on 597 digits."""

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, from which scripts run that import each other."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("cut_model", "with_onnxruntime"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def of_onnx(file: Path) -> tuple[list[str], list[Any]]:
    """Ops of the graph that ONNX Runtime makes of a file, and the file's weights of eight bits."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(file.with_suffix(".optimized"))
    options.log_severity_level = 3  # it warns that the file is for this machine alone
    onnxruntime.InferenceSession(file, options)
    weights = [each for each in onnx.load(file).graph.initializer if each.data_type == onnx.TensorProto.INT8]
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node], [
        each for each in weights if len(each.dims) > 1
    ]


def check_onnx(folder: Path) -> None:
    """All four layers compute in eight bits, with a scale for each channel of the cut model, in a smaller file."""
    import onnx

    ops, weights = of_onnx(folder / "int8.onnx")
    layers = [layer for layer in sys.modules["cut_model"].model if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert ops.count("QLinearConv") == ops.count("QGemm") == 2 and "Conv" not in ops and "Gemm" not in ops
    assert sorted(tuple(each.dims) for each in weights) == sorted(tuple(layer.weight.shape) for layer in layers)
    scales = [list(each.dims) for each in onnx.load(folder / "int8.onnx").graph.initializer if "scale" in each.name]
    assert all([len(layer.weight)] in scales for layer in layers)
    assert (folder / "int8.onnx").stat().st_size < 0.4 * (folder / "cut.onnx").stat().st_size


def test_onnxruntime(folder: Path) -> None:
    """Claim: ONNX Runtime's static quantization keeps the accuracy, computes in eight bits, and the file is smaller."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    found = runpy.run_path(str(FOLDER / "with_onnxruntime.py"))
    assert found["accuracy"](found["model"]) > 0.9
    assert found["int8"] >= found["accuracy"](found["model"]) - LOSS
    check_onnx(folder)


def test_openvino(folder: Path) -> None:
    """Claim: so does NNCF's in OpenVINO: weights of eight bits, and convolutions that multiply them as such."""
    pytest.importorskip("nncf")
    openvino = pytest.importorskip("openvino")
    found = runpy.run_path(str(FOLDER / "with_nncf.py"))
    assert found["int8"] >= found["accuracy"](found["model"]) - LOSS
    nodes = openvino.Core().read_model("int8.xml").get_ops()
    kept = [
        node for node in nodes if node.get_type_name() == "Constant" and node.get_element_type().to_string() == "i8"
    ]
    assert len([node for node in kept if len(node.shape) > 1]) >= 4
    ran = found["compiled"].get_runtime_model().get_ops()
    kinds = {node.get_rt_info()["layerType"].astype(str): node.get_rt_info() for node in ran}
    assert kinds["Convolution"]["runtimePrecision"].astype(str) in ("i8", "u8")
    assert (folder / "int8.bin").stat().st_size < 0.3 * (folder / "cut.bin").stat().st_size


def test_torchao(folder: Path) -> None:
    """Claim: its rounding trains the cut model's own parameters by the run's optimizer; int8 keeps the accuracy."""
    pytest.importorskip("torchao")
    pytest.importorskip("onnxruntime")
    found = runpy.run_path(str(FOLDER / "with_torchao.py"))
    model, cut = found["model"], sys.modules["cut_model"]
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in found["rounding"].parameters()} == own
    assert {model[0].out_channels, model[4].out_channels, model[9].out_features} == set(cut.loop.widths.values())
    state = found["optimizer"].state
    assert {id(parameter) for parameter in state} == own
    assert all(each["step"] == cut.STEPS + 40 and each["exp_avg"].shape == p.shape for p, each in state.items())
    assert sys.modules["with_onnxruntime"].int8 >= cut.accuracy(model) - LOSS > 0.9
    check_onnx(folder)


@pytest.mark.parametrize("first", [1, 20, 40], ids=["before the cut", "after the cut", "after finish"])
def test_linears_are_rounded_whenever_a_loop_is_attached(first: int) -> None:
    """Claim: torchao's rounding layers keep the parameters: the loop cuts them, the optimizer goes on with them."""
    ao, qat = (pytest.importorskip(f"torchao.quantization{each}") for each in ("", ".qat"))
    base = ao.Int8DynamicActivationIntxWeightConfig(torch.int8, weight_granularity=ao.PerAxis(0))
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=40)
    parameters = list(model.parameters())
    for step in range(60):
        if step == first:
            ao.quantize_(model, qat.QATConfig(base, step="prepare"))
        x = torch.randn(32, 16)
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 39:
            assert loop.finish().budget_met
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert all(optimizer.state[each]["step"] == 60 for each in parameters)
    assert [len(model[0].weight), len(model[2].weight)] == list(loop.widths.values()) != [64, 64]
    x = torch.randn(256, 16)
    rounded = model(x)
    ao.quantize_(model, qat.QATConfig(base, step="convert"))
    assert all(model[layer].weight.qdata.dtype == torch.int8 for layer in (0, 2, 4))
    torch.testing.assert_close(model(x), rounded, rtol=0, atol=1e-5)


def test_rounding_before_attach_is_refused() -> None:
    """Claim: a model whose linears torchao rounds already is refused, by the name of what rounds."""
    ao, qat = (pytest.importorskip(f"torchao.quantization{each}") for each in ("", ".qat"))
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    base = ao.Int8DynamicActivationIntxWeightConfig(torch.int8, weight_granularity=ao.PerAxis(0))
    ao.quantize_(model, qat.QATConfig(base, step="prepare"))
    with pytest.raises(GroupError, match="0.weight_fake_quantizer: .*no rule knows this op"):
        setpoint.attach(model, torch.optim.SGD(model.parameters()), 0.5, example=(torch.randn(2, 16),), total_steps=9)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short(script: Path) -> None:
    """Claim: it has at most 15 lines of code behind its docstring."""
    text = script.read_text(encoding="utf-8")
    assert len([line for line in text.split('"""', 2)[2].strip().splitlines() if line]) <= 15
    assert ast.get_docstring(ast.parse(text))
