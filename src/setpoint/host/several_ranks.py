"""Ranks that train one model together, as in `DistributedDataParallel`, with one outcome of all they do."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from setpoint.distributed import Ranks
from setpoint.errors import LoopError, RankError
from setpoint.groups.group import Group
from setpoint.host.host import Agreed, Host
from setpoint.sensor.reading import Reading

_FAILED = "failed "
_LATER = "continue from the last checkpoint"
_PARTS = ("saliency", "slope", "norm")  # the fields of a reading that hold numbers by group
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BUILT_IN = "BuiltinCommHookType."  # how the names of PyTorch's own hooks begin, which it remembers only by name


class SeveralRanks(Host):
    """What hosts of several ranks have in common: ranks do all things together, and decide on means."""

    wrapped = True

    def together(self, what: str) -> AbstractContextManager[dict[str, Any]]:
        return _on_all_ranks(self.ranks, what)

    def fingerprint(self) -> int:
        weights = [parameter.detach() for parameter in self.model.parameters() if parameter.is_floating_point()]
        return sum(int(w.contiguous().flatten().view(_BITS[w.itemsize]).sum(dtype=torch.int64)) for w in weights)

    def mean(self, read: Callable[[], Reading], losses: Any, step: int) -> Reading:
        return _shared_reading(self.ranks, read, losses, step) if self.ranks.count > 1 else read()

    def each(self, values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, "ranks n"]:
        with self.together("timing"):  # a rank that fails before it has sent its part is waited for here
            pass
        return self.ranks.each(values)


@contextmanager
def _on_all_ranks(ranks: Ranks, what: str) -> Iterator[dict[str, Any]]:
    """What is done inside is done by all ranks, with the same outcome, or raises on all of them.

    At the end one small all-gather says of each rank whether it failed, and a digest of every fact that it has put into
    the dict that the block is given. RankError is raised if another rank failed, is lost, or has other facts there; an
    error of this rank stays as it is.
    """
    facts: dict[str, Any] = {}
    try:
        yield facts
    except Exception as error:
        # A RankError is raised on every rank, so that nobody waits for a message.
        if ranks.count > 1 and not isinstance(error, RankError):
            with suppress(RuntimeError):  # where the others are gone, this rank's own error still counts
                ranks.all_gather_text(f"{_FAILED}{type(error).__name__}: {error}")
        raise
    if ranks.count == 1:
        return
    digests = {name: hashlib.sha256(repr(fact).encode()).hexdigest()[:16] for name, fact in facts.items()}
    try:
        texts = ranks.all_gather_text(" ".join(f"{name}:{digest}" for name, digest in digests.items()))
    except RuntimeError as error:
        raise RankError(f"a rank was lost at {what}, or has not come to it in time: {_LATER}") from error
    failures = {rank: text.removeprefix(_FAILED) for rank, text in enumerate(texts) if text.startswith(_FAILED)}
    if failures:
        failed = "; ".join(f"rank {rank} with {text}" for rank, text in failures.items())
        raise RankError(
            f"{what} failed on {failed}. Rank {ranks.own} stops too: mend that, then start again or {_LATER}"
        )
    differing = {  # by rank, the names of the facts whose digests differ
        rank: sorted({entry.partition(":")[0] for entry in set(text.split()) ^ set(texts[0].split())})
        for rank, text in enumerate(texts)
        if text != texts[0]
    }
    if differing:
        whom = "; ".join(f"rank {rank} in {', '.join(names)}" for rank, names in differing.items())
        raise RankError(
            f"the ranks do not agree on {what}: other than rank 0 is {whom}. Give every rank the same model, the same "
            "arguments, an example of the same shape, and let no part of it depend on the rank or on chance"
        )


def _shared_reading(ranks: Ranks, read: Callable[[], Reading], losses: Any, step: int) -> Reading:
    """The reading that all ranks decide on, and the observed losses with it: means over ranks, by one all-reduce.

    Gradients are averaged before a sensor sees them, and a gate's gradient is linear in them: with `g_k` the gradient
    on rank k of K,

        r = sum of w * dL/dw = sum of w * (1/K) sum over k of g_k,

    that of the mean loss over the global batch. So each rank's reading is that of all samples already, and so is their
    mean, which makes sure that all see the same to the last bit, and is the estimate where a sensor looks at data of
    its own. The mean of the losses is the loss of the global batch where batches are equally large.
    """
    what = f"the reading after step {step}"
    with _on_all_ranks(ranks, what) as facts:
        reading = read()
        places = [(part, name) for part in _PARTS for name in sorted(getattr(reading, part))]
        values = [getattr(reading, part)[name] for part, name in places]
        groups = sorted(reading.steps_seen)
        seen = [float(reading.steps_seen[name] > 0) for name in groups]
        counts = np.array([reading.skipped_steps, reading.num_steps, *seen], dtype=np.float64)
        own = losses.unshared(step)
        facts["units"] = [(*place, len(value)) for place, value in zip(places, values, strict=True)]
        facts["step"] = (step, reading.step, reading.calibrated, len(own), sorted(reading.moments or ()))
    try:
        mean = ranks.mean(np.concatenate([own, counts, *values]))
    except RuntimeError as error:
        raise RankError(f"a rank was lost at {what}: {_LATER}") from error
    ends = np.cumsum([len(own), len(counts), *map(len, values)])
    losses_mean, counts_mean, *values_mean = np.split(mean, ends[:-1])
    losses.share(step, losses_mean)
    shared: dict[str, Any] = {part: {} for part in _PARTS}
    for (part, name), value in zip(places, values_mean, strict=True):
        shared[part][name] = value
    skipped, taken, *seen_mean = counts_mean
    # A group counts as seen where every rank has seen it: one rank alone may have run its branch.
    seen_by_all = {name for name, share in zip(groups, seen_mean, strict=True) if share == 1.0}
    steps_seen = {name: steps if name in seen_by_all else 0 for name, steps in reading.steps_seen.items()}
    moments = reading.moments and {
        name: replace(moment, blocks=tuple(ranks.total(block) / ranks.alike for block in moment.blocks))
        for name, moment in sorted(reading.moments.items())
    }
    counted = {"moments": moments, "skipped_steps": math.ceil(skipped), "num_steps": math.floor(taken)}
    return replace(reading, **shared, **counted, steps_seen=steps_seen)


class DDP(SeveralRanks):
    """A `Host` of ranks that each have all of the model in `parallel`, and average its gradients."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        copies: Sequence[Any],
        *,
        compiled: bool,
        parallel: DistributedDataParallel,
    ) -> None:
        super().__init__(model, optimizers, copies, compiled=compiled)
        _check_parallel(parallel)
        self._parallel: Any = parallel  # much of it has no types
        self._trained = {parameter for parameter in model.parameters() if parameter.requires_grad}

    @property
    def ranks(self) -> Ranks:
        return Ranks(self._parallel.process_group, self._parallel.device)

    def before_step(self, *, first: bool) -> None:
        super().before_step(first=first)
        if self._parallel._join_config.enable:
            raise LoopError(
                "join() of DistributedDataParallel is not supported, as a rank without batches cannot follow a cut: "
                "give every rank as many batches. (If that context is over, `with model.join(enable=False): pass` "
                "tells the wrapper so)"
            )

    @contextmanager
    def _open(self, groups: tuple[Group, ...], agree: Agreed) -> Iterator[Agreed]:
        try:
            yield agree
        finally:
            # Also after an exception in the middle: with the old reducer gradients would silently not be averaged.
            self._rewrap()

    def _rewrap(self) -> None:
        """Let the wrapper average the gradients of a model whose parameters have changed their shapes.

        It stays the same object, with all that the user has set on it. Only its reducer, which holds buckets for
        gradients of the old shapes, is built again, as PyTorch does when a wrapper is unpickled, and communication
        hooks are registered again. Nothing is sent.
        """
        wrapper = self._parallel
        _check_parallel(wrapper)
        built_in = wrapper._get_ddp_logging_data().get("comm_hook", "")  # read now: the new reducer knows of none
        # The old reducer's hooks hang on the parameters, and would fill buckets of the old shapes.
        wrapper._remove_autograd_hooks()
        with self._with_gradients():
            parameters, sparse = wrapper._build_params_for_reducer()
            names = wrapper._build_debug_param_to_name_mapping(parameters)
            wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
        # As in a fresh wrapper: buckets are ordered after the first backward pass, and a static graph is recorded in it
        wrapper._has_rebuilt_buckets = False
        if wrapper.static_graph:
            wrapper._static_graph_delay_allreduce_enqueued = False
            wrapper.reducer._set_static_graph()
            wrapper.logger._set_static_graph()
        hooks, wrapper._comm_hooks = wrapper._comm_hooks, []
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)
        if not hooks and built_in.startswith(_BUILT_IN):
            kind = getattr(torch._C._distributed_c10d.BuiltinCommHookType, built_in.removeprefix(_BUILT_IN))
            wrapper._register_builtin_comm_hook(kind)

    @contextmanager
    def _with_gradients(self) -> Iterator[None]:
        """Let exactly those parameters train whose gradients are averaged: also those that are frozen for a while."""
        before = [(parameter, parameter.requires_grad) for parameter in self._parallel.module.parameters()]
        try:
            for parameter, trains in before:
                # A reducer takes the parameters that train when it is built, for good, and no empty ones.
                parameter.requires_grad_((trains or parameter in self._trained) and parameter.numel() > 0)
            yield
        finally:
            for parameter, trains in before:
                parameter.requires_grad_(trains)


def _check_parallel(parallel: DistributedDataParallel) -> None:
    trouble = {
        "its own mixed_precision (use torch.autocast)": parallel.mixed_precision is not None,
        "delay_all_reduce_named_params": bool(parallel._delay_all_reduce_params),
        "optimizers in the backward pass": any(hasattr(p, "_in_backward_optimizers") for p in parallel.parameters()),
        "the python_reducer of torch._dynamo.config.optimize_ddp": parallel._use_python_reducer,
        # What it remembers has the sizes of the buckets, which change.
        "the communication hook of PowerSGD": "PowerSGDState"
        in {type(state).__name__ for _, state in parallel._comm_hooks},
    }
    if found := [name for name, there in trouble.items() if there]:
        raise LoopError(f"DistributedDataParallel with {'; '.join(found)} cannot follow a cut: leave that out")
