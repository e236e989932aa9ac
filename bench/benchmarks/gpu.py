"""Seconds, bytes and joules of Setpoint on this machine's GPU: four networks, eager and compiled, and 2:4 weights.

    python bench/benchmarks/gpu.py --out results/gpu.json
    python bench/benchmarks/gpu.py --small                            # tiny networks: what the tests run on a CPU

Each network trains for some steps in bf16 while Setpoint cuts it to half of its FLOPs. Then the dense network, one that
is evenly narrow at the same FLOPs, and Setpoint's take turns, and each turn is a few training steps. Data are random,
and every target is the first class: which units are dropped is chance, and the time of a step is not. Without a GPU all
of it runs on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from record import keep
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import setpoint
from setpoint.controller.selection import landing_widths
from setpoint.cost.cost import flops_cost
from setpoint.groups.group import widths_of
from setpoint.groups.trace import trace
from setpoint.resources.joules import find_energy_meter
from setpoint_bench.joules import Joules
from setpoint_bench.recipe import autocast, best_device
from setpoint_bench.zoo import library

FRACTION, SEED = 0.5, 0


@dataclass(frozen=True)
class Subject:
    """A network, how it is fed, and how long it trains before it is timed."""

    build: Callable[[], nn.Module]
    example: Callable[[], Mapping[str, Tensor] | tuple[Tensor, ...]]
    steps: int
    per_turn: int


def _images(count: int, side: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(count, 3, side, side),)


def _tokens(count: int, length: int, vocabulary: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"input_ids": torch.randint(0, vocabulary, (count, length))}


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: library("timm").create_model(name)


def _transformers(family: str, kind: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = library("transformers")
        made: nn.Module = getattr(transformers, kind)(transformers.AutoConfig.for_model(family, **settings))
        return made

    return build


def _gpt(**settings: Any) -> Callable[[], nn.Module]:
    return _transformers("gpt2", "GPT2LMHeadModel", use_cache=False, bos_token_id=0, eos_token_id=0, **settings)


def _bert(**settings: Any) -> Callable[[], nn.Module]:
    return _transformers("bert", "BertForSequenceClassification", **settings)


_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_LITTLE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

FULL = {
    "ResNet-50": Subject(_timm("resnet50"), _images(128, 224), 100, 10),
    "ViT-S": Subject(_timm("vit_small_patch16_224"), _images(128, 224), 100, 10),
    "GPT-2 124 M": Subject(_gpt(), _tokens(16, 512, 50_000), 100, 10),
    "MiniLM-L6": Subject(_bert(**_MINILM), _tokens(128, 128, 30_000), 100, 20),
}
SMALL = {
    "residual network": Subject(_timm("test_resnet"), _images(2, 64), 12, 1),
    "BERT": Subject(_bert(vocab_size=128, **_LITTLE), _tokens(2, 16, 128), 12, 1),
}


def measure(subject: Subject, device: torch.device, rounds: int, modes: tuple[str, ...]) -> dict[str, Any]:
    """Seconds, bytes and joules of a training step of the networks, and what Setpoint's own work took.

    Args:
        rounds: turns of each network.
        modes: "eager", and "compiled" if compiled networks take turns, too.
    """
    torch.manual_seed(SEED)
    dense = subject.build().to(device).train()
    example = tree_map(lambda x: x.to(device), subject.example())
    before = time.perf_counter()
    ours, summary = _pruned(copy.deepcopy(dense), example, subject.steps, device)
    trained = time.perf_counter() - before
    even, even_flops = _even(copy.deepcopy(dense), example)
    models = {"dense": dense, "even": even, "Setpoint": ours}
    turns: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in modes} for name in models}
    joules: dict[str, list[float | None]] = {name: [] for name in models}
    steps, optimizers = {}, {}
    for name, model in models.items():
        for mode in modes:
            called = torch.compile(model) if mode == "compiled" else model
            optimizers[name, mode] = optimizer = _optimizer_of(model)
            steps[name, mode] = _step_of(called, optimizer, example, device)
            for _ in range(2):  # compiled code is made in the first
                steps[name, mode]()
    for _ in range(rounds):
        for (name, mode), step in steps.items():
            meter = Joules(find_energy_meter([device])[0])
            _wait(device)
            with meter:
                begun = time.perf_counter()
                for _ in range(subject.per_turn):
                    step()
                _wait(device)
                turns[name][mode].append((time.perf_counter() - begun) / subject.per_turn)
            if mode == "eager":
                joules[name].append(None if meter.energy_j is None else meter.energy_j / subject.per_turn)
    return {
        "step_seconds": turns,
        "step_joules": {name: _middle(each) for name, each in joules.items()},
        "peak_bytes": {
            name: _peak(steps[name, "eager"], _held(model, optimizers[name, "eager"], example), device)
            for name, model in models.items()
        },
        "flops": {"dense": summary.dense_flops, "even": even_flops, "Setpoint": summary.final_flops},
        "run": {
            "seconds": trained,
            **{each: getattr(summary, each) for each in ("steps", "overhead_seconds", "resizes", "budget_met")},
        },
    }


def _pruned(model: nn.Module, example: Any, steps: int, device: torch.device) -> tuple[nn.Module, setpoint.Summary]:
    """The network after a run that cut it, and the run's summary."""
    optimizer = _optimizer_of(model)
    loop = setpoint.attach(model, optimizer, FRACTION, example=example, total_steps=steps)
    step = _step_of(model, optimizer, example, device)
    for _ in range(steps):
        step()
    return model, loop.finish()


def _even(model: nn.Module, example: Any) -> tuple[nn.Module, float]:
    """The network with the same share of units left in each group, at the same FLOPs, and those of a step."""
    traced = trace(model, example)
    groups = tuple(group for group in traced.groups if group.lossless)
    cost, dense = flops_cost(traced), widths_of(traced.groups)
    widths = landing_widths(cost, dense, dense, groups, FRACTION * cost.total(dense))
    keep = {group.name: np.arange(group.num_units) < widths[group.name] for group in groups}
    setpoint.shrink(model, None, traced.groups, keep)
    return model, float(cost.total({**dense, **widths}))


def _optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def _step_of(
    called: Callable[..., Any], optimizer: torch.optim.Optimizer, example: Any, device: torch.device
) -> Callable[[], None]:
    """A training step in bf16; every target is the first class."""

    def step() -> None:
        with autocast(device, torch.bfloat16):
            scores = called(**example) if isinstance(example, dict) else called(*example)
            scores = scores if isinstance(scores, Tensor) else scores.logits
            loss = -scores.float().flatten(0, -2).log_softmax(-1)[:, 0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _held(model: nn.Module, optimizer: torch.optim.Optimizer, example: Any) -> int:
    """Bytes that stay allocated between steps: weights, buffers, optimizer state and inputs.

    They are summed and not measured, since the other networks are on the device as well.
    """
    states = [each for state in optimizer.state.values() for each in state.values()]
    inputs = example.values() if isinstance(example, dict) else example
    found = [each for each in (*model.parameters(), *model.buffers(), *states, *inputs) if isinstance(each, Tensor)]
    return sum(each.nbytes for each in {id(each): each for each in found}.values())


def _peak(step: Callable[[], None], held: int, device: torch.device) -> dict[str, int | None]:
    """Bytes that stay allocated, those that a step adds to them at most, and the whole peak; None on a CPU."""
    if device.type != "cuda":
        return {"held": held, "step": None, "whole": None}
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device)
    step()
    _wait(device)
    added = int(torch.cuda.max_memory_allocated(device) - resident)
    return {"held": held, "step": added, "whole": held + added}


def _middle(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if len(known) == len(values) and known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--small", action="store_true", help="tiny networks, for the tests")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="leave out torch.compile")
    args = parser.parse_args()
    device, networks = best_device(), dict[str, Any]()
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"on {hardware}", flush=True)
    subjects = SMALL if args.small else FULL
    found = {"hardware": hardware, "seed": SEED, "fraction": FRACTION, "networks": networks}
    modes = ("eager",) if args.eager else ("eager", "compiled")
    for name, subject in subjects.items():
        try:
            networks[name] = measure(subject, device, args.rounds, modes)
        except torch.OutOfMemoryError as error:
            networks[name] = {"why_not": str(error).splitlines()[0]}
            print(f"{name}: {networks[name]['why_not']}", flush=True)
        else:
            medians = {arm: median(each["eager"]) for arm, each in networks[name]["step_seconds"].items()}
            told = ", ".join(f"{arm} {1e3 * value:.1f} ms" for arm, value in medians.items())
            print(f"{name}: {told} a step", flush=True)
        keep(found, args.out, shown={"networks": list(networks)})  # what follows may fail
    keep(found, args.out, shown={"networks": list(networks)})


if __name__ == "__main__":
    main()
