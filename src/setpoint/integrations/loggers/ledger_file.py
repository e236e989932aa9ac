"""A ledger's file that grows as decisions are made."""

from __future__ import annotations

import os
from pathlib import Path

from setpoint.ledger import Entry, Ledger


class LedgerFile:
    """Keeps a file like the ledger, appending to it; what `Ledger.save` writes is the same.

    What the last cut did to the loss is known only later: then that line is written anew.

    Args:
        path: of a file, which is written anew; the folder must exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._written: list[Entry] = []
        self._ends: list[int] = []
        if not self._path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self._path.parent} for {self._path.name}: make it first")

    @property
    def begun(self) -> bool:
        """Whether anything has been written."""
        return bool(self._ends)

    def follow(self, ledger: Ledger) -> None:
        """Write what is new."""
        entries = list(ledger)
        same = 0
        while same < min(len(entries), len(self._written)) and entries[same] is self._written[same]:
            same += 1
        whole = not self._ends or not self._path.exists()
        first = 0 if whole else same + 1  # the header is line 0
        ends = self._ends[:first]
        with open(self._path, "wb" if whole else "r+b") as file:
            file.truncate(file.seek(ends[-1] if ends else 0))
            for line in ledger.lines(first):
                file.write(line.encode())
                ends.append(file.tell())
        self._written, self._ends = entries, ends
