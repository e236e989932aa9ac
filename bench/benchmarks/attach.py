"""What `attach` costs, in training steps, and what it cost with an older version, in turns.

    python bench/benchmarks/attach.py --base ../base --out results/attach.json
    python bench/benchmarks/attach.py --base ../base --out results/attach.json --budget latency

Processor seconds on one thread, each run in a fresh process, after torch's exporter has been loaded once, by an
`attach` of a tiny model, whose seconds are recorded as well. A pair is
one run of this tree and one of the tree in `--base`, in changing order; in each run the training step is measured
before and after, and ratios are to the steps of the same run. Of Llama-8B, which has no weights, groups are found.
Rows of models that are not measured stay in the file, and those of other processors. A `--budget` of latency, memory or
energy adds what it learns from copies. Joules are stated watts times seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import setpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
BUDGETS = ("latency", "memory", "energy")
"""Those that learn from copies; a model's row holds each under its name."""


def resnet18() -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.resnet18(num_classes=10), (torch.randn(64, 3, 32, 32),)


def minilm() -> tuple[nn.Module, Any]:
    import transformers

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = transformers.AutoConfig.for_model("bert", num_labels=10, **sizes)
    tokens = torch.randint(0, 30_000, (32, 32))
    example = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return transformers.BertForSequenceClassification(config).train(), example


def gpt2() -> tuple[nn.Module, Any]:
    """GPT-2 with 124 million parameters at 2 x 64 tokens."""
    import transformers

    tokens = torch.randint(0, 50_000, (2, 64))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False)).train(), {"input_ids": tokens}


def llama() -> tuple[nn.Module, Any]:
    """The structure of Llama-8B on the meta device, at 2 x 64 tokens."""
    import transformers

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = transformers.LlamaConfig(vocab_size=128_256, num_key_value_heads=8, use_cache=False, **sizes)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).train()
        return model, {"input_ids": torch.zeros(2, 64, dtype=torch.long)}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet18": resnet18,
    "minilm": minilm,
    "gpt2": gpt2,
    "llama-8b": llama,
}


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def attached(model: nn.Module, example: Any, resource: str = "flops") -> None:
    watts = 45.0 if resource == "energy" else None
    share = 0.9 if resource == "memory" else 0.5  # of a language model's memory the embeddings alone are half
    optimizer, budget = torch.optim.AdamW(model.parameters()), setpoint.Budget.fraction(share, of=resource, watts=watts)
    setpoint.attach(model, optimizer, budget, example=example, total_steps=1000).detach()


def step_of(model: nn.Module, example: Any) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        output = model(**example) if isinstance(example, dict) else model(*example)
        output = output if isinstance(output, torch.Tensor) else output.logits
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, resource: str) -> dict[str, Any]:
    """Seconds of attach and of training steps of one model, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    step_of(small, (torch.randn(2, 4),))()  # a first step loads parts of PyTorch that are the training's
    loading_s = seconds(lambda: attached(small, (torch.randn(2, 4),)))
    steps: list[float] = []

    def measure_steps() -> None:
        step = step_of(*MODELS[name]())
        step()
        steps.extend(seconds(step) for _ in range(STEPS))

    without_data = name == "llama-8b"
    if not without_data:
        measure_steps()
    model, example = MODELS[name]()
    find = setpoint.find_groups if without_data else partial(attached, resource=resource)
    cold_s = seconds(lambda: find(model, example))
    if not without_data:
        measure_steps()
    step_s = statistics.median(steps) if steps else None
    return {"loading_s": loading_s, "cold_s": cold_s, "step_s": step_s}


def in_process(name: str, tree: Path, resource: str) -> dict[str, Any]:
    """The record of a fresh process that imports the package from a tree."""
    with tempfile.TemporaryDirectory() as folder:  # older versions look for what they kept in the cache folder
        settings = {"PYTHONPATH": str(tree / "src"), "XDG_CACHE_HOME": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--one", name, "--budget", resource]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **settings})
    record: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return record


def summary(runs: list[dict[str, Any]], key: str) -> dict[str, Any]:
    values = [run[key] for run in runs]
    found = {"seconds_median": statistics.median(values), "seconds_range": [min(values), max(values)]}
    if runs[0]["step_s"]:
        steps = [run[key] / run["step_s"] for run in runs]
        found |= {"steps_median": statistics.median(steps), "steps_range": [min(steps), max(steps)]}
    return found


def main() -> None:
    """Measure every model in turns, print a line for each, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "attach.json")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--budget", default="flops", choices=["flops", *BUDGETS], help="Llama-8B has no data for others"
    )
    parser.add_argument("--one", choices=list(MODELS), help="measure this model in this process and print the record")
    arguments = parser.parse_args()
    resource = arguments.budget
    if arguments.one:
        print(json.dumps(measure(arguments.one, resource)))
        return
    from record import commit_of  # a process that measures needs no benchmark

    from setpoint_bench.environment import machine

    trees = {"now": ROOT, **({"before": arguments.base.resolve()} if arguments.base else {})}
    about = {**machine(), "threads": 1}
    kept = json.loads(arguments.out.read_text(encoding="utf-8"))["machines"] if arguments.out.exists() else []
    others = [each for each in kept if each["environment"]["cpu"] != about["cpu"]]
    rows: dict[str, Any] = {name: row for each in kept if each not in others for name, row in each["models"].items()}
    for name in arguments.models:
        if resource != "flops" and name == "llama-8b":
            continue
        runs: dict[str, list[dict[str, Any]]] = {tree: [] for tree in trees}
        for pair in range(arguments.pairs):
            for tree in list(trees)[:: -1 if pair % 2 else 1]:
                runs[tree].append(in_process(name, trees[tree], resource))
        found = {
            "code": about["code"],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "pairs": arguments.pairs,
            "cold": summary(runs["now"], "cold_s"),
            "runs": runs,
        }
        if "before" in trees:
            found |= {"base": commit_of(arguments.base), "before": summary(runs["before"], "cold_s")}
        before = rows.get(name, {})
        budgets = {budget: before[budget] for budget in BUDGETS if budget in before}
        rows[name] = {**found, **budgets} if resource == "flops" else {**before, resource: found}
        shown = (f"{kind} {row['seconds_median']:.2f} s ({row.get('steps_median', float('nan')):.2f} steps)"
                for kind, row in found.items() if kind in ("cold", "before"))  # fmt: skip
        print(f"{name}: {', '.join(shown)}", flush=True)
        result = {
            "what": "processor seconds on one thread",
            "seed": 0,
            "machines": [*others, {"environment": about, "models": rows}],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
