"""Teaching: the gradient at a model's logits is mixed with a teacher's, in whatever loop and with whatever loss."""

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import starmap
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_map_only

from setpoint.actuator.model_shapes import was_cut
from setpoint.distillation.teacher import Teacher, logits_of
from setpoint.errors import LoopError
from setpoint.loop.calls import Call, Record
from setpoint.loop.first_batch import RecordedMethod, redirected
from setpoint.loop.loop import Loop
from setpoint.messages import a_type, warn

_JUDGED = 5  # steps after which a model is judged that is to be its own teacher
_SPREAD = 1e-3  # of guesses around their mean, squared, from which on they show a slope
_STRAIGHT = 0.95  # squared correlation of gradients and guesses, from which on one is a multiple of the other
_CLEAR = 0.4  # share of a row's gradient in the class that is raised most, from which on it is the target: 0.5 if alone
_NOT_ZERO = 0.1  # share of gradients that does not add up to 0 over classes, from which on the loss is another
_PART = 1 << 18  # logits that a CPU mixes at a time
_GUESS = 0.97  # share of a guess's loss: a model above it knows nothing of the task


def as_teacher(model: nn.Module, teacher: Teacher | nn.Module | bool, copies: Sequence[nn.Module] = ()) -> Teacher:
    """What `attach(teacher=...)` was given, for this model; True stands for a frozen copy of the model as it is.

    Raises:
        ValueError: for the model itself or one of its `copies`, which are cut with it, what shares parameters with
            them, what is on other devices, or no module.
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
    own = {id(parameter) for module in (model, *copies) for parameter in module.parameters()}
    if any(id(parameter) in own for parameter in taught_by.parameters()) or taught_by is model:
        raise ValueError(
            "the teacher is the model that is pruned, or shares parameters with it or with one of copies=, which are "
            "cut with it: teacher=True takes a frozen copy, and so does teacher=copy.deepcopy(average)"
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
    entropy of hard targets, of logits or of log-probabilities, with or without class weights. Another loss has the
    scale of a cross entropy of its size.

    It changes as the model is called: the forwards and gradients that it has seen, until it is stopped.
    """

    def __init__(self, loop: Loop, called: nn.Module, teacher: Teacher, method: str) -> None:
        self._loop, self._teacher = loop, teacher
        self._call: Call | None = None
        self._called = self._arrived = self._steps = 0
        self._losses = torch.zeros(3, dtype=torch.float64)  # the teacher's, a guess's, and batches of other losses
        self._until, self._bad, self._unlike = ExitStack(), False, False
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
        self._call = None
        if trains and real and not again:  # copied, as the model may change its inputs in place, and so may the teacher
            self._call = Call(*tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tuple(call)))

    def _ends(self, output: Any, raised: bool) -> None:
        call, self._call = self._call, None
        if call is None or raised:
            return
        logits = logits_of(output, self._teacher.output)
        if logits.grad_fn is None:
            return
        self._called += 1
        taught = self._teacher.logits(*call.args, **call.kwargs)
        own = logits.detach().clone()  # training may change them in place
        self._teacher.pair(own, taught)
        # A wrapper may have cast what the model computes its own loss of.
        node, number = logits.grad_fn, logits.output_nr
        while node.name() == "ToCopyBackward0":
            node, number = node.next_functions[0]  # type: ignore[assignment]

        def arrives(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
            gradient = gradients[number]
            if gradient is None:
                return None
            with torch.no_grad():
                mixed = self._mixed(gradient, own, taught)
            return (*gradients[:number], mixed, *gradients[number + 1 :])

        node.register_prehook(arrives)

    def _mixed(self, gradient: Tensor, own: Tensor, taught: Tensor) -> Tensor:
        teacher = self._teacher
        self._arrived += 1
        looks = self._arrived & (self._arrived - 1) == 0  # now and then, since it waits for the device
        if self._arrived == 1 and teacher.dim is None and gradient.dim() > 2:
            usual = teacher.classes(gradient) % gradient.dim()
            other = 1 if usual > 1 else gradient.dim() - 1
            sums = [float(gradient.sum(dim).abs().sum() / gradient.abs().sum()) for dim in (usual, other)]
            teacher.dim = other if sums[0] > _NOT_ZERO > 10 * sums[1] else None
        rows, (own, taught) = teacher.rows(gradient), teacher.pair(own, taught)
        known = own.amax(-1, keepdim=True).isfinite() & taught.amax(-1, keepdim=True).isfinite()
        counts = ((rows.amin(-1, keepdim=True) != 0) | (rows.amax(-1, keepdim=True) != 0)) & known
        if teacher.own and self._steps < _JUDGED:
            self._losses += _losses(rows, -taught.log_softmax(-1), counts).cpu().double()
        # In parts that stay in a CPU's cache: the logits of a large vocabulary do not.
        number = max(1, rows.numel() // (_PART if rows.device.type == "cpu" else 256 * _PART))
        parts = [each.chunk(number) for each in (rows, own, counts, taught)]
        scale, unlike = _scale(list(zip(*parts[:3], strict=True)))
        alpha, heat, mixed = teacher.alpha, teacher.temperature, list[Tensor]()
        weight = alpha * heat * torch.where(scale.isfinite(), scale, 0.0)  # a loss scaler may have overflowed
        for part, z, counted, t in zip(*parts, strict=True):
            away = (z / heat).softmax(-1).sub_((t / heat).softmax(-1)).mul_(weight)
            mixed.append(torch.where(counted, away.add_(part, alpha=1 - alpha), part))
        if looks and not self._bad and bool(taught.isnan().any()):
            self._bad = True
            warn("the teacher's logits hold NaN: rows that do are learnt without it. Check its weights and its inputs")
        if looks and not self._unlike and bool(unlike > _NOT_ZERO):
            self._unlike = True
            warn(
                "the loss is no cross entropy of the logits: its gradient does not add up to 0 over the classes. The "
                "teacher is followed in a softmax, at a scale by the gradient's size. Train without a teacher, or say "
                "where the logits and their classes are, Teacher(model, output=..., dim=...)"
            )
        return teacher.as_logits(torch.cat(mixed), gradient)

    def _stepped(self, event: Any) -> None:
        self._steps += 1
        if self._steps == 1 and not self._arrived:
            what = (
                "no gradient arrived at the model's logits: the loss does not come from them, or was computed inside "
                "of compiled code. Compute it from model(x), outside"
                if self._called
                else "training calls the model in eval mode, or not itself, but parts of it or another method, or in "
                "code that hides it. Call model.train(); attach to the part that gives logits (in a callback "
                "module='net'); name the method, attach(..., method=...); take torch.compile(model) instead of "
                "model.compile(), and checkpoint(use_reentrant=False)"
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


def _scale(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """The scale c of a loss, and the share of its gradients that does not add up to 0, by parts of all rows.

    A part has the gradients by logits, these logits, and which rows count. The target is the class that the loss raises
    most, by `low`. With p the softmax, a cross entropy's gradients at the other classes are g = s (p - d), with s of
    the row (a class weight), and d of label smoothing. So

    * where g is proportional to p, c is the mean of s; that is `1 / n` for a mean over n rows with any class weights;
    * where g has an offset, c is the slope of g over p in all rows;
    * where all g are 0 and the logits are log-probabilities, c is the mean of `-low`;
    * else `c = sum |g| / sum |p - target|`, as with two or three classes and smoothing, soft targets, and other losses.

    Rows in which no single class is raised do not count, where others do: smoothing turns the gradients of a model that
    is surer than its target.
    """
    low, size, total, level, p, pp, pg, gg, counts = map(torch.cat, zip(*starmap(_moments, parts), strict=True))
    used = counts & (-low > _CLEAR * size)
    used = torch.where(used.any(), used, counts)
    others, g = parts[0][0].shape[-1] - 1, total - low
    variance, shared = pp - p * p / others, pg - p * g / others

    def over(values: Tensor) -> Tensor:
        return torch.where(used, values, 0.0).sum()

    offset = over(shared * p - g * variance) > 0.02 * over(shared * p)
    straight = over(shared.square()) > _STRAIGHT * over(variance * (gg - g * g / others))
    sloped = offset & straight & (over(variance) > _SPREAD * over(p * p / others))
    number = over(torch.ones_like(p))
    logged = (over(gg) == 0) & (over(level) < 0.01 * number)
    c = over(torch.maximum(-low, size / 2)) / over(p)
    c = torch.where(over(pg.square()) > _STRAIGHT * over(pp * gg), over(pg / pp) / number, c)
    c = torch.where(sloped, over(shared) / over(variance), c)
    c = torch.where(logged, over(-low) / number, c)
    return c, torch.where(logged, 0.0, over(total.abs()) / over(size))


def _moments(rows: Tensor, own: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """What `_scale` sums over classes, by row; p and g of all classes but the one that is raised most."""
    low, guess = rows.amin(-1, keepdim=True), own.softmax(-1)
    level = (own.amax(-1) - guess.amax(-1).log()).abs()  # 0 for log-probabilities
    guess = guess.masked_fill_(rows == low, 0.0)
    gradients = rows.masked_fill(rows == low, 0.0)
    pp, pg, gg = (torch.linalg.vecdot(a, b) for a, b in ((guess, guess), (guess, gradients), (gradients, gradients)))
    return low[:, 0], rows.abs().sum(-1), rows.sum(-1), level, guess.sum(-1), pp, pg, gg, counts[:, 0]


def _losses(rows: Tensor, surprise: Tensor, counts: Tensor) -> Tensor:
    """Of the teacher the sum of losses, that of a guess in as many rows, and 1 where the loss is another.

    A row in which the teacher is all but sure is taken for right where it is not clear which class is the target: with
    smoothing the gradient of one that is surer than its target is small, and asks for another class.
    """
    size, least = rows.abs().sum(-1, keepdim=True), surprise.amin(-1, keepdim=True)
    clear = -rows.amin(-1, keepdim=True) > _CLEAR * size
    few = rows.shape[-1] <= 3  # of which another one is all that is left
    sure = (least < -math.log(0.9)) & (~clear | few | (size < 0.5 * size.amax()))
    known = counts & (sure | clear)
    losses = torch.where(sure, least, surprise.gather(-1, rows.argmin(-1, keepdim=True))) * known
    guess = known.sum() * math.log(rows.shape[-1])
    other = rows.sum(-1).abs().sum() > 1e-2 * size.sum()  # a cross entropy's gradients add up to zero
    return torch.stack([losses.sum(), guess.to(losses), other.to(losses)])
