"""A sweep: every model of a suite checked, each in a process of its own kind, with what came out as one record."""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from setpoint.bench.coverage import Build, Verdict, check
from setpoint.bench.task import BenchError

SUITES = ("torchvision", "timm", "transformers", "plain")
"""Families that can be swept."""
_MODELS_PER_PROCESS = 12
"""A fresh process now and then, so that what one model left behind cannot reach all others."""


def suite_named(name: str) -> Mapping[str, Build]:
    """The models of a suite, by name.

    Raises:
        BenchError: for a name that is none of `SUITES`, or a library that is not installed.
    """
    if name not in SUITES:
        raise BenchError(f"unknown suite {name!r}: choose one of {', '.join(SUITES)}")
    try:
        suite: Mapping[str, Build] = importlib.import_module(f"setpoint.bench.suites.{name}").suite()
        if name != "plain":
            importlib.import_module(name)
    except ImportError as error:
        raise BenchError(f'the {name} suite needs {name}: pip install "setpoint[suites]"') from error
    return suite


def sweep(
    name: str, models: Sequence[str] | None = None, *, workers: int = 2, after: Callable[[Verdict], None] = print
) -> tuple[Verdict, ...]:
    """Check the models of a suite, `workers` at a time, each on one thread.

    Args:
        name: the suite.
        models: which of its models; by default all.
        workers: processes at work.
        after: called with each verdict as it comes, in the order of the suite.

    Raises:
        BenchError: for an unknown suite or model.
    """
    known = suite_named(name)
    unknown = [model for model in models or () if model not in known]
    if unknown:
        raise BenchError(f"suite {name} has no model {', '.join(unknown)}: leave --models out to check all of it")
    verdicts = []
    for verdict in _verdicts(name, list(known if models is None else models), workers):
        after(verdict)
        verdicts.append(verdict)
    return tuple(verdicts)


def _verdicts(name: str, models: list[str], workers: int) -> Iterator[Verdict]:
    context = multiprocessing.get_context("spawn")
    batch = workers * _MODELS_PER_PROCESS
    for first in range(0, len(models), batch):
        with ProcessPoolExecutor(workers, context, initializer=_warm_up) as pool:
            futures = {model: pool.submit(_check, name, model) for model in models[first : first + batch]}
            for model, future in futures.items():
                try:
                    yield future.result()
                except BrokenProcessPool:
                    yield Verdict(model, False, "its process died (out of memory?)")


def _warm_up() -> None:
    """One thread, and torch's exporter loaded: a discovery is timed without the import that the first one pays."""
    torch.set_num_threads(1)
    check("warm-up", lambda: (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),)))


def _check(name: str, model: str) -> Verdict:
    return check(model, suite_named(name)[model])


def summary(name: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The record of a sweep, as the command line's last line prints it."""
    passed = [verdict for verdict in verdicts if verdict.passed]

    def median(field: str) -> float | None:
        return statistics.median(getattr(verdict, field) for verdict in passed) if passed else None

    return {
        "suite": name,
        "passed": len(passed),
        "total": len(verdicts),
        "prunable_params_share_median": median("prunable_params_share"),
        "prunable_outside_embeddings_median": median("prunable_outside_embeddings"),
        "seconds_median": median("seconds"),
        "failures": [{"model": v.model, "reason": v.reason} for v in verdicts if not v.passed],
        "models": [asdict(verdict) for verdict in verdicts],
    }
