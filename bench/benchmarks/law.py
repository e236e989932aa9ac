"""What the law predicts for pruning while training, before any run of it: a table for docs/when-it-pays.md.

python bench/benchmarks/law.py --out results/law.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from record import keep

from setpoint_bench.law import LANGUAGE, average_size

RATIOS = (1.0, 4.0, 16.0, 64.0)
STARTS = (2.0, 4.0, 8.0)
CUTS = (0.25, 0.75)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = [
        {"ratio": r, "start": s, "gain": [law.gain(r, average_size(s, CUTS)) for law in LANGUAGE]}
        for r in RATIOS
        for s in STARTS
    ]
    keep({"sources": [law.source for law in LANGUAGE], "cuts": CUTS, "predicted": rows}, out, shown={"rows": len(rows)})
    for row in rows:
        print(row["ratio"], row["start"], " ".join(f"{100 * gain:+.1f} %" for gain in row["gain"]))
