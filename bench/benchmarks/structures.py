"""Structures of large language models without weights: what the search, sensing and a cut need.

    python bench/benchmarks/structures.py --out results/structures.json

Models are built on the meta device. Seconds are of the processor, for tracing and for all groups. Bytes are those that
tensors would have: the weights in 16 bit, AdamW's moments in 32, what sensing keeps (one number a unit, and the second
moments of what readers of units are given, until the first cut), and the largest layer's old and new weights.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import torch
from record import keep

from setpoint.groups.trace import find_groups
from setpoint.sensor.moments import find_readers
from setpoint_bench.zoo import library

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "mixtral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "experts_implementation": "grouped_mm",
    },
    "qwen2_moe": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "experts_implementation": "grouped_mm",
    },
}
"""Llama 3 8B, Mixtral 8x7B and Qwen1.5-MoE-A2.7B."""


def measured(kind: str) -> dict[str, Any]:
    transformers = library("transformers")
    config = transformers.AutoConfig.for_model(kind, **SHAPES[kind])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokens = torch.zeros(1, 128, dtype=torch.long, device="meta")
    began = time.process_time()
    groups = find_groups(model, {"input_ids": tokens, "attention_mask": None})
    seconds = time.process_time() - began
    lossless = tuple(group for group in groups if group.lossless)
    units: dict[str, int] = {}
    for group in lossless:
        units[group.what] = units.get(group.what, 0) + group.num_units
    moments = sum(each.nbytes for reader in find_readers(model, lossless) for each in reader.no_rows(model))
    params = sum(each.numel() for each in model.parameters())
    return {
        "model": kind,
        "parameters": params,
        "search_s": round(seconds, 1),
        "groups": len(lossless),
        "units": units,
        "weights_bytes": 2 * params,
        "adamw_bytes": 8 * params,
        "saliency_bytes": 4 * sum(units.values()),
        "moments_bytes": moments,
        "largest_tensor_bytes": max(2 * each.numel() for each in model.parameters()),
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for kind in options.models:
        rows.append(measured(kind))
        print(rows[-1], flush=True)
    keep({"rows": rows}, options.out)


if __name__ == "__main__":
    main()
