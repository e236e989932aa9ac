"""A host: how the live model is held, by one process as here or by several ranks; what cannot follow is refused.

Guards warn when something else than the given optimizers trains the model, and find a model that was changed.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from setpoint.actuator.tensors import named_tensors, shapes_by_name
from setpoint.distributed import Ranks, is_sharded_tensor, is_spread
from setpoint.errors import LoopError
from setpoint.groups.group import Group
from setpoint.messages import warn
from setpoint.sensor.reading import Reading

Agreed = Callable[[], None]

# Before we warn: weight changes between backward passes, not made by this optimizer, and passes without a step.
_MOVES, _PASSES = 3, 64
_AVERAGES = ("AveragedModel", "EMAModel", "ModelEMA", "ModelEma", "ModelEmaV2", "ModelEmaV3")


class Host:
    """A model that one process has to itself, and what is to follow when its sizes change.

    Args:
        model: the model itself, without wrappers.
        optimizers: those that really step.
        copies: what the user has named as copies, averages mostly, in their own wrappers.
        compiled: whether any of it was compiled when it was given; code may be compiled later, or around it, too.
    """

    wrapped: bool = False  # whether `DistributedDataParallel` is around the model, or `fully_shard` in it
    mesh: Any = None  # the ranks that the weights are sharded over; None where each has all of them

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], copies: Sequence[Any], *, compiled: bool = False
    ) -> None:
        self.model, self.optimizers, self.compiled = model, tuple(optimizers), compiled
        self.named_copies = tuple(copies)
        self._copies: list[Callable[[], nn.Module]] = []
        if copies:  # few runs have any: what they need is loaded by those alone
            from setpoint.host.copies import find_copies

            self._copies = find_copies(model, copies)
        self._groups: tuple[Group, ...] = ()  # until a loop begins
        self.no_backward: Sequence[str] = ()  # names of weights to which no backward pass of the traced forward comes
        self._untrained: list[tuple[str, weakref.ref[Tensor]]] = []
        self._widths: Any = None  # a `DynamicWidths`, once anything was compiled
        self._stop_watching: Callable[[], None] = lambda: None

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        """Modules that are cut like the model."""
        return tuple(copy() for copy in self._copies)

    @property
    def ranks(self) -> Ranks:
        """The processes that train the model together."""
        return Ranks()

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    @property
    def single_process(self) -> bool:
        """Whether one process has all of the model and its gradients."""
        return self.ranks.count == 1

    def together(self, what: str) -> AbstractContextManager[dict[str, Any]]:
        """All ranks do what is inside with the same outcome, or raise."""
        return nullcontext({})

    def unsharded(self) -> AbstractContextManager[None]:
        """Inside, model and copies are plain and unsharded on each rank."""
        return nullcontext()

    def fingerprint(self) -> int:
        """A number of the weights, the same on ranks whose weights are the same; 0 where nobody compares it."""
        return 0

    def even(self, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        """The groups in blocks that leave even shards to tensor parallelism."""
        return groups

    def mean(self, read: Callable[[], Reading], losses: Any, step: int) -> Reading:
        """The mean reading over ranks, on which all decide; the loop's `Losses` are then means over ranks, too."""
        return read()

    def each(self, values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, "ranks n"]:
        """The numbers of every rank, on which all decide; -inf is what a rank does not know."""
        return values[None]

    @contextmanager
    def resizable(self, what: str, groups: Iterable[Group]) -> Iterator[Agreed]:
        """Inside, tensors of these groups may change their shape, on all ranks; `what` stands in messages.

        It yields a function to be called when all that can fail is done and can still be undone. At the end wrappers,
        shards and compiled code follow, wrappers also after an exception.

        Raises:
            RankError: if another rank failed or computed different shapes.
        """

        def agree() -> None:
            with self.together(what):
                pass

        with self.together(what) as facts:
            with self._open(tuple(groups), agree) as agreed:
                yield agreed
            self._follow_in_compiled_code()
            # Gradients of different shapes would be averaged without an error, and wrongly.
            facts["shapes"] = list(shapes_by_name(self.model).values())

    def _open(self, groups: tuple[Group, ...], agree: Agreed) -> AbstractContextManager[Agreed]:
        """Inside, the tensors of these groups are unsharded; at the end what is around the model follows."""
        return nullcontext(agree)

    def _follow_in_compiled_code(self) -> None:
        if not anything_compiled():
            return  # the settings of this process stay untouched
        if self._widths is None:
            from setpoint.host.compiled import DynamicWidths

            self._widths = DynamicWidths(self._groups)
        self._widths.follow(self.model)

    def begin(self, groups: tuple[Group, ...]) -> None:
        self._groups, self._widths = groups, None
        named, hidden = self.model.named_parameters(), set(self.no_backward)
        self._untrained = [(name, weakref.ref(p)) for name, p in named if not p.requires_grad or name in hidden]
        if not self.wrapped:
            self._stop_watching = _watch_for_wrapper(self.model)

    def before_step(self, *, first: bool) -> None:
        """Check that the set-up is the one that was given, more closely at the first step, or raise LoopError."""
        if first and check_plain(self.model):  # a look at all modules, too slow for every step
            raise LoopError("fully_shard (FSDP2) was called on the model after attach: call it first, and attach then")
        if first:
            self._warn_of_unnamed()
        self._warn_of_unfrozen()

    def _warn_of_unnamed(self) -> None:
        for path, module in self.model.named_modules():
            for name, held in (*vars(module).items(), *module.named_children()):
                if type(held).__name__ in _AVERAGES and not any(held is copy for copy in self.named_copies):
                    warn(
                        f"{f'{path}.{name}'.lstrip('.')} is an average ({type(held).__name__}) that is not cut along: "
                        "name it, attach(..., copies=[it]); of one that is a module in the model, attach to the part "
                        "that it averages"
                    )

    def _warn_of_unfrozen(self) -> None:
        weights = [(name, p) for name, weight in self._untrained if (p := weight()) is not None and p.requires_grad]
        trained = [name for name, p in weights if p.grad is not None or name not in self.no_backward]
        if trained:
            self._untrained, were, hint = [], "were frozen", ""
            if any(name in self.no_backward for name in trained):
                were, hint = "had no gradient", ". In another library's checkpoint, use torch.utils.checkpoint instead"
            more = f" and {len(trained) - 3} more" if len(trained) > 3 else ""
            warn(
                f"{', '.join(trained[:3])}{more} are trained now, and {were} when the loop began: FLOPs are counted as "
                "they were then, so a step takes more than the loop reports. Call loop.detach(), and attach again"
                f"{hint}"
            )

    def stop(self) -> None:
        """Leave everything around the model as it was; may be called again."""
        self._stop_watching()
        if self._widths is not None:
            self._widths.stop()


def anything_compiled() -> bool:
    """Whether code was compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["stats"]["unique_graphs"])


def check_plain(model: nn.Module) -> bool:
    """Check that no part of the model is sharded over ranks in a way that cannot be followed; whether any is at all."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise LoopError(
                "a part of the model is wrapped by DistributedDataParallel: wrap the whole model, and attach to that"
            )
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
            kinds.add("DeepSpeedEngine")  # ZeRO 3 leaves the model's class, and marks the weights that it has taken
        for refused in kinds & {"FullyShardedDataParallel", "DataParallel", "DeepSpeedEngine"}:
            raise LoopError(
                f"{refused} is not supported by this version of Setpoint: train on one device (CUDA_VISIBLE_DEVICES=0),"
                " wrap the whole model in DistributedDataParallel (torchrun, in a Trainer), or call fully_shard on it"
            )
    return is_spread(model)


def _watch_for_wrapper(model: nn.Module) -> Callable[[], None]:
    """Refuse a `DistributedDataParallel` around a model that was given without it, in the next forward in training.

    The wrapper would miss a change of sizes, after which gradients are silently not averaged any more. What is
    returned stops the watch.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return lambda: None

    def look(module: nn.Module, args: Any) -> None:
        # A module does not know what wraps it, but PyTorch says which wrapper is running its forward.
        wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is not None and any(part is model for part in wrapper.modules()):
            raise LoopError(
                "this model is wrapped by a DistributedDataParallel that the loop does not know: wrap the model first, "
                "and give attach the wrapper in place of the model"
            )
        if module is model and torch.is_grad_enabled():  # not a deep copy, which has this hook, too
            handle.remove()

    handle = model.register_forward_pre_hook(look)
    return handle.remove


class _Watch:
    """Counts of one optimizer, and of the one parameter of it that is looked at."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps = self.passes = self.moves = 0
        self._last_version: int | None = None
        self._gradient: weakref.ref[Tensor] | None = None

    def stepped(self) -> None:
        self.steps, self.passes, self.moves, self._last_version = self.steps + 1, 0, 0, None

    def passed(self, parameter: Tensor) -> None:
        # In-place updates raise the version, whoever makes them; a gradient that adds up stays the same object.
        version, gradient = parameter._version, parameter.grad
        self.moves += self._last_version is not None and version != self._last_version
        self.passes += self._gradient is None or self._gradient() is not gradient
        self._last_version, self._gradient = version, None if gradient is None else weakref.ref(gradient)


@final
class Unseen:
    """Counts backward passes since the last step of each optimizer; warns once if something else trains the model.

    It looks at the first trained parameter of each optimizer. Passes whose gradients add up for one step count once,
    and those in the closure of a step not at all.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._watches = {optimizer: _Watch(type(optimizer).__name__) for optimizer in optimizers}
        self._within_step = False
        self._handles: list[Any] = []
        own, watched = weakref.ref(self), set[int]()  # a parameter must not keep a loop alive

        def passed(watch: _Watch, parameter: Tensor) -> None:
            unseen = own()
            if unseen is not None and not unseen._within_step:
                watch.passed(parameter)
                unseen._look(watch)

        for optimizer, watch in self._watches.items():
            held = (parameter for settings in optimizer.param_groups for parameter in settings["params"])
            # fully_shard delivers gradients past the hooks of its parameters.
            trained = (p for p in held if p.requires_grad and p.is_leaf and not is_sharded_tensor(p))
            parameter = next((p for p in trained if id(p) not in watched), None)
            if parameter is not None:
                watched.add(id(parameter))
                self._handles.append(parameter.register_post_accumulate_grad_hook(partial(passed, watch)))

    @property
    def passes(self) -> int:
        """Backward passes since the last step, of the optimizer that has seen most."""
        return max(watch.passes for watch in self._watches.values())

    def step_begins(self) -> None:
        """An optimizer is about to step; it may run backward passes in a closure."""
        self._within_step = True

    def step_ends(self, optimizer: Optimizer) -> None:
        self._within_step = False
        self._watches[optimizer].stepped()

    def _look(self, watch: _Watch) -> None:
        if watch.moves < _MOVES and watch.passes < _PASSES:
            return
        self.stop()
        moved = "the weights move" if watch.moves >= _MOVES else f"{watch.passes} backward passes were made"
        others = ", as the others do," if any(other.steps > watch.steps for other in self._watches.values()) else ""
        warn(
            f"{moved}, but {watch.name}, given to attach, does not step{others} (it has {watch.steps} times so far): "
            "Setpoint acts on the steps of that very optimizer only. Where another one trains the model now, call "
            "loop.detach() and attach with that"
        )

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class Unchanged:
    """A model and its copies as they were when they were attached."""

    def __init__(self, model: nn.Module, copies: Sequence[nn.Module]) -> None:
        self._model, self._copies, self._before = model, copies, named_tensors(model)

    def check(self, groups: tuple[Group, ...]) -> None:
        """Check that the tensors of these groups are the same objects, of the size that they were cut to.

        Of copies, and of weights sharded over ranks, names and sizes are looked at. LoopError says what has changed.
        """
        lengths = {(place.tensor, place.dim): len(place.index) for group in groups for place in group.slices}
        now = named_tensors(self._model)
        changes = {"the model": _misfit(now, lengths) or self._exchanged(now, {name for name, _ in lengths})}
        for number, copy in enumerate(self._copies):
            tensors = {name.removeprefix("module."): tensor for name, tensor in named_tensors(copy).items()}
            changes[f"copies[{number}] ({type(copy).__name__})"] = _misfit(tensors, lengths)
        for what, change in changes.items():
            if change:
                raise LoopError(
                    f"{what} was changed: {change} since attach. Nothing was cut now; loop.detach() ends the "
                    "loop, and attach prunes the model as it will be then"
                )

    def _exchanged(self, now: Mapping[str, Tensor], cut: set[str]) -> str:
        # A weight that was tied to one of these, or is now, would change its size with it.
        ours = {id(tensors[name]) for name in cut for tensors in (self._before, now)}
        for name, tensor in now.items():
            before = self._before.get(name)
            # Optimizers know parameters by identity: another object is a weight that they do not train.
            exchanged = tensor is not before and isinstance(tensor, nn.Parameter) and not is_sharded_tensor(tensor)
            if exchanged and (id(tensor) in ours or id(before) in ours):
                return f"{name!r} is another tensor"
        return ""


def _misfit(tensors: Mapping[str, Tensor], lengths: Mapping[tuple[str, int | None], int]) -> str:
    """The first tensor that is not there or of another size; "" if there is none."""
    for (name, dim), length in lengths.items():
        if name not in tensors:
            renamed = "adapters, parametrizations and torch.nn.utils.prune rename weights: they come before attach"
            return f"it has no tensor {name!r} any more ({renamed})"
        shape = tuple(tensors[name].shape)
        if dim is not None and (dim >= len(shape) or shape[dim] != length):
            return f"{name!r} has shape {shape}, where dim {dim} should have {length} entries"
    return ""
