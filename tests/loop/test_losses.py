"""Observed losses of several ranks: what each was told becomes one history."""

from __future__ import annotations

import numpy as np
import torch

from setpoint.loop.losses import Losses


def test_ranks_share_the_losses_that_they_were_told() -> None:
    """Claim: a step's loss is the mean over the ranks that observed one, of which several count by their mean; what is
    known of coming steps stays each rank's own; what was shared is not shared again, also after a resume.
    """
    one, other = Losses(), Losses()
    for watch, losses in ((one, {1: [2.0], 2: [3.0], 4: [8.0]}), (other, {1: [4.0], 4: [1.0, 3.0], 5: [7.0]})):
        for step, values in losses.items():
            for value in values:
                watch.observe(step, torch.tensor(value), None, keep=True)
    other.observe(5, None, 0.5, keep=True)
    mean = (one.unshared(4) + other.unshared(4)) / 2
    for watch in (one, other):
        watch.share(4, mean)
    for watch, rest in ((one, []), (other, [5])):
        known = watch.state_dict()
        assert known["steps"].tolist() == [1, 2, 4, *rest]
        np.testing.assert_allclose(known["losses"][:3], [3.0, 3.0, 4.0])
        assert (watch.loss, watch.val) == (7.5, 0.5)
    again = Losses()
    again.load_state_dict(other.state_dict())
    for watch in (one, again):
        watch.observe(6, 5.0, None, keep=True)
    assert again.unshared(6)[4:].tolist() == [7.0, 5.0, 1.0, 1.0]
    mean = (one.unshared(6) + again.unshared(6)) / 2
    for watch in (one, again):
        watch.share(6, mean)
        known = watch.state_dict()
        assert known["steps"].tolist() == [1, 2, 4, 5, 6] and known["losses"][3:].tolist() == [7.0, 5.0]
