"""A program that times an exported model: on a phone, on a board, or in another runtime."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from setpoint.errors import BudgetError, RuntimeUnavailable
from setpoint.groups.example import Example
from setpoint.messages import did_you_mean
from setpoint.runtimes.files import ByTensor, needs, written
from setpoint.runtimes.onnx import write_onnx
from setpoint.runtimes.runtime import Forward

_SECONDS = re.compile(
    r"(?:^|[\s=]|(?<!\d):)([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|[+-]?inf)\s*(s|ms|us)?$", re.IGNORECASE
)
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class Command:
    """A program that runs an exported model and prints the seconds of one forward.

    The last line of its output ends with them: `0.0123`, `12.3 ms` or `mean = 12.3 ms`; without a unit they are
    seconds. The program is started once a reading, without a shell, so it should make some forwards and print their
    typical time. What has to be copied to a phone first, a script of your own copies.

    Args:
        command: with `{model}` where the path of the file stands, such as "./on_phone.sh {model}".
        format: of the file: "onnx", "pt2" (`torch.export.save`) or "tflite".
        timeout_s: after which the program is stopped.

    Raises:
        BudgetError: the command has no `{model}`, or the format is unknown.

    >>> Command("./on_phone.sh {model}").format
    'onnx'
    """

    command: str
    format: str = "onnx"
    timeout_s: float = 600.0
    name = "command"

    def __post_init__(self) -> None:
        if not isinstance(self.command, str):
            raise BudgetError(f"a command is a text, such as './on_phone.sh {{model}}', got {self.command!r}")
        if not (isinstance(self.timeout_s, (int, float)) and self.timeout_s > 0):
            raise BudgetError(f"timeout_s is a number of seconds above 0, got {self.timeout_s!r}")
        if self.format not in _WRITERS:
            raise BudgetError(
                f"unknown format {self.format!r}: {did_you_mean(self.format, _WRITERS)}use one of {', '.join(_WRITERS)}"
            )
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise BudgetError(f"the command {self.command!r} cannot be split into words: {error}") from error
        if not any("{model}" in word for word in words):
            raise BudgetError(
                f"the command {self.command!r} has no {{model}}: write it where the path of the exported model stands"
            )

    def load(self, model: nn.Module, example: Example) -> Forward:
        by_tensor = ByTensor(model, example)
        folder = Path(tempfile.mkdtemp())
        file = folder / f"model.{self.format}"
        words = [word.replace("{model}", str(file)) for word in shlex.split(self.command)]

        def forward() -> float:
            return self._seconds(words)

        weakref.finalize(forward, shutil.rmtree, folder, ignore_errors=True)
        written(_WRITERS[self.format], by_tensor, file, self.format)
        return forward

    def _seconds(self, words: list[str]) -> float:
        began = time.perf_counter()
        try:
            run = _run(words, self.timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeUnavailable(
                f"{words[0]} did not end within {self.timeout_s:g} s: give a larger timeout_s, or make fewer forwards"
            ) from error
        except OSError as error:
            raise RuntimeUnavailable(
                f"the program {words[0]} cannot be started: {error.strerror}; give the path of a program"
            ) from error
        if run.returncode:
            raise RuntimeUnavailable(
                f"{words[0]} failed with exit status {run.returncode}: {_last_line(run.stderr or run.stdout)!r}; "
                f"try it by hand: {self.command}"
            )
        line = _last_line(run.stdout)
        found = _SECONDS.search(line)
        if found is None:
            raise RuntimeUnavailable(
                f"{words[0]} printed no seconds, its last line is {line!r}: end it with a number in s, ms "
                "or us, such as 12.3 ms"
            )
        number, unit = float(found[1]), (found[2] or "").lower()
        seconds = number * _UNITS.get(unit, 1.0)
        if not (math.isfinite(seconds) and seconds > 0):
            raise RuntimeUnavailable(
                f"{words[0]} printed {found[0].strip()!r}, which is no time: print positive seconds"
            )
        took_s = time.perf_counter() - began
        if not unit and seconds > took_s:
            raise RuntimeUnavailable(
                f"{words[0]} printed {number:g} without a unit, which means seconds, but ended after {took_s:.2g} s: "
                f"print the unit, such as {number:g} ms"
            )
        return seconds


def _run(words: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; where that does not come, what the program has started ends with it."""
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as run:
        try:
            output, errors = run.communicate(timeout=timeout_s)
        except BaseException:
            with suppress(ProcessLookupError):  # it may have ended by now
                os.killpg(run.pid, signal.SIGKILL) if hasattr(os, "killpg") else run.kill()
            raise
    return subprocess.CompletedProcess(words, run.returncode, output, errors)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _write_pt2(model: ByTensor, file: Path) -> None:
    torch.export.save(torch.export.export(model, tuple(model.inputs.values())), file)


def _write_tflite(model: ByTensor, file: Path) -> None:
    with needs("tflite", "litert-torch"):
        import litert_torch
    program: Any = litert_torch.convert(model, tuple(model.inputs.values()))
    program.export(str(file))


_WRITERS = {"onnx": write_onnx, "pt2": _write_pt2, "tflite": _write_tflite}
