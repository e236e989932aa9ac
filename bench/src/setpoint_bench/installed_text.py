"""Installed text: source code and documentation inside installed packages, as bytes that never repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from setpoint_bench.task import BenchError

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "sympy": "sympy",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "numpy": "numpy",
    "timm": "timm",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "mypy": "mypy",
    "pip": "pip",
    "fontTools": "fonttools",
    "torchvision": "torchvision",
    "torchmetrics": "torchmetrics",
}
"""Folders and the distributions that they come from, in the order in which they are read."""
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
SIZES = (512, 200_000)
"""Bytes of a file: shorter ones are mostly empty, longer ones mostly tables."""
VOCABULARY = 128
HELD_OUT = {"validation": 0, "test": 1}
"""Of 64 equal parts of all files, by digest, the ones that no training byte comes from."""


@dataclass(frozen=True, eq=False)
class InstalledText:
    """Bytes of three splits; no file has bytes in two of them.

    Args:
        train: files in the order of their digests.
        validation: to choose by.
        test: to report.
        digest: SHA-256 of the three, one after the other.
        versions: of the packages.
        files: how many there are.
    """

    train: UInt8[Tensor, " train"]
    validation: UInt8[Tensor, " validation"]
    test: UInt8[Tensor, " test"]
    digest: str
    versions: Mapping[str, str]
    files: int

    def about(self) -> dict[str, Any]:
        """What a results file says of the data."""
        sizes = {split: len(getattr(self, split)) for split in ("train", *HELD_OUT)}
        return {"digest": self.digest, "bytes": sizes, "files": self.files, "packages": dict(self.versions)}


def installed_text(packages: Mapping[str, str] = PACKAGES) -> InstalledText:
    """Read the packages' text: files of ASCII only, identical ones once.

    Another version of a package has other bytes, which the digest shows.

    Args:
        packages: folders and their distributions.

    Raises:
        BenchError: for a package that is not installed.
    """
    found: dict[bytes, bytes] = {}
    for package in packages:
        for content in _contents(package):
            found.setdefault(hashlib.sha256(content).digest(), content)
    parts: dict[str, list[bytes]] = {"train": [], **{split: [] for split in HELD_OUT}}
    part_of = {part: split for split, part in HELD_OUT.items()}
    for digest in sorted(found):
        parts[part_of.get(digest[0] % 64, "train")].append(found[digest])
    splits = {split: b"".join(contents) for split, contents in parts.items()}
    over_all = hashlib.sha256(b"".join(splits.values())).hexdigest()
    tensors = {split: torch.from_numpy(np.frombuffer(content, np.uint8).copy()) for split, content in splits.items()}
    return InstalledText(**tensors, digest=over_all, versions=_versions(packages), files=len(found))


def windows(text: UInt8[Tensor, " bytes"], places: Sequence[int] | Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-byte targets of the windows that begin at these places."""
    at = torch.as_tensor(places)[:, None] + torch.arange(length + 1)
    drawn = text[at].long()
    return drawn[:, :-1], drawn[:, 1:]


def _contents(package: str) -> Iterator[bytes]:
    """The files of a package's folder that count, in the order of their paths."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise BenchError(f"the text of the package {package!r} is part of this benchmark: install it")
    for path in sorted(Path(spec.origin).parent.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file() and SIZES[0] <= path.stat().st_size <= SIZES[1]:
            content = path.read_bytes()
            if content.isascii():
                yield content


def _versions(packages: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for distribution in packages.values():
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            found[distribution] = "unknown"
    return found
