"""What eight bits give a dense model and a cut one: accuracy on the test set and milliseconds in ONNX Runtime.

    python bench/benchmarks/int8.py --models runs/int8 --out results/int8.json

The dense model of a task, and the one that Setpoint cuts to half of the FLOPs, are trained by the task's recipe. The
last fifth of the cut one's steps is done twice from the same state: as before, and with weights and activations rounded
by torchao. Static quantization (QDQ, a scale for each output channel) is calibrated on training batches; a model
without convolutions is quantized dynamically, too. All files of a task are timed at batch 1 on one thread, forward by
forward in turns. Trained models stay in a folder; those that are there are not trained again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from record import held_in, write
from torch import Tensor, nn

import setpoint
from setpoint.runtimes.files import ByTensor, opened
from setpoint.runtimes.onnx import OnnxRuntime, write_onnx
from setpoint.runtimes.runtime import in_turns, ratios
from setpoint_bench.catalogue import task_named
from setpoint_bench.counter import step_flops
from setpoint_bench.environment import machine, package_version
from setpoint_bench.method import method_named
from setpoint_bench.simple_task import SimpleTask, dense_widths

TASKS = ("resnet56", "clothing", "banking77")
METHODS = {"dense": "dense", "cut": "setpoint-at-once"}
BUDGET, SEED = 0.5, 0
LAST = 0.2
"""Share of the steps that are done twice."""
CALIBRATION = 256
"""Training examples."""


def train(task: SimpleTask, kind: str, folder: Path) -> None:
    """Train the dense model, or the cut one in both ways, and keep what comes out."""
    torch.manual_seed(SEED)
    model, batches, last = task.build(dense_widths(task)), task.batches(SEED), round(LAST * task.steps)
    optimizer, pruner = method_named(METHODS[kind]).begin(task.with_steps(task.steps - last), model, BUDGET, batches)
    schedule = task.schedule(optimizer)

    def steps(count: int, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        for number in range(1, count + 1):
            loss = loss_of(*next(batches))
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if number % 25 == 0 or number == count:
                print(f"{task.name}, {kind}: step {number} of {count}, loss {loss.item():.3f}", flush=True)

    steps(task.steps - last, partial(task.loss, model))
    if pruner is not None:
        print(f"{task.name}: the budget was {'' if pruner.finish().budget_met else 'not '}met")
    parts = (model, optimizer, schedule)
    states = copy.deepcopy([part.state_dict() for part in parts])
    batches = task.batches(SEED + 1)
    steps(last, partial(task.loss, model))
    setpoint.save(model, folder / f"{kind}.safetensors")
    if pruner is None:
        return
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    batches = task.batches(SEED + 1)
    rounding, criterion = rounded(model.train(), task.example()), task.training_criterion or task.criterion
    steps(last, lambda inputs, targets: criterion(rounding(inputs), targets))
    setpoint.save(model, folder / "aware.safetensors")


def rounded(model: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """A graph of the model's own parameters that rounds to eight bits what it multiplies."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    sizes = ({0: torch.export.Dim.AUTO},)
    made: nn.Module = prepare_qat_pt2e(torch.export.export(model, example, dynamic_shapes=sizes).module(), quantizer)
    return made


class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Inputs of training batches, row by row."""

    def __init__(self, task: SimpleTask, name: str) -> None:
        batches = task.batches(SEED + 2)
        rows = itertools.chain.from_iterable(next(batches)[0].split(1) for _ in itertools.count())
        self.feeds = ({name: row.numpy()} for row in itertools.islice(rows, CALIBRATION))

    def get_next(self) -> Any:
        return next(self.feeds, None)


def files_of(model: nn.Module, task: SimpleTask, file: Path) -> dict[str, Path]:
    """Files of a model at batch 1: of floats, and of eight bits in each way that suits its layers."""
    served = ByTensor(model, (task.example()[0][:1],))
    files = {way: file.with_suffix(f".{way}.onnx") for way in ("fp32", "folded", "static")}
    write_onnx(served, files["fp32"])
    folded = files.pop("folded")
    quant_pre_process(files["fp32"], folded, skip_symbolic_shape=True)
    options: dict[str, Any] = {"per_channel": True, "weight_type": quantization.QuantType.QInt8}
    if not any(isinstance(layer, nn.Conv2d) for layer in model.modules()):
        files["dynamic"] = file.with_suffix(".dynamic.onnx")
        # Only what is multiplied by weights: what lies between loses accuracy, and gains hardly any time.
        options |= {"op_types_to_quantize": ["MatMul", "Gemm"], "extra_options": {"MatMulConstBOnly": True}}
        quantization.quantize_dynamic(folded, files["dynamic"], **options)
    # Signed activations would leave some convolutions to floats.
    options["activation_type"] = quantization.QuantType.QUInt8
    quantization.quantize_static(folded, files["static"], Calibration(task, *served.inputs), **options)
    return files


def accuracy(file: Path, task: SimpleTask) -> float:
    inputs, targets = task.data.split("test")
    session = OnnxRuntime().open(file)
    scores = [session.bind(dict.fromkeys(session.shapes, row))()[0] for row in inputs.split(1)]
    return float(np.mean(np.concatenate(scores).argmax(-1) == targets.numpy()))


def measure(task: SimpleTask, folder: Path) -> list[dict[str, Any]]:
    """A row for each file of each model."""
    rows, forwards = [], []
    one = {"x": task.data.split("test")[0][:1]}
    for kind in ("dense", "cut", "aware"):
        model = setpoint.load(folder / f"{kind}.safetensors", into=task.build(dense_widths(task)))
        flops = step_flops(model, task.example())
        for way, file in files_of(model, task, folder / kind).items():
            forwards.append(opened(OnnxRuntime(), file, one))
            found = {"flops": flops, "bytes": file.stat().st_size, "accuracy": accuracy(file, task)}
            rows.append({"model": kind, "way": way, **found})
            print(f"{task.name}, {kind}, {way}: accuracy {found['accuracy']:.2%}", flush=True)
    read = in_turns(forwards)
    for row, seconds in zip(rows, read, strict=True):
        row["seconds_quartiles"] = quartiles(seconds)
        row["of_dense_quartiles"] = quartiles(ratios(seconds, read[0]))
    return rows


def quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def has_vnni() -> bool:
    """Whether the processor multiplies and adds eight bits in one instruction, as Linux tells."""
    information = Path("/proc/cpuinfo")
    return information.exists() and "_vnni" in information.read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/int8"), help="folder of trained models")
    parser.add_argument("--out", type=Path, default=Path("results/int8.json"))
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="these tasks alone; the rest of the record stays")
    parser.add_argument("--steps", type=int, help="of each training; by default the task's own")
    parser.add_argument("--data", type=Path, help="folder that holds the data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.tasks:
        task = task_named(name, steps=arguments.steps, data=arguments.data)
        folder = arguments.models / f"{name}-{task.steps}"
        folder.mkdir(parents=True, exist_ok=True)
        for kind, last in (("dense", "dense"), ("cut", "aware")):
            if not (folder / f"{last}.safetensors").exists():
                train(task, kind, folder)
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": {**machine(), "threads": torch.get_num_threads(), "vnni": has_vnni()}
            | {package: package_version(package) for package in ("onnxruntime", "torchao")},
            "steps": task.steps,
            "seed": SEED,
            "budget": BUDGET,
            "last": LAST,
            "rows": measure(task, folder),
        }
        held = held_in(arguments.out)
        write({"tasks": {**held.get("tasks", {}), name: found}}, arguments.out)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
