"""The `shakespeare` task with dropout: whether that suits its dense model is asked of validation data.

setpoint bench --task bench/benchmarks/dropout.py:dropout --methods dense --seeds 0 --split validation --out runs/tuning
"""

from __future__ import annotations

from dataclasses import replace

from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.tasks.shakespeare import GPTFamily, shakespeare


def dropout() -> SimpleTask:
    """A tenth of the embedding and of what each layer adds is dropped in training."""
    task = shakespeare()
    assert isinstance(task.family, GPTFamily)
    return replace(task, name="shakespeare-dropout-0.1", family=replace(task.family, dropout=0.1))
