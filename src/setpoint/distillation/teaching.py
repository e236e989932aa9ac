"""Teaching: the gradient at a model's logits is mixed with a teacher's, in whatever loop and with whatever loss."""

import copy
import math
from contextlib import ExitStack
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from setpoint.actuator.model_shapes import was_cut
from setpoint.distillation.teacher import Teacher, logits_of
from setpoint.errors import LoopError
from setpoint.loop.calls import Call, Record
from setpoint.loop.first_batch import RecordedMethod, redirected
from setpoint.loop.loop import Loop
from setpoint.messages import a_type, warn

_JUDGED = 5  # steps after which a model is judged that is to be its own teacher
_SPREAD = 1e-3  # of guesses around their mean, squared, from which on they show a slope
_GUESS = 0.97  # share of a guess's loss: a model above it knows nothing of the task


def as_teacher(model: nn.Module, teacher: Teacher | nn.Module | bool) -> Teacher:
    """What `attach(teacher=...)` was given, for this model; True stands for a frozen copy of the model as it is.

    Raises:
        ValueError: for the model itself, what shares parameters with it, what is on other devices, or no module.
        LoopError: for a copy of a model that was cut before.
    """
    if teacher is True:
        if was_cut(model):
            raise LoopError("the model was cut before, so that no dense copy can teach it: give teacher=dense_model")
        copied = Teacher(copy.deepcopy(model))
        copied.own = True
        return copied
    found = teacher if isinstance(teacher, Teacher) else None
    taught_by = teacher.model if isinstance(teacher, Teacher) else teacher
    if not isinstance(taught_by, nn.Module):
        raise ValueError(
            f"teacher is True for a frozen copy of the model, a module, or a Teacher(module); got {a_type(teacher)}"
        )
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in taught_by.parameters()) or taught_by is model:
        raise ValueError(
            "the teacher is the model that is pruned, or shares parameters with it: teacher=True takes a frozen copy"
        )
    devices = [{str(parameter.device) for parameter in module.parameters()} for module in (model, taught_by)]
    if all(devices) and not devices[1] <= devices[0]:
        raise ValueError(
            f"the teacher is on {', '.join(sorted(devices[1]))}, the model on {', '.join(sorted(devices[0]))}: move "
            "the teacher, teacher.to(device)"
        )
    return found or Teacher(taught_by)


@final
class Teaching:
    """Mixes the gradient that arrives at the model's logits with that of the divergence to a teacher's.

    With z and t the logits of model and teacher in a row, g the gradient of the user's loss by z, and
    `T^2 KL(softmax(t / T) || softmax(z / T))` the divergence, the gradient becomes

        (1 - alpha) g + alpha c T (softmax(z / T) - softmax(t / T))

    in rows in which g is not zero. The scale `c` is that of the user's loss, `1 / n` for a mean over n rows, times what
    a loss scaler or accumulation multiplies it by: see `_scale`. So one argument equals `Teacher.loss` for a cross
    entropy of hard targets. Another loss has the scale of a cross entropy of its size.

    It changes as the model is called: the forwards and gradients that it has seen, until it is stopped.
    """

    def __init__(self, loop: Loop, called: nn.Module, teacher: Teacher, method: str) -> None:
        self._loop, self._teacher = loop, teacher
        self._call: Call | None = None
        self._called = self._arrived = self._steps = 0
        self._losses = torch.zeros(3, dtype=torch.float64)  # the teacher's, a guess's, and rows of other losses
        self._until, self._bad = ExitStack(), False
        teacher.loop, teacher.method = loop, method
        record = Record(self._begins, self._ends)
        if method == "forward":
            record.listen(self._until, called)
        else:
            RecordedMethod(record, self._until, loop.host.model, method)
        self._watched = loop.on_step(self._stepped)
        self._until.callback(self._watched)

    def stop(self) -> None:
        self._until.close()

    def _begins(self, module: nn.Module, call: Call) -> None:
        again = torch._C._current_graph_task_id() != -1  # a checkpoint computes the forward again
        trains = torch.is_grad_enabled() and self._loop.host.model.training and not redirected(module)
        real = detect_fake_mode(tuple(call)) is None  # an export of the user's own
        self._call = call if trains and real and not again else None

    def _ends(self, output: Any, raised: bool) -> None:
        call, self._call = self._call, None
        if call is None or raised:
            return
        logits = logits_of(output, self._teacher.output)
        if logits.grad_fn is None:
            return
        self._called += 1
        taught = self._teacher.logits(*call.args, **call.kwargs)
        with torch.no_grad():
            own, taught = self._teacher.pair(logits.detach(), taught)
            heat = self._teacher.temperature
            away = heat * ((own / heat).softmax(-1) - (taught / heat).softmax(-1))
            guess = own.softmax(-1)
            surprise = -taught.log_softmax(-1) if self._teacher.own and self._steps < _JUDGED else None
        # A wrapper may have cast what the model computes its own loss of.
        node, number = logits.grad_fn, logits.output_nr
        while node.name() == "ToCopyBackward0":
            node, number = node.next_functions[0]  # type: ignore[assignment]

        def arrives(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
            gradient = gradients[number]
            if gradient is None:
                return None
            with torch.no_grad():
                mixed = self._mixed(gradient, guess, away, surprise)
            return (*gradients[:number], mixed, *gradients[number + 1 :])

        node.register_prehook(arrives)

    def _mixed(self, gradient: Tensor, guess: Tensor, away: Tensor, surprise: Tensor | None) -> Tensor:
        self._arrived += 1
        rows = self._teacher.rows(gradient)
        counts = (rows != 0).any(-1, keepdim=True) & away.isfinite().all(-1, keepdim=True)
        if surprise is not None:
            self._losses += _losses(rows, surprise, counts).cpu().double()
        scale = _scale(rows, guess, counts)
        scale = torch.where(scale.isfinite(), scale, 0.0)  # no row counts, or a loss scaler has overflowed
        alpha = self._teacher.alpha
        mixed = torch.where(counts, (1 - alpha) * rows + alpha * scale * away, rows)
        # Whether a teacher gives NaN is looked at now and then: it waits for the device.
        if self._arrived & (self._arrived - 1) == 0 and not self._bad and bool(away.isnan().any()):
            self._bad = True
            warn("the teacher's logits hold NaN: rows that do are learnt without it. Check its weights and its inputs")
        return self._teacher.as_logits(mixed, gradient)

    def _stepped(self, event: Any) -> None:
        self._steps += 1
        if self._steps == 1 and not self._arrived:
            what = (
                "no gradient arrived at the model's logits: the loss does not come from them, or was computed inside "
                "of compiled code. Compute it from model(x), outside"
                if self._called
                else "training calls the model in eval mode, or not itself, but parts of it or another method. Call "
                "model.train(), attach to the part that gives logits, or name the method, attach(..., method=...)"
            )
            warn(f"the teacher teaches nothing: {what}")
        if not self._teacher.own:
            self._watched()
        elif self._steps == min(_JUDGED, self._loop.total_steps):  # on all ranks, whatever each has seen
            self._watched()
            loss, guess, others = self._loop.host.ranks.total(self._losses).tolist()
            if not others and loss > _GUESS * guess:
                raise LoopError(
                    f"teacher=True takes the model as it is at attach, and in {self._steps} steps its loss was "
                    f"{loss / guess:.2f} of that of a guess: its head is new, and teaches nothing. Train the dense "
                    "model first, or give another teacher, or none"
                )


def _scale(rows: Tensor, guess: Tensor, counts: Tensor) -> Tensor:
    """The scale c of a cross entropy, whose gradients by a model's logits are `rows = c (guess - targets)`.

    The target is the class that the loss raises most. All others have the same share of the target, none or that of
    label smoothing, so that their gradients lie on a line over their guesses, with slope c. Rows in which no single
    class is raised do not count: smoothing turns the gradients of a model that is surer than its target. Where guesses
    are too similar for a slope, and with two classes, `c = sum |g| / sum |guess - target|`.
    """
    asked = rows.argmin(-1, keepdim=True)
    others = torch.ones_like(guess).scatter_(-1, asked, 0.0) * (counts & _clear(rows))
    total = others.sum(-1, keepdim=True).clamp_min(1.0)
    mean = (others * guess).sum(-1, keepdim=True) / total
    from_mean = others * (guess - mean)
    slope = (from_mean * rows).sum() / from_mean.square().sum()
    error = guess.scatter_add(-1, asked, torch.full_like(asked, -1, dtype=guess.dtype))
    by_size = (rows.abs() * counts).sum() / (error.abs() * counts).sum()
    spread = from_mean.square().sum() > _SPREAD * (others * mean.square()).sum()
    return torch.where(spread & (slope > 0), slope, by_size)


def _clear(rows: Tensor) -> Tensor:
    """Whether a single class is raised."""
    return -rows.amin(-1, keepdim=True) > 0.4 * rows.abs().sum(-1, keepdim=True)


def _losses(rows: Tensor, surprise: Tensor, counts: Tensor) -> Tensor:
    """Of the teacher the sum of losses, that of a guess in as many rows, and the number of rows of another loss.

    A row in which the teacher is all but sure is taken for right where it is not clear which class is the target.
    """
    least = surprise.amin(-1, keepdim=True)
    sure = least < -math.log(0.9)
    known = counts & (sure | _clear(rows))
    losses = torch.where(sure, least, surprise.gather(-1, rows.argmin(-1, keepdim=True))) * known
    guess = known.sum() * math.log(rows.shape[-1])
    other = (rows.sum(-1).abs() > 1e-2 * rows.abs().sum(-1)).sum()  # a cross entropy's gradients add up to zero
    return torch.stack([losses.sum(), guess.to(losses), other.to(losses)])
