"""Fake forwards: the live forward on copies of a model whose tensors have shapes but no data."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from setpoint.groups.example import Example
from setpoint.groups.forward import PartialForward
from setpoint.groups.model_copy import computed, copy_of
from setpoint.groups.rng import preserved_rng_state


class FakeForward:
    """Forwards of copies of a model on tensors without data, or on real ones where it needs data."""

    def __init__(self, model: nn.Module, example: Example, forward: PartialForward | None = None) -> None:
        self.model = model
        self._forward = forward or PartialForward.whole(example)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._needs_data: dict[bool, bool] = {}  # by whether the copy was in the other mode
        self._stand_ins: dict[int, Any] | None = None

    def run(
        self, prepare: Callable[[nn.Module], None] = lambda twin: None, *, other_mode: bool = False
    ) -> tuple[torch.Size, ...]:
        """Shapes of what a prepared copy returns, in the other of train and eval mode with `other_mode`."""
        if not self._needs_data.get(other_mode, False):
            try:
                with _quiet():
                    shapes = self._run(prepare, other_mode, fake=True)
            except Exception:
                # It may have asked for a value, or have no kernel for fake tensors: real ones tell.
                if self._needs_data.get(other_mode) is False:
                    raise
            else:
                self._needs_data[other_mode] = False
                return shapes
        gc.collect(1)  # earlier copies with data must not gather while collection waits
        shapes = self._run(prepare, other_mode, fake=False)
        self._needs_data[other_mode] = True
        return shapes

    def same_shapes(self, left: Sequence[torch.Size], right: Sequence[torch.Size], *, other_mode: bool = False) -> bool:
        """Whether two forwards returned the same shapes; where data was needed, it may have decided on sizes."""
        if not self._needs_data.get(other_mode, False):
            return tuple(left) == tuple(right)
        return [len(shape) for shape in left] == [len(shape) for shape in right]

    def _run(self, prepare: Callable[[nn.Module], None], other_mode: bool, *, fake: bool) -> tuple[torch.Size, ...]:
        # The memo makes deepcopy take the stand-ins for the tensors, so no data is copied.
        twin = copy_of(self.model, self._without_data() if fake else None, users_hooks=False)
        # A forward may write into its inputs: real ones are cloned.
        inputs = {
            id(x): self._fake.from_tensor(x.detach()) if fake else x.detach().clone() for x in self._forward.tensors
        }
        with self._fake if fake else nullcontext(), preserved_rng_state(self.model):
            if other_mode:
                twin.train(not self.model.training)
            prepare(twin)
            return tuple(tensor.shape for tensor in self._forward.with_tensors(inputs).run(twin))

    def _without_data(self) -> dict[int, Any]:
        """Tensors without data by id of those that they stand for; they serve all copies."""
        if self._stand_ins is None:
            self._stand_ins = {}
            for key, tensor in computed(self.model).items():
                self._stand_ins[key] = self._fake.from_tensor(tensor.detach())
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                fake = self._fake.from_tensor(tensor.detach())
                trained = isinstance(tensor, nn.Parameter)
                self._stand_ins[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if trained else fake
        return self._stand_ins


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what fake tensors log about a failing forward: real ones may do."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
