"""Semi-structured weights: linear layers in the 2:4 pattern, handed to the sparse tensor cores of the GPU."""

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from setpoint.errors import DeviceError, GroupError

_CAPABILITY = (8, 0)  # from which a GPU has sparse tensor cores


def to_semi_structured(model: nn.Module) -> dict[str, str]:
    """Keep the weights of linear layers that are in the 2:4 pattern as `torch.sparse` semi-structured tensors.

    For inference, after `loop.finish()`: products with these weights then run on sparse tensor cores, and the weights
    take a good half of their bytes. They are no longer trained. In half precision (float16, bfloat16) the
    kernels are at their best. Convolutions have no such kernels, and stay as they are.

    Args:
        model: on a CUDA device; its linear layers are changed in place.

    Returns:
        Name of each layer with weights that stays dense, and why.

    Raises:
        DeviceError: where the hardware has no sparse tensor cores; the model is as it was.
        GroupError: if no weight can be handed over; the message says why for each layer.

    References:
        Mishra et al., "Accelerating sparse deep neural networks", arXiv 2104.08378.
    """
    layers = {
        n: layer for n, layer in model.named_modules() if isinstance(getattr(layer, "weight", None), nn.Parameter)
    }
    devices = {layer.weight.device for layer in layers.values() if isinstance(layer, nn.Linear)}
    for device in sorted(devices, key=str):
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
            raise DeviceError(
                f"only NVIDIA GPUs of compute capability {'.'.join(map(str, _CAPABILITY))} (Ampere) and later have "
                f"sparse tensor cores, and the model is on {device}: the 2:4 pattern saves nothing there"
            )
    dense = {name: why for name, layer in layers.items() if (why := why_dense(layer))}
    for name, layer in layers.items():
        if name in dense:
            continue
        try:
            sparse = to_sparse_semi_structured(layer.weight.detach().contiguous())
        except RuntimeError as error:  # shapes and dtypes that the kernels of this version do not take
            dense[name] = str(error)
        else:
            layer.weight = nn.Parameter(sparse, requires_grad=False)
    if len(dense) == len(layers):
        reasons = "; ".join(f"{name or 'the model'}: {why}" for name, why in dense.items())
        raise GroupError(f"no weight can be handed to sparse tensor cores: {reasons or 'there is none'}")
    return dense


def why_dense(layer: nn.Module) -> str:
    """Why a layer's weight stays dense, or "" for a linear layer in the 2:4 pattern."""
    if not isinstance(layer, nn.Linear):
        return f"{type(layer).__name__} has no kernels for sparse tensor cores"
    weight = layer.weight.detach()
    if weight.shape[1] % 4:
        return f"its {weight.shape[1]} inputs do not divide by 4"
    active = (weight != 0).reshape(len(weight), -1, 4).sum(2)
    if (active <= 2).all():
        return ""
    row = int((active > 2).any(1).nonzero()[0])
    return f"{int(active[row].sum())} of {weight.shape[1]} weights in row {row} are not zero, not two of every four"
