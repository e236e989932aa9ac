"""Folders of cut models that other libraries of Hugging Face write and read: diffusers, sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import setpoint
from setpoint.integrations.checkpointing import enable_diffusers, enable_transformers

STEPS = 10


def denoiser() -> Any:
    """A tiny U-Net, by seed."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=8,
    )


@pytest.mark.filterwarnings("ignore:.*It is deprecated to pass a pretrained model name:FutureWarning")
def test_diffusers_reads_its_folder_and_its_average_is_cut(tmp_path: Path) -> None:
    """Claim: a U-Net is cut with the list of an `EMAModel`, which stays alive; `from_pretrained` reads both back."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import EMAModel

    enable_diffusers()
    model = denoiser()
    average = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loop = setpoint.attach(model, optimizer, 0.6, total_steps=STEPS, copies=[average], verify=False)
    noise, times = torch.randn(2, 2, 8, 8), torch.tensor([1, 5])
    for _ in range(STEPS):
        (model(noise, times).sample - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())
    summary = loop.finish()
    assert summary.budget_met and summary.resizes
    assert [each.shape for each in average.shadow_params] == [each.shape for each in model.parameters()]
    pairs = zip(average.shadow_params, model.parameters(), strict=True)
    gap = max(float((one - other.detach()).abs().max()) for one, other in pairs)
    assert 0 < gap < 0.01

    model.save_pretrained(tmp_path / "small")
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / "small")
    assert torch.equal(loaded(noise, times).sample, model.eval()(noise, times).sample)
    average.save_pretrained(tmp_path / "ema")  # as scripts with --use_ema save it, and read it back
    read = EMAModel.from_pretrained(tmp_path / "ema", type(model))
    assert all(map(torch.equal, read.shadow_params, average.shadow_params))
    assert read.optimization_step == average.optimization_step == STEPS
    average.copy_to(model.parameters())
    model.save_pretrained(tmp_path / "average")
    averaged = diffusers.UNet2DModel.from_pretrained(tmp_path / "average")
    assert all(map(torch.equal, averaged.parameters(), average.shadow_params))

    pipeline = diffusers.DDPMPipeline(loaded, diffusers.DDPMScheduler(num_train_timesteps=10))
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(again.unet(noise, times).sample, loaded(noise, times).sample)
    denoiser().save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small/setpoint.json").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sentence_transformers_reads_its_folder(tmp_path: Path) -> None:
    """Claim: an encoder of sentences that was cut is saved and read by its own methods, with equal embeddings."""
    package = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    enable_transformers()
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(27))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(tmp_path / "dense")
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "dense")
    parts = [models.Transformer(str(tmp_path / "dense")), models.Pooling(16)]
    encoder = package.SentenceTransformer(modules=parts, device="cpu")
    texts = [f"w{number} w{number + 1} w3" for number in range(8)]
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-2)
    loop = setpoint.attach(encoder, optimizer, 0.6, total_steps=STEPS, verify=False)
    for _ in range(STEPS):
        found = encoder(encoder.tokenize(texts))["sentence_embedding"]
        (found[:4] - found[4:]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop.finish().budget_met
    encoder.save(str(tmp_path / "small"))
    again = package.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    dense, small = (sum(each.numel() for each in model.parameters()) for model in (BertModel(config), again))
    assert small < dense
    assert torch.equal(again.encode(texts, convert_to_tensor=True), encoder.encode(texts, convert_to_tensor=True))


def test_the_config_of_a_cut_folder_says_how_to_read_it(tmp_path: Path) -> None:
    """Claim: it names the call in one key, which does no harm, and goes when the model is whole again."""
    from transformers import BertConfig, BertModel

    enable_transformers()
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model, tokens = BertModel(config).eval(), torch.ones(1, 4, dtype=torch.long)
    group = max(setpoint.find_groups(model, (tokens,)), key=lambda group: group.num_units)
    setpoint.shrink(model, None, (group,), {group.name: [unit % 2 == 0 for unit in range(group.num_units)]})
    model.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    assert "setpoint.enable_checkpointing() before from_pretrained" in before.pop("setpoint")
    again = BertModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).last_hidden_state, model(tokens).last_hidden_state)
    dense = BertModel(again.config)
    dense.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == before
