"""What can be cut in well-known models: the cheapest model that can be reached, and what finding it takes.

    python bench/benchmarks/families.py --out results/families.json

One model of each family, of its usual size, with random weights. Seconds are the processor's on one thread for what
`attach` does with the model: finding groups, and trying each cut on a copy (not with Llama, whose weights are not
made). A small model goes first, so that imports do not count.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from record import keep

from setpoint.report.inspection import inspect_model
from setpoint_bench.zoo import named_model

MODELS = {
    "ResNet": "torchvision:resnet50",
    "MobileNet": "torchvision:mobilenet_v2",
    "EfficientNet": "timm:efficientnet_lite0",
    "ConvNeXt": "timm:convnext_tiny",
    "ViT": "timm:vit_small_patch16_224",
    "Swin": "timm:swin_tiny_patch4_window7_224",
    "BERT": "transformers:bert",
    "DistilBERT": "transformers:distilbert",
    "T5": "transformers:t5",
    "GPT-2": "transformers:gpt2",
    "Llama": "transformers:llama",
}


def looked_at(name: str) -> dict[str, Any]:
    """The dense and the cheapest cost of a model, the kinds of its units, and the seconds that finding them took."""
    model, example = named_model(name, None)
    began = time.process_time()
    found = inspect_model(name, model, example)
    seconds = time.process_time() - began
    cut = [group for group in found.groups if not group.kept_whole]
    return {
        "model": name,
        "params": found.params,
        "flops_share": found.cheapest_flops / found.flops,
        "params_share": found.cheapest_params / found.params,
        "units": sorted({group.what for group in cut}),
        "groups": len(cut),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    looked_at("torchvision:resnet18")
    keep({"families": {family: looked_at(name) for family, name in MODELS.items()}}, out)


if __name__ == "__main__":
    main()
