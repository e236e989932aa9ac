"""Metering: what the run's own steps really take of each resource that a budget is on, and how limits follow it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import final

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode as current_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as mode_stack
from torch.utils.hooks import RemovableHandle

from setpoint.cost.budget import METERED, amount
from setpoint.errors import LoopError, SetpointError
from setpoint.interrupts import uninterrupted
from setpoint.messages import warn
from setpoint.resources.joules import EnergyMeter
from setpoint.resources.serving import Served, answering
from setpoint.resources.tape import LiveBytes
from setpoint.sensor.consumer import Hook
from setpoint.spending.limits import Correction, Limits
from setpoint.spending.meter import Meter, Readings, StepMeter

_MARGIN = 0.03  # a clock and an allocator do not repeat themselves any better than this
_COLD = 2  # first steps after a cut, which are skipped: they are slow, as caches and the allocator meet new sizes
_FEW = 4  # steps after a cut that are timed before a decision: a cut for a reading that was too high is not taken back
_LOOK_S = 10.0  # seconds between two looks at the energy counters; at kilowatts the quickest take minutes to wrap
_TRUST = 0.6  # how far the factor of a joint cost follows a new reading, as far as the controller's PI part does
_CLOCKED = ("latency", "inference")
_SLACK = 0.03  # how far a reading may rise above what is held for a limit out of reach, before anything is cut for it

_Clocked = tuple[float, float, float]  # what a clock reads: the median, its margin, and the quickest


@final
class Metering(Meter):
    """Reads seconds, joules and bytes of the user's own optimizer steps between two cuts.

    Seconds are the median over all steps but the first two, joules the mean over all but the first three, since those
    after a cut are slow. Bytes are the peak of one step, the last before a decision: of the allocator on a GPU, of live
    tensors on the CPU. There the step runs under a dispatch mode, which is slow, so its seconds do not count. Compiled
    code and code under another dispatch mode are not read. Nor is what the user does between two steps, such as an
    evaluation: the peak counts from the first call of the model or a part of it with gradients, in the mode, training
    or not, that the model was in when the last step ended. `held` gives the tensors that live between steps.
    Seconds of inference are the median over forwards of a copy in the runtime, made before each decision.
    Of several ranks the largest seconds and bytes count, and the sum of joules: `each` shares them where clocks are
    read, and nowhere else. A model that is sharded is `whole` where it is served.
    """

    def __init__(
        self,
        resources: Collection[str],
        held: Callable[[], Sequence[Tensor]],
        device: torch.device,
        *,
        model: nn.Module,
        compiled: bool = False,
        energy: EnergyMeter | None = None,
        inference: Served | None = None,  # of several ranks the first alone has it
        served_in: str = "",  # the name of its runtime
        each: Callable[[Float64[np.ndarray, " n"]], Float64[np.ndarray, "ranks n"]] | None = None,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
        watts: float = 0.0,
        dense_widths: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        timed = bool({"latency", "energy"} & set(resources))
        # Without waiting for the GPU a step would end when its kernels are queued.
        super().__init__(StepMeter(synchronize=timed), watts)
        self._resources, self._held, self._device = frozenset(resources), held, device
        self._model, self._compiled, self._energy, self._inference = model, compiled, energy, inference
        # Steps after a cut before a decision: the last is watched for its bytes, and joules take one step more.
        self._few = _FEW + len({"memory", "energy"} & self._resources) if timed else 0
        self._served_in, self._each, self._whole = served_in, each, whole
        self._passes_s: Sequence[float] = ()
        self._shared: dict[str, _Clocked] = {}
        self._dense_widths = dict(dense_widths)
        self._watching: LiveBytes | None = None
        self._beginning = list[RemovableHandle]()
        self._mode, self._allocating, self._blocked = True, False, False
        self._peak: int | None = None
        self._looked: float | None = None
        self._began_j: float | None = None
        self._earlier_j: float | None = 0.0
        self._num_steps = self._since_cut = 0
        self._warned = set[str]()

    @property
    def sources(self) -> dict[str, str]:
        on_gpu = self._device.type == "cuda"
        found = {
            "latency": "seconds between optimizer steps",
            "inference": f"seconds of a forward in {self._served_in}",
            "memory": f"peak of {'the CUDA allocator' if on_gpu else 'live tensors'} in one step",
            "energy": self._energy.source if self._energy is not None and self._energy.works else "",
        }
        if self._compiled and not on_gpu:
            del found["memory"]
        return {name: f"measured: {how}" for name, how in found.items() if how and name in self._resources}

    @property
    def peak_wanted(self) -> bool:
        return "memory" in self.sources and not self._blocked and self._peak is None

    @property
    def peak_known(self) -> bool:
        return self._peak is not None

    @property
    def waits(self) -> str:
        if self._since_cut >= self._few:
            return ""
        return f"no decision: meters read {self._few} steps at the same widths, and this is number {self._since_cut}"

    # Steps go by.

    def stepped(self) -> None:
        self._num_steps += 1
        self._since_cut += 1
        if self._energy is not None:
            if self._began_j is None and self._since_cut > _COLD:  # one step later than seconds: a mean outvotes none
                self._began_j, self._num_steps = self._energy.read_j(), 0
            now = time.monotonic()
            if self._looked is None or now - self._looked >= _LOOK_S:
                self._looked = now
                self._energy.read_j()  # a counter that wraps twice between two readings loses a turn
        if self._allocating:
            self._allocating = False
            self._peak = int(torch.cuda.max_memory_allocated(self._device))
        self.stop()

    def stop(self) -> None:
        self._begun()
        live, self._watching = self._watching, None
        if live is None:
            return
        if current_mode() is not live:
            raise LoopError("another dispatch mode began inside a metered step: end it before `optimizer.step()`")
        live.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._peak, self._blocked = live.peak_bytes, False

    def prepare(self, due: bool) -> bool:
        # While the decision waits for steps that are timed, none is watched.
        if not due or "memory" not in self._resources or self._since_cut + 1 < self._few:
            return False
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._allocating = True
        elif not self._compiled and not mode_stack():  # Inductor allocates past the dispatcher: a mode would miss it
            self._watching = LiveBytes(self._held())
            self._watching.__enter__()  # type: ignore[no-untyped-call]
        elif not self._compiled:
            self._blocked = True
        if not self._compiled and (self._allocating or self._watching is not None):
            self._mode = self._model.training
            hook = Hook(self.first_call)
            self._beginning = [module.register_forward_pre_hook(hook) for module in self._model.modules()]
        return self._watching is not None

    def first_call(self, *of_hook: object) -> None:
        """The model or a part of it is called: with gradients this begins the step, and what was before is dropped."""
        if self._model.training != self._mode or not torch.is_grad_enabled():
            return
        self._begun()
        if self._allocating:
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._watching is not None:
            self._watching.peak_bytes = self._watching.live_bytes

    def _begun(self) -> None:
        handles, self._beginning = self._beginning, []
        for handle in handles:
            handle.remove()

    def read_clocks(self, widths: Mapping[str, int]) -> None:
        if "inference" in self._resources:
            with nullcontext() if widths == self._dense_widths else self._whole():
                self._time_inference(widths)
        if self._each is not None:
            own = self._own
            sent = np.array([own.get(name, (-math.inf,) * 3) for name in METERED])
            found = self._each(sent.ravel()).reshape(-1, *sent.shape)
            joules, together = METERED.index("energy"), found.max(0)
            together[joules, ::2] = found.sum(0)[joules, ::2]  # -inf where a rank does not know its own
            rows = zip(METERED, together.tolist(), strict=True)
            self._shared = {name: (middle, margin, least) for name, (middle, margin, least) in rows if middle > 0}

    def _time_inference(self, widths: Mapping[str, int]) -> None:
        if self._inference is None or mode_stack():  # somebody else's mode would be timed, and would see the forwards
            return
        served, dense = self._inference, widths == self._dense_widths
        try:
            with uninterrupted():  # or a time limit's exception would be taken for the runtime's
                found = [1.0] if dense else served.ratios(answering(self._model))
            self._passes_s = [served.dense_s * ratio for ratio in found]
            problem = "" if self._passes_s else "the machine is busy: no two readings of the same model agree"
        except Exception as error:  # of any kind: training goes on, and other ranks wait for what this one reads
            said = isinstance(error, SetpointError)
            self._passes_s, problem = (), str(error) if said else f"{type(error).__name__}: {error}"
        if problem and problem not in self._warned:
            self._warned |= {problem, "inference"}
            warn(f"{problem}. The budget of inference is held by the fit, and what was read before")

    def cut(self) -> None:
        self._peak, self._passes_s, self._began_j, self._shared = None, (), None, {}
        self._num_steps = self._since_cut = 0

    # What has been read.

    def read(self) -> Readings:
        known = self._known
        values = {name: middle for name, (middle, _, _) in known.items() if name != "energy" or not self.watts}
        now_j = self._energy.read_j() if self._energy is not None else None
        run_j = None if now_j is None or self._earlier_j is None else self._earlier_j + now_j
        margins = {name: margin for name, (_, margin, _) in known.items()}
        return Readings(values, {name: margins.get(name, _MARGIN) for name in METERED}, run_j)

    @property
    def incomplete(self) -> bool:
        clocked = METERED if self._each is not None else _CLOCKED
        return bool(set(clocked) & self._resources - self.read().values.keys())

    @property
    def _known(self) -> Mapping[str, _Clocked]:
        return self._own if self._each is None else self._shared

    @property
    def _own(self) -> dict[str, _Clocked]:
        found, seconds = dict[str, _Clocked](), self._seconds
        if self._peak is not None:
            found["memory"] = (float(self._peak), _MARGIN, float(self._peak))
        if (joules := self._joules) is not None:
            found["energy"] = (joules, _MARGIN, joules)
        elif self.watts and seconds is not None:
            found["energy"] = (self.watts * seconds, _MARGIN, self.watts * min(self.steps.intervals))
        if "latency" in self._resources and seconds is not None:
            found["latency"] = seconds, _margin(self._warm), min(self.steps.intervals)
        if self._passes_s:
            found["inference"] = statistics.median(self._passes_s), _margin(self._passes_s), min(self._passes_s)
        return found

    @property
    def _joules(self) -> float | None:
        """Of a step, by the meter."""
        now_j = self._energy.read_j() if self._energy is not None else None
        if now_j is None or self._began_j is None or not self._num_steps:
            return None
        spent_j = (now_j - self._began_j) / self._num_steps
        return spent_j if spent_j > 0 or (self._energy is not None and not self._energy.source) else None

    @property
    def _warm(self) -> tuple[float, ...]:
        return self.steps.intervals[_COLD:]

    @property
    def _seconds(self) -> float | None:
        return statistics.median_low(self._warm) if self._warm and self._since_cut >= _FEW else None

    def corrected(self, limits: Limits, widths: Mapping[str, int]) -> tuple[Limits, Mapping[str, float]]:
        learnable = dict(self.read().values)
        if self.watts and "energy" in self._known:  # these times seconds, of which the controller learns
            learnable["energy"] = self._known["energy"][0]
        # Seconds are missing for a few steps after a cut; an energy meter, and the rank that times, say so themselves.
        quiet = ("latency", "energy") if self._inference is not None else ("latency", "energy", "inference")
        missing = limits.corrections.keys() - learnable.keys() - set(quiet)
        if self._blocked:
            missing |= {"memory"}
        for name in sorted(missing - self._warned) if not self.waits else ():
            warn(
                f"{name} is not measured now (is there another dispatch mode, as of a second loop?): it is modelled, "
                "from what was read before if anything was, until it is measured again"
            )
            self._warned.add(name)
        # The quickest step and pass: others may have an evaluation in them.
        quickest = {**learnable, **{name: least for name, (_, _, least) in self._known.items()}}
        return corrected(limits, learnable, quickest, widths)

    def state_dict(self) -> dict[str, float | None]:
        # Joules of a step are not among them: counters begin at 0 in each process.
        facts = {"blocked": float(self._blocked), "since_cut": float(self._since_cut)}
        return {"peak": self._peak, "run_j": self.read().run_j, **facts}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        self._peak = None if state["peak"] is None else int(state["peak"])
        self._blocked, self._since_cut = bool(state["blocked"]), int(state.get("since_cut") or 0)
        self._earlier_j = None if state["run_j"] is None else float(state["run_j"])


def _margin(values: Sequence[float]) -> float:
    """How far a median of these may be off, relatively: half of its 95 % interval, but 3 % at the least.

    The number of n values that lie below the true median is binomial with probability 1/2, so the order statistics
    `n/2 -+ 1.96 sqrt(n)/2` enclose it, whatever the distribution. Below six values they are the extremes.
    """
    ordered, count = sorted(values), len(values)
    low = max(0, math.floor(count / 2 - 1.96 * math.sqrt(count) / 2))
    return max(_MARGIN, (ordered[count - 1 - low] - ordered[low]) / 2 / statistics.median(ordered))


# Limits follow what is read.


def corrected(
    before: Limits, learnable: Mapping[str, float], quickest: Mapping[str, float], widths: Mapping[str, int]
) -> tuple[Limits, dict[str, float]]:
    """The limits by readings at these widths, and the costs that the controller learns of.

    What was read before and is missing now is as predicted and corrected.
    """
    limits, followed = before, before.followed
    seen = {name: value for name, value in learnable.items() if name in followed and value > 0}
    for name, value in seen.items():
        limits = _with_reading(limits, name, value, widths)
    learnt = dict(seen)
    if len(before.budgets) > 1 and limits.corrections:
        spent = {name: seen.get(name, limits.expected(name, widths)) for name in limits.per_step}
        learnt["joint"] = max(spent[name] / limit for name, limit in limits.per_step.items())
    for name in sorted(limits.corrections.keys() - before.corrections.keys()):
        limit, lowest = limits.asked.get(name), limits.expected(name, limits.narrowest)
        if limit is not None and not limits.is_per_run(name) and limit < lowest:
            warn(
                f"the budget of {amount(limit, name)} cannot be met: the meter reads {amount(seen[name], name)} where "
                f"{amount(limits.costs[name].total(widths), name)} was predicted, and the narrowest model would still "
                f"take about {amount(lowest, name)}"
            )
    for name in limits.per_step:
        if name in quickest and name in limits.corrections:
            limits = _doubted(limits, name, quickest[name], widths)
    missing = before.corrections.keys() - learnable.keys()
    return limits, learnt | {name: limits.expected(name, widths) for name in missing}


def _with_reading(limits: Limits, name: str, value: float, widths: Mapping[str, int]) -> Limits:
    predicted, at_dense = limits.costs[name].total(widths), widths == limits.dense_widths
    ratio, known = value / predicted, limits.corrections.get(name)
    if known is None:
        return limits.anchored(name, Correction(ratio, ratio * limits.predicted(name)), at_dense=at_dense)
    # A run budget plans with the factor itself; per step the controller's PI part follows the rest.
    trust = 1.0 if limits.is_per_run(name) else _TRUST
    known = replace(known, factor=known.factor * math.exp(trust * math.log(ratio / known.factor)))
    if at_dense:
        # The first steps of a run are slow, so the last reading of the dense model counts. One that falls is followed
        # as slowly as the controller does: a limit ahead of it would be cut for.
        known = replace(known, dense=max(ratio, known.factor) * limits.predicted(name))
    return limits.anchored(name, known, at_dense=at_dense)


def _doubted(limits: Limits, name: str, quickest: float, widths: Mapping[str, int]) -> Limits:
    """Hold the present cost where two readings in a row show that no cut can meet a budget.

    They do if cuts that should have saved a tenth or more have saved less than half of that, and what is left to save
    does not reach the limit. With the dense model's reading `m0` at the predicted cost `p0` and the present `m` at
    `p`, cuts save `(m0 - m) / (p0 - p)` for each unit of predicted cost.
    """
    known, limit = limits.corrections[name], limits.per_step[name]
    if limits.is_per_run(name) or known.asked is not None:
        return limits
    cost, predicted, first = limits.costs[name], limits.predicted(name), known.dense
    now, doubts, lowest = cost.total(widths), 0, 0.0
    if quickest > limit and now <= 0.9 * predicted and 1 - quickest / first < 0.5 * (1 - now / predicted):
        slope = max(0.0, first - quickest) / (predicted - now)
        lowest = quickest - slope * (now - cost.total(limits.narrowest))
        doubts = known.doubts + 1 if lowest > limit else 0
    known, per_step = replace(known, doubts=doubts), dict(limits.per_step)
    if doubts >= 2:  # one may be another program's doing
        known, per_step[name] = replace(known, asked=limit), quickest * (1 + _SLACK)
        warn(
            f"the budget of {amount(limit, name)} looks out of reach: the meter reads {amount(quickest, name)}, "
            f"and by what cuts have saved so far the narrowest model would still take about {amount(lowest, name)}"
            ". The rest does not shrink with the model: loading data, say, or other work of this machine. Nothing "
            "more is cut for it"
        )
    return replace(limits, per_step=per_step, corrections={**limits.corrections, name: known})
