"""Even: groups of a model by the width that its config says, or by their place in repeated blocks.

A table says which number of a transformers config counts the units of which layers.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from setpoint.controller.even import Kind, same_place
from setpoint.cost.cost import flops_cost, params_cost
from setpoint.errors import GroupError
from setpoint.groups.group import Group, SizeBinding, widths_of
from setpoint.groups.sizes_in_code.place import is_call, write_size
from setpoint.groups.trace import Trace
from setpoint.loop.candidates import Candidates, restricted

_NOTHING = "even=True leaves nothing to cut"
_INSTEAD = ". Attach without even=True: setpoint.save writes models of any widths"


@dataclass(frozen=True)
class Width:
    """A width that the configs of some model types say."""

    types: str  # values of `config.model_type`
    weight: str  # regular expression for the names of the weights whose units it counts
    # Names in the config, the first counts the units. Of the others each unit has the same share: query heads share the
    # key-value head that counts them.
    numbers: tuple[str, ...]
    # Whether `head_dim` has to be written, too: else the config computes it from the number of heads.
    size_of_head: bool = False


_BERTS = "bert roberta xlm-roberta camembert electra mpnet"
_LLAMAS = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 olmo cohere granite smollm3"
_VITS = "vit deit beit"
TABLE = (
    Width(_BERTS, r"intermediate\.dense", ("intermediate_size",)),
    Width("distilbert", r"ffn\.lin1", ("hidden_dim",)),
    Width("gpt2 gptj", r"mlp\.(c_fc|fc_in)", ("n_inner",)),
    Width("opt", r"layers\.\d+\.fc1", ("ffn_dim",)),
    Width(_LLAMAS, r"mlp\.(gate_proj|gate_up_proj)", ("intermediate_size",)),
    Width(_LLAMAS, r"self_attn\.(k_proj|qkv_proj)", ("num_key_value_heads", "num_attention_heads"), size_of_head=True),
    Width(_VITS, r"mlp\.fc1", ("intermediate_size",)),
    Width(_VITS, r"attention\.q_proj", ("num_attention_heads",), size_of_head=True),
    Width("t5 mt5", r"DenseReluDense\.(wi|wi_0)", ("d_ff",)),
    # T5 has a size of a head in its config, d_kv, that no number of heads changes.
    Width("t5 mt5", r"(SelfAttention|EncDecAttention)\.q", ("num_heads",)),
)
"""Checked once for each type: a model that its class builds from the cut config has the shapes of the cut."""

_MOST_HEADS = 256  # larger widths are neurons, of which no config refuses a number


@dataclass(frozen=True)
class Number:
    """One number of a config: `per_unit` times the width, plus a constant."""

    place: str
    per_unit: int
    constant: int = 0


@dataclass(frozen=True, eq=False)
class SharedWidth:
    """Groups whose common width a config says."""

    module: str  # that has the config
    names: tuple[str, ...]  # of the groups
    numbers: tuple[Number, ...]  # of the config, which a cut writes
    block: int  # widths that are multiples of it are those that the config allows

    def bound(self, group: Group) -> Group:
        """The group, of which a cut writes the numbers, and which keeps to widths that the config allows."""
        if group.name not in self.names:
            return group
        # Phi-3 slices its fused heads by numbers of the config while it runs: once a cut has written them, the code
        # gives other sizes there than it did, and a place that insists on the old size would be refused.
        sizes = tuple(
            replace(size, place=size.place.partition("=")[0]) if is_call(size.place) else size for size in group.sizes
        )
        if group.name == self.names[0]:  # one group writes the config for all
            for number in self.numbers:
                units = np.repeat(np.arange(group.num_units), number.per_unit)
                index = np.concatenate([units, np.full(number.constant, -1)])
                sizes += (SizeBinding(self.module, number.place, index),)
        block = int(np.lcm(group.multiple_of, self.block))
        fewest = -(-max(group.min_units, 1) // block) * block
        return replace(
            group,
            sizes=sizes,
            multiple_of=block,
            min_units=min(group.num_units, fewest),
            only_blocks=group.only_blocks or self.block > 1,
        )


def configured(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that a transformers config describes, by name."""
    config = model.__dict__.get("config")
    if hasattr(config, "to_dict") and hasattr(config, "model_type") and hasattr(type(model), "save_pretrained"):
        yield "", model
        return
    for name, child in model.named_children():
        for inner, module in configured(child):
            yield f"{name}.{inner}".rstrip("."), module


def shared_widths(model: nn.Module, groups: Sequence[Group]) -> tuple[SharedWidth, ...]:
    """What the configs in a model say of its groups; groups that are in none of them are not named."""
    found = []
    for name, module in configured(model):
        config: Any = module.config
        for row in TABLE:
            found += _shared(name, module, row, groups) if config.model_type in row.types.split() else []
    return tuple(found)


def _shared(name: str, module: nn.Module, row: Width, groups: Sequence[Group]) -> list[SharedWidth]:
    """The row of the table for this module; nothing if the config does not say the width of these very groups."""
    # `.base_layer`: PEFT keeps an adapted layer under this name.
    pattern = re.compile(rf"(^|\.){row.weight}(\.base_layer)?\.weight$")
    prefix = f"{name}." if name else ""
    weights = {prefix + weight for weight, _ in module.named_parameters() if pattern.search(weight)}
    members = [group for group in groups if weights & {part.tensor for part in group.slices}]
    widths = {group.num_units for group in members}
    covered = {part.tensor for group in members for part in group.slices}
    if not weights or not weights <= covered or len(widths) > 1:  # some layer is not pruned: no one number fits all
        return []
    (width,) = widths
    config: Any = module.config
    numbers = []
    for number in row.numbers:
        size = getattr(config, number, None)
        if size is None:
            numbers.append(Number(f"config.{number}={width}", 1))  # GPT-2's n_inner: None stands for the usual width
        elif size % width:
            return []
        else:
            numbers.append(Number(f"config.{number}", size // width))
    if numbers[0].per_unit != 1:
        return []
    if row.size_of_head and getattr(config, "head_dim", None) is None:
        size = config.hidden_size // config.num_attention_heads
        numbers.append(Number(f"config.head_dim={size}", 0, size))
    block = _block(config, numbers, width)
    return [] if block == width else [SharedWidth(name, tuple(g.name for g in members), tuple(numbers), block)]


def _block(config: Any, numbers: Sequence[Number], width: int) -> int:
    """The smallest divisor of the width of which the config accepts all multiples; the width if it accepts no other."""
    if width > _MOST_HEADS:
        return 1
    accepted = [_is_valid(config, numbers, fewer) for fewer in range(1, width + 1)]
    return next(size for size in range(1, width + 1) if width % size == 0 and all(accepted[size - 1 :: size]))


def _is_valid(config: Any, numbers: Sequence[Number], width: int) -> bool:
    """Whether a config with these numbers can be written and read: Llama's wants heads that divide the hidden size."""
    holder, changed = nn.Module(), copy.deepcopy(config)
    holder.config = changed
    for number in numbers:
        write_size(holder, number.place, number.constant + number.per_unit * width)
    try:
        getattr(changed, "validate", lambda: None)()
        type(config).from_dict(changed.to_dict())
    except Exception:  # noqa: BLE001 - a config may refuse a number in any way
        return False
    return True


@dataclass(frozen=True, eq=False)
class Even:
    """What may be cut evenly."""

    traced: Trace  # with groups of which a cut writes the config
    groups: tuple[Group, ...]  # those that may be cut
    kinds: tuple[Kind, ...]  # which share a width
    frozen: Mapping[str, str]  # by name, why others are not pruned

    def complete(self, found: Candidates, model: nn.Module) -> Candidates:
        """Without the kinds of which some layer is not pruned: the others would be narrower than that layer."""
        active, missing = {group.name for group in found.groups}, dict[str, str]()
        for kind in self.kinds:
            whole = [name for name in kind if name not in active]
            missing |= {
                name: f"even=True, and {whole[0]} is not pruned: {found.frozen.get(whole[0], 'not among the groups')}"
                for name in kind
                if whole and name in active
            }
        frozen = {**found.frozen, **self.frozen, **missing}
        if not missing:
            return replace(found, frozen=frozen)
        groups = tuple(group for group in found.groups if group.name not in missing)
        if not groups:
            raise GroupError(f"{_NOTHING}: {'; '.join(sorted(set(missing.values()))[:4])}{_INSTEAD}")
        # Costs are functions of the groups that may be pruned: they have to be made for those that are left.
        traced = restricted(self.traced, groups)
        return replace(
            found,
            groups=groups,
            frozen=frozen,
            costs={"flops": flops_cost(traced), "params": params_cost(model, groups)},
        )


def evened(model: nn.Module, traced: Trace, wanted: Sequence[Group] | None, *, allow_lossy: bool) -> Even:
    """The groups, out of the wanted ones, that a config has a place for, or that no config describes; by kinds."""
    chosen = {group.name for group in (traced.groups if wanted is None else wanted)}
    some = tuple(group for group in traced.groups if group.name in chosen and (group.lossless or allow_lossy))
    described, shared = dict(configured(model)), shared_widths(model, some)
    groups, placed = traced.groups, {name for width in shared for name in width.names}
    for width in shared:
        groups = tuple(map(width.bound, groups))
    frozen = {}
    for group in some:
        # A group that reaches into a described module is one whose width its config must be able to say.
        inside = next((name for name in described if any(_inside(part.tensor, name) for part in group.slices)), None)
        if inside is not None and group.name not in placed:
            config = type(described[inside].config).__name__
            frozen[group.name] = f"even=True, and {config} has no place for fewer of its {group.what}s"
    free = tuple(group for group in some if group.name not in frozen and group.name not in placed)
    if described and not shared and not free:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(frozen.items())[:4]) or "no group is lossless"
        raise GroupError(f"{_NOTHING}: {reasons}{_INSTEAD}")
    # Also those that are not lossless: why they are not pruned is said where candidates are chosen.
    left = tuple(group for group in groups if group.name in chosen and group.name not in frozen)
    kinds = (*(width.names for width in shared), *same_place(free, widths_of(free)))
    return Even(replace(traced, groups=groups), left, kinds, frozen)


def _inside(tensor: str, module: str) -> bool:
    return not module or tensor.startswith(f"{module}.")
