"""Command: a program that is given the exported model and prints seconds; what it prints instead is refused."""

from __future__ import annotations

import gc
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from setpoint.errors import BudgetError, ExportError, RuntimeUnavailable
from setpoint.runtimes import Command, as_runtime, open_file

MODEL, EXAMPLE = nn.Linear(4, 2).eval(), (torch.ones(1, 4),)


def program(code: str) -> str:
    """A command that runs Python code; the model's path is `sys.argv[1]`."""
    return f"{shlex.quote(sys.executable)} -c {shlex.quote('import sys, time; ' + code)} {{model}}"


def reading(code: str) -> float:
    return Command(program(code)).load(MODEL, EXAMPLE)()


@pytest.mark.parametrize(
    ("printed", "seconds"),
    [
        ("0.002", 0.002), ("12.5 ms", 0.0125), ("[I] mean = 3ms\\n\\n", 0.003), ("1\\n80 us", 8e-5), ("2e-3s", 2e-3),
        ("900 s", 900.0),
    ],
)  # fmt: skip
def test_the_last_line_ends_with_the_seconds(printed: str, seconds: float) -> None:
    """Claim: a number at the end of the last line is read, in its unit."""
    assert reading(f"print('{printed}')") == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print()", "printed no seconds"),
        ("print('done at 12:34:0.002')", "printed no seconds, its last line is 'done at 12:34:0.002'"),
        ("print('810 qps')", "printed no seconds, its last line is '810 qps'"),
        ("print('-3 ms')", "no time"),
        ("print(0)", "no time"),
        ("print('nan')", "no time"),
        ("print('inf s')", "no time"),
        ("print(125.0)", "without a unit.*such as 125 ms"),
        ("sys.exit('no device')", "exit status 1: 'no device'"),
    ],
)
def test_nonsense_is_refused(code: str, words: str) -> None:
    """Claim: what is no time of a forward, and a program that fails, are refused with what was printed."""
    with pytest.raises(RuntimeUnavailable, match=words):
        reading(code)


def test_a_command_is_checked_before_it_runs() -> None:
    """Claim: a command without {model}, an unknown format, a program that is missing or hangs are refused by name."""
    for wrong, words in (
        (lambda: Command("bench model.onnx"), "has no {model}"),
        (lambda: Command("bench '{model}"), "cannot be split"),
        (lambda: Command(["bench", "{model}"]), r"a command is a text.*got \['bench'"),  # type: ignore[arg-type]
        (lambda: Command("bench {model}", timeout_s=0), "timeout_s is a number of seconds above 0, got 0"),
        (lambda: Command("bench {model}", format="onx"), "unknown format 'onx': did you mean onnx"),
    ):
        with pytest.raises(BudgetError, match=words):
            wrong()
    with pytest.raises(RuntimeUnavailable, match="no-such-program cannot be started: No such file"):
        Command("no-such-program {model}").load(MODEL, EXAMPLE)()
    with pytest.raises(RuntimeUnavailable, match=r"did not end within 0.2 s"):
        Command(program("time.sleep(60)"), timeout_s=0.2).load(MODEL, EXAMPLE)()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_a_program_has_started_ends_with_it(tmp_path: Path) -> None:
    """Claim: after the time limit no child of the program runs on."""
    child, pids = "import os, time; open(r'{0}', 'w').write(str(os.getpid())); time.sleep(60)", tmp_path / "pid"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child.format(pids)!r}])"
    with pytest.raises(RuntimeUnavailable, match="did not end"):
        Command(program(code), timeout_s=5).load(MODEL, EXAMPLE)()
    for _ in range(50):  # until the system has noticed
        state = Path(f"/proc/{pids.read_text()}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("it runs on")


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_the_program_gets_a_file_of_that_format(kind: str, tmp_path: Path) -> None:
    """Claim: the file can be read, is the same in every reading, and is gone with the forward."""
    note, copied = tmp_path / "paths", tmp_path / f"copy.{kind}"
    code = "import shutil; p, note, copied = sys.argv[1:]; open(note, 'a').write(p + chr(10)); shutil.copy(p, copied); "
    code += "print('1 ms')"
    runtime = Command(f"{program(code)} {note} {copied}", format=kind)
    assert as_runtime(runtime) is runtime
    forward = runtime.load(MODEL, EXAMPLE)
    assert forward() == forward() == 1e-3
    first, second = map(Path, note.read_text().split())
    assert first == second
    assert first.suffix == f".{kind}"
    assert first.is_file()
    if kind == "pt2":
        assert torch.equal(torch.export.load(copied).module()(*EXAMPLE)[0], MODEL(*EXAMPLE))
    else:
        assert torch.allclose(open_file(copied, EXAMPLE).outputs()[0], MODEL(*EXAMPLE))
    del forward
    gc.collect()
    assert not first.parent.exists()


def test_what_cannot_be_exported_is_named() -> None:
    """Claim: a missing package is named with its `pip install`, and a model that does not export by its class."""
    with pytest.raises(RuntimeUnavailable, match="pip install litert-torch"):
        Command("bench {model}", format="tflite").load(MODEL, EXAMPLE)

    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="Branches cannot be exported to pt2"):
        Command("bench {model}", format="pt2").load(Branches(), EXAMPLE)
