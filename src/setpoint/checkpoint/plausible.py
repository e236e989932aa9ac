"""Plausible: whether the shapes of a state without sizes can be those of a cut, as far as shapes alone tell.

A cut takes whole groups: what one layer makes narrower, others read narrower. So the outputs of a last layer, which
nothing reads, and the inputs of a first one keep their number. Without an example nobody knows which layer reads which:
only what no model can be like is found here. `fit.cut_to` is exact, at the first forward.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import gcd

from torch import nn

from setpoint.actuator.model_shapes import Shapes

_ALONG = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU)
_ROLES = ("fixed", "along", "made", "read", "unknown")
"""Of a dim: never cut; of another layer's width; a layer makes it, or reads it; in code that may do either."""


@dataclass(frozen=True)
class _Width:
    """A dim that is narrower than in the dense model."""

    tensor: str
    owner: str  # the layer, or the tensor where the role is unknown
    dim: int
    dense: int
    now: int
    role: str  # one of _ROLES

    def is_like(self, other: "_Width") -> bool:
        """Whether one may be the other, or several of it: positions that were flattened, gates that were fused."""
        multiple = not (self.dense % other.dense and other.dense % self.dense)
        return self.owner != other.owner and multiple and self.dense * other.now == self.now * other.dense

    @property
    def once(self) -> "_Width":
        """What it is several of, as heads that share their keys read these several times."""
        times = gcd(self.dense, self.now)
        return replace(self, dense=self.dense // times, now=self.now // times)

    @property
    def lost(self) -> int:
        return self.dense - self.now

    def may_hold(self, other: "_Width") -> bool:
        """Whether the other may be a part of it: of what was concatenated, or is split."""
        fits = self.dense > other.dense and self.now >= other.now and self.lost >= other.lost
        return fits and self.owner != other.owner


def misfit(model: nn.Module, dense: Shapes, shapes: Shapes) -> str | None:
    """What is wrong with shapes that no cut of the dense model can have; None where they may be those of a cut.

    Shapes that are wider than the dense ones are not looked at: `fit` refuses them.
    """
    if any(
        len(dense[name]) != len(shape) or any(map(int.__gt__, shape, dense[name])) for name, shape in shapes.items()
    ):
        return None
    widths, in_layer = [], dict[tuple[str, str, int], tuple[int, int]]()
    for path, module in model.named_modules():
        for key in (*module._parameters, *module._buffers):
            name = f"{path}.{key}" if path else key
            for dim, (before, now) in enumerate(zip(dense.get(name, ()), shapes.get(name, ()), strict=True)):
                role = _role(module, key, dim)
                if role in ("made", "along"):  # a layer's bias is as long as its weight has outputs
                    place = (path, role, 0 if role == "made" else dim)
                    if in_layer.setdefault(place, (before, now)) != (before, now):
                        return f"the tensors of {path!r} do not belong together: {name!r} has shape {shapes[name]}"
                if before != now:
                    widths.append(_Width(name, name if role == "unknown" else path, dim, before, now, role))
    fixed, along, made, read, unknown = ([w for w in widths if w.role == role] for role in _ROLES)

    def alone(some: Iterable[_Width], *others: _Width) -> list[_Width]:
        return [width for width in some if not any(map(width.is_like, others))]

    # Two that nothing reads may meet each other: queries and keys.
    not_read = alone(made, *read, *made, *unknown)
    not_made = alone([*read, *along], *made, *unknown)
    open_ones = alone(unknown, *made, *read)  # others of their kind do not explain what they are
    makers, readers = [*made, *unknown], [*read, *unknown]
    wrong = [width for width in not_read if not any(_is_part(width, reader, makers) for reader in readers)]
    wrong += [width for width in [*not_made, *alone(open_ones, *unknown)] if not _is_sum(width, makers)]
    left = [*not_read, *not_made, *open_ones]
    if not fixed and (not wrong or any(a.may_hold(b.once) or b.may_hold(a.once) for a in wrong for b in left)):
        return None
    first = [*fixed, *wrong][0]
    why = {"made": "no layer reads fewer", "fixed": "no cut drops these"}.get(first.role, "no layer makes fewer")
    there = f"{first.tensor!r} has {first.now} entries along dim {first.dim} in the state, {first.dense} in the model"
    whose = "the state is of another model, or a part of one; if not, shrink_to(model, state, example=(x,)) first"
    return f"{there}, and {why}: {whose}"


def _role(module: nn.Module, key: str, dim: int) -> str:
    if isinstance(module, _ALONG):
        return "along"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and key == "weight":
        return "made" if dim == 1 else "fixed"
    is_conv = isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1
    if not (is_conv or isinstance(module, nn.Linear)) or key not in ("weight", "bias"):
        return "unknown"
    makes = int(bool(getattr(module, "transposed", False))) if key == "weight" else 0
    return "made" if dim == makes else "read" if dim < 2 else "fixed"


def _is_part(width: _Width, reader: _Width, makers: Iterable[_Width]) -> bool:
    """Whether a layer may read it together with others."""
    sums = 1  # its bit n: whether some of the others have lost n entries together
    for other in makers:
        if other is not width and reader.may_hold(other):
            sums |= sums << other.lost
    return reader.may_hold(width) and bool(sums >> (reader.lost - width.lost) & 1)


def _is_sum(width: _Width, makers: Iterable[_Width]) -> bool:
    """Whether a layer may read several widths next to each other, each once or at several positions."""
    pairs = {(part.dense, part.lost) for part in makers if part.owner != width.owner}
    least = [0]  # by number of entries that are lost, the least dense width of parts that have lost as many
    for lost in range(1, width.lost + 1):
        least.append(min((least[lost - less] + size for size, less in pairs if less <= lost), default=width.dense + 1))
    return least[-1] <= width.dense
