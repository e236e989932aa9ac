"""Resume: all that a loop remembers, as plain data, and how a freshly attached loop takes it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from setpoint.errors import CheckpointError

FORMAT = 2
"""Version of the state's form, its entry "format"."""

AGAIN = "build the model anew, dense, and attach with the arguments of the run that is to go on"


class Part(Protocol):
    """What a loop is made of and remembers by itself."""

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain tensors, numbers and strings."""
        ...

    def check(self, state: Mapping[str, Any]) -> Any:
        """Check that a state fits, before anything is changed."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken; it was checked."""
        ...


def check_format(state: Mapping[str, Any]) -> None:
    """Check that a state is of this version.

    Raises:
        CheckpointError: for any other.
    """
    if state["format"] == 1:
        raise CheckpointError(
            "the state has format 1, of Setpoint 0.1, and this Setpoint reads format 2: finish that run with "
            "setpoint==0.1.0, or begin it anew. Its finished models still load (setpoint.load)"
        )
    if state["format"] != FORMAT:
        raise CheckpointError(f"the state has format {state['format']!r}, this Setpoint reads {FORMAT}")


def check_same_run(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a run can go on with another one's state.

    Raises:
        CheckpointError: naming the first fact that differs.
    """
    for name, value in own.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"the state is of another run: its {name} are {_short(saved.get(name), value)}, here they are "
                f"{_short(value, saved.get(name))}: {AGAIN}"
            )


def _short(value: Any, other: Any) -> str:
    """What differs, of two dicts; else the value."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: each for key, each in value.items() if other.get(key) != each}
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
