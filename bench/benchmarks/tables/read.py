"""Reading of results folders, each once: many tables show the same runs."""

from __future__ import annotations

from functools import cache

from setpoint_bench.report import folder

read_results = cache(folder.read_results)
"""`setpoint_bench.report.folder.read_results`, which reads a folder again only in another process."""
