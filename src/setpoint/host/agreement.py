"""Agreement: ranks that train one model do a thing with one outcome, or stop with an error on all of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np

from setpoint.distributed import Ranks
from setpoint.errors import RankError
from setpoint.host.host import SharedLosses
from setpoint.host.local import Local
from setpoint.sensor.reading import Reading

_FAILED = "failed "
_LATER = "the run goes on from its last checkpoint"
_PARTS = ("saliency", "slope", "norm")
"""The fields of a reading that hold numbers by group."""


class SeveralRanks(Local):
    """What hosts of several ranks have in common: ranks do all things together, and decide on means."""

    wrapped = True

    def together(self, what: str) -> AbstractContextManager[dict[str, Any]]:
        return on_all_ranks(self.ranks, what)

    def mean(self, read: Callable[[], Reading], losses: SharedLosses, step: int) -> Reading:
        return shared_reading(self.ranks, read, losses, step) if self.ranks.count > 1 else read()


@contextmanager
def on_all_ranks(ranks: Ranks, what: str) -> Iterator[dict[str, Any]]:
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
    try:
        texts = ranks.all_gather_text(" ".join(f"{name}:{_digest(fact)}" for name, fact in facts.items()))
    except RuntimeError as error:
        raise RankError(f"a rank was lost at {what}, or has not come to it in time: {_LATER}") from error
    failures = {rank: text.removeprefix(_FAILED) for rank, text in enumerate(texts) if text.startswith(_FAILED)}
    if failures:
        failed = "; ".join(f"rank {rank} with {text}" for rank, text in failures.items())
        raise RankError(f"{what} failed on {failed}. Rank {ranks.own} stops too: {_LATER}")
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


def _digest(fact: Any) -> str:
    return hashlib.sha256(repr(fact).encode()).hexdigest()[:16]


def shared_reading(ranks: Ranks, read: Callable[[], Reading], losses: SharedLosses, step: int) -> Reading:
    """The reading that all ranks decide on, and the observed losses with it: means over ranks, by one all-reduce.

    Gradients are averaged before a sensor sees them, and a gate's gradient is linear in them: with `g_k` the gradient
    on rank k of K,

        r = sum of w * dL/dw = sum of w * (1/K) sum over k of g_k,

    that of the mean loss over the global batch. So each rank's reading is that of all samples already, and so is their
    mean, which makes sure that all see the same to the last bit, and is the estimate where a sensor looks at data of
    its own. The mean of the losses is the loss of the global batch where batches are equally large.
    """
    what = f"the reading after step {step}"
    with on_all_ranks(ranks, what) as facts:
        reading = read()
        places = [(part, name) for part in _PARTS for name in sorted(getattr(reading, part))]
        values = [getattr(reading, part)[name] for part, name in places]
        groups = sorted(reading.steps_seen)
        seen = [float(reading.steps_seen[name] > 0) for name in groups]
        counts = np.array([reading.skipped_steps, reading.num_steps, *seen], dtype=np.float64)
        own = losses.unshared(step)
        facts["units"] = [(*place, len(value)) for place, value in zip(places, values, strict=True)]
        facts["step"] = (step, reading.step, reading.calibrated, len(own))
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
    counted = {"skipped_steps": math.ceil(skipped), "num_steps": math.floor(taken)}
    return replace(reading, **shared, **counted, steps_seen=steps_seen)
