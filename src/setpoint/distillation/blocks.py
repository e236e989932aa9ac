"""Blocks: what is inside a pruned model, compared with what is inside its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint.distillation.teacher import Teacher
from setpoint.groups.example import tensors_of


@final
class Blocks:
    """Outputs of blocks of a pruned model and of its teacher, compared by their direction.

    Their distance is the mean over blocks and positions of `1 - cos(own, teacher's)`, with the cosine along one dim. So
    it is 0 where both point the same way, whatever their lengths, and at most 2. Add it to the loss, with a weight.

    A block is a module of the same name in both models whose output keeps its shape when the model is cut: a layer of a
    transformer is one, since heads and neurons are cut inside it. Make this after `attach`. The outputs of the last
    forward are kept until they are compared.

    Args:
        model: the pruned model, without a wrapper.
        teacher: the teacher, or its model.
        names: of the blocks, such as "encoder.layer.3".
        dim: of the cosine: -1 for tokens, 1 for the channels of images.

    Raises:
        ValueError: for no name, or one that a model does not have.

    References:
        Sanh et al., "DistilBERT, a distilled version of BERT", 2019.

    >>> student, knows = (nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)) for _ in range(2))
    >>> teacher = Teacher(knows)
    >>> blocks = Blocks(student, teacher, ["0"])
    >>> inputs = torch.randn(5, 8)
    >>> logits, taught = student(inputs), teacher.logits(inputs)
    >>> 0 <= blocks.distance().item() <= 2
    True
    """

    def __init__(self, model: nn.Module, teacher: Teacher | nn.Module, names: Sequence[str], *, dim: int = -1) -> None:
        self.names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        if not self.names:
            raise ValueError("blocks are compared by name: give the names of some, such as 'encoder.layer.3'")
        self.dim = dim
        self._own, self._taught = dict[str, Tensor](), dict[str, Tensor]()
        knows = teacher.model if isinstance(teacher, Teacher) else teacher
        if knows is model:
            raise ValueError("the teacher is the model that is pruned: give another one, such as copy.deepcopy(model)")
        for whose, each in (("model", model), ("teacher", knows)):
            modules = dict(each.named_modules())
            for name in self.names:
                if name not in modules:
                    some = ", ".join(repr(other) for other in list(modules)[1:4])
                    raise ValueError(f"the {whose} has no module {name!r}; it has {some} and so on")
        self._hooks = [
            each.get_submodule(name).register_forward_hook(_keeping(kept, name))
            for each, kept in ((model, self._own), (knows, self._taught))
            for name in self.names
        ]

    def distance(self, mask: Tensor | None = None) -> Tensor:
        """The mean over blocks and positions of `1 - cos(own, teacher's)`, of the last forward of each.

        Args:
            mask: which positions count, with the outputs' shape but for the dim of the cosine. All by default.

        Raises:
            ValueError: when one of the models has made no forward since the last call, or shapes differ.
        """
        found = []
        for name in self.names:
            own, taught = self._own.pop(name, None), self._taught.pop(name, None)
            if own is None or taught is None:
                whose = "model" if own is None else "teacher"
                raise ValueError(
                    f"the {whose} has made no forward through {name!r} since the last comparison: call the model and "
                    "teacher.logits first (cached_logits makes no forward)"
                )
            if own.shape != taught.shape:
                raise ValueError(
                    f"the output of {name!r} has shape {tuple(own.shape)}, the teacher's {tuple(taught.shape)}: name "
                    "blocks whose outputs are not cut, such as layers of a transformer"
                )
            apart = 1 - functional.cosine_similarity(own.float(), taught.detach().float(), dim=self.dim)
            if mask is not None:
                if mask.shape != apart.shape:
                    raise ValueError(f"the mask has shape {tuple(mask.shape)} for positions of {tuple(apart.shape)}")
                apart = apart[mask.bool()]
            found.append(apart.mean())
        return torch.stack(found).mean()

    def remove(self) -> None:
        """Take the hooks off both models."""
        for hook in self._hooks:
            hook.remove()


def _keeping(kept: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that keeps the first tensor of an output."""

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept[name] = next(iter(tensors_of([output])))

    return keep
