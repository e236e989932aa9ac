"""Language models: quantized bases, adapters that come late, and files for llama.cpp."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import setpoint
from setpoint.errors import LoopError

transformers = pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[1] / "examples" / "language"
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
TOKENS = torch.arange(48).view(4, 12)


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS))


def trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-3)


def test_a_quantized_base_is_refused() -> None:
    """Claim: codes of four or eight bits are no numbers to cut; the error says which weight, and the way that works."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model[2].weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)  # as bitsandbytes packs
    with pytest.raises(LoopError, match=r"'2\.weight' is quantized, in codes of torch\.uint8 .*16 bit, .*adapters"):
        setpoint.attach(model, trained(model), 0.5, total_steps=9)
    with pytest.raises(LoopError, match=r"'2\.weight' is quantized"):
        setpoint.compress(model, [torch.zeros(4, 8)], 0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_adapters_after_attach_are_an_error() -> None:
    """Claim: adapters that come after attach rename the base's weights, and the error says that they come before."""
    peft = pytest.importorskip("peft")
    model = llama()
    optimizer = trained(model)
    loop = setpoint.attach(model, optimizer, 0.7, total_steps=9, example={"input_ids": TOKENS, "labels": TOKENS})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(LoopError, match=r"no tensor 'model\.layers\.0\..* any more \(adapters, .* come before attach"):
        for _ in range(9):
            adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    loop.detach()


@pytest.mark.parametrize("kind", ["sliding windows", "heads that do not divide", "tied embeddings"])
def test_an_even_cut_is_what_its_config_says(kind: str) -> None:
    """Claim: three query heads on each of three key heads, windows and tied embeddings: the folder of an even cut loads
    without Setpoint's sizes, and gives the same logits.
    """
    torch.manual_seed(0)
    if kind == "sliding windows":
        model: Any = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, **HEADS, sliding_window=4))
    elif kind == "tied embeddings":
        config = transformers.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    else:
        sizes = {**SIZES, "hidden_size": 72, "head_dim": 8}
        config = transformers.LlamaConfig(**sizes, **{**HEADS, "num_attention_heads": 9, "num_key_value_heads": 3})
        model = transformers.LlamaForCausalLM(config)
    optimizer = trained(model)
    example = {"input_ids": TOKENS, "labels": TOKENS}
    loop = setpoint.attach(model, optimizer, 0.7, total_steps=9, example=example, even=True)
    for _ in range(9):
        model(**example).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop.finish().budget_met
    fresh = type(model)(type(model.config).from_dict(model.config.to_dict()))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(TOKENS).logits, model.eval()(TOKENS).logits)


@pytest.mark.parametrize("even", [True, False])
def test_a_gguf_file_is_read_back(even: bool, tmp_path: Path) -> None:
    """Claim: the file has the widths, by layer where they differ and the weights, rotated pairs side by side."""
    gguf = pytest.importorskip("gguf")
    write = runpy.run_path(str(FOLDER / "write_gguf.py"))["write"]
    model, dense, cut = llama(), str(tmp_path / "dense.gguf"), str(tmp_path / "cut.gguf")
    metadata = gguf.GGUFWriter(dense, "llama")
    metadata.add_context_length(64)
    metadata.add_embedding_length(64)
    metadata.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    metadata.write_header_to_file()
    metadata.write_kv_data_to_file()
    metadata.write_tensors_to_file()
    metadata.close()
    if not even:
        model.model.layers[1].mlp.down_proj.in_features = 96
        model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.ones(64, 96))
    write(model, dense, cut, "F32")
    read = gguf.GGUFReader(cut)
    name = "llama" if even else "deci"
    assert read.fields[f"{name}.feed_forward_length"].contents() == (128 if even else [128, 96])
    tensors = {each.name: torch.from_numpy(each.data.copy()) for each in read.tensors}
    own = model.state_dict()
    assert torch.equal(tensors["blk.1.attn_v.weight"], own["model.layers.1.self_attn.v_proj.weight"])
    pairs = own["model.layers.1.self_attn.k_proj.weight"].view(2, 2, 16, 64)
    assert torch.equal(tensors["blk.1.attn_k.weight"].view(2, 16, 2, 64), pairs.transpose(1, 2))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_adapters_go_on_with_a_cut_base_in_four_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the script cuts a base in 16 bit with its adapters, quantizes the cut base, and trains the adapters on."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    model, seen = llama(), torch.randint(0, 8, (8, 64))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(20):  # teacher=True refuses a model that guesses
        model(input_ids=seen, labels=seen).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    letters = staticmethod(lambda folder: lambda text, verbose: {"input_ids": [ord(each) % 8 for each in text]})
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", letters)
    monkeypatch.setattr("sys.argv", ["qlora.py", "dense", "12"])
    found = runpy.run_path(str(FOLDER / "qlora.py"))
    layer = found["small"].model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == torch.uint8 and layer.out_features < 128
    assert layer.lora_B["default"].weight.shape[0] == layer.out_features
