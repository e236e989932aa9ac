"""Models of Hugging Face after a cut: generation with a cache, and adapters of low rank."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import setpoint
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.errors import BudgetError, GroupError
from setpoint.groups.group import Group
from setpoint.groups.trace import find_groups

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1}
    | {"eos_token_id": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": {**SMALL, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    "phi3": {**SMALL, "num_key_value_heads": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
}


def decoder(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor], tuple[Group, ...]]:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(3, 60, (2, 9))
    example = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    return model, example, tuple(group for group in find_groups(model, example) if group.lossless)


def halves(groups: tuple[Group, ...]) -> dict[str, np.ndarray]:
    return {group.name: np.arange(group.num_units) % 2 == 1 for group in groups}


def test_a_cut_encoder_decoder_takes_other_lengths_than_the_example() -> None:
    """T5, cut by an example of 4 target tokens, agrees with its masked twin on 7, on one, and in generation."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ends = {"decoder_start_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **ends)).eval()
    source = torch.randint(2, 60, (2, 9))
    found = find_groups(model, {"input_ids": source, "decoder_input_ids": torch.randint(2, 60, (2, 4))})
    groups = tuple(group for group in found if group.lossless)
    twin = copy.deepcopy(model)
    shrink(model, None, groups, halves(groups))
    mask(twin, None, groups, halves(groups))
    for length in (7, 1):
        target = torch.randint(2, 60, (3, length))
        inputs = {"input_ids": source[:1].expand(3, -1), "decoder_input_ids": target}
        torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits, rtol=0, atol=1e-4)
    for cached in (True, False):
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached}
        assert torch.equal(model.generate(source, **options), twin.generate(source, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_decoder_generates_with_a_cache_what_its_masked_twin_generates(kind: str) -> None:
    """Heads and neurons are found, and greedy generation gives the same tokens with and without a cache."""
    model, _, groups = decoder(kind)
    assert {group.what for group in groups} == {"head", "neuron"}
    twin = copy.deepcopy(model).eval()
    shrink(model, None, groups, halves(groups))
    mask(twin, None, groups, halves(groups))
    prompt = torch.tensor([[5, 9, 11, 7]])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    want = twin.generate(prompt, use_cache=True, **options)
    for use_cache in (True, False):
        got = model.eval().generate(prompt, use_cache=use_cache, **options)
        assert got.tolist() == want.tolist()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_adapters_on_attention_alone_leave_the_rest_whole() -> None:
    """PEFT's default: the error of a budget out of reach names the frozen layers and what reaches them, which helps."""
    peft = pytest.importorskip("peft")

    def attached(**settings: Any) -> setpoint.Loop:
        base, example, _ = decoder("llama")
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return setpoint.attach(model, torch.optim.AdamW(trained), 0.7, total_steps=9, example=example)

    with pytest.raises(BudgetError, match=r'mlp\.gate_proj, .*weights are frozen .*target_modules="all-linear"'):
        attached()
    attached(target_modules="all-linear").detach()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_adapters_are_cut_with_their_frozen_layers() -> None:
    """LoRA on every linear layer: A and B follow the base layer, which stays frozen; it trains as its masked twin."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, example, _ = decoder("llama")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=modules)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)  # zero at the start, which would hide what reads it
    groups = tuple(group for group in find_groups(model, example) if group.lossless)
    cut = {piece.tensor for group in groups for piece in group.slices}
    assert {name.split(".")[-3] for name in cut if "lora" in name} == {"lora_A", "lora_B"}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    keep = halves(groups)
    shrink(model, optimizer, groups, keep)
    mask(twin, twin_optimizer, groups, keep)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    for _ in range(3):
        results = []
        for each, steps in ((model, optimizer), (twin, twin_optimizer)):
            steps.zero_grad()
            results.append(each(**example).logits)
            results[-1].square().mean().backward()
            mask(twin, twin_optimizer, groups, keep)
            steps.step()
            mask(twin, twin_optimizer, groups, keep)
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


def test_mamba_is_cut_exactly_without_its_cache() -> None:
    """Claim: Mamba is traced without a cache unless the example asks for one, so its inner widths and states are cut
    exactly. With a cache all that is left is lossy, and the error names `allow_lossy`, which prunes it.
    """
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config)
    example = {"input_ids": torch.randint(0, 20, (2, 6))}
    cached = {**example, "use_cache": True}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.raises(GroupError, match=r"attach\(\.\.\., allow_lossy=True\) prunes .*out_proj"):
        setpoint.attach(model, optimizer, 0.7, total_steps=10, example=cached)
    lossy = setpoint.attach(model, optimizer, 0.7, total_steps=10, example=cached, allow_lossy=True)
    assert "backbone.layers.0.mixer.out_proj" in lossy.widths
    lossy.detach()
    exact = setpoint.attach(model, optimizer, 0.7, total_steps=10, example=example)
    assert {"backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.x_proj"} == set(exact.widths)
    exact.detach()
