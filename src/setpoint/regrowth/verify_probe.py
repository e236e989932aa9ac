"""Verify a probe: is a step with resting units present the shrunk model's own step? Tried on copies."""

from __future__ import annotations

from typing import Any

from torch import nn

from setpoint.actuator.shrink import shrink
from setpoint.actuator.verify import Trial, on_few_rows
from setpoint.errors import LoopError, VerificationError
from setpoint.groups.example import Example
from setpoint.groups.group import Group
from setpoint.groups.model_copy import copy_of
from setpoint.host.host import Host
from setpoint.regrowth.probing import Probing
from setpoint.regrowth.reserve import Reserve
from setpoint.sensor.reading import Sensor


def check_regrowth(
    host: Host, example: Example, groups: tuple[Group, ...], sensor: Sensor[Any], *, verify: bool
) -> float:
    """Check that units can be probed and come back in this model; the passes that took.

    Raises:
        LoopError: when they cannot.
        VerificationError: when a probed step on a copy is not the shrunk model's step.
    """
    instead = "attach with PricedController(regrow=False)"
    if not sensor.traits.returns:
        raise LoopError(
            f"{type(sensor).__name__} reads no units that have come back (its traits say returns=False): {instead}"
        )
    if host.compiled:
        raise LoopError(
            f"resting units cannot be present in compiled code: attach to the model uncompiled, or {instead}"
        )
    if not verify:
        return 0.0
    return 6 * on_few_rows(lambda rows: verify_probe(host.model, rows, groups), example)[1]


def verify_probe(model: nn.Module, example: Example, groups: tuple[Group, ...]) -> None:
    """Check on copies of the model that a step with resting units present is the shrunk model's own step.

    What runs parts of the forward pass again in the backward pass (activation checkpointing) fails here, since the
    units are present in the forward pass only. Groups that are not lossless are left out, as in a run.

    Raises:
        VerificationError: when the steps differ.
        ExampleError: when the model itself does not run on the example.
    """
    trial = Trial.of(model, example, groups, None)
    exact = {group.name for group in groups if group.lossless}
    keep = {name: kept for name, kept in trial.keep.items() if name in exact}
    small = copy_of(trial.model)  # in eval mode if it draws random numbers in training
    reserve = Reserve.of(small, groups).rest(small, None, keep)
    shrink(small, None, groups, keep)
    probed = copy_of(small)
    probing = Probing(probed, reserve, reserve.origins(), in_training=False)
    why: str | None
    try:
        probing.start()
        why = trial.run(small).difference(trial.run(probed), trial.tolerance)
    except Exception as error:  # a foreign forward or backward pass may raise anything
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        probing.stop()
    if why:
        raise VerificationError(
            f"with resting units present, a step of a copy was not the shrunk model's step: {why}. Activation "
            "checkpointing does this, since it runs forward passes again, and so does what norms a weight as a whole "
            "(spectral_norm); attach with PricedController(regrow=False)"
        )
