"""A teacher: a frozen model whose answers another model learns beside its targets."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from setpoint.actuator.attached import ATTACHED
from setpoint.arguments import plain_number
from setpoint.errors import NotBegunError
from setpoint.groups.example import tensors_of
from setpoint.loop.loop import Loop
from setpoint.messages import a_type


@final
class Teacher:
    """A frozen model whose logits a pruned one learns: `(1 - alpha) * loss + alpha * T^2 * KL(teacher / T || own / T)`.

    KL is the mean over rows of logits. The FLOPs of the teacher's passes count as overhead of the loop, so that a
    budget for a whole run pays for them. A teacher pays where it knows the task better than the targets say: the dense
    model that was fine-tuned on it, or a larger one. docs/results-fine-tuning.md has measurements.

    Args:
        model: answers with logits, or with an output that has `logits`; it is frozen and set to eval mode.
        loop: what `attach` returned, for the FLOPs; it may be set later as the attribute `loop`, or stay None.
        alpha: share of the teacher in the loss, from 0 to 1.
        temperature: T, above 0.

    Attributes:
        flops: of all passes of the teacher until now.

    Raises:
        ValueError: for alpha or temperature out of range, if `model` is no module or `loop` is neither a loop nor None,
            and for the pruned model itself. A teacher that is attached later is unfrozen, and refused when `loop` is
            set and by `logits`.

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
        self, model: nn.Module, loop: Loop | None = None, *, alpha: float = 0.5, temperature: float = 2.0
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"a teacher is a torch.nn.Module, got {type(model).__name__}: write Teacher(model, loop)")
        if _holds_attached(model):
            raise ValueError(_OWN)
        alpha, temperature = plain_number(alpha), plain_number(temperature)
        if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {alpha!r}")
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
        _check_loop(loop)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._training = [module for module in model.modules() if module.training]
        self.model, self._loop = model.eval().requires_grad_(False), loop
        self.alpha, self.temperature = float(alpha), float(temperature)
        self.flops = 0.0
        self._counted = 0.0
        self._flops_by_shapes = dict[Any, float]()
        self._cached = dict[Hashable, Tensor]()

    @property
    def loop(self) -> Loop | None:
        """The loop that the FLOPs are reported to, or None."""
        return self._loop

    @loop.setter
    def loop(self, loop: Loop | None) -> None:
        if loop is not self._loop:  # a Trainer sets it at every step
            _check_loop(loop)
            self._check_other()
            self._loop = loop

    @torch.no_grad()
    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """The teacher's logits; the FLOPs of the pass are counted.

        Args:
            args: for the teacher's forward.
            kwargs: for the teacher's forward.

        Raises:
            ValueError: when the teacher returns no logits, and for the model that is pruned.
        """
        self._check_other()
        if self.model.training:  # a module that holds it was set to train mode
            self.model.eval()
        shapes = _form((args, kwargs))
        if shapes in self._flops_by_shapes:
            outputs = self.model(*args, **kwargs)
        else:
            with FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
                outputs = self.model(*args, **kwargs)
            self._flops_by_shapes[shapes] = float(counter.get_total_flops())
        self.flops += self._flops_by_shapes[shapes]
        self._count()
        return logits_of(outputs)

    def cached_logits(self, keys: Iterable[Hashable] | Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same logits, computed in the first pass over the data and read from memory in every later one.

        A batch whose keys are all known costs no forward. Each sample must look the same in every pass: random crops
        and masks need `logits`. Memory: a row of logits for each sample, on the CPU.

        Args:
            keys: one a sample, such as its index in the dataset, in the order of the batch; tensors without dims are
                numbers.
            args: for the teacher's forward.
            kwargs: for the teacher's forward.

        Raises:
            ValueError: when keys and samples differ in number, or rows of one batch in shape, and for what is no key.

        >>> teacher, inputs = Teacher(nn.Linear(8, 3)), torch.randn(4, 8)
        >>> _ = teacher.cached_logits([7, 1, 5, 0], inputs)
        >>> torch.equal(teacher.cached_logits([0, 5], inputs[[3, 2]]), teacher.model(inputs[[3, 2]]))
        True
        >>> teacher.flops  # of one pass over four samples
        192.0
        """
        keys = _keys(keys)
        if not keys or not all(key in self._cached for key in keys):
            found = self.logits(*args, **kwargs)
            if len(found) != len(keys):
                raise ValueError(f"{len(keys)} keys for the logits of {len(found)} samples: give one key a sample")
            self._cached.update(zip(keys, found.to("cpu", copy=True), strict=True))
            return found
        rows = [self._cached[key] for key in keys]
        if len({row.shape for row in rows}) > 1:
            shapes = sorted({tuple(row.shape) for row in rows})
            raise ValueError(
                f"the cached logits of one batch have shapes {shapes}: pad every sample to one length, or use logits()"
            )
        return torch.stack(rows).to(next(self.model.parameters(), torch.empty(0)).device)

    def loss(self, loss: Tensor, own: Tensor, taught: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss to train by.

        Args:
            loss: of the targets, a scalar.
            own: the pruned model's logits, classes last.
            taught: the teacher's, of the same shape.
            mask: which rows count, as the logits without their last dim: 1 or True where they do. All by default.

        Raises:
            ValueError: when the shapes differ.
        """
        return (1 - self.alpha) * loss + self.alpha * self.distance(own, taught, mask)

    def distance(self, own: Tensor, taught: Tensor, mask: Tensor | None = None) -> Tensor:
        """`T^2 * KL(teacher / T || own / T)`, the mean over the rows that count; 0 where no row counts.

        A class of which the teacher's probability is 0, such as one with a logit of -inf, adds nothing. A class with a
        logit of -inf in the model alone makes the divergence infinite: both must forbid the same classes.

        Args:
            own: as in `loss`.
            taught: as in `loss`.
            mask: as in `loss`.

        Raises:
            ValueError: when the shapes differ, or are not those of logits.
        """
        if own.shape != taught.shape:
            raise ValueError(
                f"the teacher's logits have shape {tuple(taught.shape)}, the model's {tuple(own.shape)}: both must "
                "have the same classes or vocabulary"
            )
        if own.dim() < 2:
            raise ValueError(f"logits have classes last, behind a dim of rows: got shape {tuple(own.shape)}")
        if own.dim() > 3 or own.shape[-1] < 2:
            raise ValueError(
                "logits have two classes or more in their last dim, behind a dim of rows or two of rows and positions: "
                f"got shape {tuple(own.shape)}. Move classes to the end and flatten the rest, as in "
                "logits.movedim(1, -1).flatten(0, -2); a single score has no distribution to learn"
            )
        if mask is not None:
            if mask.shape != own.shape[:-1]:
                raise ValueError(f"the mask has shape {tuple(mask.shape)} for logits of shape {tuple(own.shape)}")
            own, taught = own[mask.bool()], taught[mask.bool()]
        own, taught = ((each.float().flatten(0, -2) / self.temperature).log_softmax(-1) for each in (own, taught))
        # kl_div multiplies a probability of 0 by a difference of logarithms, which is NaN where one is infinite. The
        # difference is made finite before, not the product after: in a backward 0 times infinity is NaN as well.
        absent = taught.exp() == 0
        if absent.any():
            own, taught = own.masked_fill(absent, 0.0), taught.masked_fill(absent, torch.finfo(taught.dtype).min)
        divergence = functional.kl_div(own, taught, log_target=True, reduction="sum") / max(len(own), 1)
        return divergence * self.temperature**2

    def _check_other(self) -> None:
        """Check that the teacher is not the model that is pruned by now; one that is gets back what froze it."""
        if _holds_attached(self.model):
            for parameter in self._trained:
                parameter.requires_grad_(True)
            for module in self._training:
                module.training = True
            raise ValueError(_OWN)

    def _count(self) -> None:
        """Tell the loop; before it has begun there is nobody to tell, so what is new waits for a later pass."""
        if self.loop is None:
            return
        try:
            account = self.loop.spending.account
        except NotBegunError:
            return
        account.sensed(self.flops - self._counted)
        self._counted = self.flops


_OWN = "the teacher is the model that is pruned: give another one, such as copy.deepcopy(model)"


def _holds_attached(model: nn.Module) -> bool:
    """Whether a loop is at work on the model or a part of it; one that lies beside the pruned part may teach it."""
    return any(each in ATTACHED for each in model.modules())


def _check_loop(loop: object) -> None:
    if not isinstance(loop, Loop | None):
        raise ValueError(
            f"the loop is what attach returned, got {loop!r}: give settings by name, and write "
            "Teacher(model, loop, alpha=0.5)"
        )


def _form(inputs: Any) -> Hashable:
    """What decides on the FLOPs of a pass: the shapes of all tensors, and numbers, words and flags beside them."""
    if isinstance(inputs, Mapping):
        return tuple((name, _form(each)) for name, each in inputs.items())
    if isinstance(inputs, (list, tuple)):
        return tuple(map(_form, inputs))
    if isinstance(inputs, (bool, int, str)):  # no float: it scales, and many have another value at each step
        return inputs
    return tuple(tuple(tensor.shape) for tensor in tensors_of(inputs))


def _keys(keys: Any) -> list[Hashable]:
    """One key a sample, each of which is found again by its value."""
    if not isinstance(keys, Iterable) or getattr(keys, "ndim", 1) == 0:
        raise ValueError(f"give one key a sample in a list or a tensor of one dim, got {keys!r}")
    return [_key(each) for each in (keys.tolist() if isinstance(keys, Tensor) else keys)]


def _key(key: Any) -> Hashable:
    if isinstance(key, tuple):
        return tuple(map(_key, key))
    key = key.item() if isinstance(key, Tensor) and not key.dim() else plain_number(key)
    if isinstance(key, Tensor) or not isinstance(key, Hashable):  # a tensor's hash is its identity
        raise ValueError(f"a key is a number, a string or a tuple of them, got {key!r}: give one key a sample")
    return key


def logits_of(outputs: Any) -> Tensor:
    """A model's logits: its output itself, or what that holds under this name.

    Raises:
        ValueError: when there are none.
    """
    found = outputs.get("logits") if hasattr(outputs, "get") else outputs
    if not isinstance(found, Tensor) or found.dim() < 2:
        listed = ", ".join(map(str, outputs)) if hasattr(outputs, "get") else a_type(outputs)
        raise ValueError(f"a teacher is followed in logits, and the model returned {listed}: train without a teacher")
    return found


def _attention(query: Any, key: Any, value: Any, *args: Any, **settings: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


_UNKNOWN_TO_TORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""Its counter knows attention on every device but this one."""
