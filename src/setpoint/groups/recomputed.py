"""Recomputed: FLOPs of a backward pass beyond those of its gradients, as activation checkpoints make it compute again.

A training step of a copy without data shows it, as a forward shows the FLOPs of unknown ops. It depends on checkpoints
inside others, on their policies, and on PyTorch, which ends a recomputation as soon as it has what the backward pass
reads.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint as checkpointing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from setpoint.groups.example import Example, tensors_of
from setpoint.groups.forward import checkpoints_by
from setpoint.groups.sizes_in_code.bind import FakeForward
from setpoint.messages import warn

_Product = tuple[str, int, int]  # module whose own forward holds it, its FLOPs, how many such products were before it


def recomputations(model: nn.Module, example: Example, products: Sequence[tuple[str, float]]) -> list[float]:
    """How often the backward pass computes each product of the forward again: by module, FLOPs and order."""
    step, fake = _Step(), FakeForward(model, example)  # type: ignore[no-untyped-call]
    fake.users_hooks = True  # one may say what needs a gradient
    try:
        # The counter knows no fused attention: in its mathematical form it consists of products.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), checkpoints_by(step.apply, step.hook):
            fake.run(step.prepare)
    except Exception as error:  # noqa: BLE001 - a foreign step may do anything
        warn(
            f"what the backward pass of activation checkpoints computes again could not be counted ({error!r:.200}): a "
            "step takes more FLOPs than the loop reports, by one forward pass at most if no checkpoint is in another"
        )
        return [0.0] * len(products)
    numbers = Counter[tuple[str, int]]()
    keys = [_numbered(numbers, module, int(flops)) for module, flops in products]
    # What the counter sees otherwise than the graph, as the products of an einsum, shares what is left.
    left = [sum(key[1] * n for key, n in part.items() if key not in set(keys)) for part in (step.again, step.first)]
    return [step.again[key] if step.first[key] else left[0] / max(left[1], 1) for key in keys]


def _numbered(numbers: Counter[tuple[str, int]], module: str, flops: int) -> _Product:
    numbers[module, flops] += 1
    return module, flops, numbers[module, flops]


class _Step(TorchDispatchMode):
    """Counts the products of a copy's forward, and those that its backward pass computes again."""

    def prepare(self, twin: nn.Module) -> None:
        """Let the copy's forward be counted, and be followed by a backward pass."""
        self.first, self.again = Counter[_Product](), Counter[_Product]()
        self._place, self._target = ([""], Counter[tuple[str, int]]()), self.first
        for name, module in twin.named_modules():
            module.register_forward_pre_hook(lambda module, args, name=name: self._place[0].append(name))
            module.register_forward_hook(lambda module, args, output: self._place[0].pop() and None)
        forward = twin.forward

        def step(*args: Any, **kwargs: Any) -> Any:
            with self:
                outputs = forward(*args, **kwargs)
                self._target = Counter()  # gradients are none of it
                real = [torch.view_as_real(out) if out.is_complex() else out for out in tensors_of(outputs)]
                torch.autograd.backward([out.float().square().mean() for out in real if out.requires_grad])
            return outputs

        twin.forward = step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(getattr(func, "overloadpacket", None)):
            running, numbers = self._place
            flops = int(formula(*args, **(kwargs or {}), out_val=result))
            self._target[_numbered(numbers, running[-1], flops)] += 1
        return result

    _function, _hook = checkpointing.CheckpointFunction, checkpointing._checkpoint_hook

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return self._function.apply(self._noting(function, first=True), preserve, *args)  # type: ignore[no-untyped-call]

    def hook(self, frame: Any) -> Any:
        frame.recompute_fn = self._noting(frame.recompute_fn, first=False)
        return type(self)._hook(frame)

    def _noting(self, function: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
        """The function of a checkpoint; but for a `first` call, it computes again what is computed from here on."""
        (running, numbers), calls = self._place, iter([first])
        place = list(running), numbers.copy()

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self._place, self._target
            if not next(calls, False):
                self._place, self._target = (list(place[0]), place[1].copy()), self.again
            try:
                return function(*args, **kwargs)
            finally:
                self._place, self._target = before

        return call


def uncounted(model: nn.Module, example: Example, known: float) -> float:
    """FLOPs of a forward beyond those that are known, by PyTorch's own counter: of ops without a rule, a constant."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        try:
            FakeForward(model, example).run(lambda twin: counter.flop_counts.clear())
        except Exception:  # noqa: BLE001 - a foreign forward may do anything; it then goes uncounted here
            return 0.0
    return max(0.0, float(counter.get_total_flops() - known))
