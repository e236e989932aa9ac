"""ONNX files, and ONNX Runtime, which runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import BudgetError, RuntimeUnavailable
from setpoint.groups.example import Example
from setpoint.runtimes.files import ByTensor, Session, Traceable, check_settings, loaded, needs
from setpoint.runtimes.runtime import Forward, thread_seconds, wall_seconds

_PACKAGES = "onnx onnxruntime onnxscript"
_CPU = "CPUExecutionProvider"
_ONE_FILE = 1 << 30  # bytes; an ONNX file has two GiB at most, and further ones beside it


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime, with a file of static shapes.

    With `int8`, the weights are integers, one scale a channel, and multiplications are of integers. What is mostly
    convolutions is quantised statically (QDQ, unsigned activations whose ranges are those on the example), what is
    mostly matrix products dynamically: so ONNX Runtime recommends it for convolutional nets and for transformers.

    Args:
        threads: that one forward may use; with one, seconds are those of the thread, which does all the work.
        providers: execution providers, the first ones preferred; by default the processor.
        int8: quantise the model first.
    """

    threads: int = 1
    providers: Sequence[Any] | None = None
    int8: bool = False
    name = "onnxruntime"
    suffix = ".onnx"

    def __post_init__(self) -> None:
        check_settings(self.threads, self.int8)
        if self.providers is not None and not (isinstance(self.providers, (list, tuple)) and self.providers):
            raise BudgetError(f"providers is a list of names, such as [{_CPU!r}], or None, got {self.providers!r}")

    def load(self, model: nn.Module, example: Example) -> Forward:
        return loaded(self, model, example)

    def write(self, model: ByTensor, file: Path) -> None:
        write_onnx(model, file)
        if self.int8:
            _quantise(file, model)

    def open(self, file: Path) -> Session:
        with needs(self.name, _PACKAGES):
            import onnxruntime
        asked = [_CPU] if self.providers is None else list(self.providers)
        names = {provider if isinstance(provider, str) else provider[0] for provider in asked}
        there = onnxruntime.get_available_providers()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = None if names - set(there) else onnxruntime.InferenceSession(file, options, providers=asked)
        # ONNX Runtime goes on without a provider that does not start.
        if session is None or names - set(session.get_providers()):
            raise RuntimeUnavailable(
                f"providers={asked!r} are not all available in this onnxruntime, which has {', '.join(there)}: choose "
                "one of these, or install the onnxruntime that has yours"
            )

        def bind(inputs: Mapping[str, Tensor]) -> Callable[[], Sequence[Any]]:
            arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
            return lambda: session.run(None, arrays)

        return Session({each.name: each.shape for each in session.get_inputs()}, bind)

    def clock(self, run: Callable[[], Any]) -> float:
        alone = self.threads == 1 and self.providers in (None, [_CPU])
        return thread_seconds(run) if alone else wall_seconds(run)


def write_onnx(model: ByTensor, file: Path) -> None:
    """Write an ONNX file with the shapes of the example."""
    with needs("ONNX", _PACKAGES):
        import onnx
    tensors, names = tuple(model.inputs.values()), list(model.inputs)
    # Both exporters write what runs equally fast; the one that traces takes a tenth of the time (.4 s for a
    # MobileNetV2), and the one of torch.export takes some models that the other does not, or not rightly.
    try:
        with _without_its_log(), Traceable():
            torch.onnx.export(model, tensors, file, dynamo=False, input_names=names)
        onnx.checker.check_model(file, full_check=True)
    except Exception:  # noqa: BLE001 - exporters raise anything
        with needs("ONNX", _PACKAGES):
            import onnxscript  # noqa: F401
        large = sum(tensor.nbytes for tensor in model.state_dict().values()) > _ONE_FILE
        torch.onnx.export(model, tensors, file, dynamo=True, input_names=names, verbose=False, external_data=large)


@contextmanager
def _without_its_log() -> Iterator[None]:
    """Inside, the exporter that traces does not print the graph of a model that it does not take, as torch 2.13 does.

    The log goes to C++ streams: no setting turns it off, and `redirect_stdout` does not reach them.
    """
    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log


def _quantise(file: Path, model: ByTensor) -> None:
    import onnx

    with needs("onnxruntime with int8=True", _PACKAGES):
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
        feeds = iter([{name: tensor.numpy() for name, tensor in model.inputs.items()}])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        # Folded norms first: else each of them is quantised by itself, and the file is slower than that of floats.
        folded = Path(folder) / file.name
        quant_pre_process(file, folded, skip_symbolic_shape=True)
        kinds = [node.op_type for node in onnx.load(folded, load_external_data=False).graph.node]
        products = ("MatMul", "Gemm")
        weights = {"per_channel": True, "weight_type": quantization.QuantType.QInt8}
        if sum(kind in products for kind in kinds) > kinds.count("Conv"):
            quantization.quantize_dynamic(folded, file, op_types_to_quantize=list(products), **weights)
        else:
            quantization.quantize_static(
                folded, file, Calibration(), activation_type=quantization.QuantType.QUInt8, **weights
            )
