"""Unpruned: which products of a model no unit can be taken from, by reason, and what frees them, in words."""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from setpoint.errors import GroupError
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import UNTRAINED, Trace
from setpoint.groups.walk import UNFOLLOWED
from setpoint.messages import listed, warn

_AT_THE_EDGE = "of the network"  # a reason with it says nothing of what stands in the way inside


def unpruned(model: nn.Module, found: Trace, narrowest: Mapping[str, int], frozen: Mapping[str, str]) -> str:
    """Which layers keep all their FLOPs, by reason, with their share of all FLOPs and a remedy, as sentences; or "".

    Args:
        narrowest: by group that may be cut, its smallest width.
        frozen: by group or place, why it is not cut.
    """
    widths = widths_of(found.groups)
    total = sum(product.at(widths) * product.times for product in found.contractions)
    shares: dict[str, float] = {}
    layers: dict[str, list[str]] = {}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad and weight.ndim > 1}
    for product in found.contractions:
        names = {name for size in product.sizes for name, _ in size.parts}
        if names.isdisjoint(narrowest):
            reasons = [frozen[name] for name in sorted(names & frozen.keys())]
            # Of a layer that is not trained this says more than what runs over the features that it reads.
            learns = any(name.startswith(f"{product.module}.") for name in trained)
            by_use = {why: (("get no gradient" in why) == learns, "allow_lossy" in why) for why in reasons}
            reasons.sort(key=by_use.__getitem__)
            for place, reason in sorted(product.blocked, key=lambda record: _AT_THE_EDGE in record[1]):
                reasons.append(reason if _AT_THE_EDGE in reason else f"{reason}, at {place.rpartition(': ')[2]}")
            why = _with_remedy(model, [*reasons, "no units that could be dropped lie in them"][0])
            shares[why] = shares.get(why, 0.0) + product.at(widths) * product.times
            layers.setdefault(why, []).append(product.module or "the model itself")
    most = [why for why in sorted(shares, key=lambda why: -shares[why]) if shares[why] > 0.01 * total]
    text = "; ".join(
        f"{100 * shares[why] / total:.1f} % of the FLOPs, {_layers(layers[why])}: {why}" for why in most[:3]
    )
    unread = [name for name in found.unreached if name in trained]
    sentences = [f"not pruned are {text}" if text else "", found.unfollowed]
    if unread:
        sentences.append(f"the forward does not use {_layers(unread)}: name the method that training calls, method=...")
    return "".join(f". {sentence[0].upper()}{sentence[1:]}" for sentence in sentences if sentence)


def warn_of_narrow(limit: float, needed: float, groups: Iterable[str], why: str) -> None:
    """Warn of a limit below what the model needs where these groups have a tenth of their width, shares of dense."""
    warn(
        f"a budget of {100 * limit:.1f} % narrows layers below a tenth of their width: with {_layers(groups)} at a "
        f"tenth the model needs {100 * needed:.1f} %{why}. Ask for more, or expect these layers to lose what they know"
    )


def _with_remedy(model: nn.Module, why: str) -> str:
    short, remedy = why.partition(" (")[0].partition(":")[0], ""
    if "get no gradient" in why:
        short, remedy = "their weights are frozen", "train them: requires_grad_(True)"
        if any(type(module).__module__.startswith("peft.tuners.lora") for module in model.modules()):
            remedy = 'put adapters on all layers: LoraConfig(target_modules="all-linear")'
    elif "allow_lossy" in why:
        remedy = "attach(..., allow_lossy=True) prunes them all the same"
    elif why.startswith(UNFOLLOWED):
        remedy = "docs/own-ops.md says how to make it known"
    return f"{short} ({remedy})" if remedy else short


def _layers(names: Iterable[str]) -> str:
    # Layers of the same name in all blocks are one.
    return listed(list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)), 3)


def nothing_to_prune(frozen: Mapping[str, str]) -> GroupError:
    """The error of a model without any group, and why."""
    if strangers := [why for why in frozen.values() if why.endswith(UNTRAINED)]:
        return GroupError(
            f"{listed(strangers, 2, '; ')}: give all optimizers, and all tensors of a layer to one. Nothing else "
            "can be pruned"
        )
    reasons = listed([f"{place}: {reason}" for place, reason in frozen.items()], 8, "; ") or "no dim at all"
    advice = "docs/own-ops.md says how to teach an op; a layer needs another one behind it to be narrowed"
    if any("get no gradient" in why for why in frozen.values()):
        advice = "Train the frozen weights, requires_grad_(True), or put adapters on all layers"
    elif lossy := [name for name, why in frozen.items() if "(allow_lossy" in why]:
        advice = f"attach(..., allow_lossy=True) prunes {', '.join(lossy[:4])} all the same"
    return GroupError(f"nothing in this model can be pruned: {reasons}. {advice}")


def warn_of_unseen(model: nn.Module, found: Trace, groups: tuple[Group, ...]) -> None:
    """Warn of layers that cannot be followed, and of weights that the example leaves out and that may read units."""
    if found.unfollowed:
        warn(found.unfollowed)
    lengths = {len(part.index) for group in groups for part in group.slices}
    # A tied weight has several names, and is reached by any of them.
    reached = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name not in found.unreached}
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached}
    stray = [name for name in found.unreached if len(shapes.get(name, ())) > 1 and lengths & set(shapes[name][1:])]
    if stray:  # they would stay while the units go
        warn(
            f"the example does not reach {listed(stray, 5)}: if training "
            "does, give an example that does, too. Otherwise units that these weights read may be cut without them"
        )
