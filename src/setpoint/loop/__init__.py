"""The loop: sense, decide, act and record, at every step of the user's own training loop."""

from setpoint.loop.attach import attach
from setpoint.loop.explanation import Explanation
from setpoint.loop.loop import Loop
from setpoint.loop.run_file import load_run, save_run
from setpoint.loop.summary import Summary

__all__ = ["Explanation", "Loop", "Summary", "attach", "load_run", "save_run"]
