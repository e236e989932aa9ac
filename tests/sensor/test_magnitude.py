"""The magnitude sensor."""

import numpy as np
import torch
from torch import nn

from setpoint.groups.follow import Change, follow
from setpoint.groups.group import Group, Slice
from setpoint.sensor.magnitude import MagnitudeSensor


def test_is_the_norm_of_all_incoming_weights() -> None:
    """Saliency is the L2 norm over every incoming weight of the unit, in each tensor that writes it."""
    model = nn.ModuleDict({"gate": nn.Linear(4, 6), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
    index = np.arange(6)
    group = Group(
        "ff",
        "unit",
        6,
        (
            Slice("gate.weight", 0, "produce", index),
            Slice("up.weight", 0, "produce", index),
            Slice("down.weight", 1, "consume", index),
        ),
    )
    sensor = MagnitudeSensor()
    reading = sensor.read(sensor.init((group,), model), (group,), 3)
    want = torch.cat([model["gate"].weight, model["up"].weight], 1).norm(dim=1)
    np.testing.assert_allclose(reading.saliency["ff"], want.detach().numpy(), rtol=1e-6)
    assert (reading.step, reading.calibrated) == (3, False)


def test_fixed_filters_are_judged_by_who_reads_them() -> None:
    """Units that only a buffer writes are ranked by the trained weights that read them; trained writers come first."""
    model = nn.ModuleDict({"fixed": nn.Module(), "trained": nn.Linear(2, 3), "reads": nn.Linear(3, 4)})
    model["fixed"].register_buffer("filters", torch.ones(3, 5))
    index = np.arange(3)
    fixed, reads = Slice("fixed.filters", 0, "produce", index), Slice("reads.weight", 1, "consume", index)
    sensor = MagnitudeSensor()
    for places, want in (
        ((fixed, reads), model["reads"].weight.norm(dim=0)),
        ((fixed, Slice("trained.weight", 0, "produce", index), reads), model["trained"].weight.norm(dim=1)),
    ):
        group = Group("patches", "unit", 3, places)
        assert sensor.readable((group,), model) == (group,)
        reading = sensor.read(sensor.init((group,), model), (group,), 1)
        np.testing.assert_allclose(reading.saliency["patches"], want.detach().numpy(), rtol=1e-6)
    assert not sensor.readable((Group("patches", "unit", 3, (fixed,)),), model)


def test_reads_the_weights_of_now() -> None:
    """A reading follows the live weights, also after they were cut."""
    model = nn.Linear(2, 3)
    sensor = MagnitudeSensor()
    group = Group("u", "unit", 3, (Slice("weight", 0, "produce", np.arange(3)),))
    state = sensor.update(sensor.init((group,), model), (group,), model)
    with torch.no_grad():
        model.weight.set_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    state = follow(state, Change(keep={"u": np.array([True, True, False])}))
    small = Group("u", "unit", 2, (Slice("weight", 0, "produce", np.arange(2)),))
    reading = sensor.read(state, (small,), 1)
    assert reading.saliency["u"].tolist() == [5.0, 1.0]
    assert reading.num_steps == 1
