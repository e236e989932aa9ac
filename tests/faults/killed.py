"""Trains a small model again and again, kills the process with SIGKILL, resumes, and compares the final weights.

python tests/faults/killed.py --count 50
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import setpoint
import setpoint.actuator.shrink
import setpoint.checkpoint.model_file
from setpoint.controller.schedule import Schedule

STEPS, EVERY = 60, 3
KINDS = ("at any time", "inside a resize", "inside a save", "between steps")


def build(verify: bool) -> dict[str, Any]:
    """A run at its beginning: dropout, batch norm, an averaged copy, units that come back."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3)
    )
    optimizer, ema = torch.optim.AdamW(model.parameters(), lr=0.01), AveragedModel(model)
    loop = setpoint.attach(
        model,
        optimizer,
        setpoint.Budget.fraction(0.4, of="params"),
        example=(torch.zeros(16, 8),),
        total_steps=STEPS,
        controller=setpoint.PricedController(
            Schedule(0.0, 0.5, 0.8, num_cuts=10), regrow=True, dwell=1, min_density=0.0
        ),
        copies=(ema,),
        verify=verify,
    )
    return {"model": model, "optimizer": optimizer, "ema": ema, "loop": loop}


def train(folder: Path, verify: bool = False, at_step: Callable[[int], None] = lambda step: None) -> None:
    """Go on from the last run file, if there is one, to the end, and write the final weights."""
    parts, path = build(verify), folder / "run"
    torch.manual_seed(1)
    if path.exists():
        torch.set_rng_state(setpoint.load_run(path, **parts)["rng"])
    model, optimizer, loop = parts["model"], parts["optimizer"], parts["loop"]
    while loop.step < STEPS:
        x = torch.randn(16, 8)
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long() + (x[:, 1] > 1).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
        parts["ema"].update_parameters(model)
        at_step(loop.step)
        if loop.step % EVERY == 0:
            setpoint.save_run(path, **parts, rng=torch.get_rng_state())
    ends = {**model.state_dict(), **{f"ema.{name}": value for name, value in parts["ema"].state_dict().items()}}
    origins = {f"origin.{name}": torch.from_numpy(origin) for name, origin in loop.origin.items()}
    setpoint.save_run(folder / "end", weights={**ends, **origins}, resizes=loop.finish().resizes)


def kill() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(function: Callable[..., Any], number: int, left: list[int]) -> Callable[..., Any]:
    """The function, which ends the process before or after one of its calls."""

    def run(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == -number and number % 2:
            kill()
        result = function(*args, **kwargs)
        if left[0] == -number:
            kill()
        return result

    return run


def child(folder: Path, kind: str, chance: random.Random) -> None:
    """Train in a process that ends itself at a moment of this kind."""
    number, left, stop = chance.randrange(1, 30), [0], chance.randrange(STEPS)
    if kind == "inside a resize":
        setpoint.actuator.shrink.swap = killed_at(setpoint.actuator.shrink.swap, number, left)
    if kind == "inside a save":
        os.fsync, os.replace = killed_at(os.fsync, number, left), killed_at(os.replace, number, left)
        setpoint.checkpoint.model_file.save_file = killed_at(setpoint.checkpoint.model_file.save_file, number, left)
    train(folder, at_step=lambda step: kill() if kind == "between steps" and step == stop else None)


def run_in_child(work: Callable[[], None], after_s: float | None = None) -> bool:
    """Run in a process of its own, kill it after some seconds, if given; whether it was killed."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise SystemExit("a run failed by itself")
    return False


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended alike."""
    first, second = (setpoint.load_run(each / "end") for each in (one, other))
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]] = first["weights"], second["weights"]
    if list(tensors[0]) != list(tensors[1]) or first["resizes"] != second["resizes"]:
        return False
    return all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def main() -> None:
    """Kill `--count` runs, and say how many came to the same end as the run that was left alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance, alike, kills = random.Random(options.seed), 0, dict.fromkeys(KINDS, 0)
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        whole.mkdir()
        began = time.perf_counter()
        run_in_child(lambda: train(whole, verify=True))
        run_s = time.perf_counter() - began
        for number in range(options.count):
            folder = Path(name) / str(number)
            folder.mkdir()
            for attempt in range(1 + chance.randrange(3)):
                kind = KINDS[(number + attempt) % len(KINDS)]
                after_s = chance.random() * run_s if kind == "at any time" else None
                kills[kind] += run_in_child(lambda kind=kind, folder=folder: child(folder, kind, chance), after_s)  # type: ignore[misc]
                chance.random()
            run_in_child(lambda folder=folder: train(folder))  # type: ignore[misc]
            alike += same(whole, folder)
        resizes = setpoint.load_run(whole / "end")["resizes"]
    said = ", ".join(f"{count} {kind}" for kind, count in kills.items())
    print(f"{alike} of {options.count} runs ended alike; {resizes} resizes each; kills: {said}")
    sys.exit(alike != options.count)


if __name__ == "__main__":
    main()
