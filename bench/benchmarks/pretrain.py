"""Train the checkpoint that the `finetune` task starts from: six convolutions on six classes of CIFAR-10 at 16x16.

    python bench/benchmarks/pretrain.py

It needs about a minute and a half on one core, and writes
`bench/src/setpoint_bench/tasks/pretrained/six-classes.safetensors`.
"""

from __future__ import annotations

from itertools import islice

import torch

from setpoint_bench.simple_task import dense_widths
from setpoint_bench.tasks.finetune import PRETRAINED, pretraining, save_features


def main() -> None:
    """Train on the six classes with seed 0, say the validation accuracy, and save."""
    task = pretraining()
    torch.manual_seed(0)
    model = task.build(dense_widths(task))
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer)
    for step, (inputs, targets) in enumerate(islice(task.batches(seed=0), task.steps), start=1):
        torch.autograd.backward(task.loss(model, inputs, targets))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % task.steps_per_validation == 0:
            print(f"step {step} of {task.steps}: {task.evaluate(model, 'validation')}", flush=True)
    save_features(model, PRETRAINED)
    print(f"{PRETRAINED}: {PRETRAINED.stat().st_size} bytes")


if __name__ == "__main__":
    main()
