"""Budgets of seconds in a runtime: how near the finished file comes, how good the fit is, and what the clock costs.

    python bench/benchmarks/runtimes.py --nets mobilenetv2,minilm --runtimes onnxruntime,openvino --shares 0.5,0.25

Each cell trains on random data for a few steps under a budget, and then times the finished model's file in turns with
the dense model's: `ratio` over `share` is how near it comes. Before that, the fit of `attach` foretells the seconds of
fresh copies of random widths (`fit_errors`). Cells that the file holds are not run again.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from record import held_in, write
from torch import nn

import setpoint
from setpoint.errors import BudgetError
from setpoint.groups.example import Example, mapped
from setpoint.resources.replica import replica
from setpoint.resources.serving import answering
from setpoint.resources.tape import spread_widths
from setpoint.runtimes import named
from setpoint.runtimes.runtime import in_turns, ratios, typical
from setpoint_bench.environment import machine

OUT = Path(__file__).resolve().parents[2] / "results" / "runtimes.json"
FRESH = 6  # copies on which the fit is tried
BATCH = 8
LOADS = 5  # of the finished file and of the dense one, each timed: where a file lies in memory matters


def mobilenetv2() -> tuple[nn.Module, Example]:
    import torchvision

    return torchvision.models.mobilenet_v2(num_classes=10), (torch.randn(1, 3, 128, 128),)


def resnet18() -> tuple[nn.Module, Example]:
    import torchvision

    return torchvision.models.resnet18(num_classes=10), (torch.randn(1, 3, 128, 128),)


def efficientnet_lite0() -> tuple[nn.Module, Example]:
    import timm

    return timm.create_model("efficientnet_lite0", num_classes=10), (torch.randn(1, 3, 96, 96),)


def minilm() -> tuple[nn.Module, Example]:
    import transformers

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = transformers.AutoConfig.for_model("bert", num_labels=10, **sizes)
    return transformers.BertForSequenceClassification(config), {"input_ids": torch.randint(0, 30_000, (1, 64))}


def small_llama() -> tuple[nn.Module, Example]:
    import transformers

    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1024}
    config = transformers.LlamaConfig(vocab_size=256, num_key_value_heads=4, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 256, (1, 64))}


NETS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "mobilenetv2": mobilenetv2,
    "efficientnet-lite0": efficientnet_lite0,
    "resnet18": resnet18,
    "minilm": minilm,
    "small-llama": small_llama,
}


def varied(leaf: torch.Tensor) -> torch.Tensor:
    """Another sample of its kind: norms over a batch of samples that are all alike divide by nearly nothing."""
    return torch.randn_like(leaf) if leaf.is_floating_point() else leaf


def cell(net: str, runtime: str, share: float, steps: int) -> dict[str, Any]:
    """One run, and what its finished model takes in the runtime."""
    torch.manual_seed(0)
    model, sample = NETS[net]()
    model.train()
    dense, served = answering(model), named(runtime)
    batch = mapped(lambda leaf: torch.cat([varied(leaf) for _ in range(BATCH)]), sample)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    budget = setpoint.Budget.fraction(share, of="inference", runtime=served)
    loop = setpoint.attach(model, optimizer, budget, example=batch, total_steps=steps)
    cost, groups = loop.control.spending.costs["inference"], loop.control.groups
    fresh = fit_errors(model, sample, groups, cost, dense, served) if share == 0.5 else None
    dense_flops = loop.control.spending.costs["flops"].total(loop.widths)
    before = time.perf_counter()
    for _ in range(steps):
        inputs = mapped(lambda leaf: leaf + 0.1 * torch.randn_like(leaf) if leaf.is_floating_point() else leaf, batch)
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        getattr(out, "logits", out).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    steps_s, own = time.perf_counter() - before, loop.control.spending.account.watch.seconds()
    summary = loop.finish()
    of_dense, of_cut = list[float](), list[float]()
    for _ in range(LOADS):
        taken = in_turns([served.load(answering(each), sample) for each in (dense, model)])
        of_dense, of_cut = (seconds + more for seconds, more in zip((of_dense, of_cut), taken, strict=True))
    found = ratios(of_cut, of_dense)
    low, high = found[len(found) // 4], found[-1 - len(found) // 4]
    constant = sum(term.coefficient for term in cost.terms if not any(size.parts for size in term.sizes))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "net": net,
        "runtime": runtime,
        "share": share,
        "ratio": statistics.median(found),
        "quartiles": [low, high],
        "dense_ms": 1000 * typical(of_dense),
        "cut_ms": 1000 * typical(of_cut),
        "flops_ratio": loop.control.spending.costs["flops"].total(dict(summary.widths)) / dense_flops,
        "constant": constant / cost.total(dict(summary.dense_widths)),
        "fit_errors": fresh,
        "attach_seconds": own["attach"],
        "deciding_seconds": own["deciding"],
        "steps_seconds": steps_s,
        "steps": steps,
        "reason": summary.reason,
    }


def fit_errors(
    model: nn.Module, sample: Example, groups: Any, cost: Any, dense: nn.Module, runtime: Any
) -> list[float]:
    """Relative errors of the fit at fresh copies of random widths, in turns with the dense model."""
    widths_now = {group.name: group.num_units for group in groups}
    reference, errors = runtime.load(answering(dense), sample), []
    for widths in spread_widths(groups, FRESH, seed=1):
        with replica(model, (), sample, groups, [], widths, data=True, trains=False) as copy:
            of_dense, of_copy = in_turns([reference, runtime.load(copy.model, sample)])
        read = statistics.median(ratios(of_copy, of_dense))
        errors.append(cost.total(widths) / cost.total(widths_now) / read - 1)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--runtimes", default="onnxruntime,openvino")
    parser.add_argument("--shares", default="0.5,0.25,0.75")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for share in map(float, args.shares.split(",")):
        for runtime in args.runtimes.split(","):
            for net in args.nets.split(","):
                held = held_in(args.out)
                rows = held.get("rows", [])
                if any((row["net"], row["runtime"], row["share"]) == (net, runtime, share) for row in rows):
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        row = cell(net, runtime, share, args.steps)
                    except BudgetError as error:  # below what the runtime takes however narrow the layers are
                        print(f"{net} {runtime} {share:.0%}: {error}")
                        continue
                about = {
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "environment": {**machine(), "threads": 1},
                }
                write({**held, **about, "seed": 0, "rows": [*rows, row]}, args.out)
                print(f"{net} {runtime} {share:.0%}: {row['ratio']:.1%} of the dense seconds")


if __name__ == "__main__":
    main()
