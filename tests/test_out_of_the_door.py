"""A model that was cut leaves by every door that a dense one leaves by, with equal outputs."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from doors import CNN, FAMILIES, GPT, Detector, Make, Translator, gpt2, llama

ROWS = pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)


@cache
def cut(make: Make) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """A model with uneven widths everywhere, an example, and what it makes of it."""
    torch.manual_seed(0)
    model, example = make(), FAMILIES[make]()
    groups = setpoint.find_groups(model, example)
    draw = np.random.default_rng(0)
    keep = {group.name: draw.random(group.num_units) < 0.6 for group in groups}
    for group in groups:
        keep[group.name][: max(group.min_units, 1)] = True
    setpoint.shrink(model, None, groups, keep)
    assert any(not kept.all() for kept in keep.values())
    with torch.no_grad():
        return model.eval(), example, model(*example)


def same(got: Tensor, want: Tensor) -> None:
    """Equal but for rounding: another engine adds in another order."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def by_onnx(file: Path, example: tuple[Tensor, ...]) -> Tensor:
    """Outputs of onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    inputs = {each.name: x.numpy() for each, x in zip(session.get_inputs(), example, strict=True)}
    return torch.from_numpy(session.run(None, inputs)[0])


@ROWS
def test_export(make: Make) -> None:
    """Claim: torch.export's program, through its file, computes the same."""
    model, example, want = cut(make)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, example), file)
    file.seek(0)
    same(torch.export.load(file).module()(*example), want)


@ROWS
@pytest.mark.filterwarnings("ignore")
def test_onnx(make: Make, tmp_path: Path) -> None:
    """Claim: onnxruntime computes the same from the file, which PyTorch's tracing exporter has written."""
    model, example, want = cut(make)
    torch.onnx.export(model, example, tmp_path / "small.onnx", dynamo=False)
    same(by_onnx(tmp_path / "small.onnx", example), want)


@ROWS
@pytest.mark.filterwarnings("ignore")
def test_trace(make: Make) -> None:
    """Claim: a TorchScript trace, through its file, computes the same."""
    model, example, want = cut(make)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, example, check_trace=False), file)
    file.seek(0)
    same(torch.jit.load(file)(*example), want)


@pytest.mark.filterwarnings("ignore")
def test_onnx_by_export(tmp_path: Path) -> None:
    """Claim: so does the file of the newer exporter, for a forward whose sizes are corrected by call."""
    model, example, want = cut(GPT)
    torch.onnx.export(model, example, tmp_path / "small.onnx", dynamo=True, verbose=False)
    same(by_onnx(tmp_path / "small.onnx", example), want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_aot_inductor(tmp_path: Path) -> None:
    """Claim: AOTInductor's package, compiled from the program, computes the same."""
    model, example, want = cut(CNN)
    with torch.no_grad():
        program = torch.export.export(model, example)
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "small.pt2"))
    same(torch._inductor.aoti_load_package(file)(*example), want)


@pytest.mark.parametrize("make", [CNN, llama, GPT], ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore")
def test_int8(make: Make) -> None:
    """Claim: torchao's weights are eight bits wide at any width, and the outputs are those of the rounded weights."""
    quantization = pytest.importorskip("torchao.quantization")  # not in `dev`: transformers imports it, for seconds
    Int8WeightOnlyConfig, quantize_ = quantization.Int8WeightOnlyConfig, quantization.quantize_

    model, example, want = cut(make)
    small, rounded = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(small, Int8WeightOnlyConfig())
    for module, eight in zip(rounded.modules(), small.modules(), strict=True):
        if isinstance(module, nn.Linear):
            step = module.weight.detach().abs().amax(1, keepdim=True) / 127.5
            weight = eight.weight.dequantize()
            assert eight.weight.qdata.dtype == torch.int8 and ((weight - module.weight).abs() < 0.51 * step).all()
            module.weight = nn.Parameter(weight)
    with torch.no_grad():
        got = small(*example)
        same(got, rounded(*example))
    assert not torch.equal(got, want)


def names_in(model: nn.Module) -> set[str]:
    """Modules and words that a model's pickle mentions."""
    return {arg for _, arg, _ in pickletools.genops(pickle.dumps(model)) if isinstance(arg, str)}


@ROWS
def test_a_plain_pickle_names_setpoint_only_where_code_writes_numbers(make: Make) -> None:
    """Claim: sizes stand in attributes, but for heads that code computes as width // heads, and nn.Transformer's."""
    model, _, _ = cut(make)
    assert any(name.startswith("setpoint") for name in names_in(model)) == (make in (GPT, Translator))


_READER = """
import sys, torch
torch.set_num_threads(1)  # as in the tests: another number adds in another order
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "setpoint": raise ImportError("setpoint is not here")
sys.meta_path.insert(0, Refused())
sys.path[:0] = sys.argv[1:]
for model, example, want in torch.load(sys.argv[1] + "/models.pt", weights_only=False):
    with torch.no_grad():
        assert torch.equal(model(*example), want), type(model)
assert not [name for name in sys.modules if name.split(".")[0] == "setpoint"]
"""


def test_pickles_load_where_setpoint_is_not_installed(tmp_path: Path) -> None:
    """Claim: a baked model of any family computes the same bits in a process that has no Setpoint."""
    baked = []
    for make in FAMILIES:
        model, example, want = cut(make)
        baked.append((setpoint.bake(model, tmp_path / f"small_{make.__name__}.py"), example, want))
    assert {path.stem for path in tmp_path.glob("*.py")} == {"small_GPT", "small_Translator"}
    torch.save(baked, tmp_path / "models.pt")
    command = [sys.executable, "-c", _READER, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("make", [GPT, Translator], ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_baked_model_leaves_too(make: Make, tmp_path: Path) -> None:
    """Claim: what bake has written can be exported and traced as the model itself can."""
    model, example, want = cut(make)
    baked = setpoint.bake(model, tmp_path / f"again_{make.__name__}.py")
    same(torch.export.export(baked, example).module()(*example), want)
    same(torch.jit.trace(baked, example, check_trace=False)(*example), want)


def test_a_size_that_only_another_forward_reads_is_set() -> None:
    """Claim: a YOLO's blocks state one number for both halves of their channels, which the forward for export reads."""
    model, example, want = cut(Detector)
    other = copy.deepcopy(model)
    for block in (other.fine, other.coarse):
        assert block.c * 2 == block.before.conv.out_channels < block.after.bn.num_features * 2
        block.forward = block.forward_split
    assert torch.equal(other(*example), want) and other.outputs == 7


def test_sizes_that_no_forward_reads_are_set() -> None:
    """Claim: widths that a module states are set where its own tensors tell which they are."""
    mlp = cut(llama)[0].inner.model.layers[0].mlp
    assert (mlp.intermediate_size, mlp.hidden_size) == tuple(mlp.gate_proj.weight.shape)
    conv = cut(gpt2)[0].inner.transformer.h[0].mlp.c_fc
    assert (conv.nx, conv.nf) == tuple(conv.weight.shape)
