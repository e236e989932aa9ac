"""The host of what a user gives: model and optimizers are taken out of the wrappers of frameworks, copies listed."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from setpoint.distributed import unwrapped
from setpoint.errors import GroupError, LoopError, OptimizerError
from setpoint.host.host import Host, check_plain
from setpoint.messages import a_type


@runtime_checkable
class Steps(Protocol):
    """What steps an optimizer for its user."""

    def step(self, *args: Any, **settings: Any) -> Any: ...

    def zero_grad(self, *args: Any, **settings: Any) -> None: ...


def host_of(model: nn.Module, optimizer: Steps | Sequence[Steps], copies: Any = ()) -> Host:
    """How a model is held: it is taken out of `torch.compile` and `DistributedDataParallel` in any order.

    Raises:
        LoopError: for what is no module, and for any other wrapper for several devices.
        GroupError: for copies that are none.
        OptimizerError: for what is no optimizer, and for one that cannot follow a cut.
    """
    if not isinstance(model, nn.Module):
        raise LoopError(f"model must be a torch.nn.Module, got {a_type(model)}")
    outer, model = model, unwrapped(model)
    parallel = next((module for module in outer.modules() if isinstance(module, DistributedDataParallel)), None)
    sharded = check_plain(model)
    if sharded and parallel is not None:
        raise LoopError("fully_shard inside DistributedDataParallel is not supported: use one of the two")
    copies = () if copies is None else copies
    if not isinstance(copies, (Sequence, nn.ModuleList)):
        raise GroupError(
            f"copies must be a sequence of modules or of objects with shadow_params, got {type(copies).__name__}: "
            "write copies=(it,)"
        )
    compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in outer.modules())
    held = (model, real_optimizers(optimizer), tuple(copies))
    # Few runs are distributed: what they need is loaded by those alone.
    if parallel is not None:
        from setpoint.host.several_ranks import DDP

        return DDP(*held, compiled=compiled, parallel=parallel)
    if sharded:
        from setpoint.host.sharded import Sharded

        return Sharded(*held, compiled=compiled)
    return Host(*held, compiled=compiled)


def real_optimizers(given: Any) -> tuple[Optimizer, ...]:
    """The optimizers that really step, whose hooks PyTorch calls; each once.

    Raises:
        OptimizerError: for none, for what is no optimizer, and for what cannot follow a cut.
    """
    one = isinstance(given, Optimizer) or not isinstance(given, Iterable)
    found = tuple(dict.fromkeys(map(real_optimizer, (given,) if one else given)))
    if not found or not all(isinstance(optimizer, Optimizer) for optimizer in found):
        raise OptimizerError(
            "optimizer must be a torch.optim.Optimizer or a sequence of them, and at least one (the one inside, where "
            f"a class of your own wraps it); got {given!r:.200}"
        )
    return found


def real_optimizer(part: Any) -> Any:
    """An optimizer out of its wrappers, which step, clear gradients and hold what they step; anything else as it is.

    Raises:
        OptimizerError: for a wrapper of several optimizers, or with a state of its own.
    """
    while isinstance(part, Steps):  # a scheduler, which clears no gradients, wraps nothing
        held = [value for value in vars(part).values() if value is not part]
        held += [inner for value in held if isinstance(value, (list, tuple)) for inner in value]
        for kind in (kind for each in (part, *held) if isinstance(each, Steps) for kind in type(each).__mro__):
            if kind.__name__ == "ZeroRedundancyOptimizer" or kind.__module__.startswith("deepspeed.runtime."):
                raise OptimizerError(
                    f"{kind.__name__} keeps its state in parts on several ranks, or weights of its own, which this "
                    "version cannot cut: use the optimizer itself, in DistributedDataParallel or with fully_shard"
                )
        inside = list({id(inner): inner for inner in held if isinstance(inner, Optimizer)}.values())
        if not inside:
            break
        name, kinds = type(part).__name__, ", ".join(type(optimizer).__name__ for optimizer in inside)
        if len(inside) > 1:
            raise OptimizerError(f"{name} holds several optimizers ({kinds}): give attach these, in place of it")
        # Lookahead keeps slow weights, SAM the step back: of the old shapes after a cut.
        if getattr(part, "state", inside[0].state) is not inside[0].state:
            raise OptimizerError(
                f"{name} keeps a state in addition to that of the {kinds} in it, which would not follow a cut: train "
                f"with the {kinds} itself, or give attach that if {name} holds nothing for single parameters"
            )
        part = inside[0]
    return part
