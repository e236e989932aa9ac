"""A count: the FLOPs of a forward pass by PyTorch's own counter, on a copy without data."""

from __future__ import annotations

from torch import nn

from setpoint.groups.export import Example
from setpoint.groups.rehearsal import Rehearsal


def forward_flops(model: nn.Module, example: Example) -> int | None:
    """FLOPs of `model(*example)`, attention as its two products; None if the copy does not run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        try:
            Rehearsal(model, example).run(lambda twin: counter.flop_counts.clear())
        except Exception:  # noqa: BLE001 - a foreign forward may do anything; it then goes uncounted here
            return None
    return int(counter.get_total_flops())
