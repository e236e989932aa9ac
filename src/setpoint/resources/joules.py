"""Joules: energy counters of GPUs (NVML) and processors (RAPL), added up from the moment a meter is made."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from setpoint.messages import warn

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, eq=False)
class Counter:
    """One energy counter of the hardware."""

    name: str  # what it counts, for people: "RAPL package-0"
    read_j: Callable[[], float]  # its present value in joules; raises OSError when it cannot be read
    range_j: float | None = None  # value at which it starts again from 0; None for one that does not wrap


@final
class EnergyMeter:
    """Joules spent since the meter was made, over all of its counters.

    A counter with a known range that reads less than before has wrapped. A step back by less than half of the range is
    no wrap, so read it more often than it takes for half a turn (a minute at least). A counter that runs backwards or
    cannot be read has vanished: the meter warns once, and has no reading from then on.
    """

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters, self._energy_j, self.works = tuple(counters), 0.0, True
        self._last_j = self._read()

    @property
    def source(self) -> str:
        return " + ".join(counter.name for counter in self._counters)

    def without_processors(self) -> "EnergyMeter":
        """The counters of GPUs alone, for a rank whose processors another rank counts; without any it reads 0 J."""
        return EnergyMeter([counter for counter in self._counters if not counter.name.startswith("RAPL")])

    def read_j(self) -> float | None:
        """Joules since the meter was made, or None once a counter has vanished."""
        before_j, self._last_j = self._last_j, self._read()
        for counter, before, now in zip(self._counters, before_j, self._last_j, strict=False):
            range_j = math.inf if counter.range_j is None else counter.range_j
            step_j = now - before if now >= before else now - before + range_j
            if now > range_j or step_j > range_j / 2 or step_j == math.inf:
                self._vanish(f"{counter.name} went from {before} to {now} J")
                break
            self._energy_j += step_j
        return self._energy_j if self.works else None

    def _read(self) -> list[float]:
        """The counters' values, none where the meter has vanished."""
        if not self.works:
            return []
        try:
            return [counter.read_j() for counter in self._counters]
        except (OSError, ValueError) as error:
            self._vanish(str(error))
            return []

    def _vanish(self, why: str) -> None:
        self.works = False
        warn(f"the energy meter has vanished, energy is not measured from here on ({why})")


def rapl_counters(root: Path = POWERCAP) -> tuple[list[Counter], str]:
    """Counters of the processor packages and their memory by RAPL (Intel and AMD), and why there are none.

    Of the parts of a package only "dram" is read, which the package does not count (Intel SDM, volume 3, "RAPL
    domains"); "core" and "uncore" are in it, and "psys" counts everything again.
    """
    found, why = [], f"no RAPL domain under {root}"
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            part = folder.name.count(":") > 1
            if name.startswith("psys") or (part and name != "dram"):
                continue
            range_j = _joules(folder / "max_energy_range_uj")
            read = partial(_joules, folder / "energy_uj")
            if not read() and part:  # a domain that the processor names and does not count
                continue
        except PermissionError as error:
            # None at all: a part of the energy would look like the whole.
            return [], f"{error.filename} may be read by root only: give this user read access to it"
        except (OSError, ValueError) as error:
            return [], f"{folder} cannot be read: {error}"
        found.append(Counter(f"RAPL dram-{folder.name.split(':')[1]}" if part else f"RAPL {name}", read, range_j))
    return found, "" if found else why


def _joules(file: Path) -> float:
    return float(file.read_text()) / 1e6


def nvml_counters(indices: Iterable[int], nvml: Any = None) -> tuple[list[Counter], str]:
    """Counters of these CUDA devices by NVML, and why there are none."""
    if nvml is None:
        try:
            import pynvml
        except ImportError:
            return [], 'nvidia-ml-py is not installed: pip install "setpoint[energy]"'
        nvml = pynvml
    try:
        nvml.nvmlInit()
        counters = []
        for index in indices:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            counters.append(Counter(f"NVML GPU {index}", partial(_nvml_joules, nvml, handle)))
    except Exception as error:  # NVML raises classes of its own
        return [], f"NVML: {error}"
    return counters, "" if counters else "no GPU is in use"


def _nvml_joules(nvml: Any, handle: Any) -> float:
    try:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except Exception as error:
        raise OSError(str(error)) from error


def find_energy_meter(devices: Iterable[torch.device], root: Path = POWERCAP) -> tuple[EnergyMeter | None, str]:
    """A meter of what these devices and the processor spend, and why there is none."""
    cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    counters, why = nvml_counters(cuda) if cuda else ([], "")
    if cuda and not counters:  # the processor alone would be a part of the energy that looks like the whole
        return None, why
    packages, why = rapl_counters(root)
    if not packages and not cuda:
        return None, why
    return EnergyMeter([*counters, *packages]), ""
