"""The table of timed operations in the cache folder: what is damaged, turned off, set otherwise, or written by two."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten

from setpoint import cache
from setpoint.groups.group import Group, Size
from setpoint.resources import table as table_file
from setpoint.resources.curve import points
from setpoint.resources.problem import Problem, pose
from setpoint.resources.table import Table, environment
from setpoint.resources.tape import Operand, Operation

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is on."""
    monkeypatch.setenv("SETPOINT_CACHE", "on")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Operations that take a millisecond for each entry of their first axis; yields the keys that were timed."""
    keys: list[str] = []

    def seconds(problem: Problem, point: tuple[int, ...], device: torch.device) -> float:
        keys.append(problem.key)
        return 1e-3 * point[0]

    monkeypatch.setattr(table_file, "_seconds", seconds)
    yield keys


def product(rows: int = 8) -> Problem:
    """A matrix product whose one axis is the width of a group of 64 units."""
    width = Size(0, (("a", 1),))
    one, other, out = (
        Operand(shape, (0, 1), (), torch.float32)
        for shape in ((Size(rows), width), (width, Size(4)), (Size(rows), Size(4)))
    )
    spec = tree_flatten(((one, other), {}))[1]
    operation = Operation(torch.ops.aten.mm.default, (one, other), spec, (out,))
    return pose(operation, {"a": Group("a", "unit", 64, ())})


def dense_seconds(table: Table, problem: Problem) -> float:
    """What the table says of a problem at its dense lengths."""
    curve = table.time([problem])[problem.key]
    assert curve is not None
    return curve.at(problem.dense)


def other_point(timed: dict[str, Any]) -> None:
    for rows in timed.values():
        rows[0][0] = [65]


def other_seconds(timed: dict[str, Any]) -> None:
    for rows in timed.values():
        rows[0][1] *= 10


def longer_points(timed: dict[str, Any]) -> None:
    for rows in timed.values():
        rows[0][0].append(1)


def no_rows(timed: dict[str, Any]) -> None:
    timed.update({key: [] for key in timed})


@pytest.mark.parametrize("damage", [other_point, other_seconds, longer_points, no_rows])
def test_a_damaged_table_is_timed_again(
    damage: Callable[[dict[str, Any]], None], timed: list[str], tmp_path: Path
) -> None:
    """Claim: whatever has changed in a file that is still JSON, it is said once with the file's name, and mended."""
    problem, first = product(), Table(CPU, tmp_path)
    assert dense_seconds(first, problem) == pytest.approx(0.064)
    content = json.loads(first.file.read_text())
    damage(content["timed"])
    first.file.write_text(json.dumps(content))
    timed.clear()
    with pytest.warns(UserWarning, match=rf"{first.file.name} is damaged .*timed again") as said:
        table = Table(CPU, tmp_path)
    assert len(said) == 1
    assert dense_seconds(table, problem) == pytest.approx(0.064) and timed
    timed.clear()
    assert dense_seconds(Table(CPU, tmp_path), problem) == pytest.approx(0.064) and len(timed) == 1  # a check


def test_rows_without_the_dense_point_are_timed_again(timed: list[str], tmp_path: Path) -> None:
    """Claim: a curve that does not begin at the dense lengths is no curve, even where the digest fits."""
    problem, first = product(), Table(CPU, tmp_path)
    dense_seconds(first, problem)
    content = json.loads(first.file.read_text())
    content["timed"] = {key: rows[1:] for key, rows in content["timed"].items()}
    content["digest"] = cache.digest_of([content["timed"], content["fits"]])
    first.file.write_text(json.dumps(content))
    assert dense_seconds(Table(CPU, tmp_path), problem) == pytest.approx(0.064)


def test_a_cache_that_is_off_holds_no_table(timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: SETPOINT_CACHE=off writes no table, and reads none that is there."""
    monkeypatch.setenv("SETPOINT_CACHE", "off")
    dense_seconds(Table(CPU, tmp_path), product())
    Table(CPU, tmp_path).keep_fit("fit", [1.0, 1.0, 0.0, 0.1])
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("SETPOINT_CACHE", "on")
    dense_seconds(Table(CPU, tmp_path), product())
    monkeypatch.setenv("SETPOINT_CACHE", "off")
    timed.clear()
    dense_seconds(Table(CPU, tmp_path), product())
    assert timed


def test_settings_that_choose_other_kernels_have_a_table_of_their_own(tmp_path: Path) -> None:
    """Claim: mkldnn, the precision of float32 products and determinism make another file each."""
    before, plain, mkldnn = torch.get_float32_matmul_precision(), Table(CPU, tmp_path).file, torch.backends.mkldnn
    assert Table(CPU, tmp_path).file == plain
    found = {plain}
    try:
        torch.set_float32_matmul_precision("medium")
        found.add(Table(CPU, tmp_path).file)
        torch.set_float32_matmul_precision(before)
        mkldnn.enabled = False  # type: ignore[assignment]
        found.add(Table(CPU, tmp_path).file)
        mkldnn.enabled = True  # type: ignore[assignment]
        torch.use_deterministic_algorithms(True)
        found.add(Table(CPU, tmp_path).file)
    finally:
        torch.set_float32_matmul_precision(before)
        mkldnn.enabled = True  # type: ignore[assignment]
        torch.use_deterministic_algorithms(False)
    assert len(found) == 4


def test_a_setting_that_pytorch_does_not_say_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: where both interfaces to the precision were used, PyTorch refuses to say it, and the newer one counts."""

    def refused() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refused)
    assert environment(CPU)["precision"] == "mixed" and len(environment(CPU)["fp32"]) == 3


@pytest.mark.parametrize("busy", [1.5, 3.0])
def test_a_table_of_a_busy_device_is_timed_again(
    busy: float, timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: where an operation takes much less than the table says, all of it is forgotten, with its fits, and that is
    said; less does not matter, nor does a device that is busy now.
    """
    usual = table_file._seconds
    monkeypatch.setattr(table_file, "_seconds", lambda *args: busy * usual(*args))
    first = Table(CPU, tmp_path)
    assert dense_seconds(first, product()) == pytest.approx(0.064 * busy)
    first.keep_fit("model", [1.0, 1.0, 0.0, 0.1])
    monkeypatch.setattr(table_file, "_seconds", usual)
    table = Table(CPU, tmp_path)
    if busy < 2:
        assert dense_seconds(table, product()) == pytest.approx(0.064 * busy)
    else:
        with pytest.warns(UserWarning, match="busy or slowed device: an operation took 0.192 s, and takes 0.064 s now"):
            assert dense_seconds(table, product()) == pytest.approx(0.064)
        assert table.fit("model") is None and Table(CPU, tmp_path).fit("model") is None
    monkeypatch.setattr(table_file, "_seconds", lambda *args: 9 * usual(*args))
    expected = dense_seconds(table, product())
    assert dense_seconds(Table(CPU, tmp_path), product()) == expected


def test_two_processes_keep_each_others_timings(timed: list[str], tmp_path: Path) -> None:
    """Claim: of two tables that were read before either was written, the file holds what both have timed."""
    one, other = Table(CPU, tmp_path), Table(CPU, tmp_path)
    dense_seconds(one, product(8))
    one.keep_fit("one", [1.0, 1.0, 0.0, 0.1])
    dense_seconds(other, product(16))
    other.keep_fit("other", [1.0, 2.0, 0.0, 0.1])
    timed.clear()
    after = Table(CPU, tmp_path)
    dense_seconds(after, product(8)), dense_seconds(after, product(16))
    assert len(timed) == 1  # a check
    assert after.fit("one") == [1.0, 1.0, 0.0, 0.1] and after.fit("other") == [1.0, 2.0, 0.0, 0.1]


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(timed: list[str], tmp_path: Path) -> None:
    """Claim: where the file cannot be replaced it is said, the timing goes on, and no temporary file stays."""
    file = Table(CPU, tmp_path).file
    file.mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        table = Table(CPU, tmp_path)
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert dense_seconds(table, product()) == pytest.approx(0.064)
    assert list(file.parent.iterdir()) == [file]


def test_the_oldest_tables_make_room(timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: of tables so many are kept as of other facts, this one among them."""
    monkeypatch.setattr(cache, "_MOST", 3)
    folder = tmp_path / "latency"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.json").write_text("{}")
    table = Table(CPU, tmp_path)
    for rows in (8, 16):
        dense_seconds(table, product(rows))
    assert len(list(folder.iterdir())) == 3 and table.file.exists()


def test_more_points_are_timed_of_what_takes_most_of_a_step(tmp_path: Path, timed: list[str]) -> None:
    """Claim: where not all points fit into the limit, the operation with most seconds in the step has more of them."""
    often, once = product(8), product(16)

    def seconds(problem: Problem, *, coarse: bool) -> float:
        """Two calls at each point, by bytes, and what a short one takes."""
        dense = problem.num_bytes(problem.dense)
        return sum(0.128 * problem.num_bytes(each) / dense + 1e-3 for each in points(problem, coarse=coarse))

    limit = seconds(often, coarse=False) + seconds(once, coarse=True)
    assert seconds(once, coarse=False) > seconds(once, coarse=True)
    Table(CPU, tmp_path).time([often, once, often], limit_s=limit * 1.01)
    rounds = 3
    assert timed.count(often.key) == rounds * len(points(often, coarse=False))
    assert timed.count(once.key) == rounds * len(points(once, coarse=True))
