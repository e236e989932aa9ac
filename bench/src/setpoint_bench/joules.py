"""Joules: what the energy counters add up to while training runs, and nothing of what runs in between."""

from __future__ import annotations

from typing import final

from setpoint.resources.joules import EnergyMeter


@final
class Joules:
    """A stopwatch of energy: `with` blocks add up.

    Other work of the machine in these blocks is in it.

    Args:
        meter: a working meter, or None.
    """

    def __init__(self, meter: EnergyMeter | None) -> None:
        self._meter = meter
        self._began: float | None = None
        self.energy_j: float | None = None if meter is None else 0.0
        """Joules so far; None without a meter, or once it has vanished."""

    def __enter__(self) -> Joules:
        self._began = None if self._meter is None else self._meter.read_j()
        return self

    def __exit__(self, *exception: object) -> None:
        now = None if self._meter is None else self._meter.read_j()
        if self.energy_j is None or self._began is None or now is None:
            self.energy_j = None
        else:
            self.energy_j += now - self._began
