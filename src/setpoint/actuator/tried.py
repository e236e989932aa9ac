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
    return _known(key, groups) or _found(model, example, groups, key)


def _known(key: str, groups: tuple[Group, ...]) -> tuple[tuple[str, ...], float] | None:
    facts, names = recall(key), {group.name for group in groups}
    right = isinstance(facts, dict) and isinstance(facts.get("failed"), list) and isinstance(facts.get("share"), float)
    return (tuple(facts["failed"]), facts["share"]) if right and set(map(str, facts["failed"])) <= names else None


def _found(model: nn.Module, example: Example, groups: tuple[Group, ...], key: str) -> tuple[tuple[str, ...], float]:
    few, share = few_rows(example)
    with under_way("trying every cut on copies"):
        try:
            failed = failing_groups(model, few, groups)
        except ExampleError:
            if share == 1.0:
                raise
            share, failed = 1.0, failing_groups(model, example, groups)
    keep(key, {"failed": list(failed), "share": share})
    return failed, share
