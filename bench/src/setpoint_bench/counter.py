"""The independent counter: FLOPs of one training step, counted operation by operation as it runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def step_flops(model: nn.Module, inputs: tuple[Tensor, ...] | Mapping[str, Tensor]) -> int:
    """FLOPs of the forward and backward pass of one optimizer step.

    A multiply-add counts 2. Matrix products and convolutions count, in both passes; elementwise work,
    norms and the optimizer do not. Attention counts as its plain products, masked entries included. The model
    is copied to the meta device, so nothing is computed and neither its state nor any random state moves.

    Args:
        model: must return one tensor.
        inputs: positional or keyword inputs, at the batch shape to count.

    >>> step_flops(nn.Linear(3, 5), (torch.zeros(7, 3),))  # forward 2*7*3*5; weight gradient the same
    420
    """
    twin = copy.deepcopy(model).to("meta").train()
    with FlopCounterMode(display=False, custom_mapping=_CORRECTED) as counter, sdpa_kernel(SDPBackend.MATH):
        if isinstance(inputs, Mapping):
            output = twin(**{name: value.to("meta") for name, value in inputs.items()})
        else:
            output = twin(*(value.to("meta") for value in inputs))
        torch.autograd.backward(output.sum())
    return int(counter.get_total_flops())


def _convolution_backward(
    grad_shape: Sequence[int], input_shape: Sequence[int], weight_shape: Sequence[int], *rest: Any, **_: Any
) -> int:
    """Each weight takes part once per position, whatever `groups` is, in either gradient.

    The stock formula charges the weight gradient of a grouped convolution `groups` times.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = rest
    positions = math.prod((input_shape if transposed else grad_shape)[2:])
    return int(2 * input_shape[0] * positions * math.prod(weight_shape) * sum(map(bool, output_mask[:2])))


_CORRECTED = {torch.ops.aten.convolution_backward: _convolution_backward}
