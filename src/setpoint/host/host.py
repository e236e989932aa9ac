"""A host: how the live model is held, by one process as here or by several ranks; what cannot follow is refused."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from setpoint.actuator.tensors import named_tensors
from setpoint.distributed import Ranks, is_sharded, is_sharded_tensor
from setpoint.errors import LoopError
from setpoint.groups.group import Group
from setpoint.messages import warn
from setpoint.sensor.reading import Reading

Agreed = Callable[[], None]


class Host:
    """A model that one process has to itself, and what is to follow when its sizes change.

    Args:
        model: the model itself, without wrappers.
        optimizers: those that really step.
        copies: what the user has named as copies, averages mostly, in their own wrappers.
        compiled: whether any of it was compiled when it was given; code may be compiled later, or around it, too.
    """

    wrapped: bool = False
    """Whether `DistributedDataParallel` is around the model, or `fully_shard` in it."""
    mesh: Any = None
    """The ranks that the weights are sharded over; None where each has all of them."""

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], copies: Sequence[Any], *, compiled: bool = False
    ) -> None:
        self.model, self.optimizers, self.compiled = model, tuple(optimizers), compiled
        self.named_copies = tuple(copies)
        self._copies: tuple[Callable[[], nn.Module], ...] = ()
        if copies:  # few runs have any: what they need is loaded by those alone
            from setpoint.host.copies import find_copies

            self._copies = find_copies(model, copies)
        self._groups: tuple[Group, ...] = ()  # until a loop begins
        self._frozen: list[tuple[str, weakref.ref[Tensor]]] = []
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

    def mean(self, read: Callable[[], Reading], losses: Any, step: int) -> Reading:
        """The mean reading over ranks, on which all decide; the loop's `Losses` are then means over ranks, too."""
        return read()

    @contextmanager
    def resizable(self, what: str, groups: Iterable[Group]) -> Iterator[Agreed]:
        """Inside, tensors of these groups may change their shape, on all ranks; `what` stands in messages.

        It yields a function to be called when all that can fail is done and can still be undone. At the end wrappers,
        shards and compiled code follow, wrappers also after an exception.

        Raises:
            RankError: if another rank failed or computed different shapes.
        """
        changing = tuple(groups)

        def agree() -> None:
            with self.together(what):
                pass

        with self.together(what) as facts:
            with self._open(changing, agree) as agreed:
                yield agreed
            self._follow_in_compiled_code()
            # Gradients of different shapes would be averaged without an error, and wrongly.
            facts["shapes"] = [tuple(tensor.shape) for tensor in named_tensors(self.model).values()]

    def _open(self, groups: tuple[Group, ...], agree: Agreed) -> AbstractContextManager[Agreed]:
        """Inside, the tensors of these groups are unsharded; at the end what is around the model follows."""
        return nullcontext(agree)

    def _follow_in_compiled_code(self) -> None:
        dynamo = sys.modules.get("torch._dynamo.utils")
        if dynamo is None or not dynamo.counters["stats"]["unique_graphs"]:
            return  # nothing was compiled in this process, so that its settings stay untouched
        if self._widths is None:
            from setpoint.host.compiled import DynamicWidths

            self._widths = DynamicWidths(self._groups)
        self._widths.follow(self.model)

    def begin(self, groups: tuple[Group, ...]) -> None:
        """A loop begins, with these groups."""
        self._groups, self._widths = groups, None
        self._frozen = [(name, weakref.ref(p)) for name, p in self.model.named_parameters() if not p.requires_grad]
        if not self.wrapped:
            self._stop_watching = _watch_for_wrapper(self.model)

    def before_step(self, *, first: bool) -> None:
        """Check that the set-up is the one that was given, more closely at the first step, or raise LoopError."""
        if first and check_plain(self.model):  # a look at all modules, too slow for every step
            raise LoopError("fully_shard (FSDP2) was called on the model after attach: call it first, and attach then")
        self._warn_of_unfrozen()

    def _warn_of_unfrozen(self) -> None:
        """Warn once when weights are trained that were frozen when the loop began."""
        trained = [name for name, weight in self._frozen if (p := weight()) is not None and p.requires_grad]
        if trained:
            self._frozen = []
            more = f" and {len(trained) - 3} more" if len(trained) > 3 else ""
            warn(
                f"{', '.join(trained[:3])}{more} are trained now, and were frozen when the loop began: FLOPs are "
                "counted as they were then, so a step takes more than the loop reports. Call loop.detach(), and attach "
                "again"
            )

    def stop(self) -> None:
        """Leave everything around the model as it was; may be called again."""
        self._stop_watching()
        if self._widths is not None:
            self._widths.stop()


def check_plain(model: nn.Module) -> bool:
    """Check that no part of the model is sharded over ranks in a way that cannot be followed; whether any is at all."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise LoopError(
                "a part of the model is wrapped by DistributedDataParallel: wrap the whole model, and attach to that"
            )
        kinds = {kind.__name__ for kind in type(module).__mro__}
        for refused in kinds & {"FullyShardedDataParallel", "DataParallel"}:
            raise LoopError(
                f"{refused} is not supported by this version of Setpoint: train on one device (CUDA_VISIBLE_DEVICES=0),"
                " wrap the whole model in DistributedDataParallel (torchrun, in a Trainer), or call fully_shard on it"
            )
    sharded = any(is_sharded(module) for module in model.modules())
    if not sharded and any(map(is_sharded_tensor, model.parameters())):
        raise LoopError(
            "a DTensor is not supported by this version of Setpoint, unless fully_shard (FSDP2) has made it of a plain "
            "parameter"
        )
    return sharded


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
