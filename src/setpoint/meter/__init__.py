"""The meters: what the hardware really spent. A missing sensor is a missing reading, never a guess."""

from setpoint.meter.energy import EnergyMeter, idle_watts
from setpoint.meter.memory import LiveBytes, peak_bytes, resident_bytes
from setpoint.meter.seconds import Measured, StepMeter, Stopwatch

__all__ = [
    "EnergyMeter",
    "LiveBytes",
    "Measured",
    "StepMeter",
    "Stopwatch",
    "idle_watts",
    "peak_bytes",
    "resident_bytes",
]
