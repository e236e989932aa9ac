"""The command line of the wheel: words for people, one JSON object with --json, and errors in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import setpoint
from setpoint.cli import app, make_app
from setpoint.ledger import Ledger

OWN_MODEL = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4)), (torch.zeros(2, 8),)

def keywords():
    return build()[0], {"input": torch.zeros(2, 8)}

def bare():
    return build()[0]

def number():
    return 3
"""


def invoke(*arguments: str | Path) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: str | Path) -> dict[str, Any]:
    """What a command prints with --json, which is all of stdout."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_python_runs_the_package() -> None:
    """`python -m setpoint` is the same command line: it inspects a model, and its errors end with exit code 2."""
    here = [sys.executable, "-m", "setpoint"]
    listed = subprocess.run([*here, "--help"], capture_output=True, text=True, timeout=120, check=True)
    assert "Usage: setpoint" in listed.stdout and "inspect" in listed.stdout
    assert subprocess.run([*here, "nonsense"], capture_output=True, timeout=120, check=False).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "folder/mine.py"), "give a function of a Python file, as module.py:function"),
        (("inspect", "resnet1"), "did you mean resnet18"),
        (("inspect", "keras:resnet50"), "torchvision, timm, transformers"),
        (("inspect", "/nowhere/model.py:build"), "no file"),
        (("inspect", "resnet18", "--input", "1,x"), "--input takes whole numbers"),
        (("inspect", "resnet18", "--input", "1,3"), "example"),
        (("inspect", "null\0byte.py:build"), "no file"),
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


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path: Path) -> None:
    """Every command that writes says so in one line, before it shows or makes anything, and without --out, too."""
    own, ledger = tmp_path / "own.py", tmp_path / "run.jsonl"
    own.write_text("def build():\n    raise AssertionError('work has begun')\n")
    Ledger({"groups": {}, "dense": {"flops": 8.0}}).save(ledger)

    def made() -> list[Path]:
        return sorted(path for path in tmp_path.iterdir() if path.name != "__pycache__")

    before = made()
    for command in (
        ["inspect", f"{own}:build"],
        ["compress", f"{own}:build", "--data", f"{own}:build", "--budget", "50%"],
        ["report", ledger],
    ):
        refused = invoke(*command, "--out", ledger / "x")
        assert refused.exit_code == 2 and refused.stdout == "", command
        assert refused.stderr == f"error: {ledger / 'x'} cannot be made or written to: name another folder by --out\n"
    assert made() == before
    assert "work has begun" in invoke("inspect", f"{own}:build", "--out", tmp_path / "new" / "deep").stderr
    assert made() == before


def test_inspect_own_model(tmp_path: Path) -> None:
    """Inspecting a model of one's own finds its one group, its places, and what is frozen and why."""
    file = tmp_path / "model.py"
    file.write_text(OWN_MODEL, encoding="utf-8")
    found = answer("inspect", f"{file}:build", "--out", tmp_path / "out")
    (group,) = found["groups"]
    assert group["num_units"] == 20
    assert ["2.weight", 1, "consume"] in group["places"]
    assert found["flops"] == 2 * (2 * 2 * 8 * 20) + 3 * (2 * 2 * 20 * 4)
    assert found["params"] == 8 * 20 + 20 + 20 * 4 + 4
    assert found["cheapest_flops"] == found["flops"] * group["min_units"] / 20
    assert group["flops_share"] == pytest.approx(1 - group["min_units"] / 20)
    assert found["cheapest_params"] == 8 * group["min_units"] + group["min_units"] + 4 * group["min_units"] + 4
    assert group["params"] == found["params"] - 4
    assert any("output" in frozen["reason"] for frozen in found["frozen"])
    shown = invoke("inspect", f"{file}:build").stdout.splitlines()
    assert (
        len(shown) == 8
        and "{" not in "".join(shown)
        and shown[-1].startswith(f"next: setpoint inspect {file}:build --groups shows every group")
    )
    tree = invoke("inspect", f"{file}:build", "--groups").stdout.splitlines()
    assert "2.weight, dim 1, reads" in "".join(tree) and "setpoint.attach(model, optimizer, 0.5" in tree[-1]
    assert "cheapest reachable" in (tmp_path / "out" / "inspect.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "inspect.json").read_text(encoding="utf-8")) == found


HARDLY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.large, self.small = nn.Linear(64, 256), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    def forward(self, x):
        return self.large(x), self.small(x)

def build():
    return Net(), (torch.randn(2, 64),)
"""


def test_the_next_step_asks_for_what_can_be_reached(tmp_path: Path) -> None:
    """Claim: where half of the FLOPs is out of reach the line names a share that attach takes."""
    file = tmp_path / "model.py"
    file.write_text(HARDLY, encoding="utf-8")
    last = invoke("inspect", f"{file}:build", "--groups").stdout.splitlines()[-1]
    share = float(re.search(r"attach\(model, optimizer, ([\d.]+), ", last).group(1))  # type: ignore[union-attr]
    found = answer("inspect", f"{file}:build")
    assert 0.5 < found["cheapest_flops"] / found["flops"] <= share < 1 and "half of them is out of reach" in last
    space: dict[str, Any] = {}
    exec(HARDLY, space)
    model, example = space["build"]()
    setpoint.attach(model, torch.optim.SGD(model.parameters(), 0.1), share, example=example, total_steps=9).detach()


def test_version_help_and_lists() -> None:
    """The version is the package's; -h is --help, with examples; models are listed, and a wrong list has a hint."""
    assert invoke("--version").stdout.startswith(f"setpoint {setpoint.__version__}, torch ")
    for command in ("inspect", "report", "list"):
        shown = invoke(command, "-h").stdout
        assert shown == invoke(command, "--help").stdout and f"setpoint {command} " in shown.split("Examples:")[1]
    pytest.importorskip("torchvision")
    found = json.loads(invoke("list", "models", "resnet1", "--json").stdout)["models"]
    assert "torchvision:resnet18" in found and "torchvision:vgg11" not in found
    assert "did you mean models?" in invoke("list", "model").stderr
    assert "did you mean resnet18" in invoke("list", "models", "resnett18").stderr
    assert "contains 'qqqqqqqqq': leave the word out to list all models" in invoke("list", "models", "qqqqqqqqq").stderr


def test_inspect_writes_nothing_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --out no file appears; a dict of inputs will do; a shape beside them is an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "model.py").write_text(OWN_MODEL, encoding="utf-8")
    found = answer("inspect", "model.py:keywords", "--no-verify")
    assert found["inputs"] == [[2, 8]]
    assert found["verified"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["model.py"]
    assert "leave out --input" in invoke("inspect", "model.py:keywords", "--input", "2,8").stderr
    assert answer("inspect", "model.py:bare", "--input", "4,8")["inputs"] == [[4, 8]]


def test_a_name_that_is_unknown_says_what_it_is_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's name and a file's without its ending are told as such."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model.py").write_text(OWN_MODEL, encoding="utf-8")
    (tmp_path / "bert_small").mkdir()
    (tmp_path / "bert_small" / "config.json").write_text("{}", encoding="utf-8")
    assert "write ./bert_small for the folder" in invoke("inspect", "bert_small").stderr
    refused = invoke("compress", "my_model:build", "--data", "my_model.py:build", "--budget", "50%")
    for result in (invoke("inspect", "my_model:build"), refused):
        assert result.exit_code == 2 and "did you mean my_model.py:build?" in result.stderr
    (tmp_path / "bert_small" / "net.py").write_text(OWN_MODEL, encoding="utf-8")
    assert "did you mean bert_small/net.py:build?" in invoke("inspect", "bert_small.net:build").stderr


def test_help_is_light() -> None:
    """`--help` needs neither the benchmark nor the report."""
    code = (
        "import sys\nfrom setpoint.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = ('setpoint_bench.', 'setpoint.report', 'rich.progress')\n"
        "print([name for name in sys.modules if name.startswith(heavy) and name != 'setpoint_bench.commands'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("compress", "bench", "report", "inspect"):
        assert command in done.stdout


def test_without_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where setpoint-bench is not installed, own models are inspected, and what it adds is said in the help and in one
    line which package to install; a folder or a file that holds no run is named.
    """
    monkeypatch.setattr("setpoint.cli.entry_points", lambda **_: EntryPoints(()))
    for name in [each for each in sys.modules if each.partition(".")[0] == "setpoint_bench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "setpoint_bench", None)
    file, results = tmp_path / "model.py", tmp_path / "results"
    file.write_text(OWN_MODEL, encoding="utf-8")
    results.mkdir()
    (results / "results.jsonl").touch()
    (tmp_path / "results.jsonl.txt").write_text("{}\n", encoding="utf-8")

    def invoke_alone(*arguments: str) -> Result:
        return CliRunner().invoke(make_app(), arguments)

    shown = invoke_alone("inspect", f"{file}:build", "--no-verify")
    assert shown.exit_code == 0 and shown.stdout.startswith(f"{file}:build on 2x8: ")
    assert "pip install setpoint-bench" in " ".join(invoke_alone("--help").stdout.split())
    for arguments, words in (
        (("inspect", "resnet18"), "is part of the benchmark, a package of its own: pip install setpoint-bench"),
        (("report", str(results)), "is part of the benchmark, a package of its own: pip install setpoint-bench"),
        (("report", str(tmp_path / "results.jsonl.txt")), "is not a Setpoint ledger of format 1: give a file that"),
        (("report", str(tmp_path)), "run.jsonl cannot be read: there is no such file"),
    ):
        result = invoke_alone(*arguments)
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and result.stdout == "" and line.startswith("error: ") and words in line


def test_a_model_is_compressed(tmp_path: Path) -> None:
    """`compress` cuts the model of a file to a budget and writes it; a budget or function that is none is one line."""
    own = tmp_path / "own.py"
    own.write_text(OWN_MODEL + "\ndef batches():\n    return [(torch.randn(50, 8), None)]\n")
    arguments = ["compress", f"{own}:build", "--data", f"{own}:batches"]
    tried = invoke(*arguments, "--budget", "0.5", "--json")
    assert tried.stderr.startswith("a trial: without --out DIR the small model is not kept\nloading model and data ...")
    assert "gathering moments ..." in tried.stderr
    half = json.loads(tried.stdout)
    assert half["resource"] == "flops" and half["limit"] == 0.5 * half["before"]["flops"]
    found = answer(*arguments, "--budget", "50% params", "--out", tmp_path / "out")
    small = setpoint.load(
        tmp_path / "out" / "model.safetensors", into=nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4))
    )
    assert (
        found["widths"] == {"0": small[0].out_features} and found["after"]["params"] <= 0.5 * found["before"]["params"]
    )
    for wrong, said in (
        ([*arguments, "--budget", "8 ms latency"], "compress takes"),
        (
            [*arguments[:1], "/nowhere.py:build", *arguments[2:], "--budget", "half"],
            "the budget 'half' is not understood",
        ),
        ([*arguments[:3], f"{own}:no", "--budget", "50% flops"], "no function"),
        (
            [*arguments[:3], f"{own}:bare", "--budget", "50%"],
            "data is a Sequential: give batches, a DataLoader or another iterable of them",
        ),
        ([*arguments[:3], f"{own}:number", "--budget", "50%"], "data is an int: give batches"),
        (
            ["compress", "resnet18", *arguments[2:], "--budget", "50% flops"],
            "'resnet18' names no function: give a function",
        ),
    ):
        result = invoke(*wrong)
        assert result.exit_code == 2 and said in result.stderr


def test_a_model_is_timed(tmp_path: Path) -> None:
    """`time` shows what cut copies take in each runtime, in lines of a terminal, and says what it does from the start;
    --json and --out have the same numbers; a runtime that is none is one line, before the file is run.
    """
    own = tmp_path / "own.py"
    own.write_text(OWN_MODEL.replace("20", "64") + "\nprint('work has begun')\n")
    shown = invoke("time", f"{own}:build", "--runtime", "eager,onnxruntime")
    assert shown.exit_code == 0, shown.output
    assert shown.stderr.startswith("starting eager ...\nstarting onnxruntime ...\n")
    assert "onnxruntime, 1 thread, inputs 2x8\n" in shown.stdout and '"50% flops" gives about' in shown.stdout
    assert max(map(len, shown.stdout.splitlines()[:-1])) <= 80
    found = answer("time", f"{own}:build", "--threads", "2", "--out", tmp_path / "out")
    assert found == json.loads((tmp_path / "out" / "time.json").read_text())
    (timing,) = found["timings"]
    assert (timing["runtime"], timing["threads"], timing["without_int8"]) == ("onnxruntime", 2, "")
    for wrong, said in (
        (["--runtime", "onxruntime"], "did you mean onnxruntime"),
        (["--runtime", "eager", "--threads", "2"], "set OMP_NUM_THREADS=2 instead of --threads"),
    ):
        refused = invoke("time", f"{own}:build", *wrong)
        assert refused.exit_code == 2 and said in refused.stderr
        assert "work has begun" not in refused.output


def test_a_cut_model_is_exported(tmp_path: Path) -> None:
    """`export` writes the file of a cut model, says how near its outputs are, and with --time shows dense and cut in
    five lines; what cannot be written is one line, before the file of the model is run.
    """
    own = tmp_path / "own.py"
    own.write_text(OWN_MODEL.replace("20", "64") + "\ndef batches():\n    return [(torch.randn(50, 8), None)]\n")
    cut = "--data", f"{own}:batches", "--budget", "50%", "--out", tmp_path
    assert invoke("compress", f"{own}:build", *cut).exit_code == 0
    weights = "--weights", tmp_path / "model.safetensors"
    shown = invoke("export", f"{own}:build", *weights, "--to", "onnx", "--out", tmp_path / "net.onnx", "--time")
    assert shown.exit_code == 0, shown.output
    said, *table, then = shown.stdout.splitlines()
    assert "net.onnx: its outputs are PyTorch's, but for" in said and (tmp_path / "net.onnx").stat().st_size > 100
    assert len(table) == 4 and table[0].startswith("onnxruntime, 1 thread, inputs 2x8") and "int8" in table[1]
    assert "open_file(" in then and max(map(len, table)) <= 80
    found = answer("export", f"{own}:build", "--to", "openvino", "--out", tmp_path / "net.xml")
    assert found["difference"] < 1e-3 and sorted(found) == ["difference", "file"]
    own.write_text("def build():\n    raise AssertionError('work has begun')\n")
    for wrong, words in (
        (["--to", "onx"], "did you mean onnx"),
        (["--to", "onnx", "--out", tmp_path / "net.xml"], "ends with .onnx: name it"),
        (["--to", "onnx", "--weights", tmp_path / "gone"], "no file"),
    ):
        refused = invoke("export", f"{own}:build", *wrong)
        assert refused.exit_code == 2 and words in refused.stderr


def test_what_a_users_file_prints_is_no_json(tmp_path: Path) -> None:
    """With --json all of stdout is the answer, whatever the file that makes the model prints."""
    (tmp_path / "net.py").write_text(
        "import torch\nprint('loading')\n"
        "def build():\n"
        "    print('building')\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))\n"
    )
    result = invoke("inspect", f"{tmp_path / 'net.py'}:build", "--input", "2,4", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["groups"]
    assert "loading" in result.stderr and "building" in result.stderr


PROGRAM = """
import sys, torch
from torch import nn
import beside
model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4))
model.load_state_dict(torch.load(sys.argv[1]))
print("widths", model[0].out_features, __name__, sys.argv[1:])

def main():
    return 7

if "--fail" in sys.argv:
    sys.exit(main())
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a program that knows nothing of Setpoint, and the state of a cut model."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "beside.py").write_text("", encoding="utf-8")
    for heavy in ("transformers", "diffusers"):
        (tmp_path / f"{heavy}.py").write_text("raise ImportError", encoding="utf-8")
    (tmp_path / "shell").write_text("#!/bin/sh\n", encoding="utf-8")
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4))
    (group,) = setpoint.find_groups(model, (torch.zeros(2, 8),))
    setpoint.shrink(model, None, (group,), {group.name: [n < 12 for n in range(20)]})
    torch.save(model.state_dict(), tmp_path / "small.pt")
    package = tmp_path / "tool-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: tool\nVersion: 1\n", encoding="utf-8")
    (package / "entry_points.txt").write_text("[console_scripts]\ntool = program:main\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(Path(setpoint.__file__).parents[1]))
    return tmp_path


def run_in(folder: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "setpoint", "run", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("words", [["program.py"], ["--", "python", "program.py"], ["python", "-m", "program"]])
def test_run_lets_a_program_load_a_cut_model(words: list[str], program: Path) -> None:
    """A program that builds the dense model loads a cut state, with its own arguments, neighbours and exit code."""
    # As the console script starts, without the working folder on the path.
    done = run_in(program, *words, "small.pt", "--fail", options=("-P",))
    assert done.returncode == 7, done.stderr
    assert done.stdout == "widths 12 __main__ ['small.pt', '--fail']\n"


@pytest.mark.parametrize("words", [["fails.py"], ["python", "-m", "fails"]])
def test_errors_of_a_program_look_as_without_run(words: list[str], program: Path) -> None:
    """An exception and Ctrl-C end a program with its own traceback, without frames of Typer and Setpoint."""
    (program / "fails.py").write_text("import sys\ndef f():\n    raise eval(sys.argv[1])\nf()\n")
    for error, code in (("ValueError", 1), ("KeyboardInterrupt", 130)):
        done = run_in(program, *words, error)
        assert done.returncode == code and done.stderr.startswith("Traceback") and done.stderr.endswith(f"{error}\n")
        assert done.stderr.count("File ") == 2 and done.stderr.count("fails.py") == 2, done.stderr


def test_run_starts_a_command_of_a_package_and_names_what_it_cannot_run(program: Path) -> None:
    """A console script's return value is the exit code; what is missing or no Python is one line and exit code 2."""
    assert run_in(program, "tool", "small.pt").returncode == 7
    for words, message in (
        (["nothing"], "'nothing' is no file, and no command of a Python package"),
        (["./shell"], "is no Python program"),
        (["python", "-m", "no_such_module"], "there is no module 'no_such_module'"),
        (["python", "-m", "no_such.module"], "there is no module 'no_such.module'"),
        (["python"], "got 'python': leave out options"),
        (["python", "-u", "program.py"], "such as PYTHONUNBUFFERED=1"),
    ):
        done = run_in(program, *words)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
