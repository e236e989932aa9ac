"""Installed text: code and documentation inside installed packages, of which some files are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from setpoint_bench.task import BenchError

SUFFIXES = (".py", ".md", ".rst", ".txt")
SIZES = (2_000, 60_000)
"""Bytes of a file: shorter ones are mostly empty, longer ones mostly tables."""
HELD_OUT = {0: "validation", 1: "test"}
"""Of sixteen equal parts of all files, by digest, the ones that no training byte comes from."""


def installed_text(packages: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Files of each split, in the order of their SHA-256: of ASCII only, identical ones once.

    Another version of a package has other files.

    Raises:
        BenchError: for a package that is not installed.
    """
    found = {hashlib.sha256(each).digest(): each for package in packages for each in _contents(package)}
    splits: dict[str, list[str]] = {split: [] for split in ("train", *HELD_OUT.values())}
    for digest in sorted(found):
        splits[HELD_OUT.get(digest[0] % 16, "train")].append(found[digest].decode("ascii"))
    return splits


def _contents(package: str) -> Iterator[bytes]:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise BenchError(f"the text of the package {package!r} is part of this task: install it")
    for path in sorted(Path(spec.origin).parent.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file() and SIZES[0] <= path.stat().st_size <= SIZES[1]:
            content = path.read_bytes()
            if content.isascii():
                yield content
