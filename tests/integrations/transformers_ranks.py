"""A run of Hugging Face's Trainer on two ranks, and the rest of one from its second step: started by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from setpoint.integrations.transformers import SetpointCallback

STEPS = 5


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random tokens, each its own label."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": tokens, "labels": tokens}


class Agreement(TrainerCallback):
    """Compares the ranks after each step: at the end they all read the best model from one file."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = flat(kwargs["model"])
        both = [torch.zeros_like(weights) for _ in range(2)]
        dist.all_gather(both, weights)
        assert torch.equal(*both), state.global_step


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def run(folder: Path, resume: Path | None = None) -> Tensor:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        bf16=True,
        gradient_checkpointing=True,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=4,
        report_to=[],
        learning_rate=1e-2,
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
    )
    callback, data = SetpointCallback(0.6, verify=False), Tokens()
    callbacks = [callback, Agreement()]
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert dist.get_world_size() == 2
    assert callback.loop is not None and callback.loop.step == STEPS
    assert callback.summary is not None and callback.summary.budget_met and callback.summary.resizes
    return flat(trainer.model)


if __name__ == "__main__":
    whole = run(Path(sys.argv[1], "whole"))
    again = run(Path(sys.argv[1], "again"), Path(sys.argv[1], "whole/checkpoint-2"))
    assert torch.equal(again, whole)
    print("alike")
