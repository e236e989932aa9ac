"""Pad: a cut transformers model as an ordinary one of its class, with exact zeros where layers differ in width."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from setpoint.actuator.cut import cut_groups, plan_cut
from setpoint.actuator.lift import lifted
from setpoint.actuator.shrink import named_tensors
from setpoint.actuator.swap import swap
from setpoint.checkpoint.given import given_module
from setpoint.checkpoint.infer import kept_of
from setpoint.configs.keys import Said, is_configured, keys, numbered
from setpoint.errors import CheckpointError, ExampleError, GroupError, VerificationError
from setpoint.groups.export import Example, inputs_of, tensors_of
from setpoint.groups.group import Group
from setpoint.groups.rng import in_eval_mode, preserved_rng_state
from setpoint.groups.trace import trace


def export_padded(model: nn.Module, example: Example | None = None) -> nn.Module:
    """A copy of a cut transformers model, padded with zeros to widths that the config of its class can say.

    Layers of one kind get the width of the widest among them. Layers whose width the config cannot say get the width
    that they were built with. The added entries are exact zeros, which change no output. `save_pretrained` of the copy
    writes a folder that any reader of such models takes, without Setpoint.

    Args:
        model: of a `PreTrainedModel` class, cut in whatever way; it is not changed.
        example: inputs of the model, as for `attach`; by default the model's own dummy inputs.

    Returns:
        A new model on the same device.

    Raises:
        CheckpointError: for a model that no config describes.
        ExampleError: where an example is needed.
        GroupError: where units are gone of which a zero is not the same as their absence.
        VerificationError: when the padded model computes something else.

    >>> import setpoint, transformers
    >>> sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> config = transformers.LlamaConfig(**sizes, intermediate_size=16, max_position_embeddings=8)
    >>> model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.arange(3, 7)[None]
    >>> neurons = [group for group in setpoint.find_groups(model, (tokens,)) if group.what == "neuron"]
    >>> keep = [np.arange(16) % 4 > 0, np.arange(16) % 2 > 0]
    >>> cut = setpoint.shrink(model, None, neurons, {group.name: stay for group, stay in zip(neurons, keep)})
    >>> padded = export_padded(model, (tokens,))
    >>> [group.num_units for group in cut], padded.config.intermediate_size
    ([12, 8], 12)
    >>> torch.allclose(padded(tokens).logits, model(tokens).logits, atol=1e-6)
    True
    """
    module = given_module("export_padded", model)
    if not is_configured(module):
        raise CheckpointError(
            f"export_padded writes a transformers model with its config, and {type(module).__name__} has none: give "
            "the PreTrainedModel itself, or save it with setpoint.save"
        )
    example = _dummy(module) if example is None else example
    with preserved_rng_state(module):
        now = {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}
        with lifted(module):
            dense = trace(module, example).groups
            left = {name: int(units.sum()) for name, units in kept_of(dense, now).items()}
            said = keys(module, [group for group in dense if left[group.name] < group.num_units])
            config = copy.deepcopy(module.config)
        target = _targets(dense, said, left, type(module).__name__)
        numbers = {key.place: key.at(target[each.names[0]]) for each in said for key in each.keys}
        made: nn.Module = type(module)(numbered(config, numbers))
        made.to(next(module.parameters()).device).train(module.training)
        wide = _first(tuple(replace(group, min_units=0) for group in dense), target)
        unmasked = {(part.tensor, part.dim) for group in dense for part in group.slices if not part.masked}
        stay = {group.name: np.arange(group.num_units) < left[group.name] for group in wide}
        _fill(made, module, plan_cut(wide, stay).dims(), unmasked)
        _check(made, module, example)
    if getattr(module, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(module.generation_config)
    return made


def _dummy(module: nn.Module) -> Example:
    """Inputs of a model by its config: pixels, or the few tokens that transformers itself tries models on."""
    config: Any = module.config
    name = getattr(module, "main_input_name", "input_ids")
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        parameter = next(module.parameters())
        pixels = torch.randn(1, getattr(config, "num_channels", 3), height, width)
        return {name: pixels.to(parameter.device, parameter.dtype)}
    if name != "input_ids" or not hasattr(module, "dummy_inputs"):
        raise ExampleError(f"{type(module).__name__} takes {name}: give export_padded an example of them")
    device = next(module.parameters()).device
    inputs: Any = module.dummy_inputs
    return {key: each.to(device) for key, each in inputs.items()}


def _first(groups: tuple[Group, ...], widths: Mapping[str, int]) -> tuple[Group, ...]:
    """The groups with so many of their units."""
    return cut_groups(groups, {group.name: np.arange(group.num_units) < widths[group.name] for group in groups})


def _targets(dense: tuple[Group, ...], said: tuple[Said, ...], left: Mapping[str, int], name: str) -> dict[str, int]:
    """By group, the width that it gets.

    Raises:
        GroupError: for one that gets wider, though a zero is not the same as an absent unit there.
    """
    target = {group.name: group.num_units for group in dense}
    for each in said:
        widest = max(1, *(left[member] for member in each.names))
        target |= dict.fromkeys(each.names, -(-widest // each.block) * each.block)
    for group in dense:
        if not group.lossless and left[group.name] < target[group.name]:
            raise GroupError(
                f"{group.name!r} of {name} has lost units, and zeros in their place would change its outputs "
                f"({'; '.join(group.notes)}): its config cannot say its width, so save it with setpoint.save"
            )
    return target


@torch.no_grad()
def _fill(
    made: nn.Module,
    source: nn.Module,
    positions: Mapping[str, Mapping[int, Int[np.ndarray, " _kept"]]],
    unmasked: set[tuple[str, int | None]],
) -> None:
    """Give every tensor the values of the source at these positions of its dims, and zeros elsewhere."""
    own, done = named_tensors(source), set[int]()
    for name, tensor in named_tensors(made).items():
        if id(tensor) in done or name not in own:
            continue
        done.add(id(tensor))
        value = own[name].detach()
        for dim, at in positions.get(name, {}).items():
            shape = list(value.shape)
            shape[dim] = tensor.shape[dim]
            # A length that weight norm divides by must not be 0; what it scales is.
            wider = value.new_full(shape, float((name, dim) in unmasked))
            value = wider.index_copy_(dim, torch.from_numpy(at).to(value.device), value)
        if value.shape != tensor.shape:
            raise VerificationError(
                f"{name!r} has shape {tuple(tensor.shape)} by the config, and {tuple(value.shape)} after padding: the "
                "model was changed otherwise than by Setpoint"
            )
        swap(tensor, value.clone(), ExitStack())
        tensor.requires_grad_(own[name].requires_grad)


@torch.no_grad()
def _check(made: nn.Module, source: nn.Module, example: Example) -> None:
    """Check that both compute the same, up to the order of sums."""
    args, kwargs = inputs_of(example)
    outputs = []
    for each in (made, source):
        with in_eval_mode(each):
            given = tensors_of(each(*args, **kwargs))
        outputs.append([tensor.float() for tensor in given if tensor.is_floating_point()])
    # Keys and values that are kept for generation have as many heads as the model.
    pairs = [(new, old) for new, old in zip(*outputs, strict=True) if new.shape == old.shape]
    loose = 100 * torch.finfo(next(source.parameters()).dtype).eps ** 0.75
    same = all((new - old).abs().max() <= loose * old.abs().max() for new, old in pairs if old.numel())
    if not pairs or not same:
        raise VerificationError(
            f"the padded {type(source).__name__} does not compute what the cut one does, so nothing was exported: "
            "report this model"
        )
