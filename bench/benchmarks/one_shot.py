"""A trained model cut at once, without training and after a little of it: `compress` beside what others would cut.

    python bench/benchmarks/one_shot.py --data DIR --runs runs/one-shot --out results/one-shot.json

Each task trains its dense model by its recipe; that of the task `llama` is a small decoder on Shakespeare. Each method
is given the same 1,024 samples of the training data and cuts a copy to the same share of the dense FLOPs. The
statistics of BatchNorms are renewed after every method. The test data are read with the cut model as it is, and again
after a tenth of the task's steps by the task's recipe. Dense models stay in `--runs`; rows that the record holds are
not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import keep
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import setpoint
from setpoint.cost.flops import flops_cost
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import trace
from setpoint.loop.candidates import restricted
from setpoint.one_shot.consumer import Padding, by_column, channel_dim, find_consumers
from setpoint.one_shot.forward import run
from setpoint_bench.catalogue import task_named
from setpoint_bench.counter import step_flops
from setpoint_bench.method import method_named
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError, Dimension, dense_widths

TASKS = ("finetune", "resnet56", "clothing", "banking77", "llama")
BUDGETS = (0.5, 0.25)
NUM_SAMPLES = 1024
RECOVERY = 0.1
"""Share of the task's steps that a cut model is trained on for."""

Batches = Sequence[tuple[Tensor, Tensor]]
Cut = Callable[[SimpleTask, nn.Module, float, Batches], None]


class Decoder(nn.Module):
    """A small Llama of the library Transformers: tokens in, scores of the next one out."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=65,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=64,
            attn_implementation="eager",  # the FLOP counter's tensors without data have no masks to look into
        )
        self.model = transformers.LlamaForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of each next character."""
        whole = torch.ones_like(tokens)
        scores: Tensor = self.model(input_ids=tokens, attention_mask=whole, use_cache=False).logits
        return scores


@dataclass(frozen=True)
class Decoders:
    """The family of one decoder."""

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """None is free: it is only trained whole."""
        return {}

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        """The decoder."""
        return Decoder()


def task_of(name: str, data: Path | None) -> SimpleTask:
    """A task of the catalogue, or the one of the decoder, which has the text and the recipe of shakespeare-mini."""
    found = task_named("shakespeare-mini" if name == "llama" else name, data=data)
    assert isinstance(found, SimpleTask)
    return replace(found, name=name, family=Decoders()) if name == "llama" else found


def trained(task: SimpleTask, model: nn.Module, seed: int, steps: int) -> nn.Module:
    """Train a model by the task's recipe, its schedule over so many steps."""
    of_length = task.with_steps(steps)
    optimizer = of_length.optimizer(model)
    schedule = of_length.schedule(optimizer)
    model.train()
    for inputs, targets in islice(task.batches(seed), steps):
        task.loss(model, inputs, targets).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def dense_model(task: SimpleTask, seed: int, runs: Path) -> nn.Module:
    """The trained dense model of a seed, from its file where there is one."""
    torch.manual_seed(seed)
    model = task.build(dense_widths(task))
    file = runs / f"{task.name}-seed{seed}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model
    trained(task, model, seed, task.steps)
    runs.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    return model


def inputs_of(batches: Batches) -> list[tuple[Tensor, ...]]:
    """The batches without their targets."""
    return [(inputs,) for inputs, _ in batches]


def by_reconstruction(even: bool) -> Cut:
    """What Setpoint does: scores, widths and weights by what the layers that read the units can reconstruct."""

    def cut(task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> None:
        setpoint.compress(model, batches, f"{100 * budget}% flops", even=even, num_samples=NUM_SAMPLES)

    return cut


def by_library(name: str) -> Cut:
    """What a method of the benchmark cuts, such as the library Torch-Pruning."""

    def cut(task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> None:
        prunes = replace(method_named(name).prunes, num_batches=len(batches))  # type: ignore[attr-defined]
        prunes.begin(task, model, budget, iter(batches))
        run(model, inputs_of(batches), "renewed")

    return cut


@dataclass(frozen=True)
class Seen:
    """Of each channel that a layer is given, the mean and the variance over the data."""

    mean: Tensor
    variance: Tensor


def seen_by_layers(model: nn.Module, layers: Sequence[str], batches: Batches) -> dict[str, Seen]:
    """Means and variances of what these layers are given, by channel; padding is left out, as `compress` does."""
    sums: dict[str, list[Tensor]] = {}
    padding = Padding(model)

    def look(name: str) -> Callable[..., None]:
        def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
            values = args[0].detach().double().movedim(channel_dim(layer), 0).flatten(1)
            if padding.real is not None and padding.real.numel() == values.shape[1]:
                values = values[:, padding.real.flatten()]
            new = torch.tensor(values.shape[1], dtype=torch.float64), values.sum(1), values.square().sum(1)
            sums[name] = [old + each for old, each in zip(sums.get(name, (0, 0, 0)), new, strict=True)]

        return note

    handles = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in dict.fromkeys(layers)]
    try:
        run(model, inputs_of(batches), "running")
    finally:
        padding.stop()
        for handle in handles:
            handle.remove()
    means = {name: total / count for name, (count, total, _) in sums.items()}
    return {name: Seen(means[name], squares / count - means[name] ** 2) for name, (count, _, squares) in sums.items()}


def by_fluctuation(task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> None:
    """What FLAP does: units whose inputs fluctuate least go, and a bias takes over their mean.

    The score of a channel is its variance times the squared norm of the weights that read it. Scores are standardised
    within each group, and all units are ranked together. An, Zhao, Yu, Tang, Wang: "Fluctuation-based adaptive
    structured pruning for large language models", AAAI 2024.
    """
    traced = trace(model, task.example())
    groups = tuple(group for group in traced.groups if group.lossless and find_consumers(group, model))
    readers = [each for group in groups for each in find_consumers(group, model)]
    seen = seen_by_layers(model, [each.layer for each in readers], batches)
    scores: dict[str, np.ndarray] = {}
    for group in groups:
        score = np.zeros(group.num_units)
        for reader in find_consumers(group, model):
            layer: Any = model.get_submodule(reader.layer)
            norms = by_column(layer, layer.weight.detach()).double().square().sum((1, 2))
            score += (seen[reader.layer].variance * norms).numpy()[reader.channels].sum(1)
        scores[group.name] = (score - score.mean()) / (score.std() + 1e-12)
    kept = _lowest_gone(groups, scores, flops_cost(restricted(traced, groups)).total, budget)
    with torch.no_grad():
        for group in groups:
            for reader in find_consumers(group, model):
                layer = model.get_submodule(reader.layer)
                if layer.bias is None and isinstance(layer, nn.modules.conv._ConvNd):
                    continue  # a BatchNorm lies behind it, whose new statistics take over the mean
                gone = torch.from_numpy(reader.channels[~kept[group.name]].ravel())
                columns = by_column(layer, layer.weight.detach()).sum(1)[gone]
                shift = (seen[reader.layer].mean[gone].to(columns)[None] @ columns)[0]
                layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)
    setpoint.shrink(model, None, groups, kept)
    run(model, inputs_of(batches), "renewed")


def _lowest_gone(
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    total: Callable[[Mapping[str, int]], float],
    budget: float,
) -> dict[str, np.ndarray]:
    """The units that stay where those of least score go one by one until the budget is met; each group keeps one."""
    widths = widths_of(groups)
    limit = budget * total(widths)
    kept = {group.name: np.ones(group.num_units, dtype=bool) for group in groups}
    ranked = sorted(
        (float(score), name, unit) for name, of_group in scores.items() for unit, score in enumerate(of_group)
    )
    for _, name, unit in ranked:
        if total(widths) <= limit:
            return kept
        if widths[name] > 1:
            kept[name][unit] = False
            widths[name] -= 1
    raise BenchError("no cut by fluctuation meets the budget")


METHODS: dict[str, Cut] = {
    "compress": by_reconstruction(even=False),
    "compress, even": by_reconstruction(even=True),
    "fluctuation": by_fluctuation,
    "torch-pruning-taylor": by_library("torch-pruning-taylor"),
    "torch-pruning-norm": by_library("torch-pruning-norm"),
}


def measured(
    task: SimpleTask, seed: int, runs: Path, known: set[tuple[Any, ...]], methods: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for each method and budget of a seed that is not known, and one of the dense model."""
    wanted = [(name, budget) for budget in BUDGETS for name in methods if (task.name, name, budget, seed) not in known]
    if not wanted:
        return
    dense = dense_model(task, seed, runs)
    samples = math.ceil(NUM_SAMPLES / task.recipe.batch)
    batches = list(islice(task.batches(seed + 1000), samples))
    flops = float(step_flops(dense, task.example()))
    about = {"task": task.name, "seed": seed, "metric": task.metric, "num_samples": samples * task.recipe.batch}
    yield {**about, "method": "dense", "budget": None, "value": value_of(task, dense), "flops": 1.0}
    for name, budget in wanted:
        model, row = copy.deepcopy(dense), {**about, "method": name, "budget": budget}
        torch.manual_seed(seed)
        start = time.perf_counter()
        try:
            METHODS[name](task, model, budget, batches)
        except (BenchError, setpoint.SetpointError) as error:
            yield {**row, "failed": f"{error}"}
            continue
        row |= {"seconds": time.perf_counter() - start, "flops": step_flops(model, task.example()) / flops}
        row["value"] = value_of(task, model)
        steps = max(1, round(RECOVERY * task.steps))
        yield {**row, "steps": steps, "recovered": value_of(task, trained(task, model, seed, steps))}


def value_of(task: SimpleTask, model: nn.Module) -> float:
    """Accuracy on the test data, or loss where that is the metric."""
    score = task.evaluate(model, "test")
    return score.loss if task.metric == "loss" else float(score.accuracy or 0.0)


def main() -> None:
    """Measure what the record does not hold, and write it after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder that holds the data")
    parser.add_argument("--runs", type=Path, default=Path("runs/one-shot"), help="folder of the dense models")
    parser.add_argument("--out", type=Path, default=Path("results/one-shot.json"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
    for name in args.tasks:
        task = task_of(name, args.data)
        for seed in args.seeds:
            known = {(row["task"], row["method"], row["budget"], row["seed"]) for row in rows}
            for row in measured(task, seed, args.runs, known, args.methods):
                same = (row["task"], row["method"], row["budget"], row["seed"])
                rows = [each for each in rows if (each["task"], each["method"], each["budget"], each["seed"]) != same]
                rows.append(row)
                keep({"recovery": RECOVERY, "rows": rows}, args.out, shown=row)


if __name__ == "__main__":
    main()
