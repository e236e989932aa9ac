"""Small models whose groups are written out by hand, so that the actuator is tested without the tracer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpoint.actuator.mask import mask
from setpoint.groups.group import Group, SizeBinding, Slice

Case = tuple[nn.Module, tuple[Tensor, ...], tuple[Group, ...]]


def group(name: str, num_units: int, places: str, sizes: str = "", index: np.ndarray | None = None) -> Group:
    """A group whose slices are written "tensor:dim:role ..." and whose sizes are "module:place ..."."""
    table = np.arange(num_units) if index is None else index
    slices = []
    for place in places.split():
        tensor, dim, role = place.split(":")
        slices.append(Slice(tensor, int(dim), role, table))  # type: ignore[arg-type]
    bindings = (each.split(":") for each in sizes.split())
    return Group(name, "unit", num_units, tuple(slices), tuple(SizeBinding(a, b, table) for a, b in bindings))


def batch_norm(name: str) -> str:
    """Places of a batch norm."""
    return " ".join(f"{name}.{part}:0:carry" for part in ("weight", "bias", "running_mean", "running_var"))


def mlp_model(first: int = 6, second: int = 5) -> nn.Module:
    """Two hidden layers of these widths."""
    return nn.Sequential(nn.Linear(3, first), nn.Tanh(), nn.Linear(first, second), nn.GELU(), nn.Linear(second, 2))


def mlp() -> Case:
    """Two hidden layers."""
    model = mlp_model()
    first = group("first", 6, "0.weight:0:produce 0.bias:0:carry 2.weight:1:consume", "0:out_features 2:in_features")
    second = group("second", 5, "2.weight:0:produce 2.bias:0:carry 4.weight:1:consume", "2:out_features 4:in_features")
    return model, (torch.randn(4, 3),), (first, second)


class Residual(nn.Module):
    """conv, then conv-BN-conv beside a shortcut, then a classifier."""

    def __init__(self, stream: int = 6, inner: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, stream, 3, padding=1)
        self.conv = nn.Conv2d(stream, inner, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(inner)
        self.out = nn.Conv2d(inner, stream, 1)
        self.head = nn.Linear(stream, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.out(torch.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


def residual() -> Case:
    """A residual CNN: the sum ties the stem's channels to the branch's output."""
    stream = group(
        "stream",
        6,
        "stem.weight:0:produce stem.bias:0:carry conv.weight:1:consume out.weight:0:produce out.bias:0:carry "
        "head.weight:1:consume",
        "stem:out_channels conv:in_channels out:out_channels head:in_features",
    )
    inner = group(
        "inner",
        8,
        f"conv.weight:0:produce {batch_norm('norm')} out.weight:1:consume",
        "conv:out_channels norm:num_features out:in_channels",
    )
    return Residual(), (torch.randn(3, 2, 5, 5),), (stream, inner)


def depthwise() -> Case:
    """A depthwise convolution between two pointwise ones."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.SiLU(),
        nn.Conv2d(6, 2, 1),
    )
    channels = group(
        "channels",
        6,
        f"0.weight:0:produce 0.bias:0:carry {batch_norm('1')} 3.weight:0:carry 3.bias:0:carry 5.weight:1:consume",
        "0:out_channels 1:num_features 3:in_channels 3:out_channels 3:groups 5:in_channels",
    )
    # Silu(bias) is not zero, but bias and outgoing weights of a masked channel are.
    return model, (torch.randn(3, 2, 4, 4),), (channels,)


class Concat(nn.Module):
    """Two convolutions side by side, concatenated and read by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 4, 3)
        self.right = nn.Conv2d(2, 5, 3)
        self.both = nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(F.gelu(torch.cat([self.left(x), self.right(x)], 1)))


def concat() -> Case:
    """Two groups that share the input dim of one convolution."""
    groups = []
    for name, width, start in (("left", 4, 0), ("right", 5, 4)):
        index = np.full(9, -1)
        index[start : start + width] = np.arange(width)
        own = group(name, width, f"{name}.weight:0:produce {name}.bias:0:carry", f"{name}:out_channels")
        shared = group(name, width, "both.weight:1:consume", "both:in_channels", index)
        groups.append(Group(name, "unit", width, own.slices + shared.slices, own.sizes + shared.sizes))
    return Concat(), (torch.randn(3, 2, 5, 5),), tuple(groups)


class Attention(nn.Module):
    """Self-attention with one fused projection; heads may go, their width stays."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 3
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 36)
        self.proj = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, time, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.proj(y.transpose(1, 2).reshape(batch, time, -1))


def attention() -> Case:
    """Heads: one unit lies in three places of the fused projection."""
    entries = np.repeat(np.arange(4), 3)
    fused = group("heads", 4, "qkv.weight:0:produce qkv.bias:0:carry", "qkv:out_features", np.tile(entries, 3))
    read = group("heads", 4, "proj.weight:1:consume", "proj:in_features", entries)
    count = group("heads", 4, "", ":num_heads")
    slices, sizes = fused.slices + read.slices, fused.sizes + read.sizes + count.sizes
    return Attention(), (torch.randn(2, 5, 6),), (Group("heads", "unit", 4, slices, sizes, what="head"),)


class Tied(nn.Module):
    """A token embedding whose matrix is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + torch.tanh(self.mix(x)))


def tied() -> Case:
    """Tied embeddings: one tensor is written by tokens and read by the output layer."""
    features = group(
        "features",
        6,
        "embed.weight:1:produce embed.weight:1:consume mix.weight:0:produce mix.weight:1:consume mix.bias:0:carry",
        "embed:embedding_dim mix:in_features mix:out_features head:in_features",
    )
    return Tied(), (torch.randint(0, 7, (3, 4)),), (features,)


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "residual": residual,
    "depthwise": depthwise,
    "concat": concat,
    "attention": attention,
    "tied": tied,
}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[Tensor, ...]) -> Tensor:
    """One ordinary training step; gradients stay for inspection."""
    optimizer.zero_grad()
    loss = model(*inputs).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def masked_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: tuple[Tensor, ...],
    groups: tuple[Group, ...],
    keep: dict[str, np.ndarray],
) -> Tensor:
    """One step of the masked twin: dropped entries zero before the step and in what it leaves."""
    mask(model, optimizer, groups, keep)
    optimizer.zero_grad()
    loss = model(*inputs).square().mean()
    loss.backward()
    mask(model, optimizer, groups, keep)
    optimizer.step()
    mask(model, optimizer, groups, keep)
    return loss.detach()


def kept_only(tensor: Tensor, name: str, groups: tuple[Group, ...], keep: dict[str, np.ndarray]) -> Tensor:
    """Entries of a tensor that a cut keeps, worked out by plain indexing, one entry at a time."""
    for dim in range(tensor.dim()):
        stays = [True] * tensor.shape[dim]
        for each in groups:
            for part in each.slices:
                if (part.tensor, part.dim) == (name, dim):
                    for entry, unit in enumerate(part.index):
                        stays[entry] &= unit < 0 or bool(keep.get(each.name, np.ones(each.num_units, bool))[unit])
        tensor = torch.stack([piece for piece, stay in zip(tensor.unbind(dim), stays, strict=True) if stay], dim)
    return tensor


def some_keep(groups: tuple[Group, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """Drop about a third of every group's units, at least one."""
    generator = np.random.default_rng(seed)
    keep = {}
    for each in groups:
        kept = np.ones(each.num_units, dtype=bool)
        kept[generator.permutation(each.num_units)[: max(1, each.num_units // 3)]] = False
        keep[each.name] = kept
    return keep
