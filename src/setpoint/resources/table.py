"""A table: seconds of operations on this device, each timed once and kept in the user's cache folder."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from setpoint.cache import cache_folder, digest_of, keeps, replace_file
from setpoint.resources.curve import Curve, Point, points
from setpoint.resources.problem import Problem, on_one_dim
from setpoint.spending.seconds import Stopwatch
from setpoint.under_way import under_way
from setpoint.warn import warn

FORMAT = 3
"""A table of another version is timed again: its fits belong to other curves, or it has no digest."""
_ROUNDS = 3
_LEAST_SECONDS = 5e-4
_BUSY = 2.0
"""A table whose times are so many times those of now was timed on a busy or slowed device."""


def environment(device: torch.device) -> dict[str, Any]:
    """What timings hold for: they are worth nothing elsewhere."""
    facts: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "device": device.type}
    if device.type == "cuda":
        facts |= {"name": torch.cuda.get_device_name(device)}
    else:
        facts |= {"name": _processor(), "threads": torch.get_num_threads()}
    return facts | _modes(device)


def _modes(device: torch.device) -> dict[str, Any]:
    """Settings of PyTorch that choose other kernels for the same operation."""
    backends: Any = torch.backends
    wanted: dict[str, Callable[[], Any]] = {
        "precision": torch.get_float32_matmul_precision,
        "deterministic": torch.are_deterministic_algorithms_enabled,
    }
    if device.type == "cuda":
        wanted |= {
            "tf32": lambda: backends.cuda.matmul.allow_tf32,
            "cudnn": lambda: backends.cudnn.enabled,
            "cudnn tf32": lambda: backends.cudnn.allow_tf32,
            "cudnn benchmark": lambda: backends.cudnn.benchmark,
            "cudnn deterministic": lambda: backends.cudnn.deterministic,
        }
        kernels = [backends.cuda.matmul, getattr(backends.cudnn, "conv", None), getattr(backends.cudnn, "rnn", None)]
    else:
        wanted |= {"mkldnn": lambda: backends.mkldnn.enabled}
        kernels = [getattr(backends.mkldnn, name, None) for name in ("matmul", "conv", "rnn")]
    facts = {name: _setting(read) for name, read in wanted.items()}
    return facts | {"fp32": [str(getattr(each, "fp32_precision", None)) for each in kernels]}


def _setting(read: Callable[[], Any]) -> Any:
    """A setting of PyTorch, which refuses to say one that its newer interface ("fp32") has changed."""
    try:
        return read()
    except RuntimeError:
        return "mixed"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.node()


class Table:
    """Seconds by problem and point, for one device."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.device = device
        self.environment = environment(device)
        words = "-".join(str(self.environment[name]) for name in ("torch", "machine", "device", "name"))
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in words)[:100]
        self.name = f"{name}-{digest_of(self.environment)[:8]}.json"
        self.file: Path | None = None
        with suppress(OSError):  # a user without a home has no cache folder, and times anew
            self.file = (cache_folder() if folder is None else folder) / "latency" / self.name
        self._seconds, self._fits = self._kept(warns=True)
        self._timed, self._fitted = set[str](), dict[str, list[float]]()  # by this object: others may be outdated
        self._checked = not self._seconds  # what was timed by this object needs no check

    def _kept(self, warns: bool = False) -> tuple[dict[str, dict[Point, float]], dict[str, list[float]]]:
        """What the file holds: nothing where nothing is kept, or it is damaged or was timed elsewhere.

        Args:
            warns: of a file that is not used.
        """
        nothing: tuple[dict[str, dict[Point, float]], dict[str, list[float]]] = {}, {}
        if self.file is None or not keeps():
            return nothing
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                return nothing
            made_for = content["environment"]
            if made_for != self.environment:
                if warns:
                    here = f"this is {self.environment}"
                    warn(f"the latency table {self.file} was timed on {made_for}, and {here}: timed again")
                return nothing
            if content["digest"] != digest_of([content["timed"], content["fits"]]):
                raise ValueError("its digest does not fit")
            timed = {
                key: {tuple(point): float(seconds) for point, seconds in rows} for key, rows in content["timed"].items()
            }
            fits = {key: [float(value) for value in values] for key, values in content["fits"].items()}
            if not all(0 < seconds < math.inf for rows in timed.values() for seconds in rows.values()):
                raise ValueError("it holds times that are no seconds")
            if not all(0 <= value < math.inf for values in fits.values() for value in values):
                raise ValueError("it holds a fit that is no numbers")
            if not all(sum(values[:-1]) > 0 for values in fits.values()):
                raise ValueError("it holds a fit of nothing")
        except FileNotFoundError:
            return nothing
        except OSError as error:
            if warns:
                warn(f"the latency table {self.file} cannot be read ({error}): operations are timed again")
            return nothing
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if warns:
                warn(f"the latency table {self.file} is damaged ({error}) and is timed again")
            return nothing
        return timed, fits

    def _write(self) -> None:
        """Replace the file at once; a folder that cannot be written to costs the next run a timing, no more.

        What another process has added meanwhile stays.
        """
        if self.file is None or not keeps():
            return
        seconds, fits = self._kept()
        for key in self._timed:
            seconds[key] = {**seconds.get(key, {}), **self._seconds[key]}
        timed = {key: [[list(p), s] for p, s in rows.items()] for key, rows in seconds.items()}
        fits |= self._fitted
        digest = digest_of([timed, fits])
        content = {"format": FORMAT, "digest": digest, "environment": self.environment, "timed": timed, "fits": fits}
        try:
            replace_file(self.file, content)
        except OSError as error:
            warn(f"the latency table cannot be kept in {self.file}: {error}")

    def fit(self, key: str) -> list[float] | None:
        """Coefficients that were fitted to whole steps before, or None."""
        return self._fits.get(key)

    def keep_fit(self, key: str, values: Sequence[float]) -> None:
        """Keep coefficients for the next run."""
        self._fits[key] = self._fitted[key] = list(values)
        self._write()

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
        self._forget_if_busy([problem for problem in needed.values() if not self._lacks(problem)])
        new = [problem for problem in needed.values() if self._lacks(problem)]
        if new:
            self._time(new, calls, limit_s)
            self._write()
        curves = {key: Curve(problem, self._seconds[key]) for key, problem in needed.items() if self._seconds[key]}
        found: dict[str, Curve | None] = {}
        for key, problem in wanted.items():
            alone = flat[key]
            curve = curves.get(key if alone is None else alone.key)
            found[key] = curve if curve is None or alone is None else Curve(problem, {}, curve)
        return found

    def _forget_if_busy(self, known: Sequence[Problem]) -> None:
        """Time the longest of these operations once more: where it is much quicker now, none of the table is used."""
        kept = {
            each.key: self._seconds[each.key][each.dense] for each in known if each.dense in self._seconds[each.key]
        }
        if self._checked or not kept or self.file is None:
            return
        self._checked = True
        longest = next(each for each in known if each.key == max(kept, key=lambda key: kept[key]))
        now = _seconds(longest, longest.dense, self.device)
        if now is not None and kept[longest.key] > _BUSY * now:
            warn(
                f"the latency table {self.file} was timed on a busy or slowed device: an operation took "
                f"{kept[longest.key]:.3g} s, and takes {now:.3g} s now. It is timed again"
            )
            self._seconds, self._fits = {}, {}
            with suppress(OSError):
                self.file.unlink()

    def _lacks(self, problem: Problem) -> bool:
        """Whether a problem was not timed where its curve begins, or on one dim not up to such a length."""
        known = self._seconds.get(problem.key)
        if not known:
            return known is None
        return max(known) < problem.dense if problem.by_entries else problem.dense not in known

    def _time(self, problems: Sequence[Problem], calls: Mapping[str, int], limit_s: float) -> None:
        began = time.perf_counter()
        with under_way("timing operations on this device") as show:
            first = {}
            for number, problem in enumerate(problems):
                first[problem.key] = _seconds(problem, problem.dense, self.device)
                known = first[problem.key]
                self._seconds[problem.key] = {} if known is None else {problem.dense: known}
                self._timed.add(problem.key)
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
