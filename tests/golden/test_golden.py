"""Golden ledgers: seeded short runs of every kind decide, count, say and train what they did when they were recorded.

`python tests/golden/check.py NAMES` does the same from a shell; tests/golden/record.py says when to record anew.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from golden import kept
from golden.compare import differences
from golden.play import NAMES, kept_as

RECORDED, WHERE = kept.read()

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork and no gloo")


@pytest.fixture(scope="module")
def said() -> str:
    """What check.py says of all runs: it plays them in a process that has made no gradients and checks no types."""
    command = [sys.executable, str(Path(__file__).with_name("check.py"))]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=settings)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_as_it_was(name: str, said: str) -> None:
    """Claim: header, plans, numbers, weights and words of this run are the recorded ones."""
    of_run = re.search(rf"^{name}: .*(\n    .*)*", said, re.MULTILINE)
    assert of_run is not None, said
    assert of_run[0].startswith(f"{name}: ok ("), of_run[0]


def test_everything_that_is_played_is_recorded() -> None:
    """Claim: no run is without a record, no record without a run, and the digests are those of the facts."""
    assert set(RECORDED) == {kept_as(name) for name in NAMES}
    assert kept.read_digests() == {name: kept.digests_of(facts) for name, facts in RECORDED.items()}


def test_the_runs_show_what_they_are_there_for() -> None:
    """Claim: units do come back, gates are learned, weights are exchanged, cuts wait and are taken back."""

    def words(name: str) -> str:
        return " ".join(entry["reason"] for entry in RECORDED[name]["words"]["entries"])

    def moved(name: str, what: str) -> int:
        return sum(bool(entry[what]) for entry in RECORDED[name]["plan"]["entries"])

    assert all(facts["plan"]["budget_met"] for facts in RECORDED.values())
    assert all(
        moved(name, "dropped") + moved(name, "num_dropped") >= 3 for name in RECORDED if not name.startswith("first")
    )
    assert "refitted" in words("first_cut")
    assert moved("regrowth", "grown") >= 3 and RECORDED["regrowth"]["plan"]["probed_steps"] > 30
    assert words("gates").count("of gates below one half") >= 3
    assert moved("two_four", "num_grown") >= 3
    assert words("run_budget").count("waits") >= 3
    assert moved("tolerance", "grown") == moved("taken_back", "grown") == 1
    assert any(group["what"] == "head" for group in RECORDED["gpt"]["header"]["groups"].values())
    assert any(group["what"] == "state" for group in RECORDED["states"]["header"]["groups"].values())


def changed(name: str, change: Any, **how: Any) -> list[str]:
    found = copy.deepcopy(RECORDED[name])
    change(found)
    return differences(RECORDED[name], found, **{"exact": True, **how})


def test_a_difference_is_told_by_run_entry_and_field() -> None:
    """Claim: nothing differs from itself; another unit, number or word is named with its step; elsewhere numbers may be
    near, but plans must be the same.
    """
    entries = {section: RECORDED["resnet"][section]["entries"] for section in ("plan", "numbers", "words")}
    step, price = entries["plan"][2]["step"], entries["numbers"][2]["price"]["flops"]
    assert changed("resnet", lambda found: None) == []

    def unit(found: Any) -> None:
        found["plan"]["entries"][2]["widths"]["stem"] += 1

    def number(found: Any) -> None:
        found["numbers"]["entries"][2]["price"]["flops"] = price * (1 + 1e-9)

    def word(found: Any) -> None:
        found["words"]["entries"][2]["reason"] = "because"

    def entry(found: Any) -> None:
        found["plan"]["entries"].pop()

    (told,) = changed("resnet", unit)
    assert told.startswith(f"plan: entry 2 (step {step}) widths.stem was ")
    assert changed("resnet", unit, exact=False) == [told]
    (told,) = changed("resnet", number)
    assert told.startswith(f"numbers: entry 2 (step {step}) price.flops was {price!r}, is ")
    assert changed("resnet", number, exact=False) == []
    (told,) = changed("resnet", word)
    assert told.startswith(f"words: entry 2 (step {step}) reason was 'dropped") and told.endswith("is 'because'")
    (told,) = changed("resnet", entry)
    assert told == f"plan: {len(entries['plan'])} entries were kept, now there are {len(entries['plan']) - 1}"
