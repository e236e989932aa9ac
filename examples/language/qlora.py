"""LoRA on a base that is cut in 16 bit and quantized to 4 bit afterwards; the adapters go on.

pip install setpoint peft transformers bitsandbytes
python examples/language/qlora.py MODEL_FOLDER [optimizer steps]

A base in 4 bit holds codes and no numbers to cut, so that `attach` refuses it.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import setpoint

folder, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 200
text = "".join(file.read_text(encoding="utf-8") for file in Path(torch.__file__).parent.glob("nn/modules/*.py"))
tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text[:400_000], verbose=False)["input_ids"])


def train(model: torch.nn.Module, budget: str | None) -> float:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-3)
    loop = setpoint.attach(model, optimizer, budget, total_steps=steps, even=True, teacher=True) if budget else None
    for _ in range(steps):
        batch = torch.stack([tokens[start : start + 128] for start in torch.randint(len(tokens) - 128, (4,))])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if loop is not None:
        print(loop.finish())
    return loss.item()


torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
adapted = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
adapted.gradient_checkpointing_enable()
adapted.enable_input_require_grads()
print("loss of the cut model in 16 bit", train(adapted, "70% params"))
adapted.save_pretrained("adapters")
adapted.unload().save_pretrained("cut")
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
small = AutoModelForCausalLM.from_pretrained("cut", quantization_config=four_bit)
model = PeftModel.from_pretrained(small, "adapters", is_trainable=True)
print("and on the base in 4 bit", train(model, None))
