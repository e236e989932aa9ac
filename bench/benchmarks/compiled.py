"""Whole runs with and without `torch.compile`, dense and pruned: does pruning still pay, and what do recompiles cost?

    python bench/benchmarks/compiled.py --data DIR --out results/compiled.json

Each run has a process and a cache folder of its own, so that nothing is known from one to the next. Rounds of all runs
take turns, every second one in the other order. Compilation, recompilation and all of Setpoint's own work count. Run it
on an otherwise idle machine. Tasks that are not measured stay in the file. Llama is that of Transformers in a small
size, trained on the task's text.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import setpoint
from setpoint_bench.catalogue import task_named
from setpoint_bench.environment import machine
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import dense_widths

RUNS = {
    "eager, dense": ("", False),
    "eager, pruned": ("", True),
    "compiled, dense": ("model", False),
    "compiled, pruned": ("model", True),
    "compiled by block, dense": ("blocks", False),
    "compiled by block, pruned": ("blocks", True),
    "compiled after the last cut, pruned": ("last", True),
}
"""What is compiled, and whether the model is pruned."""
OF_LLAMA = ("eager, pruned", "compiled after the last cut, pruned")
TASKS = {"cifar10-mini": 1200, "shakespeare-mini": 600, "shakespeare-mini, batch 2": 6000, "llama, batch 4": 24_000}
TASKS["llama, batch 4, shorter"] = 12_000
BUDGET = 0.25


class Llama(nn.Module):
    """A small model with the code of Transformers' Llama, from tokens to scores."""

    def __init__(self) -> None:
        import transformers

        super().__init__()
        sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 32}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        config = transformers.LlamaConfig(vocab_size=128, use_cache=False, **sizes, **heads)
        self.inner = transformers.LlamaForCausalLM(config)

    @property
    def layers(self) -> nn.ModuleList:
        """Its equal blocks."""
        found: nn.ModuleList = self.inner.model.layers
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next token at each place."""
        found: Tensor = self.inner(input_ids=tokens).logits
        return found


def runs_of(name: str) -> list[str]:
    """Runs of a task: only a transformer has equal blocks, and the longest task has two runs alone."""
    if name.startswith("llama"):
        return list(OF_LLAMA)
    others = ("last",) if name.startswith("shakespeare") else ("last", "blocks")
    return [run for run, how in RUNS.items() if how[0] not in others]


def trained(name: str, compiled: str, pruned: bool, steps: int, seed: int, data: Path | None) -> dict[str, Any]:
    """One run: its seconds in all, of its first step and of a step at its end, and what was compiled again."""
    name, _, batch = name.partition(", batch ")
    task = task_named("shakespeare-mini" if name == "llama" else name, data=data).with_steps(steps)
    if batch:
        assert isinstance(task, SimpleTask)
        task = replace(task, recipe=replace(task.recipe, batch=int(batch.partition(",")[0])))
    torch.manual_seed(seed)
    model = Llama() if name == "llama" else task.build(dense_widths(task))
    batches = task.batches(seed=seed)
    next(batches)  # data are read and decoded before the clock starts
    start = time.perf_counter()
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer)
    loop = None
    if pruned:
        budget = setpoint.Budget.fraction(BUDGET, of="flops")
        loop = setpoint.attach(model, optimizer, budget, example=task.example(), total_steps=steps)
    called = torch.compile(model) if compiled == "model" else model
    if compiled == "blocks":
        for block in model.layers:
            block.compile()
    durations, waits = list[float](), compiled == "last"
    compiles = 0 if compiled and not waits else None  # number of the step that compiles first
    for number in range(steps):
        if waits and loop is not None and loop.budget_met:
            model.compile()
            waits, compiles = False, number
        begun = time.perf_counter()
        inputs, targets = next(batches)
        loss = task.loss(called, inputs, targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        durations.append(time.perf_counter() - begun)
    summary = None if loop is None else loop.finish()
    return {
        "seconds": time.perf_counter() - start,
        "loss": float(loss.detach()),
        "first_compiled_seconds": None if compiles is None else durations[compiles],
        "dense_step_seconds": statistics.median(durations[1 : max(2, steps // 25)]),
        "last_step_seconds": statistics.median(durations[-max(1, steps // 5) :]),
        "resizes": 0 if summary is None else summary.resizes,
        "recompiles": 0 if summary is None else summary.recompiles,
        "recompile_seconds": 0.0 if summary is None else summary.recompiling_seconds,
        "overhead_seconds": 0.0 if summary is None else summary.overhead_seconds,
        "budget_met": None if summary is None else summary.budget_met,
    }


def _in_process(pipe: Any, threads: int, *arguments: Any) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
        pipe.send(trained(*arguments))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=None, help="folder that holds the data")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 100), metavar="N")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, for a quick look")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    held: dict[str, Any] = {"budget": BUDGET, "tasks": {}}
    if args.out is not None and args.out.exists():
        held = json.loads(args.out.read_text(encoding="utf-8"))
    for name in args.tasks:
        length = max(20, round(args.share * TASKS[name]))
        found: dict[str, list[dict[str, Any]]] = {run: [] for run in runs_of(name)}
        for seed in range(args.rounds):
            for run in list(found)[:: -1 if seed % 2 else 1]:
                ours, theirs = context.Pipe(duplex=False)
                order = (theirs, torch.get_num_threads(), name, *RUNS[run], length, seed, args.data)
                process = context.Process(target=_in_process, args=order)
                process.start()
                theirs.close()
                found[run].append(ours.recv())
                process.join()
                print(name, run, seed, found[run][-1], flush=True)
        held["tasks"][name] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": {**machine(), "threads": torch.get_num_threads()},
            "steps": length,
            "runs": found,
        }
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
