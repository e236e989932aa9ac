"""timm: a cut convolutional network as the string of shapes from which timm itself builds its pruned models."""

import copy
from collections.abc import Iterator

from timm.models import adapt_model_from_string
from torch import nn

from setpoint.actuator.model_shapes import ModelShapes
from setpoint.actuator.tensors import named_tensors
from setpoint.checkpoint.fit import at_dense_shapes
from setpoint.distributed import unwrapped
from setpoint.errors import CheckpointError
from setpoint.groups.sizes_in_code.place import is_call
from setpoint.messages import a_type


def shape_string(model: nn.Module) -> str:
    """What `timm.models.adapt_model_from_string` reads: the shape of every tensor in the state dict.

    timm knows convolutions that are dense or depthwise, batch norms, and one linear layer behind them. Where Setpoint
    is not installed, `adapt_model_from_string(timm.create_model(...), string)` gives a model of the cut shapes, and
    `load_state_dict` its weights. Before the string is returned, timm builds the model from it once.

    Args:
        model: one of timm's, cut or not; the model is not changed.

    Raises:
        CheckpointError: for a model that timm would build otherwise; the message names the module.

    >>> from timm.models import ResNet
    >>> from timm.models.resnet import BasicBlock
    >>> shape_string(ResNet(BasicBlock, (1, 1, 1, 1)))[:55]
    'conv1.weight:[64, 3, 7, 7]***bn1.weight:[64]***bn1.bias'
    """
    model = unwrapped(model)
    # A pooling layer such as "catavgmax" gives the linear layer each feature several times.
    times = int(getattr(getattr(model, "global_pool", None), "feat_mult", lambda: 1)())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[f"{name}.weight"][1] //= times
    string = "***".join(f"{name}:[{', '.join(map(str, shape))}]" for name, shape in shapes.items())
    for name, why in _unlike(model, string):
        what = f"{name or 'the model'!r}, {a_type(model.get_submodule(name))}"
        raise CheckpointError(
            f"timm's string of shapes cannot describe {what}: {why}. Use setpoint.save, or setpoint.bake for a pickle "
            "that needs no Setpoint"
        )
    return string


def _unlike(model: nn.Module, string: str) -> Iterator[tuple[str, str]]:
    for name, place in ModelShapes.of(model).sizes:
        if is_call(place):
            yield name, "its code writes a size that had to be corrected"
    dense = copy.deepcopy(model)  # timm puts what it is given into eval mode
    try:
        with at_dense_shapes(dense):
            built = adapt_model_from_string(dense, string)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        yield "", f"timm stops at it with {error!r}"
        return
    for (name, module), other in zip(model.named_modules(), built.modules(), strict=True):
        # Of timm's own classes extra_repr may say anything; linear layers become plain ones.
        linear = isinstance(module, nn.Linear) and isinstance(other, nn.Linear)
        if not linear and type(module) is not type(other):
            yield name, f"timm builds {a_type(other)}"
        if type(module).__module__.startswith("torch.nn.") and module.extra_repr() != other.extra_repr():
            yield name, f"timm builds it with {other.extra_repr()} in place of {module.extra_repr()}"
    tensors = named_tensors(built)
    for name, tensor in named_tensors(model).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            yield name.rpartition(".")[0], f"timm does not give {name!r} the shape {tuple(tensor.shape)}"
