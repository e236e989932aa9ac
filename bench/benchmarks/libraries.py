"""The libraries that are compared: Setpoint and Torch-Pruning as contenders."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from contenders import Contender, Report, judge
from torch import Tensor, nn
from torch.optim import SGD

from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.groups.example import inputs_of, tensors_of
from setpoint.groups.trace import trace
from setpoint_bench.coverage import Build, halves


class Setpoint:
    """Setpoint: the lossless groups that `trace` finds, half of the units of each dropped at random."""

    def __init__(self, model: nn.Module, example: Any, ignored: list[nn.Module]) -> None:
        del ignored  # it finds out which widths an output fixes
        found = trace(model, example)
        self.model, self.groups = model, tuple(group for group in found.groups if group.lossless)
        if not self.groups:
            raise ValueError("no group found; " + "; ".join(f"{f.place}: {f.reason}" for f in found.frozen[:3]))

    def to_freeze(self) -> nn.Parameter | None:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return named.get(self.groups[-1].slices[0].tensor)

    def cut(self, optimizer: SGD) -> None:
        shrink(self.model, optimizer, self.groups, halves(self.groups))

    def mask(self, twin: nn.Module) -> None:
        mask(twin, None, self.groups, halves(self.groups))


# What examples/ of Torch-Pruning reads off a model by hand, by the names that libraries give to it.
_FUSED = ("qkv", "qkv_proj")
_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"))
_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")
_WIDTHS = ("all_head_size", "attn_dim", "hidden_size", "embed_dim", "inner_dim")


@dataclass(frozen=True, eq=False)
class _Attention:
    """An attention module, the layers that make its queries, keys and values, and its heads."""

    module: nn.Module
    layers: tuple[nn.Module, ...]
    heads: int
    key_value_heads: int

    @property
    def width(self) -> int:
        """All heads together."""
        query: Any = self.layers[0]
        width = query.out_features if isinstance(query, nn.Linear) else query.out_channels
        return int(width) // (3 if len(self.layers) == 1 else 1)


def attentions(model: nn.Module) -> list[_Attention]:
    """Modules with a number of heads (their own, or their config's) and layers of a usual name for qkv or q, k, v."""
    found = []
    for module in model.modules():
        heads = _number(module, _HEADS)
        for names in (*((name,) for name in _FUSED), *_SEPARATE):
            layers = tuple(getattr(module, name, None) for name in names)
            if heads and all(isinstance(layer, (nn.Linear, nn.Conv2d)) for layer in layers):
                found.append(_Attention(module, layers, heads, _number(module, _KEY_VALUE_HEADS) or heads))
                break
    return found


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            if type(value := getattr(holder, name, None)) is int:
                return value
    return None


class TorchPruning:
    """Torch-Pruning: `BasePruner`, ratio 0.5, group magnitude, told what its documentation asks the user for.

    That is: output layers to ignore; `num_heads` of every attention whose layers have usual names;
    `out_channel_groups` of `gate_up_proj`; `round_to` for torch's own attention; attention written out, not fused;
    and, after the cut, sizes that attention modules keep in attributes, as its examples set them.
    """

    def __init__(self, model: nn.Module, example: Any, ignored: list[nn.Module], *, whole_heads: bool = False) -> None:
        import torch_pruning

        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")
        self.model, self.attentions = model, attentions(model)
        modes = {module: module.training for module in model.modules()}
        torch_heads = [m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
        num_heads = {}
        for each in self.attentions:
            counts = (each.heads, each.key_value_heads, each.key_value_heads)
            num_heads.update(zip(each.layers, counts, strict=False))
        doubled = [getattr(m, "gate_up_proj", None) for m in model.modules()]

        def forward(model: nn.Module, example: Any) -> Any:
            for module, training in modes.items():  # the library traces in eval mode: heads of training would be missed
                module.training = training
            args, kwargs = inputs_of(example)
            return model(*args, **kwargs)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pruner = torch_pruning.pruner.BasePruner(
                model,
                example,
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=0.5,
                ignored_layers=ignored,
                num_heads=num_heads,
                prune_num_heads=whole_heads,
                prune_head_dims=not whole_heads,
                head_pruning_ratio=0.5 if whole_heads else 0.0,
                round_to=max(torch_heads, default=None),
                in_channel_groups={},
                out_channel_groups={layer: 2 for layer in doubled if isinstance(layer, nn.Linear)},
                forward_fn=forward,
                output_transform=lambda output: [each for each in tensors_of(output) if each.requires_grad],
            )
        self.cuts = self.pruner.step(interactive=True)
        self.first = None
        self.kept: dict[str, Tensor] = {}

    def to_freeze(self) -> nn.Parameter | None:
        self.first = next(self.cuts, None)
        return None if self.first is None else next(self.first[0].dep.target.module.parameters(), None)

    def cut(self, optimizer: SGD) -> None:
        """Cut group by group. The library cuts `grad` along: numbers of the entries in it tell which of them stayed."""
        for p in self.model.parameters():
            p.grad = torch.arange(p.numel(), dtype=torch.int32).view(torch.float32).view(p.shape)
        before = [each.width for each in self.attentions]
        if self.first is not None:
            self.first.prune()
        for group in self.cuts:
            group.prune()
        for each, width in zip(self.attentions, before, strict=True):
            self._update(each, width)
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if p.grad is not None:
                self.kept[name] = p.grad.contiguous().view(torch.int32).flatten().long()
        self.model.zero_grad(set_to_none=True)

    def _update(self, attention: _Attention, width: int) -> None:
        """Sizes that the module keeps in attributes, if they were those of its heads."""
        module, heads = attention.module, self.pruner.num_heads[attention.layers[0]]
        for name in _HEADS:
            if type(getattr(module, name, None)) is int:
                setattr(module, name, heads)
        values = {**dict.fromkeys(_HEAD_WIDTHS, (width // attention.heads, attention.width // max(heads, 1)))}
        values |= dict.fromkeys(_WIDTHS, (width, attention.width))
        values["num_key_value_groups"] = (
            attention.heads // attention.key_value_heads,
            heads // attention.key_value_heads,
        )
        for name, (old, new) in values.items():
            if type(getattr(module, name, None)) is int and getattr(module, name) == old:
                setattr(module, name, new)

    def mask(self, twin: nn.Module) -> None:
        for name, p in twin.named_parameters(remove_duplicate=False):
            if name not in self.kept:
                raise ValueError(f"which entries of {name} were removed is not known")
            gone = torch.ones(p.numel(), dtype=torch.bool)
            gone[self.kept[name]] = False
            with torch.no_grad():
                p.masked_fill_(gone.view(p.shape), 0)


LIBRARIES: Mapping[str, tuple[Callable[..., Contender], ...]] = {
    "setpoint": (Setpoint,),
    "torch_pruning": (TorchPruning, partial(TorchPruning, whole_heads=True)),
}
"""By library, its settings: the first with which a model passes counts.

Heads become narrower, as in Torch-Pruning's examples for timm, ViT and Swin, or go whole, as in those for BERT.
"""


def best(library: str, build: Build, report: Report = lambda outcome: None) -> dict[str, Any]:
    """The outcome with the first of a library's settings that passes; with none, that of the first."""
    outcomes = []
    for setting in LIBRARIES[library]:
        outcomes.append(judge(setting, build, report))
        if outcomes[-1]["passed"]:
            return outcomes[-1]
    return outcomes[0]
