"""An agreement: what ranks that train one model together do alike, or stop with an error on all of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from setpoint.distributed import Ranks
from setpoint.errors import RankError
from setpoint.sensor.reading import Reading

_FAILED = "failed "
_LATER = "the run goes on from its last checkpoint"


@runtime_checkable
class SharedLosses(Protocol):
    """Losses that each rank was given for itself, until they are shared."""

    def unshared(self, step: int) -> Float64[np.ndarray, " n"]:
        """What this rank alone was given up to a step, as numbers whose mean over ranks `share` takes."""

    def share(self, step: int, means: Float64[np.ndarray, " n"]) -> None:
        """From here on know what all ranks together know."""


@contextmanager
def together(ranks: Ranks, what: str) -> Iterator[dict[str, Any]]:
    """What is done inside is done by all ranks, with the same outcome, or raises on all of them.

    Each rank tells the others at the end, in one small all-gather, that it came through, and a digest of everything
    that it has put into the dict that the block is given. Nothing is sent where there is one rank.

    Raises:
        RankError: when another rank has failed, is lost, or has put something else into the dict. What this rank
            raises itself it raises as it is, after the others know of it.
    """
    facts: dict[str, Any] = {}
    try:
        yield facts
    except Exception as error:
        if ranks.count > 1 and not isinstance(error, RankError):
            with suppress(RuntimeError):
                ranks.hear(f"{_FAILED}{type(error).__name__}: {error}")
        raise
    if ranks.count == 1:
        return
    try:
        heard = ranks.hear(" ".join(f"{name}:{_digest(fact)}" for name, fact in facts.items()))
    except RuntimeError as error:
        raise RankError(f"a rank was lost at {what}, or has not come to it in time: {_LATER}") from error
    failures = {rank: words.removeprefix(_FAILED) for rank, words in enumerate(heard) if words.startswith(_FAILED)}
    if failures:
        failed = "; ".join(f"rank {rank} with {words}" for rank, words in failures.items())
        raise RankError(f"{what} failed on {failed}. Rank {ranks.own} stops too: {_LATER}")
    # By rank, the names of the facts of which the digests differ.
    apart = {
        rank: sorted({each.partition(":")[0] for each in set(words.split()) ^ set(heard[0].split())})
        for rank, words in enumerate(heard)
        if words != heard[0]
    }
    if apart:
        whom = "; ".join(f"rank {rank} in {', '.join(names)}" for rank, names in apart.items())
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

    Raises:
        RankError: when ranks cannot be brought together.
    """
    what = f"the reading after step {step}"
    with together(ranks, what) as facts:
        reading = read()
        values = [getattr(reading, part)[name] for part, name in _places(reading)]
        seen = [float(steps > 0) for _, steps in sorted(reading.steps_seen.items())]
        counts = np.array([reading.skipped_steps, reading.num_steps, *seen], dtype=np.float64)
        own = losses.unshared(step)
        facts["units"] = [(part, name, len(getattr(reading, part)[name])) for part, name in _places(reading)]
        facts["step"] = (step, reading.step, reading.calibrated, len(own))
    try:
        mean = ranks.mean(np.concatenate([own, counts, *values]))
    except RuntimeError as error:
        raise RankError(f"a rank was lost at {what}: {_LATER}") from error
    losses.share(step, mean[: len(own)])
    skipped, taken, *rest = mean[len(own) :]
    shared = _with_values(reading, mean[len(own) + len(counts) :])
    by_all = {name for name, each in zip(sorted(reading.steps_seen), rest, strict=False) if each == 1.0}
    steps_seen = {name: steps if name in by_all else 0 for name, steps in reading.steps_seen.items()}
    counted = {"skipped_steps": math.ceil(skipped), "num_steps": math.floor(taken)}
    return replace(shared, **counted, steps_seen=steps_seen)


def _places(reading: Reading) -> list[tuple[str, str]]:
    """Where the numbers of a reading are, in one order on all ranks."""
    return [(part, name) for part in ("saliency", "slope", "norm") for name in sorted(getattr(reading, part))]


def _with_values(reading: Reading, values: Float64[np.ndarray, " n"]) -> Reading:
    found: dict[str, Any] = {"saliency": {}, "slope": {}, "norm": {}}
    for part, name in _places(reading):
        length = len(getattr(reading, part)[name])
        found[part][name], values = values[:length], values[length:]
    return replace(reading, **found)
