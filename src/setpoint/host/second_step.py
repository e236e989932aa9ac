"""The second step: whether the model is given as much in it as FLOPs are counted for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from setpoint.host.first_forward import FirstForward
from setpoint.messages import counted, warn


class SecondStep:
    """Notes calls of the model between the first step and the second, and then warns of what `compare` says of them.

    Args:
        notes: begins to note calls; called after the first step.
        compare: gets what was noted, and returns a sentence, or "".
    """

    def __init__(self, notes: Callable[[], FirstForward], compare: Callable[[FirstForward], str]) -> None:
        self._notes, self._compare = notes, compare
        self._noted: FirstForward | None = None
        self._unlisten: Callable[[], object] = lambda: None

    def listen(self, on_step: Callable[[Callable[[Any], None]], Callable[[], object]]) -> None:
        """Have this called after each step."""
        self._unlisten = on_step(lambda _: self._stepped())

    def _stepped(self) -> None:
        if self._noted is None:
            self._noted = self._notes()
            return
        noted = self._noted
        noted.step_begins()
        said = self._compare(noted)
        self.stop()
        if said:
            warn(said)

    def stop(self) -> None:
        """Leave the model alone; may be called again."""
        self._unlisten()
        if self._noted is not None:
            self._noted.stop()


def counts_flops(spending: Any) -> bool:
    """Whether it matters how many FLOPs a step has: for a bill, and for a budget of FLOPs that is no share."""
    return bool(spending.bill) or any(each.resource == "flops" and not each.relative for each in spending.budgets)


def more_than(known: int, noted: FirstForward) -> str:
    """Where the model was given at least twice the elements that its example has."""
    given = noted.elements
    if not given >= 2 * known > 0:
        return ""
    return (
        f"in its second step the model was given {given:,} elements of input, and the example has {known:,}: "
        "FLOPs are counted by the example. If all steps are like this, training spends about "
        f"{given / known:.2g} times what is counted. Give the batch of a whole step, or leave the example out"
    )


def without_unused(first: int, noted: FirstForward) -> str:
    """Where so many calls before the first step were of no use, and fewer before the second."""
    if noted.num_unused >= first:
        return ""
    return (
        f"before its first step training made {counted(first, 'call')} of the model without using the gradients, and "
        f"{noted.num_unused} before its second: FLOPs of a step are counted with those of the first. If they were a "
        "look at an output or a pass that was discarded, call loop.detach() and attach again, or give attach an example"
    )
