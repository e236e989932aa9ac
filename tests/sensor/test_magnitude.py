"""The magnitude sensor."""

import numpy as np
import torch
from torch import nn

from actuator.hand_made import group
from setpoint.groups.follow import Change, follow
from setpoint.sensor.magnitude import MagnitudeSensor

SENSOR = MagnitudeSensor()


def test_is_the_norm_of_all_incoming_weights() -> None:
    """Saliency is the L2 norm over every incoming weight of the unit, in each tensor that writes it."""
    model = nn.ModuleDict({"gate": nn.Linear(4, 6), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
    groups = (group("ff", 6, "gate.weight:0:produce up.weight:0:produce down.weight:1:consume"),)
    reading = SENSOR.read(SENSOR.init(groups, model), groups, 3)
    want = torch.cat([model["gate"].weight, model["up"].weight], 1).norm(dim=1)
    np.testing.assert_allclose(reading.saliency["ff"], want.detach().numpy(), rtol=1e-6)
    assert (reading.step, reading.calibrated) == (3, False)


def test_fixed_filters_are_judged_by_who_reads_them() -> None:
    """Units that only a buffer writes are ranked by the trained weights that read them; trained writers come first."""
    model = nn.ModuleDict({"fixed": nn.Module(), "trained": nn.Linear(2, 3), "reads": nn.Linear(3, 4)})
    model["fixed"].register_buffer("filters", torch.ones(3, 5))
    fixed, reads, trained = "fixed.filters:0:produce", "reads.weight:1:consume", "trained.weight:0:produce"
    for places, want in (
        (f"{fixed} {reads}", model["reads"].weight.norm(dim=0)),
        (f"{fixed} {trained} {reads}", model["trained"].weight.norm(dim=1)),
    ):
        groups = (group("patches", 3, places),)
        assert SENSOR.readable(groups, model) == groups
        reading = SENSOR.read(SENSOR.init(groups, model), groups, 1)
        np.testing.assert_allclose(reading.saliency["patches"], want.detach().numpy(), rtol=1e-6)
    assert not SENSOR.readable((group("patches", 3, fixed),), model)


def test_reads_the_weights_of_now() -> None:
    """A reading follows the live weights, also after they were cut."""
    model, (whole, small) = nn.Linear(2, 3), (group("u", num_units, "weight:0:produce") for num_units in (3, 2))
    state = SENSOR.update(SENSOR.init((whole,), model), (whole,), model)
    with torch.no_grad():
        model.weight.set_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    reading = SENSOR.read(follow(state, Change(keep={"u": np.array([True, True, False])})), (small,), 1)
    assert reading.saliency["u"].tolist() == [5.0, 1.0] and reading.num_steps == 1
