"""A cut Llama as a GGUF file for llama.cpp, also where each layer has widths of its own.

pip install gguf transformers
python examples/language/write_gguf.py CUT_FOLDER DENSE.gguf CUT.gguf [Q8_0|F16|F32]

Metadata and tokenizer are those of the dense model's file. One width for all layers stays a "llama"; llama.cpp reads
widths by layer under the name "deci". Blocks of Q8_0 and Q4_1 have 32 weights: attach with `grid=32`.
"""

import sys
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def rotary(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of queries and keys in llama.cpp's order: both numbers of a rotated pair side by side."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(model: nn.Module, dense: str, file: str, kind: str = "Q8_0") -> None:
    """Write the model of transformers, whose dense self the file `dense` is of."""
    network: Any = model
    layers, head_dim = network.model.layers, network.config.head_dim
    widths = {
        "attention.head_count": [layer.self_attn.q_proj.out_features // head_dim for layer in layers],
        "attention.head_count_kv": [layer.self_attn.k_proj.out_features // head_dim for layer in layers],
        "feed_forward_length": [layer.mlp.down_proj.in_features for layer in layers],
    }
    even = all(len(set(each)) == 1 for each in widths.values())
    architecture = "llama" if even else "deci"
    writer, read = gguf.GGUFWriter(file, architecture), gguf.GGUFReader(dense)
    changed = {"general.architecture", "general.file_type", "llama.block_count"} | {f"llama.{name}" for name in widths}
    for field in read.fields.values():
        if field.name not in changed and not field.name.startswith("GGUF."):
            name = field.name.replace("llama.", f"{architecture}.")
            value_type, *inner = field.types
            writer.add_key_value(name, field.contents(), value_type, inner[-1] if inner else None)
    for name, each in widths.items():
        whole = gguf.GGUFValueType.UINT32
        if even:
            writer.add_key_value(f"{architecture}.{name}", each[0], whole)
        else:
            writer.add_key_value(f"{architecture}.{name}", each, gguf.GGUFValueType.ARRAY, whole)
    for name in ("key_length", "value_length"):  # else llama.cpp divides the embedding width by the number of heads
        writer.add_uint32(f"{architecture}.attention.{name}", head_dim)
    writer.add_block_count(len(layers))
    kept = gguf.GGMLQuantizationType[kind]

    def add(name: str, weight: Tensor) -> None:
        data = weight.detach().float().numpy()
        quantized = gguf.quantize(np.ascontiguousarray(data), kept if data.ndim > 1 else gguf.GGMLQuantizationType.F32)
        writer.add_tensor(f"{name}.weight", quantized, raw_dtype=kept if data.ndim > 1 else None)

    add("token_embd", network.model.embed_tokens.weight)
    add("output_norm", network.model.norm.weight)
    if network.lm_head.weight is not network.model.embed_tokens.weight:
        add("output", network.lm_head.weight)
    for number, layer in enumerate(layers):
        for own, name in NAMES.items():
            weight = layer.get_submodule(own).weight
            add(f"blk.{number}.{name}", rotary(weight, head_dim) if name in ("attn_q", "attn_k") else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    folder, dense, file, *kind = sys.argv[1:]
    write(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), dense, file, *kind)
