"""Hugging Face Trainer: one callback prunes MiniLM to half of its FLOPs while it learns BANKING77's 77 intents.

    pip install ./setpoint transformers accelerate datasets
    python examples/huggingface_trainer.py

Data and weights are downloaded from the Hub. SETPOINT_BANKING77 and SETPOINT_MINILM may name folders that hold them,
and SETPOINT_STEPS fewer steps. docs/tutorials/trainer.md goes through it.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from setpoint.integrations.transformers import SetpointCallback

STEPS = int(os.environ.get("SETPOINT_STEPS", 560))
DATA = os.environ.get("SETPOINT_BANKING77", "PolyAI/banking77")
MODEL = os.environ.get("SETPOINT_MINILM", "sentence-transformers/all-MiniLM-L6-v2")

tokenizer = AutoTokenizer.from_pretrained(MODEL)


def tokens(rows: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tokenizer(rows["text"], padding="max_length", truncation=True, max_length=32)
    return found


data = load_dataset(DATA).map(tokens, batched=True)


def pretrained() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=77)
    return model


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}


arguments = TrainingArguments(
    output_dir="checkpoints",
    max_steps=STEPS,
    per_device_train_batch_size=32,
    learning_rate=4e-4,
    warmup_steps=STEPS // 10,
    save_steps=STEPS // 2,
    logging_steps=STEPS // 4,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)


def trainer_of(model: torch.nn.Module, callback: SetpointCallback) -> Trainer:
    parts = {"train_dataset": data["train"], "eval_dataset": data["test"]}
    return Trainer(model, arguments, **parts, compute_metrics=accuracy, callbacks=[callback])


def main() -> None:
    callback = SetpointCallback(0.5)  # half of the FLOPs
    trainer = trainer_of(pretrained(), callback)
    trainer.train()
    print(callback.summary)
    print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.1%}")

    for layer in trainer.model.bert.encoder.layer:
        heads = layer.attention.self.query.out_features // 32
        print(f"{heads:2} of 12 heads, {layer.intermediate.dense.out_features:4} of 1536 neurons")

    trainer.save_model("small")
    small = AutoModelForSequenceClassification.from_pretrained("small")
    print(f"{sum(parameter.numel() for parameter in small.parameters()):,} parameters loaded from the folder")

    again = trainer_of(pretrained(), SetpointCallback(0.5))
    again.train(resume_from_checkpoint=f"checkpoints/checkpoint-{STEPS // 2}")
    states = trainer.model.state_dict(), again.model.state_dict()
    print("resumed bit for bit:", all(torch.equal(states[0][name], states[1][name]) for name in states[0]))


if __name__ == "__main__":
    main()
