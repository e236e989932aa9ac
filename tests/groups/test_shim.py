"""The size shim corrects the sizes of numbered calls and nothing else, wherever the module goes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from groups.zoo import Attention
from setpoint.groups.sizes_in_code.shim import get_call_sizes, set_call_sizes


class Sizes(nn.Module):
    """Views and splits with written sizes."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = x.split([3, 3], dim=1)
        return (*x.chunk(2, dim=1), a, b, x.view(-1, 6), torch.reshape(x, (2, 6)), *torch.split(x, 3, 1))


def shapes(module: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in module(x)]


def test_sizes_are_corrected_by_place() -> None:
    """A listed call gets the sizes that must be there; -1 and calls that are not listed stay as written."""
    module = Sizes()
    x = torch.zeros(2, 5)
    with pytest.raises(RuntimeError):
        module(x)
    sizes = {"split#0[0]": 3, "split#0[1]": 2, "chunk#0[0]": 1, "chunk#0[1]": 4, "view#0[1]": 5, "reshape#0[1]": 5}
    set_call_sizes(module, {**sizes, "split#1[0]": 3, "split#1[1]": 2})
    assert shapes(module, x) == [(2, 1), (2, 4), (2, 3), (2, 2), (2, 5), (2, 5), (2, 3), (2, 2)]


def test_shim_is_removed() -> None:
    """With no sizes left to correct, the plain forward runs again."""
    module = Sizes()
    set_call_sizes(module, {"view#0[1]": 6})
    assert get_call_sizes(module) == {"view#0[1]": 6}
    set_call_sizes(module, {})
    assert get_call_sizes(module) == {} and "forward" not in vars(module)


def cut_attention() -> Attention:
    """Attention of 16 features with 2 of 4 heads left."""
    module = Attention(16, 4)
    module.c_attn, module.c_proj = nn.Linear(16, 24), nn.Linear(8, 16)
    heads = {f"view#{call}[{place}]": size for call in range(3) for place, size in ((2, 2), (3, 4))}
    set_call_sizes(module, {**heads, "split#0[0]": 8, "split#0[1]": 8, "split#0[2]": 8, "view#3[2]": 8})
    return module


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_shim_survives_copies_and_follows_the_copy(travel: object) -> None:
    """Deepcopy and pickle carry the corrections along, bound to the new module's own weights."""
    module = cut_attention()
    x = torch.randn(2, 5, 16)
    twin = travel(module)  # type: ignore[operator]
    assert torch.equal(twin(x), module(x))
    with torch.no_grad():
        twin.c_proj.weight.zero_()
        twin.c_proj.bias.zero_()
    assert not twin(x).any() and module(x).any()
