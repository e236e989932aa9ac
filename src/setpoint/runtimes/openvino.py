"""OpenVINO, and its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import BudgetError, RuntimeUnavailable
from setpoint.groups.example import Example
from setpoint.runtimes.files import ByTensor, Session, Traceable, check_settings, loaded, needs
from setpoint.runtimes.runtime import Forward, thread_seconds, wall_seconds

_OF_SEVERAL = {"AUTO", "BATCH", "HETERO", "MULTI"}  # devices that choose among others


@cache
def _core() -> Any:
    # One, which stays. Each gives the main thread a stack for signals where the processor has AMX; if several end in
    # another order than backwards, the stack that is left is gone, and the next Ctrl-C ends the process.
    with needs("openvino", "openvino"):
        import openvino
    return openvino.Core()


@dataclass(frozen=True)
class OpenVINO:
    """OpenVINO, with a file of static shapes, tuned for latency; floats have 32 bits.

    With `int8`, NNCF quantises weights and activations, whose ranges are those on the example; what is mostly matrix
    products is quantised as a transformer, as NNCF recommends. SmoothQuant and the correction of biases are off: they
    need more than one example, and change no seconds.

    Args:
        device: "CPU", "GPU", "NPU" and others that OpenVINO knows.
        threads: of the processor, that one forward may use; with one, seconds are those of the thread, which does all
            the work.
        int8: quantise the model first.
    """

    device: str = "CPU"
    threads: int = 1
    int8: bool = False
    name = "openvino"
    suffix = ".xml"

    def __post_init__(self) -> None:
        check_settings(self.threads, self.int8)
        if not (isinstance(self.device, str) and self.device):
            raise BudgetError(f"device is a name that OpenVINO knows, such as 'CPU', got {self.device!r}")

    def load(self, model: nn.Module, example: Example) -> Forward:
        return loaded(self, model, example)

    def write(self, model: ByTensor, file: Path) -> None:
        """Write the file, and the weights in one that ends with `.bin`."""
        with needs(self.name, "openvino"):
            import openvino
        tensors = tuple(model.inputs.values())
        # As with ONNX: traced first, which is quick, else by torch.export, which takes other models.
        try:
            with Traceable():
                traced = torch.jit.trace(model, tensors, check_trace=False)  # type: ignore[no-untyped-call]
            graph = openvino.convert_model(traced)
        except Exception:  # noqa: BLE001 - exporters raise anything
            graph = openvino.convert_model(torch.export.export(model, tensors))
        for port, (name, tensor) in zip(graph.inputs, model.inputs.items(), strict=True):
            port.get_node().set_partial_shape(openvino.PartialShape(list(tensor.shape)))
            port.get_tensor().set_names({name})
        graph.validate_nodes_and_infer_types()
        if self.int8:
            with needs("openvino with int8=True", "nncf"):
                import nncf
            kinds = [node.get_type_name() for node in graph.get_ops()]
            products = kinds.count("MatMul") > kinds.count("Convolution") + kinds.count("GroupConvolution")
            graph = nncf.quantize(
                graph,
                nncf.Dataset([{name: tensor.numpy() for name, tensor in model.inputs.items()}]),
                subset_size=1,
                model_type=nncf.ModelType.TRANSFORMER if products else None,
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    disable_bias_correction=True,
                    # A channel that is zero on the example would be scaled without a limit.
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
                ),
            )
        openvino.save_model(graph, file, compress_to_fp16=False)

    def open(self, file: Path) -> Session:
        there = {device.partition(".")[0] for device in _core().available_devices}
        if self.device.partition(":")[0].partition(".")[0] not in there | _OF_SEVERAL:
            raise RuntimeUnavailable(
                f"device={self.device!r} is not available in this OpenVINO, which has {', '.join(sorted(there))}: "
                "choose one of these, or install the driver of yours"
            )
        tuned = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        threads = {"INFERENCE_NUM_THREADS": self.threads} if self.device == "CPU" else {}
        compiled = _core().compile_model(file, self.device, {**tuned, **threads})

        def bind(inputs: Mapping[str, Tensor]) -> Callable[[], Sequence[Any]]:
            import openvino

            request = compiled.create_infer_request()
            for number, tensor in enumerate(inputs.values()):
                request.set_input_tensor(number, openvino.Tensor(tensor.numpy()))
            return lambda: list(request.infer(share_outputs=True).values())

        return Session({each.any_name: list(each.shape) for each in compiled.inputs}, bind)

    def clock(self, run: Callable[[], Any]) -> float:
        return thread_seconds(run) if (self.device, self.threads) == ("CPU", 1) else wall_seconds(run)
