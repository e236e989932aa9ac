"""ExecuTorch with XNNPACK, PyTorch's runtime for phones and boards, and its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.groups.example import Example
from setpoint.messages import counts
from setpoint.runtimes.files import ByTensor, Session, loaded, needs
from setpoint.runtimes.runtime import Forward, thread_seconds, wall_seconds


@dataclass(frozen=True)
class ExecuTorch:
    """ExecuTorch with XNNPACK, on this processor: what XNNPACK lacks, ExecuTorch's own operations do.

    An export takes long, 15 s for a MobileNetV2. A board has another processor: measure there by `Command`.

    Args:
        threads: that one forward may use; with one, seconds are those of the thread, which does all the work. All
            models of a process share the threads, which are set at each forward.
    """

    threads: int = 1
    name = "executorch"
    suffix = ".pte"
    int8 = False

    def __post_init__(self) -> None:
        counts(threads=self.threads)

    def load(self, model: nn.Module, example: Example) -> Forward:
        return loaded(self, model, example)

    def write(self, model: ByTensor, file: Path) -> None:
        with needs(self.name, "executorch"):
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        program = to_edge_transform_and_lower(
            torch.export.export(model, tuple(model.inputs.values())),
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        ).to_executorch()
        file.write_bytes(program.buffer)

    def open(self, file: Path) -> Session:
        with needs(self.name, "executorch"):
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        program = Runtime.get().load_program(file.read_bytes())
        about = program.metadata("forward")
        inputs = [about.input_tensor_meta(number) for number in range(about.num_inputs())]

        def bind(inputs: Mapping[str, Tensor]) -> Callable[[], Sequence[Any]]:
            tensors = list(inputs.values())

            def run() -> Sequence[Any]:
                if portable_lib._threadpool_get_thread_count() != self.threads:
                    portable_lib._unsafe_reset_threadpool(self.threads)
                # A method does not keep its program, and crashes without it; the program keeps the method.
                return list(program.load_method("forward").execute(tensors))

            return run

        return Session({f"input {number}": list(each.sizes()) for number, each in enumerate(inputs)}, bind)

    def clock(self, run: Callable[[], Any]) -> float:
        return thread_seconds(run) if self.threads == 1 else wall_seconds(run)
