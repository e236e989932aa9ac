"""The ledger: an append-only record of every decision, what it cost and what it led to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from setpoint.checkpoint.plain import fields_of, json_object, plain, replace_text, without_nan
from setpoint.errors import CheckpointError

OWN_SECONDS = ("sensing", "deciding", "resizing", "probing")  # what Setpoint's own time goes into
FORMAT = 1  # version of the file format, the value of "ledger" in its first line


@dataclass(frozen=True)
class Entry:
    """One decision: what it cost and what it led to. `spent`, `reference` and `price` are by resource, per step.

    Args:
        step: optimizer steps done.
        widths: active units by group, after the decision.
        dropped: origins (indices in the dense model) of the units dropped, by group.
        grown: origins of those brought back, by group.
        loss: last observed loss.
        seconds: wall-clock seconds since attach.
        reason: why, and what was skipped.
        spent: after the decision, as predicted, and corrected by what meters have read so far.
        metered: measured at the widths before the decision, of what a meter reads.
        reference: what the reference allowed.
        price: loss per unit of resource.
        saliency: of the dropped units, by group, in the order of `dropped`.
        worth: saliency / saving of their blocks, likewise.
        own_seconds: Setpoint's own time since the last entry, by the kinds `OWN_SECONDS`.
        val: last observed validation loss.
        predicted: what was predicted where `metered` was measured.
        gain: probed gain of the units brought back, by group, in the order of `grown`.
        grown_worth: gain / cost of their blocks, likewise.
        num_dropped: of single weights, how many were dropped, by group; they are not listed one by one.
        num_grown: likewise, how many were grown.
        loss_after: loss of the first step after a decision that changed the model; None until it has been observed.
        limit: the budget per step; a fraction is one of what a meter has read of the dense model.
        spent_run: of budgets of the whole run, what it has spent so far.
    """

    step: int
    widths: Mapping[str, int]
    dropped: Mapping[str, list[int]] = field(default_factory=dict)
    grown: Mapping[str, list[int]] = field(default_factory=dict)
    loss: float | None = None
    seconds: float = 0.0
    reason: str = ""
    spent: Mapping[str, float] = field(default_factory=dict)
    metered: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    price: Mapping[str, float] = field(default_factory=dict)
    saliency: Mapping[str, list[float]] = field(default_factory=dict)
    worth: Mapping[str, list[float]] = field(default_factory=dict)
    own_seconds: Mapping[str, float] = field(default_factory=dict)
    val: float | None = None
    predicted: Mapping[str, float] = field(default_factory=dict)
    gain: Mapping[str, list[float]] = field(default_factory=dict)
    grown_worth: Mapping[str, list[float]] = field(default_factory=dict)
    num_dropped: Mapping[str, int] = field(default_factory=dict)
    num_grown: Mapping[str, int] = field(default_factory=dict)
    loss_after: float | None = None
    limit: Mapping[str, float] = field(default_factory=dict)
    spent_run: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> dict[str, float]:
        """By resource, spent / reference - 1."""
        limits = {name: value for name, value in self.reference.items() if name in self.spent and value > 0}
        return {name: self.spent[name] / value - 1.0 for name, value in limits.items()}

    @property
    def changed(self) -> bool:
        """Whether the decision dropped anything or brought anything back."""
        return any((*self.dropped.values(), *self.grown.values(), *self.num_dropped.values(), *self.num_grown.values()))


class Ledger:
    """All entries of a run, in order, and a header that says what the run was.

    A ledger grows only at its end. The effect of a decision on the loss shows one step later; `complete` notes it once.
    The file is JSON Lines: the header, one entry a line, and how the run ended, if it did; NaN and infinity are null.

    Args:
        header: facts of the run; docs/results-format.md lists those that `attach` writes.

    Attributes:
        ended: how the run ended: "step", "total_steps", "budget_met", "reason" and "note" of its summary;
            None before its end.

    >>> ledger = Ledger({"total_steps": 100})
    >>> ledger.append(Entry(step=10, widths={"conv1": 12}, dropped={"conv1": [3, 7]}, loss=0.5))
    >>> ledger.complete(loss_after=0.7)
    >>> len(ledger), ledger[-1].widths["conv1"], ledger[-1].loss_after
    (1, 12, 0.7)
    """

    def __init__(self, header: Mapping[str, Any] | None = None) -> None:
        self.header: Mapping[str, Any] = dict(header or {})
        self._entries: list[Entry] = []
        self.ended: Mapping[str, Any] | None = None

    def append(self, entry: Entry) -> None:
        """Add one entry at the end; a `ValueError` if its step lies before the last one's."""
        if self._entries and entry.step < self._entries[-1].step:
            raise ValueError(f"a ledger is in order of steps: got step {entry.step} after {self._entries[-1].step}")
        self._entries.append(entry)

    def end(self, step: int, total_steps: int, **verdict: Any) -> None:
        """Note how the run ended, after so many steps of those planned; in the file it is the last line."""
        self.ended = {"step": step, "total_steps": total_steps, **verdict}

    def complete(self, loss_after: float) -> None:
        """Note the loss right after the last decision that changed the model, unless it has been noted."""
        place = next((place for place in reversed(range(len(self))) if self._entries[place].changed), None)
        # Only once: the loss of later steps shows what training did, not what the cut did.
        if place is not None and self._entries[place].loss_after is None:
            self._entries[place] = replace(self._entries[place], loss_after=loss_after)

    def state_dict(self) -> dict[str, Any]:
        return {"entries": [plain(asdict(entry), "the ledger") for entry in self._entries]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
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
        return tuple(self._entries[position]) if isinstance(position, slice) else self._entries[position]

    def to_rows(self) -> list[dict[str, Any]]:
        """Entries as dictionaries that JSON can hold: NaN and infinity are None."""
        return [without_nan(asdict(entry)) for entry in self._entries]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON Lines into a folder that exists; the file is replaced at once, so it is never half old."""
        rows = [{"ledger": FORMAT, **self.header}, *map(asdict, self._entries)]
        rows += [{"ended": self.ended}] if self.ended is not None else []
        replace_text(Path(path), "".join(json.dumps(without_nan(row), allow_nan=False) + "\n" for row in rows))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read what `save` wrote; a last line that was not written to its end is left out, null is read as NaN.

        Raises:
            CheckpointError: for a file that is not a ledger, or is damaged before its last line.
        """
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
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
    """The entry of a row, without keys that a later version may add."""
    row = row or {}
    # Ledgers of version 0.2 have a number for each: pages are still drawn from them.
    earlier = {name: row[f"{name}_seconds"] for name in OWN_SECONDS if f"{name}_seconds" in row}
    values = fields_of(Entry, {"own_seconds": earlier, **row} if earlier else row)
    if not {"step", "widths"} <= values.keys():
        raise ValueError("it is not a whole entry")
    return Entry(**values)
