"""What the benchmark adds to the command line: bench, coverage, list, and its half of report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from setpoint.cli import app
from setpoint_bench import catalogue
from setpoint_bench.method import ABOUT
from setpoint_bench.tasks.digits import digits


@pytest.fixture(autouse=True)
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow digits task, so that a run takes a second."""
    monkeypatch.setitem(catalogue.tasks(), "digits", lambda data: digits(epochs=2, width=16))


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: str | Path) -> dict[str, Any]:
    """What a command prints with --json, which is all of stdout."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_bench(tmp_path: Path) -> None:
    """A benchmark prints a table, or with --json one object with all three methods, and writes the page."""
    command = ("bench", "--task", "digits", "--epochs", "1", "--out", tmp_path)
    result = invoke(*command)
    found = answer(*command)
    assert found["task"] == "digits"
    assert found["budget"] == 0.5
    assert list(found["methods"]) == ["dense", "small", "setpoint"]
    pruned = found["methods"]["setpoint"]
    assert pruned["final_flops_ratio"] <= 0.5
    assert {"resizes", "overhead_seconds", "overhead_flops_ratio", "accuracy", "train_flops"} <= pruned.keys()
    assert Path(found["report"]).is_file()
    assert any("setpoint" in line and "%" in line for line in result.stdout.splitlines())
    assert "{" not in result.stdout
    assert "results in" not in result.stdout
    assert "3 runs of 15 steps (dense, small, setpoint), results in" in result.stderr
    assert "about 45 steps ahead; Ctrl-C is safe, and the same command continues there" in result.stderr


@pytest.mark.slow
def test_bench_over_seeds_and_report(tmp_path: Path) -> None:
    """Several seeds give means and runs, on the validation data if asked; `report` writes the page anew elsewhere."""
    found = answer(
        *("bench", "--task", "digits", "--methods", "small", "--seeds", "0,1", "--budgets", "50%,75% flops"),
        *("--epochs", "1", "--split", "validation", "--out", tmp_path / "results"),
    )
    assert [part["budget"] for part in found["budgets"]] == [0.5, 0.75]
    assert len(found["methods"]["small"]["runs"]) == 2
    lines = (tmp_path / "results" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["split"] for line in lines} == {"validation"}
    page = Path(answer("report", tmp_path / "results", "--out", tmp_path / "page")["report"])
    assert page.parent == tmp_path / "page"
    assert page.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("bench", "--task", "imagenet"),
            "clothing, clothing-lite0, clothing-mobilenet, digits",
        ),
        (("bench", "--task", "digits", "--methods", "dense,magic"), "dense, small, small-long"),
        (("bench", "--task", "digitts"), "did you mean digits?"),
        (("bench", "--task", "digits", "--methods", "gmp@densty=0.1"), "did you mean density?"),
        (("bench", "--task", "digits", "--split", "validate"), "did you mean validation?"),
        (("bench", "--task", "digits", "--methods", "dense,small", "--budgets", "1e-4"), "cost"),
        (("coverage", "tim"), "did you mean timm?"),
        (("bench", "--task", "digits", "--methods", ","), "--methods is empty"),
        (("bench", "--task", "digits", "--budgets", "half"), "--budgets takes a fraction of the dense FLOPs"),
        (("bench", "--task", "digits", "--seeds", "0.5"), "--seeds takes whole numbers"),
        (("bench", "--task", "digits", "--budgets", "1.5"), "at most 1"),
        (("bench", "--task", "cifar10", "--data", "/nowhere"), "/nowhere"),
        (("bench", "--task", "digits", "--budgets", "nan"), "got 'nan'"),
        (("bench", "--task", "digits", "--budgets", "50% params"), "got '50% params', a budget of another kind"),
        (("bench", "--task", "digits", "--epochs", "0"), "at least 1"),
        (("report", "/nowhere"), "run.jsonl"),
        (("coverage", "plain", "--models", "unett"), "did you mean unet"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """What the user got wrong is one line on stderr that says what to do, with exit code 2 and no traceback."""
    result = invoke(*arguments, "--out", tmp_path)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_missing_data_cost_nothing(tmp_path: Path) -> None:
    """Where the data are missing no run is announced and no folder made; the error says whose they are."""
    result = invoke("bench", "--task", "mnist", "--data", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no ylecun/mnist") and "datasets/ylecun/mnist" in result.stderr
    assert not (tmp_path / "out").exists()


BROKEN_METHOD = """
from setpoint_bench.method import Setpoint
from setpoint_bench.scheduled import ScheduledController

class Broken(ScheduledController):
    def init(self, *arguments, **settings):
        raise ValueError("broken")

def broken():
    return Setpoint("broken", Broken(), family="mine")
"""


@pytest.mark.slow
def test_a_bench_whose_runs_all_fail_answers_all_the_same(tmp_path: Path) -> None:
    """Where no run could be finished, the answer names each failure, and the exit code is 1."""
    file = tmp_path / "own.py"
    file.write_text(BROKEN_METHOD, encoding="utf-8")
    out = tmp_path / "out"
    result = invoke("bench", "--task", "digits", "--methods", f"{file}:broken", "--epochs", "1", "--out", out, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [each["cell"] for each in found["failures"]] == ["digits-broken-0.5-seed0"]
    assert result.stderr.count("digits-broken-0.5-seed0: ") == 1


def test_tasks_and_methods_are_listed() -> None:
    """Each task and each method comes with a sentence of its own; the names are those that `bench` takes."""
    tasks = json.loads(invoke("list", "tasks", "--json").stdout)["tasks"]
    assert list(tasks) == list(catalogue.tasks()) and "six classes of CIFAR-10" in tasks["finetune"]
    methods = json.loads(invoke("list", "methods", "--json").stdout)["methods"]
    assert methods["cubic"].startswith("All groups narrowed evenly along a cubic schedule, by norms. Zhu and Gupta")
    assert list(methods) == list(ABOUT) and len(set(methods.values())) == len(methods)
    assert len(set(tasks.values())) == len(tasks) and "The same" not in "".join(tasks.values())
    assert [line.split()[0] for line in invoke("list", "methods", "torch").stdout.splitlines()[:-1]] == [
        *("torch-pruning-norm", "torch-pruning-taylor"),
    ]


def test_interrupt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ctrl-C ends with exit code 130 and says that finished runs are kept."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("setpoint_bench.progress.run", interrupt)
    result = invoke("bench", "--task", "digits", "--out", tmp_path)
    assert result.exit_code == 130
    assert "finished runs are kept" in result.stderr


@pytest.mark.slow
def test_coverage_of_a_suite(tmp_path: Path) -> None:
    """A suite in a worker process: a table, the record in the folder, and with --json its summary."""
    models = "gated_mlp,many_inputs_and_outputs"
    command = ("coverage", "plain", "--models", models, "--workers", "1", "--out", tmp_path)
    result = invoke(*command)
    found = answer(*command)
    assert list(found)[:6] == [
        *("suite", "passed", "total", "prunable_params_share_median", "seconds_median", "failures"),
    ]
    assert (found["suite"], found["passed"], found["total"], found["failures"]) == ("plain", 2, 2, [])
    assert 0 < found["prunable_params_share_median"] <= 1
    assert "gated_mlp" in result.stdout
    assert "plain" in result.stderr
    record = json.loads((tmp_path / "suite-plain.json").read_text(encoding="utf-8"))
    assert {key: record[key] for key in found} == found
    assert [model["model"] for model in record["models"]] == models.split(",")
