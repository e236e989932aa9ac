"""A listener: notes what consumers are given in training forwards, and which BatchNorm lies behind each."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.sensor.consumer import Consumer
from setpoint.sensor.padding import Padding
from setpoint.sensor.sentinel import graph_task

_MOST_NUMBERS = 2**23
"""Numbers that are kept of what one consumer was given: a wider one is seen in fewer rows."""


def rows_kept(consumer: Consumer, rows: int) -> int:
    """Up to how many rows are kept of a consumer."""
    return min(rows, max(1, _MOST_NUMBERS // (consumer.num_units * consumer.num_columns)))


class Listener:
    """Hooks on consumers, which note a sample of the rows that each is given; changes with each forward.

    Only forwards outside of compiled code count, and of these such as record gradients, or else all. Where a checkpoint
    runs one twice, it counts once. Positions that an attention mask leaves out are not noted. `norms` names, by
    consumer's layer, the BatchNorm that is given just what it has made.

    Args:
        consumers: to listen to, in `model`.
        rows: noted of each in one forward, at most.
        most: kept of each until `take`, at most: those of the last forwards.
        training: whether only forwards that record gradients count.
    """

    def __init__(
        self, consumers: Sequence[Consumer], model: nn.Module, rows: int, most: int, *, training: bool = True
    ) -> None:
        self._training = training
        self.consumers = tuple(consumers)
        self.norms: dict[str, str] = {}
        self._noted: list[deque[Tensor]] = [deque(maxlen=-(-most // rows)) for _ in consumers]
        self._rows = [rows_kept(consumer, rows) for consumer in consumers]
        self._ahead = [False] * len(self.consumers)  # whether any row was noted outside of a backward pass
        self._made: dict[str, weakref.ref[Tensor]] = {}
        self._padding = Padding(model)
        layers = [(model.get_submodule(each.layer), _Ear(self, number)) for number, each in enumerate(consumers)]
        norms = [
            (name, each) for name, each in model.named_modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)
        ]
        self._handles = [layer.register_forward_hook(ear, with_kwargs=True) for layer, ear in layers]
        self._handles += [norm.register_forward_pre_hook(_NormEar(self, name)) for name, norm in norms]
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def note(self, number: int, layer: nn.Module, x: Any, output: Any) -> None:
        """Note a sample of what a consumer is given."""
        counts = torch.is_grad_enabled() or not self._training
        if torch.compiler.is_compiling() or not counts or not isinstance(x, Tensor) or not x.numel():
            return
        again = graph_task() != -1  # a checkpoint runs the forward in the backward pass, once more or only there
        if again and self._ahead[number]:
            return
        self._ahead[number] |= not again
        consumer = self.consumers[number]
        with torch.no_grad():
            self._noted[number].append(consumer.rows(layer, x, self._rows[number], self._padding.positions))
        if isinstance(output, Tensor):
            self._made[consumer.layer] = weakref.ref(output)

    def passed(self, norm: str, x: Any) -> None:
        """A BatchNorm is given x."""
        for layer, made in self._made.items():
            if x is not None and made() is x:
                self.norms[layer] = norm

    def take(self) -> list[Tensor | None]:
        """By consumer, the rows since the last call, the latest last; None where there were none."""
        noted = [torch.cat(tuple(each), 2) if each else None for each in self._noted]
        self.forget()
        return noted

    def forget(self) -> None:
        """Drop what was noted."""
        for each in self._noted:
            each.clear()
        self._made.clear()
        self._ahead = [False] * len(self._ahead)

    def stop(self) -> None:
        """Take the hooks off; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._padding.stop()
        self.forget()


class _Ear:
    """A hook that does not keep its listener alive, and is deaf in a copy of the model, or in a file."""

    def __init__(self, listener: Listener | None = None, number: int = 0) -> None:
        self._listener = (lambda: None) if listener is None else weakref.ref(listener)
        self._number = number

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        listener = self._listener()
        if listener is not None:
            listener.note(self._number, layer, args[0] if args else next(iter(kwargs.values()), None), output)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class _NormEar:
    """The same on a BatchNorm."""

    def __init__(self, listener: Listener | None = None, name: str = "") -> None:
        self._listener = (lambda: None) if listener is None else weakref.ref(listener)
        self._name = name

    def __call__(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        listener = self._listener()
        if listener is not None and args:
            listener.passed(self._name, args[0])

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()
