"""A target: the model that a command names, as `module.py:function` or by its name in a library, and an example."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import UsageError
from setpoint.groups.example import Example
from setpoint.messages import a_type, counted, did_you_mean

MOST_NUMBERS = 2**28
"""In an example that is filled with noise: a gigabyte of them."""
MOST_PARAMS = 500_000_000
"""A larger transformers model is built without weights: the copies on which cuts are tried would fill the memory."""


def load_target(target: str, shape: tuple[int, ...] | None = None) -> tuple[nn.Module, Example]:
    """The model and example that `module.py:function` returns, or a library's model of that name.

    Args:
        target: a file and a function of no arguments that returns a model and its inputs (a tuple, or a dict of
            keyword inputs), or a model alone if `shape` says what it takes; or what `named_model` takes.
        shape: of the example, filled with noise; None for the usual size of a library's model.

    Raises:
        UsageError: there is no such file, function or model, it raises, it returns no inputs and no shape is given,
            or the shape does not fit it.
    """
    if shape is not None and min(shape) < 1:
        raise UsageError(f"sizes of an example are at least 1, got {','.join(map(str, shape))}")
    if shape is not None and math.prod(shape) > MOST_NUMBERS:
        raise UsageError(
            f"an example of {','.join(map(str, shape))} is too large to inspect a model with, at most {MOST_NUMBERS:,} "
            "numbers: give a smaller batch, since groups and shares are the same"
        )
    if not is_own_function(target):
        return named_model(target, shape)
    made = call_own(target)
    if isinstance(made, tuple) and len(made) != 2:
        raise UsageError(
            f"{target} returned {counted(len(made), 'thing')}: return a model and its inputs, as `model, (x,)`"
        )
    if isinstance(made, tuple) and shape is not None:
        raise UsageError(f"{target} returns inputs of its own: leave out --input {','.join(map(str, shape))}")
    model, example = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{target} returned {a_type(model)}: return a torch.nn.Module, or one and its inputs")
    if example is None and shape is None:
        raise UsageError(
            f"{target} returned a model without inputs: return `model, (x,)`, or `model, {{'x': x}}` for keyword "
            "inputs; or say the shape of its one input of floats, for images --input 2,3,224,224"
        )
    example = (noise(shape),) if shape is not None else example
    return model, (example,) if isinstance(example, Tensor) else example


# A function of a file.


def is_own_function(target: str) -> bool:
    """Whether the name is that of a function in a file.

    >>> is_own_function("folder/task.py:make"), is_own_function("cifar10")
    (True, False)
    """
    return ".py:" in target


def call_own(target: str) -> Any:
    """What a function of a file returns.

    Raises:
        UsageError: in place of whatever it raises, and where it is a model and no function.
    """
    with named_errors(target):
        function = own_function(target)
    if isinstance(function, nn.Module):  # it could be called, with nothing, and would raise something unhelpful
        name = target.rpartition(":")[2]
        raise UsageError(
            f"{target} is {a_type(function)} itself: name a function without arguments that returns {name}"
        )
    with named_errors(target):
        return function()


def own_function(target: str) -> Callable[[], Any]:
    """The function without arguments of a Python file, which may import modules of its folder.

    Raises:
        UsageError: there is no such file, or it has no such function.
    """
    path, name = check_own_function(target)
    module = _module(path.resolve(), path.read_bytes())
    function = getattr(module, name, None)
    if not callable(function):
        raise _absent(path, name, [name for name, value in vars(module).items() if inspect.isfunction(value)])
    if not isinstance(function, nn.Module):
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise UsageError(f"{target} must take nothing, since it is called with nothing: {error}") from None
    return function  # type: ignore[no-any-return]


def check_own_function(target: str) -> tuple[Path, str]:
    """The file and the name of a function; the file is read, and not run.

    Raises:
        UsageError: there is no such file, or the name stands nowhere in it.
    """
    if not is_own_function(target):
        raise UsageError(
            _file_meant(target)
            or f"{target!r} names no function: give a function of a Python file as module.py:function"
        )
    file, _, name = target.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"no file {path}: give an existing Python file as module.py:function")
    text = path.read_text(encoding="utf-8", errors="replace")
    if not re.search(rf"\b{re.escape(name)}\b|\bimport \*", text):
        raise _absent(path, name, re.findall(r"^(?:async )?def (\w+)", text, re.MULTILINE))
    return path, name


def _absent(path: Path, name: str, own: list[str]) -> UsageError:
    if "@" in name:
        return UsageError(f"{path} has no function {name!r}: only methods of Setpoint's own have settings by name")
    listed = f"it has {', '.join(own)}" if own else "it has no functions"
    return UsageError(f"{path} has no function {name!r}: {did_you_mean(name, own)}{listed}")


def _file_meant(target: str) -> str:
    """What to write for `module:function`, where there is such a file; empty for anything else."""
    file, colon, function = target.partition(":")
    if not colon or not Path(f"{file}.py").is_file():
        return ""
    return f"{target!r} names no file: did you mean {file}.py:{function}?"


@cache
def _module(path: Path, source: bytes) -> ModuleType:
    """A file's module, loaded once for each text of it.

    Its module name is unique, so that the file may have the name of any other module, or of another file.
    """
    name = f"own_{path.stem}"
    while (other := sys.modules.get(name)) is not None and Path(other.__file__ or "") != path:
        name += "_"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    if path.stem in sys.stdlib_module_names:
        import_module(path.stem)  # before the file's folder hides it
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@contextmanager
def named_errors(target: str) -> Iterator[None]:
    """Turn any exception of a user's file into one line: function, place in the file, and message.

    Raises:
        UsageError: in place of anything but itself.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        path = Path(target.rpartition(":")[0]).resolve()
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        where = f'at {path.name}:{lines[-1].lineno}: "{lines[-1].line}"' if lines else "outside the file"
        if isinstance(error, SyntaxError) and error.lineno is not None:
            where = f"at {Path(error.filename or path).name}:{error.lineno}"
        message = str(error).strip().partition("\n")[0] or "no message"
        raise UsageError(f"{target} raised {type(error).__name__}: {message} ({where})") from error


# A model of a library.


def named_model(target: str, shape: tuple[int, ...] | None = None) -> tuple[nn.Module, Any]:
    """An untrained model of a library in train mode, and an example.

    A transformers model of more than 500 million parameters comes on the "meta" device: it has shapes only.

    Args:
        target: "torchvision:resnet50", "timm:vit_tiny_patch16_224", "transformers:gpt2" (a model type, or a model on
            the Hub, with a slash in its name), or one of these names alone: then the libraries are searched in
            this order. "timm/resnet18.a1_in1k" is timm's, as on the Hub.
        shape: of a batch of images, or of tokens for a language model; None for the model's usual size.

    Raises:
        UsageError: for a name that no installed library knows, or a shape of another kind than the model takes.
    """
    if target.endswith(".py"):
        raise UsageError(f"{target} is a file: name the function in it that returns the model, {target}:function")
    if Path(target).is_file():
        raise UsageError(f"{target} is a file and no model: name a function of a Python file, as module.py:function")
    prefix, separator, name = target.rpartition(":")
    if not separator and target.partition("/")[0] in LIBRARIES:
        prefix, separator, name = target.partition("/")
    if separator and prefix not in LIBRARIES:
        hint = _file_meant(target) or f"{did_you_mean(prefix, LIBRARIES)}use one of {', '.join(LIBRARIES)}"
        raise UsageError(f"unknown library {prefix!r} in {target!r}: {hint}")
    missing, known = list[str](), list[str]()
    for library_name in [prefix] if separator else LIBRARIES:
        try:
            found = library_names(library_name)
        except ImportError:
            missing.append(library_name)
            continue
        tagged = library_name == "timm" and name.partition(".")[0] in found
        if name in found or tagged or (library_name == "transformers" and "/" in name and not _misspelt(name)):
            return _BUILDERS[library_name](name, shape)
        known += found
    raise UsageError(_unknown(target, target.removesuffix(name), known, missing))


def _misspelt(name: str) -> str:
    """The library that was meant by `tim/resnet18`, which would be a model of the user `tim` on the Hub."""
    folder, slash, _ = name.partition("/")
    meant = difflib.get_close_matches(folder.lower(), LIBRARIES, 1, 0.8) if slash else []
    return meant[0] if meant and folder not in LIBRARIES else ""


def _unknown(target: str, prefix: str, known: list[str], missing: list[str]) -> str:
    """What to say of a name that no library has."""
    own = "or give module.py:function that returns your own"
    if Path(target, "config.json").is_file():
        return f"unknown model {target!r}: write ./{target} for the folder"
    if meant := _misspelt(target):
        return f"unknown library in {target!r}: did you mean {meant}? A model on the Hub is transformers:{target}"
    if not known:
        first, *others = missing
        more = f" (or {', '.join(others)})" if others else ""
        return f"{target!r} needs {'a model library' if others else first}: pip install {first}{more}, {own}"
    hint = did_you_mean(target, [f"{prefix}{name}" for name in dict.fromkeys(known)])
    hint = f"{hint}Otherwise name" if hint else "name"
    absent = f"; not installed: {', '.join(missing)}" if missing else ""
    hub = "; models of the Hub are written owner/name, such as google-bert/bert-base-uncased"
    of_hub = "-" in target and not prefix and "/" not in target
    return (
        f"unknown model {target!r}: {hint} a model of torchvision, timm or transformers, {own}{absent}"
        f"{hub if of_hub else ''}"
    )


def library(name: str) -> Any:
    """The library "torchvision", "timm" or "transformers": this file alone imports them.

    Raises:
        ImportError: it is not installed.
    """
    return import_module(name)


def library_names(name: str) -> list[str]:
    """Names of the models of "torchvision", "timm" or "transformers".

    Raises:
        ImportError: the library is not installed.
    """
    if name == "torchvision":
        return list(library("torchvision.models").list_models())
    if name == "timm":
        return list(library("timm").list_models())
    return list(library("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES)


def noise(shape: tuple[int, ...]) -> Tensor:
    """An example input of noise: BatchNorm cannot normalise zeros."""
    return torch.randn(shape, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")


def torchvision_model(name: str, shape: tuple[int, ...] | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An untrained torchvision model, and a batch of noise: images, clips, or pairs of images for optical flow."""
    builder = library("torchvision.models").get_model_builder(name)
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    model: nn.Module = builder(weights=None, **backbone)
    kind = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    if kind == "optical_flow":
        return model, (noise(shape or (2, 3, 128, 128)),) * 2
    size = 112 if name.startswith(("r3d", "mc3", "r2plus1d")) else 299 if name == "inception_v3" else 224
    return model, (noise(shape or (2, 3, *((16,) if kind == "video" else ()), size, size)),)


def timm_model(name: str, shape: tuple[int, ...] | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An untrained timm model, and a batch of noise of the size that it is made for."""
    model: Any = library("timm").create_model(name, pretrained=False)
    return model, (noise(shape or (2, *model.pretrained_cfg["input_size"])),)


def _transformers(name: str, shape: tuple[int, ...] | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """An untrained transformers model with the first head that its type has, without a cache, and its inputs."""
    transformers = library("transformers")
    transformers.logging.set_verbosity_error()
    try:
        known = transformers.AutoConfig
        config = known.from_pretrained(name) if "/" in name else known.for_model(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"no configuration of {name!r} on this machine or on the Hub: {reason}") from error
    if hasattr(config, "use_cache"):
        config.use_cache = False
    heads = ("Seq2SeqLM", "ImageClassification", "SemanticSegmentation", "MaskedLM", "CausalLM")
    makers = [getattr(transformers, f"AutoModelFor{head}") for head in heads]
    maker = next((maker for maker in makers if type(config) in maker._model_mapping), None)
    if maker is None:
        raise UsageError(f"{config.model_type!r} has no head for text or images: give module.py:function instead")
    with torch.device("meta"):
        model: nn.Module = maker.from_config(config)
    large = sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMS
    example = _inputs(config, model.main_input_name == "pixel_values", shape)
    if large:
        return model.train(), {key: value.to("meta") for key, value in example.items()}
    return maker.from_config(config).train(), example


def _inputs(config: Any, images: bool, shape: tuple[int, ...] | None) -> dict[str, Tensor]:
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    longest = int(getattr(config, "max_position_embeddings", None) or 128)
    usual = (2, getattr(config, "num_channels", 3), height, width) if images else (2, min(128, longest))
    shape = shape or usual
    if len(shape) != len(usual):
        what, like = "images" if images else "tokens", ",".join(map(str, usual))
        raise UsageError(f"the model takes a batch of {what}, such as {like}, got {','.join(map(str, shape))}")
    if images:
        return {"pixel_values": noise(shape)}
    generator = torch.Generator(device="cpu").manual_seed(0)
    tokens = torch.randint(3, min(config.vocab_size, 1000), shape, generator=generator, device="cpu")
    if config.is_encoder_decoder:
        # Fewer tokens for the decoder: no dim of one can be mistaken for the other's.
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, : max(1, tokens.shape[1] * 7 // 12)]}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


_BUILDERS: dict[str, Callable[[str, tuple[int, ...] | None], tuple[nn.Module, Any]]] = {
    "torchvision": torchvision_model,
    "timm": timm_model,
    "transformers": _transformers,
}
LIBRARIES = tuple(_BUILDERS)
"""In the order in which a name is searched."""
