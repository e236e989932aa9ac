"""A recipe: optimizer, learning rate and length of a task's training, which can be stretched and scaled."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from setpoint_bench.task import BenchError

Rule = Literal["sgd", "adamw"]
Fall = Literal["cosine", "linear"]


@dataclass(frozen=True)
class Recipe:
    """How every model of a task is trained. Its schedule is given in shares of the run, so it stretches with the steps.

    Args:
        steps: optimizer steps of one run.
        batch: examples per step.
        rule: "sgd" with Nesterov momentum 0.9, or "adamw" with betas (0.9, 0.99).
        learning_rate: the peak.
        weight_decay: of all weights under "sgd"; of matrices, not of vectors, under "adamw".
        warm_up: share of the steps in which the learning rate rises to its peak, linearly.
        fall: shape of its way down after that.
        floor: last learning rate / peak.
        mixed: whether products run in bfloat16 where the hardware has it.
        num_validations: looks at the validation data in one run.

    >>> Recipe(steps=200, learning_rate=0.1).steps
    200
    """

    steps: int
    batch: int = 128
    rule: Rule = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    warm_up: float = 0.2
    fall: Fall = "cosine"
    floor: float = 0.0
    mixed: bool = False
    num_validations: int = 10

    def __post_init__(self) -> None:
        for what, value, known in (("rule", self.rule, get_args(Rule)), ("fall", self.fall, get_args(Fall))):
            if value not in known:
                raise BenchError(f"unknown {what} {value!r}: use {' or '.join(known)}")
        if self.steps < 1 or self.batch < 1:
            raise BenchError(f"a recipe needs at least 1 step and 1 example, got {self.steps} and {self.batch}")
        if not 0 < self.learning_rate < math.inf:
            raise BenchError(f"the learning rate must be above 0 and finite, got {self.learning_rate}")

    @property
    def steps_per_validation(self) -> int:
        return max(1, self.steps // self.num_validations)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The rule, on the parameters that are trained."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.rule == "sgd":
            return torch.optim.SGD(
                trained, lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay, nesterov=True
            )
        matrices = {"params": [p for p in trained if p.dim() >= 2], "weight_decay": self.weight_decay}
        vectors = {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}
        return torch.optim.AdamW([matrices, vectors], lr=self.learning_rate, betas=(0.9, 0.99))

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rate, stepped once per optimizer step; the optimizer's present rates are the peaks."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.share_of_peak)

    def share_of_peak(self, step: int) -> float:
        """Learning rate of a step / peak.

        >>> [round(Recipe(steps=5, warm_up=0.4, fall="linear").share_of_peak(step), 2) for step in range(5)]
        [0.5, 1.0, 1.0, 0.67, 0.33]
        """
        rise = max(1, round(self.warm_up * self.steps))
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, self.steps - rise))
        left = 1 - progress if self.fall == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.floor + (1 - self.floor) * left


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, which is about twice as fast; else float32.

    Read from the capabilities, not from a stopwatch, so that a machine always gives the same answer.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
