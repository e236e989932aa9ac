"""A teacher: a frozen model whose logits another model learns together with its targets."""

import math
from collections.abc import Hashable, Iterable, Mapping
from contextlib import nullcontext, suppress
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from setpoint.actuator.in_state_dict import ATTACHED
from setpoint.errors import NotBegunError
from setpoint.groups.example import tensors_of
from setpoint.loop.loop import Loop
from setpoint.messages import a_type, plain_number


@final
class Teacher:
    """A frozen model whose logits a pruned one learns: `(1 - alpha) * loss + alpha * T^2 * KL(teacher / T || own / T)`.

    KL is the mean over rows of logits. `attach(..., teacher=Teacher(dense))` needs no more: the user's loss stays as it
    is. In a loop without `attach`, `loss` gives the sum. The FLOPs of the teacher's passes count as overhead of the
    loop, so that a budget for a whole run pays for them.

    Args:
        model: answers with logits, or with an output that has `logits`; set to eval mode, and called without gradients.
        loop: what `attach` returned, for the FLOPs; `attach` sets it.
        alpha: share of the teacher in the loss, from 0 to 1.
        temperature: T, above 0.
        output: key, attribute or position of the logits in what both models return; by default the output itself, or
            its `logits`.
        dim: dim of the classes; by default 1 in four dims or more, as in maps, and else the last one. `attach` takes
            the other of the two where the first gradient adds up to 0 over it, as a cross entropy's over classes does.

    Attributes:
        flops: of all passes of the teacher until now.
        own: whether it is a copy of the pruned model itself.
        method: name of the model's method that is called; `attach` sets it.

    Raises:
        ValueError: for a setting out of range, if `model` is no module or `loop` is neither a loop nor None, and for
            the pruned model itself.

    References:
        Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015.

    >>> student, teacher = nn.Linear(8, 3), Teacher(nn.Linear(8, 3), alpha=0.5)
    >>> inputs, targets = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    >>> logits = student(inputs)
    >>> loss = teacher.loss(functional.cross_entropy(logits, targets), logits, teacher.logits(inputs))
    >>> teacher.flops
    192.0
    """

    def __init__(
        self,
        model: nn.Module,
        loop: Loop | None = None,
        *,
        alpha: float = 0.5,
        temperature: float = 2.0,
        output: str | int | None = None,
        dim: int | None = None,
    ) -> None:
        if not (isinstance(model, nn.Module) and isinstance(loop, Loop | None)):
            raise ValueError(f"write Teacher(model, loop, alpha=0.5): got {a_type(model)} and {a_type(loop)}")
        alpha, temperature = plain_number(alpha), plain_number(temperature)
        if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {alpha!r}")
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
        if dim is not None and type(dim) is not int:
            raise ValueError(f"dim is the number of the dim that the classes are in, or None; got {dim!r}")
        _check_not_pruned(model)
        self.model, self.loop = model.eval(), loop
        self.alpha, self.temperature, self.output, self.dim = float(alpha), float(temperature), output, dim
        self.flops, self._counted, self.own, self.method = 0.0, 0.0, False, "forward"
        self._flops_by_inputs = dict[Any, float]()
        self._samples: list[int] | None = None
        self._kept = dict[int, Tensor]()

    def samples(self, indices: Iterable[int]) -> None:
        """Say which samples the next forward gets: logits are kept in memory, and known ones need no pass.

        For samples that are the same each time: an augmented one has other logits. Row i of the logits is sample i.
        """
        self._samples = [int(index) for index in indices]

    @torch.no_grad()
    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """The teacher's logits on these arguments of its forward; the FLOPs of the pass are counted.

        Raises:
            ValueError: when the teacher returns no logits, and for the model that is pruned.
        """
        samples, self._samples = self._samples, None
        if samples and all(index in self._kept for index in samples):
            device = next((parameter.device for parameter in self.model.parameters()), None)
            return torch.stack([self._kept[index] for index in samples]).to(device)
        _check_not_pruned(self.model)  # it may have been attached since
        if self.model.training:  # a module that holds it was set to train mode
            self.model.eval()
        inputs = _form((args, kwargs))
        counter = FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH)
        with nullcontext() if inputs in self._flops_by_inputs else counter:  # it slows a pass down
            called = self.model if self.method == "forward" else getattr(self.model, self.method)
            try:
                outputs = called(*args, **kwargs)
            except Exception as error:
                raise ValueError(
                    f"the teacher does not take what the model takes ({type(error).__name__}: {str(error):.200}): both "
                    "must have the same inputs, targets and classes"
                ) from error
        self.flops += self._flops_by_inputs.setdefault(inputs, float(counter.get_total_flops()))
        self.count()
        logits = logits_of(outputs, self.output)
        if samples is not None:
            if len(samples) != len(logits):
                raise ValueError(f"samples() named {len(samples)}, and the forward has {len(logits)} rows of logits")
            self._kept.update(zip(samples, logits.cpu().unbind(), strict=True))
        return logits

    def count(self) -> None:
        """Count the passes until now as overhead of the loop, once that has begun."""
        if self.loop is not None:
            with suppress(NotBegunError):
                self.loop.spending.account.sensed(self.flops - self._counted)
                self._counted = self.flops

    def loss(self, loss: Tensor, own: Tensor, taught: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss to train by.

        Args:
            loss: of the targets, a scalar.
            own: the pruned model's logits, classes last.
            taught: the teacher's, of the same shape.
            mask: which rows count, as the logits without their last dim: 1 or True where they do. All by default.

        Raises:
            ValueError: when the shapes differ, or are not those of logits.
        """
        return (1 - self.alpha) * loss + self.alpha * self.distance(own, taught, mask)

    def distance(self, own: Tensor, taught: Tensor, mask: Tensor | None = None) -> Tensor:
        """`T^2 * KL(teacher / T || own / T)`, the mean over rows that count, 0 where none does; arguments of `loss`.

        A class of which the teacher's probability is 0, such as one with a logit of -inf, adds nothing. A class with a
        logit of -inf in the model alone makes the divergence infinite: both must forbid the same classes.
        """
        own, taught = self.pair(own, taught)
        if mask is not None:
            own, taught = (each[mask.bool().flatten()] for each in (own, taught))
        own, taught = ((each / self.temperature).log_softmax(-1) for each in (own, taught))
        # kl_div multiplies a probability of 0 by a difference of logarithms, which is NaN where one is infinite. The
        # difference is made finite before, not the product after: in a backward 0 times infinity is NaN as well.
        absent = taught.exp() == 0
        if absent.any():
            own, taught = own.masked_fill(absent, 0.0), taught.masked_fill(absent, torch.finfo(taught.dtype).min)
        divergence = functional.kl_div(own, taught, log_target=True, reduction="sum") / max(len(own), 1)
        return divergence * self.temperature**2

    def pair(self, own: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of both models; ValueError where their shapes differ."""
        if own.shape != taught.shape:
            raise ValueError(
                f"the teacher's logits have shape {tuple(taught.shape)}, the model's {tuple(own.shape)}: both must "
                "have the same classes or vocabulary"
            )
        return self.rows(own), self.rows(taught)

    def rows(self, logits: Tensor) -> Tensor:
        """Logits, or what has their shape, as (rows, classes), in float32 or float64.

        Raises:
            ValueError: for fewer than two classes.
        """
        dim, dims = self.classes(logits), logits.dim()
        if dims < 2 or not -dims <= dim < dims or logits.shape[dim] < 2:
            raise ValueError(
                f"logits are (rows, classes) or more dims, with two classes or more, got shape {tuple(logits.shape)}: "
                f"Teacher(model, dim=...) says which dim the classes are, here {dim}"
            )
        found = logits.movedim(dim, -1)
        return (found if found.dtype == torch.float64 else found.float()).flatten(0, -2)

    def as_logits(self, rows: Tensor, like: Tensor) -> Tensor:
        """The reverse of `rows`, in the shape and dtype of logits."""
        dim = self.classes(like)
        return rows.view(like.movedim(dim, -1).shape).movedim(-1, dim).to(like.dtype)

    def classes(self, logits: Tensor) -> int:
        return (1 if logits.dim() >= 4 else -1) if self.dim is None else self.dim


def logits_of(outputs: Any, output: str | int | None = None) -> Tensor:
    """A model's logits: its output itself, or what that holds under this name; ValueError where there are none."""
    found = outputs
    if output is not None or hasattr(outputs, "get") or hasattr(outputs, "logits"):
        name = "logits" if output is None else output
        try:
            found = getattr(outputs, name) if isinstance(name, str) and hasattr(outputs, name) else outputs[name]
        except (KeyError, IndexError, TypeError):
            found = None
    if not isinstance(found, Tensor) or found.dim() < 2:
        listed = ", ".join(map(str, outputs)) if hasattr(outputs, "get") else a_type(outputs)
        raise ValueError(
            f"a teacher is followed in logits, and the model returned {listed}: say where they are, "
            'Teacher(model, output="out"), or train without a teacher'
        )
    return found


def _check_not_pruned(model: nn.Module) -> None:
    """Check that no loop prunes the model or a part of it; a teacher beside the pruned part of a module is fine."""
    if any(module in ATTACHED for module in model.modules()):
        raise ValueError("the teacher is the model that is pruned: give another one, such as copy.deepcopy(model)")


def _form(inputs: Any) -> Hashable:
    """What decides on the FLOPs of a pass: the shapes of all tensors, and integers, strings and flags."""
    if isinstance(inputs, Mapping):
        return tuple((name, _form(value)) for name, value in inputs.items())
    if isinstance(inputs, (list, tuple)):
        return tuple(map(_form, inputs))
    if isinstance(inputs, (bool, int, str)):  # no float: it scales, and many have another value at each step
        return inputs
    return tuple(tuple(tensor.shape) for tensor in tensors_of(inputs))


def _attention(query: Any, key: Any, value: Any, *args: Any, **settings: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


_UNKNOWN_TO_TORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""torch's FLOP counter knows attention on every device but the CPU."""
