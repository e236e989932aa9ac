"""Plays the golden runs and says of each, in a line, ok or what differs; after every commit of a refactoring.

python tests/golden/check.py                    all of them, half a minute
python tests/golden/check.py readme fsdp        these
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden import kept
from golden.compare import differences
from golden.play import NAMES, kept_as, play


def check(names: Sequence[str]) -> bool:
    """Whether all these runs are as they were; each is told at once."""
    recorded, where = kept.read()
    here = kept.environment()
    if here != where:
        print(f"recorded on {where}, this is {here}: plans must be the same, numbers near")
    good = True
    for name, facts, seconds in play(names):
        if kept_as(name) not in recorded:
            told = ["is not recorded yet: python tests/golden/record.py " + kept_as(name)]
        else:
            digits = 6 if kept_as(name) == "readme" else 12
            told = differences(recorded[kept_as(name)], facts, exact=here == where, digits=digits)
        print("\n    ".join([f"{name}: {'DIFFERS' if told else 'ok'} ({seconds:.1f} s)", *told]), flush=True)
        good = good and not told
    return good


if __name__ == "__main__":
    sys.exit(0 if check(sys.argv[1:] or NAMES) else 1)
