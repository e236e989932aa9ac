"""Tried: which groups' cuts behave, as was found out on copies of this model, or of an equal one before."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from setpoint.actuator.verify import failing_groups, few_rows
from setpoint.cache import keep, recall
from setpoint.errors import ExampleError
from setpoint.groups.encoded import encode_groups
from setpoint.groups.example import Example
from setpoint.groups.fingerprint import digest
from setpoint.groups.group import Group
from setpoint.under_way import under_way

_Found = TypeVar("_Found")


def tried(model: nn.Module, example: Example, groups: tuple[Group, ...], key: str) -> tuple[tuple[str, ...], float]:
    """Names of the groups that fail, and the share of the example that they were tried on.

    Args:
        key: the model's fingerprint; "" where it has none.
    """
    key = digest(key, json.dumps(encode_groups(groups)))
    facts = recall(key)
    if isinstance(facts, dict) and isinstance(facts.get("share"), float):
        return (), facts["share"]
    return _found(model, example, groups, key)


def on_few_rows(find: Callable[[Example], _Found], example: Example) -> tuple[_Found, float]:
    """What is found on a few rows of the example, or on all where the model does not run on few; and their share."""
    few, share = few_rows(example)
    try:
        return find(few), share
    except ExampleError:
        if share == 1.0:
            raise
        return find(example), 1.0


def _found(model: nn.Module, example: Example, groups: tuple[Group, ...], key: str) -> tuple[tuple[str, ...], float]:
    with under_way("trying every cut on copies"):
        failed, share = on_few_rows(lambda rows: failing_groups(model, rows, groups), example)
    if not failed:  # a failure may come from numbers of this example, such as NaN, which the key does not hold
        keep(key, {"share": share})
    return failed, share
