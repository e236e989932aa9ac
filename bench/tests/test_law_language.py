"""The language arm of the law: its data, its runs of equal size and FLOPs, and its resumable list."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from setpoint_bench.installed_text import InstalledText, installed_text
from setpoint_bench.task import BenchError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "benchmarks" / "law_language.py"


@pytest.fixture(scope="module")
def law() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("law_language", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(law: ModuleType) -> Any:
    """Random bytes in place of text."""
    drawn = [torch.randint(128, (size,), dtype=torch.uint8) for size in (40_000, 2_000, 2_000)]
    return law.Bench.of(InstalledText(*drawn, digest="random", versions={}, files=3), {"validation": 16, "test": 16})


def test_text_is_ascii_without_repeats_and_split_by_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: identical files count once, others than ASCII not at all, and no file has bytes in two splits."""
    package = tmp_path / "written_for_this_test"
    package.mkdir()
    for number in range(300):
        (package / f"m{number}.py").write_text(f"# {number:04d}\n" * 80)
    (package / "again.py").write_text("# 0007\n" * 80)
    (package / "other.py").write_text("# Grüße\n" * 100, encoding="utf-8")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    text = installed_text({"written_for_this_test": "none-such"})
    numbers = {split: set(bytes(getattr(text, split).tolist()).split()) for split in ("train", "validation", "test")}
    assert text.files == 300 and sum(map(len, numbers.values())) == 300 + 3  # with the "#" of each
    assert len(numbers["train"]) > 250 and min(map(len, numbers.values())) > 1
    assert text.digest == installed_text({"written_for_this_test": "none-such"}).digest
    (package / "m5.py").write_text("# changed\n" * 80)
    assert text.digest != installed_text({"written_for_this_test": "none-such"}).digest


def test_no_window_is_drawn_twice(bench: Any) -> None:
    """Claim: the windows of a run cover the text once, and then the run is refused."""
    batches = bench.batches(seed=0, batch=8)
    seen = torch.cat([x for x, _ in islice(batches, 78)])
    assert seen.numel() == 39_936 and torch.equal(
        seen.flatten().bincount(), bench.text.train[: 39_999 // 64 * 64].bincount()
    )
    with pytest.raises(BenchError, match="used up"):
        next(batches)


@pytest.mark.parametrize("arm", ["even", "setpoint"])
@pytest.mark.parametrize(("kind", "steps"), [("arm", 60), ("larger", 19)])
def test_arms_end_at_the_small_models_size_and_flops(
    law: ModuleType, bench: Any, kind: str, steps: int, arm: str
) -> None:
    """Claim: a run that starts twice as large has spent the small model's FLOPs and ends at its size.

    Even widths end at the very same; Setpoint's own are within the budget, by less than a head, the largest unit.
    """
    cell = law.Cell(kind, arm, 2.0, 1.0, steps, 0.008, 0)
    row, scale = law.trained(bench, cell, lambda share: None), cell.scale
    small, step = law.params(law.built(1.0, scale)), law.step_flops(1.0, scale)
    head = scale.head_dim * (4 * scale.embedding + 3)
    assert row["bill"] == steps * step and row["bill"] - 2 * step < row["flops"] <= row["bill"]
    assert small - head < row["size"] <= small
    assert arm == "setpoint" or (row["size"] == small and row["widths"] == [[1, scale.neurons]] * scale.layers)
    assert 1.3 * small < row["average_size"] < 1.6 * small  # 1.5 in a straight line, by steps


def test_finished_runs_are_not_run_again(law: ModuleType, bench: Any, tmp_path: Path) -> None:
    """Claim: a run that the file holds is not made again, and a file of other bytes is refused."""
    out = tmp_path / "found.json"
    cell = law.Cell("calibration", "small", 0.5, None, 4, 0.008, 0)
    law.run_one(law.Results(out, bench), bench, cell, None)
    written = out.read_text()
    law.run_one(law.Results(out, bench), bench, cell, None)
    assert out.read_text() == written and law.Results(out, bench).row(cell)["num_steps"] == 4
    other = law.Bench.of(
        InstalledText(*[bench.text.train] * 3, digest="other", versions={}, files=3), {"validation": 16, "test": 16}
    )
    with pytest.raises(BenchError, match="not those of"):
        law.Results(out, other)


def test_the_list_of_runs_takes_the_best_rates(law: ModuleType) -> None:
    """Claim: further seeds and the longest runs take the rate that validation chose; all arms come in turn."""
    rows: list[dict[str, Any]] = []
    for part in (law.arms, law.further_arms):
        for cell in part(rows, optimal=100):
            best = 0.008 if cell.start == 2 else 0.032
            rows.append({**vars(cell), "validation": abs(cell.rate - best)})
            if cell.seed or cell.ratio == 16 or 15 < len(rows) <= 20:
                assert cell.rate == best
    counts = [len({(row["arm"], row["start"], row["ratio"]) for row in rows[: 5 * n]}) for n in (1, 3, 4)]
    assert counts == [5, 5, 10] and len(rows) == 2 * 25 + 3 * 7
    assert {row["steps"] for row in rows} == {100, 400, 1600}
    for part in (law.longest_arms, law.pair):
        for cell in part(rows, optimal=100):
            rows.append({**vars(cell), "validation": abs(cell.rate - 0.004)})
    longest = {(row["arm"], row["start"], row["rate"]) for row in rows if row["ratio"] == 64}
    assert {(arm, start) for arm, start, _ in longest} == set(law.LONGEST_ARMS)
    assert {rate for arm, start, rate in longest if (arm, start) == ("small", 1.0)} == {0.032, 0.008, 0.004}
    pair = [row for row in rows if row["kind"] == "pair"]
    assert {row["final"] for row in pair} == {2.0} and {row["steps"] for row in pair} == {1600}
    assert {row["rate"] for row in pair if row["seed"]} == {0.004} and {row["ratio"] for row in pair} == {16}
    assert [row["seed"] for row in pair] == 6 * [0] + 3 * [1] + 3 * [2]


def test_the_pair_has_a_table_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: each arm is shown in final sizes, against the small model of the final size at its best rate.

    The ratio is that of the small model's bytes to its optimal ones, whatever the rows call it.
    """
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "benchmarks"))
    from tables.law import pair_table

    shared = {"kind": "pair", "ratio": 16.0, "size": 8800, "average_size": 9000.0, "tokens": 1e6, "final": 2.0}
    rows = [
        {**shared, "arm": arm, "start": start, "rate": rate, "seed": seed, "validation": loss + rate, "test": loss}
        for arm, start, rate, loss in (
            ("small", 2.0, 0.004, 2.0),
            ("small", 2.0, 0.008, 2.5),
            ("even", 4.0, 0.004, 1.9),
        )
        for seed in (0, 1)
    ]
    file = tmp_path / "law.json"
    file.write_text(json.dumps({"rows": rows, "pair_optimal_tokens": 4e4}), encoding="utf-8")
    (line,) = pair_table(file).splitlines()[2:]
    cells = [cell.strip(" *") for cell in line.split("|")[1:-1]]
    assert cells == ["25", "2 x", "even", "0.004", "0.004", "8,800", "2.0000", "1.9000", "+0.1000", "–", "2"]


def test_the_larger_models_take_the_best_rates(law: ModuleType) -> None:
    """Claim: rates are swept at a ratio of 4, and the best is taken at 1; at 16 they are swept anew; seed 0 first.

    Starts of 4 are swept at 4 and 1 as well; larger starts at 16 have rates of their own. Two rates at 1 and the other
    seeds of starts of 4 come last.
    """
    rows: list[dict[str, Any]] = []
    for cell in law.larger(rows, optimal=100):
        if not any(cell.same(row) for row in rows):  # a run that is there is not made again
            rows.append({**vars(cell), "validation": abs(cell.rate - (0.008 if cell.arm == "even" else 0.004))})
    assert {cell["rate"] for cell in rows[9:24] if cell["arm"] == "even"} == {0.008}
    assert {cell["rate"] for cell in rows[9:24] if cell["arm"] != "even"} == {0.004}
    assert {cell["rate"] for cell in rows[24:32]} == {0.001, 0.002, 0.004, 0.008}
    assert [cell["rate"] for cell in rows[32:38]] == 2 * [0.004, 0.008, 0.004]
    assert [cell["start"] for cell in rows[38:]] == [*13 * [4.0], 8.0, *5 * [4.0], 8.0, 4.0, 1.0, 2.0, 2.0, *8 * [4.0]]
    assert [cell["rate"] for cell in rows[50:62]] == [0.004, 0.004, *5 * [0.008], 0.004, *2 * [0.008], 0.004, 0.008]
    assert [cell["rate"] for cell in rows[62:]] == 4 * [0.008, 0.004]
    seeds = 12 * [0] + 6 * [1] + 6 * [2] + 8 * [0] + 3 * [1] + 3 * [2] + 15 * [0]
    seeds += [1, 0, 2, 1, 0, 2] + 3 * [0] + 4 * [1] + 4 * [2]
    assert [row["seed"] for row in rows] == seeds
    assert {(row["ratio"], row["steps"]) for row in rows} == {(1.0, 100), (4.0, 400), (16.0, 1600)}


def test_the_page_shows_what_the_runs_came_to() -> None:
    """Claim: each measured and predicted gain of the page follows from the rows of the results file."""
    data = json.loads((ROOT / "results" / "law-language.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results-law.md").read_text(encoding="utf-8")
    table = page.partition("<!-- results:law-measured -->\n")[2].partition("\n\n")[0]
    lines = [[cell.strip(" *x") for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(lines) >= 8

    def runs(ratio: float, arm: str, start: float) -> dict[int, dict[str, Any]]:
        arms = [row for row in data["rows"] if row["kind"] == "arm"]
        found = [row for row in arms if (row["ratio"], row["arm"], row["start"]) == (ratio, arm, start)]
        rate = min((row["validation"], row["rate"]) for row in found if row["seed"] == 0)[1]
        return {row["seed"]: row for row in found if row["rate"] == rate}

    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.replace("−", "-").strip("[] %").replace("[", ",").split(",")]

    for ratio, start, widths, *cells in lines:
        arm = "even" if widths == "even" else "setpoint"
        ours, theirs = runs(float(ratio), arm, float(start)), runs(float(ratio), "small", 1.0)
        seeds = sorted(ours.keys() & theirs.keys())
        gains = np.array([theirs[seed]["test"] - ours[seed]["test"] for seed in seeds])
        assert int(cells[-1]) == len(seeds)
        assert (float(cells[0]), float(cells[1])) == (ours[0]["rate"], theirs[0]["rate"])
        mean, *ends = numbers(cells[5])
        assert mean == pytest.approx(gains.mean(), abs=5.1e-5)
        if len(seeds) >= 3:
            interval = stats.t.interval(0.95, len(seeds) - 1, gains.mean(), stats.sem(gains))
            assert ends == pytest.approx(interval, abs=5.1e-5)
        if not data.get("law"):
            assert cells[6:9] == ["–"] * 3
            continue
        irreducible, by_size, a, by_data, b = data["law"]
        size, tokens = ([np.mean([of[s][key] for s in seeds]) for of in (theirs, ours)]
                        for key in ("average_size", "tokens"))  # fmt: skip
        losses = [by_size * n**-a + by_data * d**-b for n, d in zip(size, tokens, strict=True)]
        assert numbers(cells[6])[0] == pytest.approx(losses[0] - losses[1], abs=5.1e-5)
        assert numbers(cells[7])[0] == pytest.approx(gains.mean() - losses[0] + losses[1], abs=5.1e-5)
        reducible = np.mean([theirs[seed]["test"] for seed in seeds]) - irreducible
        assert numbers(cells[8])[0] == pytest.approx(100 * gains.mean() / reducible, abs=0.051)


def test_arms_spend_the_same_flops() -> None:
    """Claim: all runs that are compared have spent the small model's FLOPs within 1 %, and end no larger than it."""
    data = json.loads((ROOT / "results" / "law-language.json").read_text(encoding="utf-8"))
    for kind in ("arm", "pair", "larger"):
        arms = [row for row in data["rows"] if row["kind"] == kind]
        size = next(row["size"] for row in arms if row["arm"] == "small")
        assert all(0.99 * row["bill"] <= row["flops"] <= row["bill"] for row in arms)
        assert all(row["size"] <= size and (row["size"] == size or row["arm"] == "setpoint") for row in arms)


def test_errors_of_the_law_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the error of the gain is that of the small model less that of the pruned one."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "benchmarks"))
    from tables.law import errors_table

    lines = errors_table(ROOT / "results" / "law-language.json").splitlines()[2:]
    cells = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines]
    assert {row[0] for row in cells} >= {"4,624", "51,264"} and len(cells) >= 20
    for row in cells:
        small, pruned, gain, predicted = (float(cell.replace("−", "-")) for cell in row[4:8])
        assert small - pruned == pytest.approx(gain - predicted, abs=2.1e-4)


def test_a_table_compares_three_forms_of_the_law_by_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: by r the errors are the mean distances of the arms' gains, and the page says which form is closest."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "benchmarks"))
    from tables.law import arms_of, forms_table

    file = ROOT / "results" / "law-language.json"
    lines = forms_table(file).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {(row[0], row[1]) for row in cells} >= {("4,624", "1"), ("4,624", "64"), ("51,264", "16")}
    assert all(float(row[4]) < float(row[3]) for row in cells if row[0] != "200,064")
    there = [arm for arm in arms_of(json.loads(file.read_text(encoding="utf-8"))) if arm.ratio == 16]
    (row,) = (row for row in cells if row[:2] == ["4,624", "16"])
    assert row[2] == f"{len(there)}"
    errors = [abs(arm.gain.mean - arm.by_final) for arm in there if arm.by_final is not None]
    assert float(row[4]) == pytest.approx(sum(errors) / len(errors), abs=1e-4)
    assert float(row[8].removesuffix(" %")) < 3 < float(row[7].removesuffix(" %"))
    closest = {(row[0], row[1]): min((3, 4, 5), key=lambda column: float(row[column])) for row in cells}
    assert [closest["51,264", r] for r in ("1", "4", "16")] == [4, 5, 5]
    assert closest["8,800", "26"] == 4 and closest["200,064", "8"] == 3


def test_bytes_that_are_worth_less_have_the_exponent_that_made_the_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: k is found again from gains that follow the form exactly, below 0 too; 0 is the form of final sizes."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "benchmarks"))
    from tables.law import arms_of, gain_by_worth, worth_exponent

    from setpoint_bench.law import Law

    data = json.loads((ROOT / "results" / "law-language.json").read_text(encoding="utf-8"))
    law, arms = Law(*data["law"], source="calibration"), arms_of(data)
    pruned, small = {"tokens": 4e6, "average_size": 10_000.0, "size": 4624.0}, {"tokens": 8e6, "size": 4624.0}
    arm = dataclasses.replace(arms[0], runs=(pruned, small))
    assert gain_by_worth(law, arm, 0.0) == pytest.approx(law.loss(4624, 8e6) - law.loss(4624, 4e6))
    worth = 4e6 * (10_000 / 4624) ** -0.8
    assert gain_by_worth(law, arm, 0.8) == pytest.approx(law.loss(4624, 8e6) - law.loss(4624, worth))
    assert all(gain_by_worth(law, arm, 0.0) == pytest.approx(arm.by_final) for arm in arms)
    for exponent in (-0.4, 0.37):
        exact = [
            dataclasses.replace(arm, gain=dataclasses.replace(arm.gain, mean=gain_by_worth(law, arm, exponent)))
            for arm in arms
        ]
        assert worth_exponent(law, exact) == pytest.approx(exponent)


@pytest.mark.parametrize("kind", ["arm", "larger"])
def test_a_run_of_each_arm_is_made_again_as_the_file_holds_it(law: ModuleType, kind: str) -> None:
    """Claim: five arms at a ratio of 1, each with its best rate; the file holds them, so none is made twice."""
    rows = json.loads((ROOT / "results" / "law-language.json").read_text(encoding="utf-8"))["rows"]
    cells = list(law.made_again(rows, kind))
    assert [(cell.arm, cell.start) for cell in cells] == list(law.ARMS)
    assert all(any(cell.same(row) for row in rows) for cell in cells)


def test_the_optimal_data_of_the_page_are_those_of_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: r by the fitted law is the one of the page times the share of data that it says."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "benchmarks"))
    from tables.law import larger_optimal_line

    from setpoint_bench.law import Law

    data = json.loads((ROOT / "results" / "law-language.json").read_text(encoding="utf-8"))
    optimal = Law(*data["larger_law"], source="calibration").optimal_data(51_264)
    line = larger_optimal_line(ROOT / "results" / "law-language.json")
    assert f"by the fitted law it would be {optimal / 1e6:.1f} million" in line.lower()
    assert f"{data['larger_optimal_tokens'] / optimal:.2g} times as large" in line
