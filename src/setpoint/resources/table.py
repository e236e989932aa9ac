"""A table: seconds of operations on this device, each timed once."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from setpoint.progress import progress
from setpoint.resources.curve import Curve, Point, points
from setpoint.resources.problem import Problem, on_one_dim
from setpoint.spending.seconds import Stopwatch

_ROUNDS = 3
_LEAST_SECONDS = 5e-4


class Table:
    """Seconds by problem and point, for one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, dict[Point, float]] = {}

    def time(self, problems: Sequence[Problem], limit_s: float = 2.5) -> dict[str, Curve | None]:
        """Curves of these problems by key, timed now unless the table knows them.

        Rounds over all points are repeated up to three times, while they fit into the limit, and the least time
        of a point counts: what disturbs a measurement only ever adds to it. Where even one round would take
        longer, fewer points are measured of the operations that take least of the step. Pointwise operations share one
        curve, by the number of entries.

        Args:
            problems: one for each call of the step.
            limit_s: seconds to time for.

        Returns:
            None for a problem that does not run by itself.
        """
        wanted = {problem.key: problem for problem in problems}
        flat = {key: on_one_dim(problem) for key, problem in wanted.items()}
        needed, calls = dict[str, Problem](), Counter[str]()
        for problem in problems:
            timed = flat[problem.key] or problem
            calls[timed.key] += 1
            if timed.key not in needed or timed.dense > needed[timed.key].dense:
                needed[timed.key] = timed
        new = [problem for problem in needed.values() if self._lacks(problem)]
        if new:
            self._time(new, calls, limit_s)
        curves = {key: Curve(problem, self._seconds[key]) for key, problem in needed.items() if self._seconds[key]}
        found: dict[str, Curve | None] = {}
        for key, problem in wanted.items():
            alone = flat[key]
            curve = curves.get(key if alone is None else alone.key)
            found[key] = curve if curve is None or alone is None else Curve(problem, {}, curve)
        return found

    def _lacks(self, problem: Problem) -> bool:
        """Whether a problem was not timed where its curve begins, or on one dim not up to such a length."""
        known = self._seconds.get(problem.key)
        if not known:
            return known is None
        return max(known) < problem.dense if problem.by_entries else problem.dense not in known

    def _time(self, problems: Sequence[Problem], calls: Mapping[str, int], limit_s: float) -> None:
        began = time.perf_counter()
        with progress("timing operations on this device") as show:
            first = {}
            for number, problem in enumerate(problems):
                first[problem.key] = _seconds(problem, problem.dense, self.device)
                known = first[problem.key]
                self._seconds[problem.key] = {} if known is None else {problem.dense: known}
                show(0.1 * (number + 1) / len(problems))
            running = [problem for problem in problems if first[problem.key] is not None]
            jobs = _jobs(running, first, calls, limit_s)
            for number in range(_ROUNDS):
                for done, (problem, point) in enumerate(jobs):
                    before = self._seconds[problem.key].get(point)
                    if before is not None and number == 0:
                        continue
                    seconds = _seconds(problem, point, self.device)
                    if seconds is not None:
                        self._seconds[problem.key][point] = seconds if before is None else min(seconds, before)
                    elapsed = time.perf_counter() - began
                    if number and elapsed > limit_s:
                        return
                    least = 0.9 if number == 0 else 1.0  # the first round is finished, however long it takes
                    show(max(0.1 + 0.9 * (number + done / len(jobs)) / _ROUNDS, min(least, elapsed / limit_s)))


def _jobs(
    problems: Sequence[Problem], first: Mapping[str, float | None], calls: Mapping[str, int], limit_s: float
) -> list[tuple[Problem, Point]]:
    """What to time: few points of each problem, and more of those that take most of a step, up to the limit."""

    def estimate(problem: Problem, chosen: Sequence[Point]) -> float:
        dense, seconds = problem.num_bytes(problem.dense) or 1.0, first[problem.key] or 0.0
        return sum(2 * seconds * problem.num_bytes(point) / dense + 2 * _LEAST_SECONDS for point in chosen)

    chosen = {problem.key: points(problem, coarse=True) for problem in problems}
    left = limit_s - sum(estimate(problem, chosen[problem.key]) for problem in problems)
    for problem in sorted(problems, key=lambda each: -calls[each.key] * (first[each.key] or 0.0)):
        fine = points(problem, coarse=False)
        more = estimate(problem, fine) - estimate(problem, chosen[problem.key])
        if more <= left:
            left -= more
            chosen[problem.key] = fine
    return [(problem, point) for problem in problems for point in chosen[problem.key]]


def _seconds(problem: Problem, point: Point, device: torch.device) -> float | None:
    """Seconds of one call, after one that is not counted; None if the operation does not run by itself."""
    watch = Stopwatch(synchronize=device.type == "cuda")
    try:
        args, kwargs = problem.arguments(point, device)
        with torch.no_grad():
            with watch:
                problem.operation.target(*args, **kwargs)
            calls = max(1, min(50, int(_LEAST_SECONDS / max(watch.last_seconds, 1e-7))))
            best = float("inf")
            for _ in range(2 if calls > 1 else 1):
                with watch:
                    for _ in range(calls):
                        problem.operation.target(*args, **kwargs)
                best = min(best, watch.last_seconds / calls or best)  # 0 where the clock ran backwards
    except Exception:  # an operation may need arguments that make sense together
        return None
    return best if best < float("inf") else None


def seconds_per_byte(curves: Sequence[Curve]) -> float:
    """Median over operations that move bytes and do little else; for those that could not be timed."""
    rates = [
        curve.at(curve.problem.dense) / curve.problem.num_bytes(curve.problem.dense)
        for curve in curves
        if not curve.problem.contraction and curve.problem.num_bytes(curve.problem.dense) > 1e5
    ]
    return statistics.median(rates) if rates else 1e-9
