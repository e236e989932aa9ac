"""A run of Hugging Face's Trainer on two ranks under FSDP2: started by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import fsdp_on_cpu
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import setpoint
from setpoint.integrations.transformers import SetpointCallback


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random tokens, each its own label."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": tokens, "labels": tokens}


def main(folder: Path) -> None:
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=16, **sizes))
    wrap = {
        "fsdp_version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=2,
        fsdp="full_shard auto_wrap",
        fsdp_config={"fsdp_version": 2, **wrap},
        save_strategy="no",
        report_to=[],
        learning_rate=1e-2,
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
    )
    callback = SetpointCallback(0.6, verify=False)
    trainer = Trainer(model, arguments, train_dataset=Tokens(), callbacks=[callback])
    trainer.train()
    assert dist.get_world_size() == 2 and isinstance(trainer.model, FSDPModule)
    assert callback.summary is not None and callback.summary.budget_met and callback.summary.resizes
    with setpoint.unsharded(trainer.model):
        if dist.get_rank() == 0:
            setpoint.save(trainer.model, folder / "small")
    print("trained", flush=True)


if __name__ == "__main__":
    fsdp_on_cpu.allow()
    main(Path(sys.argv[1]))
