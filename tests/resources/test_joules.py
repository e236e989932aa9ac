"""Energy meters on recorded counters and on a sysfs tree made for the test."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from setpoint.resources.joules import POWERCAP, Counter, EnergyMeter, find_energy_meter, nvml_counters, rapl_counters

CPU = torch.device("cpu")


def recorded(*values: float) -> Callable[[], float]:
    """A counter's readings, one after the other; then it cannot be read."""
    left = list(values)

    def read() -> float:
        if not left:
            raise OSError("no such device")
        return left.pop(0)

    return read


def domain(root: Path, folder: str, name: str, energy_uj: int, range_uj: int = 1_000_000_000) -> Path:
    """One powercap folder."""
    made = root / folder
    made.mkdir(parents=True)
    for file, text in (("name", name), ("max_energy_range_uj", range_uj), ("energy_uj", energy_uj)):
        (made / file).write_text(f"{text}\n")
    return made


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    """Two packages and the memory beside one are summed; cores and the whole platform would count twice."""
    first = domain(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    core = domain(tmp_path, "intel-rapl:0:0", "core", 1_000_000)
    second = domain(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    dram = domain(tmp_path, "intel-rapl:1:0", "dram", 1_000_000)
    domain(tmp_path, "intel-rapl:0:1", "dram", 0)  # named by the processor, never counted
    psys = domain(tmp_path, "intel-rapl:2", "psys", 5_000_000)
    meter, why = find_energy_meter([CPU], tmp_path)
    assert meter is not None and why == "" and meter.source == "RAPL package-0 + RAPL package-1 + RAPL dram-1"
    spent = ((first, 2_500_000), (core, 2_000_000), (second, 5_500_000), (dram, 1_250_000), (psys, 9_000_000))
    for folder, more in spent:
        (folder / "energy_uj").write_text(str(more))
    assert meter.read_j() == pytest.approx(1.5 + 0.5 + 0.25)


def test_a_counter_wraps_around(tmp_path: Path) -> None:
    """A RAPL counter that starts again from 0 goes on counting: range - before + after."""
    folder = domain(tmp_path, "intel-rapl:0", "package-0", 999_000_000)
    meter, _ = find_energy_meter([CPU], tmp_path)
    assert meter is not None
    for energy_uj, spent_j in (("500000", 1.5), ("700000", 1.7)):
        (folder / "energy_uj").write_text(energy_uj)
        assert meter.read_j() == pytest.approx(spent_j)


def test_a_meter_that_vanishes_says_so_once(tmp_path: Path) -> None:
    """A counter that is gone in the middle of a run is one warning, and from then on no reading."""
    folder = domain(tmp_path, "intel-rapl:0", "package-0", 1)
    meter, _ = find_energy_meter([CPU], tmp_path)
    assert meter is not None and meter.works
    (folder / "energy_uj").unlink()
    with pytest.warns(UserWarning, match=r"vanished.*not measured from here on"):
        assert meter.read_j() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meter.read_j() is None and not meter.works


@pytest.mark.parametrize(
    ("values", "range_j"),
    [
        ((5.0, 4.0), None),  # it falls and has no range
        ((5.0, -1.0), None),
        *((values, 262_143.0) for values in ((110.0, 109.9), (100.0, 5.0), (10.0, 1e12), (10.0, 200_000.0))),
    ],
)
def test_what_no_device_could_have_spent_is_skipped(values: tuple[float, ...], range_j: float | None) -> None:
    """A small step back is no wrap, and half a turn no step: the meter vanishes and no number is made of it."""
    meter = EnergyMeter([Counter("recorded", recorded(5.0 if range_j is None else 100.0, *values), range_j)])
    with pytest.warns(UserWarning, match="vanished"):
        assert [meter.read_j() for _ in values][-1] is None
    assert meter.read_j() is None and not meter.works


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no RAPL domain under"),
        ({"intel-rapl:0": "nonsense"}, "intel-rapl:0 cannot be read"),
        ({"intel-rapl:0": "1", "intel-rapl:1": "nonsense"}, "intel-rapl:1 cannot be read"),  # a part looks like all
        ({"intel-rapl:0": None}, "may be read by root only: give this user read access"),
    ],
)
def test_counters_that_cannot_be_read_are_no_meter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str | None], words: str
) -> None:
    """No counter, garbage in one of several, and one for root alone leave no meter; the reason says what to do."""
    plain = Path.read_text
    for name, text in files.items():
        (domain(tmp_path, name, f"package-{name[-1]}", 1) / "energy_uj").write_text(text or "1")

    def refused(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "energy_uj" and files[self.parent.name] is None:
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    meter, why = find_energy_meter([CPU], tmp_path)
    assert meter is None and words in why


class Nvml:
    """The part of `pynvml` that is used, playing back recorded millijoules."""

    def __init__(self, *values: int) -> None:
        self.values = list(values)

    def nvmlInit(self) -> None:
        """Nothing to do."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.values:
            raise RuntimeError("GPU is lost")
        return self.values.pop(0)


def test_gpu_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's millijoules become joules; a lost GPU is a vanished meter; a GPU that never answers is none."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=index))
    counters, why = nvml_counters([0], Nvml(1000, 1000, 4500))
    assert why == "" and counters[0].name == "NVML GPU 0"
    meter = EnergyMeter(counters)
    assert meter.read_j() == pytest.approx(3.5)
    with pytest.warns(UserWarning, match="GPU is lost"):
        assert meter.read_j() is None
    assert nvml_counters([0], Nvml()) == ([], "NVML: GPU is lost")


@pytest.mark.skipif(not rapl_counters()[0], reason=f"no readable counter under {POWERCAP}")
def test_real_counter_rises() -> None:
    """Where the machine has a counter, work costs energy."""
    meter, _ = find_energy_meter([CPU])
    assert meter is not None
    for _ in range(20):
        torch.randn(500, 500) @ torch.randn(500, 500)
    assert (meter.read_j() or 0.0) > 0.0
