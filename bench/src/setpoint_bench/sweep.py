"""A sweep: the models of a suite checked, a few at a time in other processes, and what came of it as one record."""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from setpoint.messages import did_you_mean
from setpoint_bench.coverage import SEED, Build, Verdict, check
from setpoint_bench.environment import machine, package_version
from setpoint_bench.task import BenchError
from setpoint_bench.zoo import library_names

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
        raise BenchError(f"unknown suite {name!r}: {did_you_mean(name, SUITES)}choose one of {', '.join(SUITES)}")
    try:
        if name != "plain":
            library_names(name)
        suite: Mapping[str, Build] = importlib.import_module(f"setpoint_bench.suites.{name}").suite()
    except ImportError as error:
        raise BenchError(f"the {name} suite needs {name}: pip install setpoint-bench") from error
    return suite


def chosen_models(name: str, models: Sequence[str] | None = None) -> tuple[str, ...]:
    """Models of a suite to check.

    Raises:
        BenchError: for an unknown suite or model.
    """
    known = suite_named(name)
    unknown = [model for model in models or () if model not in known]
    if unknown:
        hint = "".join(did_you_mean(model, known) for model in unknown) or f"it has {', '.join(list(known)[:5])} ..."
        raise BenchError(f"suite {name} has no model {', '.join(unknown)}: {hint.strip()}")
    return tuple(known if models is None else dict.fromkeys(models))


def sweep(
    name: str,
    models: Sequence[str] | None = None,
    *,
    workers: int = 2,
    after: Callable[[Verdict], None] = lambda verdict: None,
) -> tuple[Verdict, ...]:
    """Check the models of a suite, `workers` at a time, each on one thread.

    Raises:
        BenchError: for an unknown suite or model.
    """
    verdicts = []
    for verdict in _verdicts(name, chosen_models(name, models), workers):
        after(verdict)
        verdicts.append(verdict)
    return tuple(verdicts)


def _verdicts(name: str, models: Sequence[str], workers: int) -> Iterator[Verdict]:
    if not workers:
        yield from (_check(name, model) for model in models)
        return
    batch = workers * _MODELS_PER_PROCESS
    for first in range(0, len(models), batch):
        with _pool(workers) as pool:
            futures = {model: pool.submit(_check, name, model) for model in models[first : first + batch]}
            for model, future in futures.items():
                try:
                    yield future.result()
                except BrokenProcessPool:
                    yield _alone(name, model)


def _alone(name: str, model: str) -> Verdict:
    with _pool(1) as pool:
        try:
            return pool.submit(_check, name, model).result()
        except BrokenProcessPool:
            return Verdict(model, False, "its process died (out of memory?)")


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_warm_up)


def _warm_up() -> None:
    """One thread, and torch's exporter loaded: a discovery is timed without the import that the first one pays."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    check("warm-up", lambda: (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),)))


def _check(name: str, model: str) -> Verdict:
    return check(model, suite_named(name)[model])


def summary(name: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What a sweep came to, as the command line prints it with --json; medians are over the models that passed."""
    passed = [verdict for verdict in verdicts if verdict.passed]

    def median(field: str) -> float | None:
        return statistics.median(getattr(verdict, field) for verdict in passed) if passed else None

    return {
        "suite": name,
        "passed": len(passed),
        "total": len(verdicts),
        "prunable_params_share_median": median("prunable_params_share"),
        "seconds_median": median("seconds"),
        "failures": [{"model": v.model, "reason": v.reason} for v in verdicts if not v.passed],
        "prunable_outside_embeddings_median": median("prunable_outside_embeddings"),
    }


def record(name: str, verdicts: Sequence[Verdict], workers: int) -> dict[str, Any]:
    """The summary of a sweep with every verdict, how many models were at work at a time, environment and date."""
    about: dict[str, Any] = machine()
    if name != "plain":
        about[name] = package_version(name)
    return {
        **summary(name, verdicts),
        "models": [asdict(verdict) for verdict in verdicts],
        "seed": SEED,
        "workers": workers,
        "environment": {**about, "threads": 1, "dtype": "float64"},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
