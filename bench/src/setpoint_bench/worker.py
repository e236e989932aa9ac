"""A worker: one cell trained in a fresh interpreter, which tells how far it is and ends with its maker."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from setpoint.errors import SetpointError
from setpoint_bench.fingerprint import fingerprint
from setpoint_bench.method import Method, method_named
from setpoint_bench.results import Result
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError, Split
from setpoint_bench.training import Cell, Progress, train

LOG = "log.txt"
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Failure:
    """A cell that could not be finished."""

    cell: str
    error: str


class Worker:
    """A process at work on one cell.

    What the process prints goes to `log.txt` in the cell's folder. It ignores Ctrl-C, which reaches
    the whole group of processes at once: its maker stops it. Should the maker die, its next turn ends it.

    Args:
        cell: what to train.
        out: folder of the results.
        needed: results that the cell needs, by method.
        threads: processor threads that it may use.
        make_task: makes the cell's task there; None where it can be sent.
        own_method: `module.py:function` that makes its method there; None where it can be sent.
    """

    def __init__(
        self,
        cell: Cell,
        out: Path,
        needed: Mapping[str, Result],
        threads: int,
        make_task: Callable[[], SimpleTask] | None = None,
        own_method: str | None = None,
    ) -> None:
        self.cell, self._log = cell, out / cell.name / LOG
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe(duplex=False)
        known = "" if make_task is None else fingerprint(cell.task)
        method = own_method or cell.method
        order = _Order(cell.name, make_task or cell.task, method, cell.budget, cell.seed, cell.split, known)
        self._process = context.Process(
            target=_train,
            args=(order, out, dict(needed), threads, theirs),
            daemon=True,
            name=cell.name,
        )
        self._process.start()
        theirs.close()  # so that its end is seen when the process dies

    def receive(self) -> Progress | Result | Failure:
        """The next message; after a result or a failure the process is gone."""
        try:
            message: Progress | Result | Failure = self.pipe.recv()
        except EOFError:
            self._process.join()
            told = f"; see {self._log}" if self._log.exists() and self._log.stat().st_size else ""
            message = Failure(self.cell.name, f"its process died ({_ending(self._process.exitcode)}){told}")
        if not isinstance(message, Progress):
            self.stop()
        return message

    def stop(self) -> None:
        """End the process, at once if it does not end by itself."""
        self.pipe.close()
        if self._process.is_alive():
            self._process.join(0.5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        if self._log.exists() and not self._log.stat().st_size:
            self._log.unlink()


@dataclass(frozen=True)
class _Order:
    """A cell on its way to another process: its task and method or what makes them, and a made task's fingerprint."""

    name: str
    task: SimpleTask | Callable[[], SimpleTask]
    method: Method | str
    budget: float | None
    seed: int
    split: Split
    fingerprint: str

    def cell(self) -> Cell:
        """The cell again.

        Raises:
            BenchError: the task was made again and is another one.
        """
        task = self.task if isinstance(self.task, SimpleTask) else self.task()
        if self.fingerprint and fingerprint(task) != self.fingerprint:
            raise BenchError(
                f"{task.name} is made again for every run, and its data or model came out different: draw whatever is "
                "random in it from a generator with a seed of its own"
            )
        method = method_named(self.method) if isinstance(self.method, str) else self.method
        return Cell(task, method, self.budget, self.seed, self.split)


def _train(order: _Order, out: Path, needed: Mapping[str, Result], threads: int, pipe: Connection) -> None:
    """Train the cell in this process, and send what there is to tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    name = order.name
    log = out / name / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(max(1, min(threads, torch.get_num_threads())))
    with suppress(BrokenPipeError):  # nobody is left to hear it
        try:
            pipe.send(_result(order.cell(), out, needed, pipe))
        except BrokenPipeError:
            raise
        except SetpointError as error:
            pipe.send(Failure(name, " ".join(str(error).split())))
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            told = " ".join(f"{type(error).__name__}: {error}".split())
            pipe.send(Failure(name, f"{told} (all of it in {log})"))


def _result(cell: Cell, out: Path, needed: Mapping[str, Result], pipe: Connection) -> Result:
    """The cell's result, with the task's own length and the kind of clock that its seconds come from."""
    training = train(cell, out, needed)
    while True:
        try:
            pipe.send(next(training))
        except StopIteration as end:
            result: Result = end.value
            return replace(result, task_steps=cell.task.steps, clock="shared")


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"{signal.Signals(-code).name}{', out of memory?' if -code == 9 else ''}"
    return f"signal {-code}"
