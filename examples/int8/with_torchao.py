# ruff: noqa: E402, F401 - short on purpose
"""Training that knows of eight bits: torchao rounds weights and activations in the last steps of a run.

pip install torchao onnx onnxruntime onnxscript
python examples/int8/with_torchao.py
"""

import torch
from cut_model import batches, model, optimizer
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
x, _ = next(batches(1))
exported = torch.export.export(model.train(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
rounding = prepare_qat_pt2e(exported, quantizer)  # its parameters are the model's own
for x, y in batches(40, seed=1):
    torch.nn.functional.cross_entropy(rounding(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
import with_onnxruntime  # the first way writes the file: the model has learnt to be rounded
