# ruff: noqa: D101 - short on purpose
"""Eight bits for a cut model in ONNX Runtime: static, per channel, with activations calibrated on a few batches.

pip install onnx onnxruntime onnxscript
python examples/int8/with_onnxruntime.py
"""

import onnxruntime
import torch
from cut_model import accuracy, batches, example, model
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Calibration(CalibrationDataReader):
    inputs = ({"x": x.numpy()} for x, _ in batches(8))

    def get_next(self):
        return next(self.inputs, None)


torch.onnx.export(model, (example,), "cut.onnx", dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
quant_pre_process("cut.onnx", "folded.onnx")
quantize_static("folded.onnx", "int8.onnx", Calibration(), per_channel=True, activation_type=QuantType.QUInt8)
session = onnxruntime.InferenceSession("int8.onnx")
int8 = accuracy(lambda images: session.run(None, {"x": images.numpy()})[0])
print(f"accuracy: fp32 {accuracy(model):.3f}, int8 {int8:.3f}")
