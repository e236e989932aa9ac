"""Tried: which groups' cuts behave, as was found out on copies of this model, or of an equal one before."""

from __future__ import annotations

import json

from torch import nn

from setpoint.actuator.verify import failing_groups, few_rows
from setpoint.cache import keep, recall
from setpoint.errors import ExampleError
from setpoint.groups.encoded import encode_groups
from setpoint.groups.example import Example
from setpoint.groups.fingerprint import digest
from setpoint.groups.group import Group
from setpoint.under_way import under_way


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


def _found(model: nn.Module, example: Example, groups: tuple[Group, ...], key: str) -> tuple[tuple[str, ...], float]:
    few, share = few_rows(example)
    with under_way("trying every cut on copies"):
        try:
            failed = failing_groups(model, few, groups)
        except ExampleError:
            if share == 1.0:
                raise
            share, failed = 1.0, failing_groups(model, example, groups)
    if not failed:  # a failure may come from numbers of this example, such as NaN, which the key does not hold
        keep(key, {"share": share})
    return failed, share
