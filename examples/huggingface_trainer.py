"""Hugging Face Trainer: one callback prunes BERT to half of its FLOPs, resumes from a checkpoint, and the folder loads.

    pip install ./setpoint transformers accelerate
    python examples/huggingface_trainer.py

The model is tiny and its data are random tokens, so that it takes seconds.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from setpoint.integrations.transformers import SetpointCallback


class Parity(torch.utils.data.Dataset):
    """Rows of tokens; the label says whether the first one is even."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": tokens, "labels": tokens[0] % 2}


def train(folder: str, resume: str | None = None) -> Trainer:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=2, **small))
    arguments = TrainingArguments(
        output_dir=folder, max_steps=60, per_device_train_batch_size=32, learning_rate=3e-3, save_steps=20,
        logging_steps=20, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callback = SetpointCallback(0.5)  # the one line: half of the FLOPs
    trainer = Trainer(model, arguments, train_dataset=Parity(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    print(callback.summary)
    return trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(folder)
        resumed = train(folder, resume=f"{folder}/checkpoint-40")
        states = trainer.model.state_dict(), resumed.model.state_dict()
        print("resumed bit for bit:", all(torch.equal(states[0][name], states[1][name]) for name in states[0]))
        trainer.save_model(f"{folder}/small")
        small = AutoModelForSequenceClassification.from_pretrained(f"{folder}/small")
        print("loaded from its folder:", sum(parameter.numel() for parameter in small.parameters()), "parameters")
