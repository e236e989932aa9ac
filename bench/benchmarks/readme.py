"""Writes the tables of README.md and docs/ from the committed result files.

    python bench/benchmarks/readme.py            rewrite what stands between the markers
    python bench/benchmarks/readme.py --check    fail if a page does not show what the result files say

A marker is `<!-- results:NAME -->` ... `<!-- end -->`; NAME is that of a block of `tables/`. Text between
`<!-- results: kept -->` and `<!-- end -->` was made by a script that is at a tag, as it says, and is left as it is.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import tables.league
import tables.records
import tables.runs
from tables.renderer import ROOT, SPECS

DOCS = ROOT / "docs"
MARKER = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every marked part as the result files say."""
    return MARKER.sub(lambda match: f"{match[1]}{SPECS[match['name']]()}\n{match[3]}", text)


def pages() -> dict[Path, str]:
    """Every page that has a marker, as the result files say."""
    written = [ROOT / "README.md", *DOCS.glob("*.md"), *(DOCS / "api").glob("*.md")]
    found = {page: page.read_text(encoding="utf-8") for page in written}
    shown = {page: filled(text) for page, text in found.items() if MARKER.search(text)}
    pictures = {"league.svg": tables.league.chart(), "best-small.svg": tables.runs.recipe_picture()}
    return shown | {DOCS / "pictures" / name: picture for name, picture in pictures.items() if picture is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    fresh = pages()
    stale = [file for file, text in fresh.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    if check:
        if stale:
            names = ", ".join(file.name for file in stale)
            sys.exit(f"{names} not as the result files say: run python bench/benchmarks/readme.py")
        return
    for file in stale:
        file.write_text(fresh[file], encoding="utf-8")


if __name__ == "__main__":
    main()
