"""The ledger: an append-only record of every decision and what it cost."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, overload

from setpoint.checkpoint.fields import fields_of, json_object
from setpoint.checkpoint.ordinary_file import ordinary_file
from setpoint.checkpoint.plain import plain
from setpoint.entry import Entry
from setpoint.errors import CheckpointError
from setpoint.files import replace_text

FORMAT = 1
"""Version of the file format, the value of "ledger" in its first line."""


class Ledger:
    """All entries of a run, in order, and a header that says what the run was.

    A ledger grows only at its end. The effect of a decision on the loss shows one step later; `complete` notes it once.
    The file is JSON Lines: first the header, then one entry a line, and last how the run ended, if it did.
    Numbers that JSON does not know (NaN, infinity) are written as null.

    Args:
        header: facts of the run; docs/results-format.md lists those that `attach` writes.

    Attributes:
        ended: how the run ended: "step", "total_steps", "budget_met" and "reason"; None before its end.

    >>> ledger = Ledger({"total_steps": 100})
    >>> ledger.append(Entry(step=10, widths={"conv1": 12}, dropped={"conv1": [3, 7]}))
    >>> len(ledger), ledger[-1].widths["conv1"]
    (1, 12)
    """

    def __init__(self, header: Mapping[str, Any] | None = None) -> None:
        self.header: Mapping[str, Any] = dict(header or {})
        self._entries: list[Entry] = []
        self.ended: Mapping[str, Any] | None = None

    def append(self, entry: Entry) -> None:
        """Add one entry at the end.

        Raises:
            ValueError: if its step lies before the last one's.
        """
        if self._entries and entry.step < self._entries[-1].step:
            raise ValueError(f"a ledger is in order of steps: got step {entry.step} after {self._entries[-1].step}")
        self._entries.append(entry)

    def end(self, step: int, total_steps: int, *, budget_met: bool, reason: str) -> None:
        """Note how the run ended, after so many steps of those planned; in the file it is the last line."""
        self.ended = {"step": step, "total_steps": total_steps, "budget_met": budget_met, "reason": reason}

    def complete(self, loss_after: float) -> None:
        """Note the loss right after the last decision that changed the model, unless it has been noted.

        >>> ledger = Ledger()
        >>> ledger.append(Entry(step=10, widths={"conv1": 12}, dropped={"conv1": [3, 7]}, loss=0.5))
        >>> ledger.complete(loss_after=0.7)
        >>> ledger[-1].loss, ledger[-1].loss_after
        (0.5, 0.7)
        """
        place = next((place for place in reversed(range(len(self))) if self._entries[place].changed), None)
        if place is not None and self._entries[place].loss_after is None:
            self._entries[place] = replace(self._entries[place], loss_after=loss_after)

    def state_dict(self) -> dict[str, Any]:
        """All entries, in plain tensors, numbers and strings."""
        return {"entries": [plain(asdict(entry), "the ledger") for entry in self._entries]}

    def check(self, state: Mapping[str, Any]) -> None:
        """Check that a state holds entries."""
        for entry in state["entries"]:
            _entry(entry)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the entries of a state in behind those that are there."""
        for entry in state["entries"]:
            self.append(Entry(**entry))

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries))

    @overload
    def __getitem__(self, position: int) -> Entry: ...
    @overload
    def __getitem__(self, position: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, position: int | slice) -> Entry | tuple[Entry, ...]:
        if isinstance(position, slice):
            return tuple(self._entries[position])
        return self._entries[position]

    def lines(self, first: int = 0) -> Iterator[str]:
        """The lines of its file from this one on; the header is line 0, and each has its line break."""
        rows = [{"ledger": FORMAT, **self.header}] if not first else []
        rows += [asdict(entry) for entry in self._entries[max(0, first - 1) :]]
        rows += [{"ended": self.ended}] if self.ended is not None else []
        yield from (json.dumps(without_nan(row), allow_nan=False) + "\n" for row in rows)

    def to_rows(self) -> list[dict[str, Any]]:
        """Entries as dictionaries that JSON can hold: NaN and infinity are None."""
        return [without_nan(asdict(entry)) for entry in self._entries]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON Lines into a folder that exists; the file is replaced at once, so it is never half old."""
        replace_text(Path(path), "".join(self.lines()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read what `save` wrote; a last line that was not written to its end is left out, null is read as NaN.

        Raises:
            CheckpointError: for a file that is not a ledger, or is damaged before its last line.
        """
        lines = ordinary_file(path).read_text(encoding="utf-8", errors="replace").split("\n")
        ended = lines.pop() == ""
        header = json_object(lines[0]) if lines else None
        if not header or header.get("ledger") != FORMAT:
            raise CheckpointError(
                f"{path} is not a Setpoint ledger of format {FORMAT}: give a file that Ledger.save or log_to wrote"
            )
        ledger = cls({key: value for key, value in header.items() if key != "ledger"})
        for number, line in enumerate(lines[1:], start=2):
            row = json_object(line)
            if row is None and number == len(lines) and ended:
                break
            if row and isinstance(row.get("ended"), dict):
                ledger.ended = row["ended"]
                continue
            try:
                ledger.append(_entry(row))
            except ValueError as error:
                raise CheckpointError(
                    f"line {number} of {path} is damaged ({error}): restore the file, or cut it before that line"
                ) from error
        return ledger


def _entry(row: Mapping[str, Any] | None) -> Entry:
    """The entry of a row; keys that a later version may add are left out."""
    values = {} if row is None else fields_of(Entry, row)
    if not {"step", "widths"} <= values.keys():
        raise ValueError("it is not a whole entry")
    return Entry(**values)


def without_nan(value: Any) -> Any:
    """The same in what JSON can hold: None in the place of NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return value
