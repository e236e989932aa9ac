"""Eight bits for a cut model in OpenVINO: NNCF quantizes it, with activations calibrated on a few batches.

pip install openvino nncf
python examples/int8/with_nncf.py
"""

import nncf
import openvino
from cut_model import accuracy, batches, example, model

fp32 = openvino.convert_model(model, example_input=example)
calibration = nncf.Dataset([x.numpy() for x, _ in batches(8)])
quantized = nncf.quantize(fp32, calibration, subset_size=8)
openvino.save_model(fp32, "cut.xml", compress_to_fp16=False)
openvino.save_model(quantized, "int8.xml")
compiled = openvino.compile_model("int8.xml", "CPU", {"INFERENCE_NUM_THREADS": 1})
int8 = accuracy(lambda images: compiled(images.numpy())[0])
print(f"accuracy: fp32 {accuracy(model):.3f}, int8 {int8:.3f}")
