"""A method: one way to get a trained model of a given size out of a task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from setpoint.controller.priced import Gains, PricedController
from setpoint.controller.schedule import Schedule
from setpoint.gates.gated import GatedController
from setpoint.messages import did_you_mean
from setpoint.report.target import call_own, is_own_function
from setpoint.sensor.magnitude import MagnitudeSensor
from setpoint_bench.course import Batches, Begun, Course
from setpoint_bench.methods.composed import Composed
from setpoint_bench.methods.fitted import Fitted
from setpoint_bench.methods.in_training import Setpoint
from setpoint_bench.methods.rival import RIVALS
from setpoint_bench.methods.scratch import Dense, Neighbour, Small
from setpoint_bench.methods.sparse import Sparse
from setpoint_bench.methods.states import FewStates, Hankel
from setpoint_bench.methods.torch_pruning import TorchPruning
from setpoint_bench.random_sensor import RandomSensor
from setpoint_bench.results import Result
from setpoint_bench.scheduled import ScheduledController
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import PLAIN, BenchError, fits_a_folder

__all__ = ["METHODS", "Dense", "Method", "Setpoint", "Small", "method_named"]


@runtime_checkable
class Method(Protocol):
    """Chooses a course, and what acts on the model while it trains. A method is a value.

    In every method `learning_rate` is the peak of the schedule relative to the task's.
    """

    @property
    def name(self) -> str:
        """Name on the command line and in result files."""
        ...

    @property
    def sized(self) -> bool:
        """Whether the result depends on the budget; the dense model's does not."""
        ...

    @property
    def family(self) -> str:
        """Kind of method: "dense", "small", "post-training", "open-loop", "sparse" or "setpoint", or any other word.

        Tables list a task's rows by it.
        """
        ...

    @property
    def paper(self) -> str:
        """Where the method comes from, or ""."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Setpoint's methods whose cell of the same task, budget and seed must be finished first."""
        ...

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        """Where to begin and how long to train.

        Args:
            task: what to train.
            budget: fraction of the dense FLOPs per step.
            needed: the results of the cells that `needs` names, by method.

        Raises:
            BenchError: for a budget that it cannot meet; the message says the least that it can.
        """
        ...

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        """Make the optimizer, and put the pruner in place; the time that takes counts as the method's own.

        Args:
            task: the recipe, as the course says.
            model: built as the course says; it may be cut here.
            budget: fraction of the dense FLOPs per step.
            batches: training batches, for a method that looks at some before it begins.
        """
        ...


_MEMBERS = ("name", "sized", "family", "paper", "needs", "course", "begin")


def _random_sensor() -> RandomSensor:
    """One that chooses by the cell's own random state, so that every seed has other units to go."""
    return RandomSensor(seed=int(torch.randint(2**31, ())))


_GRADUAL = PricedController()  # what `setpoint` was measured with, in eight cuts
_AT_ONCE = ScheduledController(begin=0.0, end=0.0, num_cuts=1)
_GLOBAL = ScheduledController(allocation="worth")
_HAN = "Han et al., Learning both weights and connections for efficient neural networks, NIPS 2015"
_LI = "Li et al., Pruning filters for efficient ConvNets, ICLR 2017"
_ZHU = "Zhu and Gupta, To prune, or not to prune, ICLR workshop 2018"
_FANG = "Fang et al., DepGraph: towards any structural pruning, CVPR 2023"
_MOLCHANOV = "Molchanov et al., Importance estimation for neural network pruning, CVPR 2019"
_EVCI = "Evci et al., Rigging the lottery, ICML 2020"
_HINTON = "Hinton et al., Distilling the knowledge in a neural network, 2015"
_MITTAL = "Mittal et al., Studying the plasticity of networks using random pruning, MVA 30, 2019"

_NORMS, _TAYLOR = (
    TorchPruning("norm-first", "norm", True, paper=_FANG),
    TorchPruning("taylor-first", "taylor", False, paper=f"{_FANG}; {_MOLCHANOV}"),
)
_CUBIC = Setpoint("cubic", ScheduledController(), MagnitudeSensor, paper=_ZHU, family="open-loop")


def after_training(name: str, cut: Method) -> Composed:
    """The finished dense run, cut, and trained for a quarter of its steps: the usual length in the literature."""
    return Composed(name, cut, start="dense", share=0.25, kind="post-training")


METHODS: tuple[Method, ...] = (
    Dense(),
    Small(),
    Composed("small-long", Small(), pays="setpoint"),
    Neighbour(),
    after_training("magnitude-oneshot", Sparse("masks", _HAN, begin_at=0.0, end=0.0)),
    after_training("filter-oneshot", Setpoint("filter-first", _AT_ONCE, MagnitudeSensor, paper=_LI)),
    after_training("torch-pruning-norm", _NORMS),
    after_training("torch-pruning-taylor", _TAYLOR),
    Setpoint("filter-first", _AT_ONCE, MagnitudeSensor, paper=_LI, family="open-loop"),
    _NORMS,
    _TAYLOR,
    TorchPruning("taylor-first-even", "taylor", True, paper=f"{_FANG}; {_MOLCHANOV}"),
    _CUBIC,
    Setpoint("cubic-global", _GLOBAL, MagnitudeSensor, paper=_ZHU, family="open-loop"),
    Setpoint("cubic-taylor", ScheduledController(), paper=_ZHU, family="open-loop"),
    Setpoint("cubic-taylor-global", _GLOBAL, paper=_ZHU, family="open-loop"),
    Sparse("gmp", _ZHU),
    Setpoint(controller=_GRADUAL),
    Setpoint("setpoint-gradual", _GRADUAL),
    Setpoint("setpoint-at-once"),
    Composed("setpoint-at-once-long", Setpoint("setpoint-at-once"), pays="setpoint"),
    Fitted(),
    Composed(
        "setpoint-from-trained", Setpoint(), start="dense", teacher="dense", share=None, source=_HINTON, kind="setpoint"
    ),
    Composed("setpoint-from-trained-alone", Setpoint(), start="dense", share=None),
    Setpoint("setpoint-uniform", PricedController(allocation="uniform")),
    Setpoint("setpoint-first", PricedController(Schedule(warmup=0.0, settle=0.02, num_cuts=1))),
    Setpoint("setpoint-early", PricedController(Schedule(warmup=0.02, settle=0.1))),
    Setpoint("setpoint-late", PricedController(Schedule(warmup=0.3, settle=0.6))),
    Setpoint("setpoint-gates", GatedController()),
    Setpoint("setpoint-regrow", PricedController(regrow=True)),
    Setpoint("setpoint-weights", granularity="weight", paper=_EVCI, family="sparse"),
    Setpoint("setpoint-magnitude", _GRADUAL, sensor=MagnitudeSensor),
    Setpoint("setpoint-random", _GRADUAL, sensor=_random_sensor, paper=_MITTAL),
)
"""All methods; those that end in `first` cut at the start, as makes sense for a pretrained model.

Each `setpoint-...` is Setpoint with one thing changed: how a cut is split over layers (`uniform`; `magnitude` and
`random` too, since their readings rank within a layer only), when it is made (`first`, `early`, `late`), what ranks
units (`gates`, `magnitude`, `random`), whether units come back (`regrow`), or what is pruned (`weights`: single ones,
in theory). `+taught` and the other words of `CHANGES` change any of them.
"""

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "taught": {"teacher": "dense"},
    "trained": {"start": "dense"},
    "counted": {"start": "dense@share=0.25", "share": 0.75},
}
"""What a word after a method's name changes: `cubic+taught+trained`.

`taught`: it learns the answers of the finished dense run as well. `trained`: it starts from that run's model, and
trains for as many steps again. `counted`: it starts from a dense run of a quarter of the steps, and trains for the
rest. `long`, which is the last word, trains all that for as many steps as the dense run's training FLOPs pay for.
"""

RESOURCE_METHODS: tuple[Method, ...] = (
    Setpoint("setpoint-latency", resource="latency"),
    Setpoint("setpoint-memory", _GRADUAL, resource="memory"),
    Setpoint("setpoint-memory-open", PricedController(gains=Gains(kp=0.0, ki=1e-9)), resource="memory"),
)
"""Setpoint with a budget on seconds or peak bytes of a step: how many FLOPs are left is another matter.

`setpoint-memory-open` follows the reference by what the meter read of the dense model alone: its feedback is off.
"""
STATE_METHODS: tuple[Method, ...] = (Hankel(), FewStates())
"""Methods for tasks on state-space models."""


def all_methods() -> tuple[Method, ...]:
    """The methods that have a name, those of the tables first."""
    return *METHODS, *RESOURCE_METHODS, *STATE_METHODS, *RIVALS


def method_named(name: str) -> Method:
    """The method of that name, changed where the name says so, `cubic+taught`, `gmp@density=0.1`; or the user's own.

    Args:
        name: that of a method, or `module.py:function` for a function that takes nothing and returns one.

    Raises:
        BenchError: there is none, or it has no such change or setting; the message lists those there are.
    """
    everything = all_methods()
    if is_own_function(name):
        return _own_method(name, {method.name for method in everything})
    changed, *settings = name.split("@")
    base, *words = changed.split("+")
    for method in everything:
        if method.name == base:
            return _with_settings(_changed(method, changed, words) if words else method, name, settings)
    listed = "; ".join(
        f"{what}{', '.join(method.name for method in methods)}"
        for what, methods in (
            ("use ", METHODS),
            ("for budgets on other resources ", RESOURCE_METHODS),
            ("for state-space models ", STATE_METHODS),
            ("with setpoint-bench[rivals] ", RIVALS),
        )
    )
    hint = did_you_mean(base, [method.name for method in everything])
    raise BenchError(f"unknown method {name!r}: {hint}{listed}; or your own as module.py:function")


def _changed(method: Method, name: str, words: list[str]) -> Method:
    """The method with all that the words change; what starts from a trained model cuts after training."""
    if words[-1] == "long":
        shorter = name.removesuffix("+long")
        return Composed(name, _changed(method, shorter, words[:-1]) if words[:-1] else method, pays="dense")
    wanted: dict[str, Any] = {}
    for word in words:
        if word not in CHANGES:
            hint = did_you_mean(word, (*CHANGES, "long"))
            raise BenchError(f"unknown change +{word} in {name!r}: {hint}there are +{', +'.join(CHANGES)}, and +long")
        wanted |= CHANGES[word]
    if "start" in wanted and method.family == "open-loop":
        wanted["kind"] = "post-training"
    if isinstance(method, Composed):
        return dataclasses.replace(method, name=name, **wanted)
    return Composed(name, method, **wanted)


def _own_method(target: str, taken: Collection[str]) -> Method:
    """What a function of the user's own returns, if it is a method with a name that is free and can name a folder."""
    made: Any = call_own(target)
    returned = f"{target} returned {type(made).__name__}"
    if missing := [each for each in _MEMBERS if not hasattr(made, each)]:
        raise BenchError(f"{returned}, which has no {', '.join(missing)}: return a setpoint_bench.method.Method")
    try:
        hash(made)
    except TypeError as error:
        raise BenchError(f"{returned}, which is no value: make it a frozen dataclass without lists ({error})") from None
    if not isinstance(made.name, str) or not fits_a_folder(made.name):
        raise BenchError(f"{returned} with the name {made.name!r}, which cannot name a folder: {PLAIN}")
    if made.name in taken:
        raise BenchError(f"{returned} with the name {made.name}, which a method of Setpoint's has: give it another")
    method: Method = made
    return method


def _with_settings(method: Method, name: str, settings: list[str]) -> Method:
    """The method under its full name with all `key=number` set, in itself or in what it prunes by."""
    if not settings:
        return method
    known = _numbers(method)
    wanted: dict[tuple[str, ...], object] = {("name",): name}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            listed = ", ".join(f"@{each}=NUMBER" for each in sorted(known))
            hint = did_you_mean(key, known)
            raise BenchError(f"unknown setting {key!r} of {method.name}: {hint}it has {listed or 'none'}")
        path, kind = known[key]
        try:
            number = kind(value)
        except ValueError as error:
            whole = "whole " if kind is int else ""
            raise BenchError(f"the setting {key!r} of {method.name} is a {whole}number, got {value!r}") from error
        if key == "learning_rate" and not 0 < number < math.inf:
            raise BenchError(f"{name} cannot be: a learning rate is relative to the task's and above 0, got {value}")
        wanted[path] = number
    try:
        changed: Method = _replaced(method, wanted)
    except ValueError as error:
        raise BenchError(f"{name} cannot be: {error}") from error
    return changed


def _numbers(value: Any) -> dict[str, tuple[tuple[str, ...], type[int] | type[float]]]:
    """The settings that are numbers: by name the attributes that lead there, and its type; those outside hide inner."""
    found: dict[str, tuple[tuple[str, ...], type[int] | type[float]]] = {}
    for each in dataclasses.fields(value):
        inner = getattr(value, each.name)
        if type(inner) in (int, float):
            found[each.name] = (each.name,), type(inner)
    for each in dataclasses.fields(value):
        inner = getattr(value, each.name)
        if dataclasses.is_dataclass(inner) and not isinstance(inner, type):
            for key, (path, kind) in _numbers(inner).items():
                found.setdefault(key, ((each.name, *path), kind))
    return found


def _replaced(value: Any, wanted: Mapping[tuple[str, ...], object]) -> Any:
    """A copy with other values at the ends of paths of attributes, each part of it made once."""
    direct = {path[0]: new for path, new in wanted.items() if len(path) == 1}
    inner: dict[str, dict[tuple[str, ...], object]] = {}
    for (first, *rest), new in wanted.items():
        if rest:
            inner.setdefault(first, {})[tuple(rest)] = new
    parts = {first: _replaced(getattr(value, first), rest) for first, rest in inner.items()}
    return dataclasses.replace(value, **direct, **parts)


ABOUT: Mapping[str, str] = {
    "dense": "The full model.",
    "small": "A uniformly narrower model at the budget, from scratch, for the same steps.",
    "small-long": "As small, for as many steps as Setpoint's whole training FLOPs pay for.",
    "neighbour": "Another pretrained model, trained as it is: the one that the task names.",
    "magnitude-oneshot": "Dense, then the smallest weights of each tensor masked, then fine-tuned.",
    "filter-oneshot": "Dense, then units cut by the norm of their weights, then fine-tuned.",
    "torch-pruning-norm": "Dense, then cut by the library Torch-Pruning by group norms, then fine-tuned.",
    "torch-pruning-taylor": "Dense, then cut by the library Torch-Pruning by its Taylor criterion, then fine-tuned.",
    "filter-first": "Cut by norms after the first step, then trained.",
    "norm-first": "Cut by Torch-Pruning by group norms before the first step, then trained.",
    "taylor-first": "Cut by Torch-Pruning by its Taylor criterion, all layers ranked together, then trained.",
    "taylor-first-even": "Cut by Torch-Pruning by its Taylor criterion, every group by the same ratio, then trained.",
    "cubic": "All groups narrowed evenly along a cubic schedule, by norms.",
    "cubic-global": "Along the same schedule, by norms ranked over all groups.",
    "cubic-taylor": "As cubic, by Setpoint's own saliency.",
    "cubic-taylor-global": "Along the same schedule, by Setpoint's own saliency per FLOP, ranked over all groups.",
    "gmp": "Weights masked by magnitude along a cubic schedule.",
    "setpoint": "With feedback, widths free, Taylor readings; gradual cuts.",
    "setpoint-gradual": "As setpoint, by a name that says so.",
    "setpoint-at-once": "The default of attach: one cut after the first batches, its readers refitted.",
    "setpoint-at-once-long": "As setpoint-at-once, for as many steps as setpoint's training FLOPs pay for.",
    "fitted-first": "Cut by compress before the first step, then trained.",
    "setpoint-from-trained": "The finished dense run, cut at once, with itself as teacher; for the dense run's FLOPs.",
    "setpoint-from-trained-alone": "The same without a teacher, for the same FLOPs.",
    "setpoint-uniform": "With feedback, all groups at the same density.",
    "setpoint-first": "With feedback, settled by 2 % of the run: for a pretrained model.",
    "setpoint-early": "With feedback, settled by 10 % of the run.",
    "setpoint-late": "With feedback, leaves dense at 30 % of the run and settles by 60 %.",
    "setpoint-gates": "With feedback, learned gates in place of the saliency.",
    "setpoint-regrow": "With feedback, dropped units may come back.",
    "setpoint-weights": "With feedback, weights masked by worth per theoretical FLOP, some replaced by gradient.",
    "setpoint-magnitude": "With feedback, all groups at the same density, units by the norm of their weights.",
    "setpoint-random": "With feedback, all groups at the same density, units at random.",
    "setpoint-latency": "With feedback, the budget a fraction of the dense seconds of a step.",
    "setpoint-memory": "With feedback, the budget a fraction of the dense peak bytes of a step.",
    "setpoint-memory-open": "As setpoint-memory, without feedback.",
    "hankel": "With feedback, over states of state-space layers, ranked by Hankel singular values.",
    "few-states": "A model that begins with few states, 28 by default, from scratch.",
    "fasterai-first": "Cut by fasterai by the size of weights, every layer by the same ratio, then trained.",
    "fasterai-first-global": "Cut by fasterai by the size of weights, all layers ranked together, then trained.",
    "kirigami-first": "Cut by torch-kirigami by Taylor scores, all layers ranked together, then trained.",
    "fastnas-first": "Cut by ModelOpt's FastNAS, then trained.",
}
