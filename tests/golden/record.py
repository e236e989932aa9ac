"""Records the golden runs anew. Only for a change of behaviour that is wanted, and said in the commit and in CHANGELOG.

python tests/golden/record.py                   all of them
python tests/golden/record.py readme fsdp       these; the others stay as they are

It writes digests.json and facts.json, of which `git diff` shows each decision that is another one now. What is recorded
holds in one environment (torch, processor); with another one all are recorded.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden import kept
from golden.play import NAMES, kept_as, play


def record(names: list[str]) -> None:
    facts, where = kept.read() if kept.FACTS.exists() else ({}, kept.environment())
    if names and where != kept.environment():
        sys.exit(f"the others were recorded on {where}, this is {kept.environment()}: record all, without names")
    chosen = names or [name for name in NAMES if name == kept_as(name)]
    made = {}
    for name, found, seconds in play(chosen):
        made[name] = found
        print(f"{name}: {len(found['plan']['entries'])} entries, {seconds:.1f} s", flush=True)
    kept.write({**(facts if names else {}), **made})


if __name__ == "__main__":
    record(sys.argv[1:])
