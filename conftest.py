"""What every test shares: fixed seeds, one thread, and quiet markers for what a machine lacks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import nn

from typechecker import begin_test, leave_nested_functions

leave_nested_functions()
settings.register_profile("setpoint", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("setpoint")

SLOW = Path(__file__).parent / "tests" / "slow.txt"
"""Tests by their names: each takes seconds, and others of its kind are run by `make test`."""

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def determinism() -> Iterator[None]:
    """Start each test from the same seeds and give the global settings back afterwards."""
    begin_test()
    random.seed(0)
    np.random.seed(0)
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:  # manual_seed() keeps a formatted stack of each call until CUDA starts, which is never
        torch.default_generator.manual_seed(0)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    load = nn.Module.load_state_dict
    yield
    nn.Module.load_state_dict = load  # type: ignore[method-assign]  # setpoint.enable_checkpointing() wraps it
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what tests/slow.txt lists, and skip what is marked `gpu` where there is no accelerator."""
    listed = set(SLOW.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker("slow")
    if torch.accelerator.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator on this machine"))
