"""nanoGPT: a script of its shape (its model, parameter groups, learning rate, `ckpt.pt`), with three lines added.

It shows: the lines marked `setpoint`; heads and neurons pruned; `init_from="resume"` going on from `ckpt.pt` bit for
bit; gradient accumulation, of which nothing needs to be said.

    python examples/nanogpt_like.py
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import setpoint

MAX_ITERS, ACCUMULATION, BATCH = 40, 2, 4
TEXT = (Path(__file__).read_text(encoding="utf-8") * 2).encode("ascii", "replace")


@dataclass
class GPTConfig:
    """Sizes as the code builds them."""

    block_size: int = 16
    vocab_size: int = 128
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32


class CausalSelfAttention(nn.Module):
    """Query, key and value by one layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.n_embd = config.n_head, config.n_embd

    def forward(self, x: Tensor) -> Tensor:
        """Heads next to each other."""
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.c_fc, self.c_proj = (
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.Linear(4 * config.n_embd, config.n_embd),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Both added to the stream."""
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """Tied embeddings, learned positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte, self.wpe = (
            nn.Embedding(config.vocab_size, config.n_embd),
            nn.Embedding(config.block_size, config.n_embd),
        )
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits, and the loss where there are targets."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss

    def configure_optimizers(self, weight_decay: float, learning_rate: float) -> torch.optim.AdamW:
        """Weight decay for matrices only."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def get_batch(number: int) -> tuple[Tensor, Tensor]:
    """Letters of this file, and the next ones."""
    generator, data = torch.Generator().manual_seed(number), torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).long()
    start = torch.randint(len(data) - 17, (BATCH,), generator=generator)
    x = torch.stack([data[i : i + 16] for i in start])
    return x, torch.stack([data[i + 1 : i + 17] for i in start])


def train(out_dir: Path, init_from: Path | None = None) -> tuple[GPT, setpoint.Loop]:
    """The model and its loop, which is finished; `ckpt.pt` is written ahead of each step, as `ckpt-N.pt`."""
    iter_num, model_args = 0, asdict(GPTConfig())
    checkpoint = torch.load(init_from, map_location="cpu", weights_only=True) if init_from else None
    if checkpoint:
        model_args = checkpoint["model_args"]
    model = setpoint.resumable(GPT(GPTConfig(**model_args)))  # setpoint
    if checkpoint:
        state_dict, unwanted_prefix = checkpoint["model"], "_orig_mod."
        for k in list(state_dict):
            if k.startswith(unwanted_prefix):
                state_dict[k[len(unwanted_prefix) :]] = state_dict.pop(k)
        model.load_state_dict(state_dict)
        iter_num = checkpoint["iter_num"]
    optimizer = model.configure_optimizers(0.1, 1e-2)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    loop = setpoint.attach(model, optimizer, 0.6, total_steps=MAX_ITERS, resume=True)  # setpoint
    out_dir.mkdir(parents=True, exist_ok=True)
    while iter_num < MAX_ITERS:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * iter_num / MAX_ITERS))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": model_args}
        torch.save({**state, "iter_num": iter_num}, out_dir / f"ckpt-{iter_num}.pt")
        for micro_step in range(ACCUMULATION):
            _, loss = model(*get_batch(iter_num * ACCUMULATION + micro_step))
            (loss / ACCUMULATION).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        iter_num += 1
    loop.finish()  # setpoint
    return model, loop


def main() -> None:
    """Train, and go on from a checkpoint between two cuts."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model, loop = train(Path(folder))
        assert loop.summary is not None and loop.summary.budget_met
        print(f"{loop.summary.final_flops / loop.summary.dense_flops:.3f} of the dense FLOPs")
        print("heads:", [block.attn.c_attn.out_features // 24 for block in model.h], "of 4")
        print("neurons:", [block.c_fc.out_features for block in model.h], "of 128")
        again, _ = train(Path(folder, "again"), Path(folder, "ckpt-8.pt"))
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        print("gone on from ckpt.pt: the same weights to the bit")


if __name__ == "__main__":
    main()
