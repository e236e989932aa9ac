"""A model that one process has to itself; what is in it, or around it, that cannot follow a cut is refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from setpoint.actuator.tensors import named_tensors
from setpoint.distributed import Ranks, is_sharded, is_sharded_tensor
from setpoint.errors import LoopError
from setpoint.groups.group import Group
from setpoint.host.guards import Frozen
from setpoint.host.host import Agreed, SharedLosses
from setpoint.sensor.reading import Reading

_REFUSED = ("FullyShardedDataParallel", "DataParallel")


class Local:
    """A `Host` of one process: the model, and what is to follow when its sizes change."""

    wrapped: bool = False
    mesh: Any = None

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
        self._widths: Any = None  # a `DynamicWidths`, once anything was compiled
        self._frozen = Frozen(model)
        self._stop_watching: Callable[[], None] = lambda: None

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        return tuple(copy() for copy in self._copies)

    @property
    def ranks(self) -> Ranks:
        return Ranks()

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    @property
    def single_process(self) -> bool:
        return self.ranks.count == 1

    def together(self, what: str) -> AbstractContextManager[dict[str, Any]]:
        return nullcontext({})

    def unsharded(self) -> AbstractContextManager[None]:
        return nullcontext()

    def mean(self, read: Callable[[], Reading], losses: SharedLosses, step: int) -> Reading:
        return read()

    @contextmanager
    def resizable(self, what: str, groups: Iterable[Group]) -> Iterator[Agreed]:
        """Inside, tensors of these groups may change their shape, on all ranks; as `Host` says."""
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

    def _follow_in_compiled_code(self) -> None:
        dynamo = sys.modules.get("torch._dynamo.utils")
        if dynamo is None or not dynamo.counters["stats"]["unique_graphs"]:
            return  # nothing was compiled in this process, so that its settings stay untouched
        if self._widths is None:
            from setpoint.host.compiled import DynamicWidths

            self._widths = DynamicWidths(self._groups)
        self._widths.follow(self.model)

    def _open(self, groups: tuple[Group, ...], agree: Agreed) -> AbstractContextManager[Agreed]:
        """Inside, the tensors of these groups are unsharded; at the end what is around the model follows."""
        return nullcontext(agree)

    def begin(self, *, steps: Callable[[], int], missed: Callable[[], None], groups: tuple[Group, ...]) -> None:
        self._groups, self._widths, self._frozen = groups, None, Frozen(self.model)
        if not self.wrapped:
            self._stop_watching = watch_for_wrapper(self.model)

    def before_step(self, *, first: bool, regrows: bool, by_hooks: bool) -> None:
        """Check that the set-up is the one that was given."""
        if first:  # a look at all modules, too slow for every step
            check_unsharded(self.model)
        self._frozen.check()

    def complete(self) -> bool:
        return True

    def stop(self) -> None:
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
        kinds = [kind.__name__ for kind in type(module).__mro__]
        name = next((kind for kind in kinds if kind in _REFUSED), "")
        if name:
            raise LoopError(
                f"{name} is not supported by this version of Setpoint: train on one device (CUDA_VISIBLE_DEVICES=0), "
                "wrap the whole model in DistributedDataParallel (torchrun, in a Trainer), or call fully_shard on it"
            )
    sharded = any(is_sharded(module) for module in model.modules())
    if not sharded and any(map(is_sharded_tensor, model.parameters())):
        raise LoopError(
            "a DTensor is not supported by this version of Setpoint, unless fully_shard (FSDP2) has made it of a plain "
            "parameter"
        )
    return sharded


def check_unsharded(model: nn.Module) -> None:
    """Check that a model whose ranks each had all of it is still so, or raise LoopError."""
    if check_plain(model):
        raise LoopError("fully_shard (FSDP2) was called on the model after attach: call it first, and attach then")


def watch_for_wrapper(model: nn.Module) -> Callable[[], None]:
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
