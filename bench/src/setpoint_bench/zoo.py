"""Models of torchvision, timm and transformers by name, with random weights and an example each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import UsageError
from setpoint.messages import did_you_mean
from setpoint.report.target import check_shape, noise

MOST_PARAMS = 500_000_000
"""A larger transformers model is built without weights: the copies on which cuts are tried would fill the memory."""

# What a transformers model is built for, the first that it can do; and the mapping that says so.
_HEADS = {
    "ZeroShotImageClassification": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "SpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "CTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "Seq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "ImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "SemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "MaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "CausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}


def classifier_names() -> list[str]:
    """Names of torchvision's models that classify images."""
    models = library("torchvision").models
    return list(models.list_models(module=models))


def bert_encoder(**sizes: int) -> nn.Module:
    """An untrained BERT encoder without a pooler; `sizes` are named as in its configuration."""
    transformers = library("transformers")
    encoder: nn.Module = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    return encoder


def timm_network(name: str, classes: int) -> nn.Module:
    """An untrained network of timm with this many classes."""
    network: nn.Module = library("timm").create_model(name, pretrained=False, num_classes=classes)
    return network


def small_config(name: str, known: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
    """The configuration of a model type at `sizes`, and at those `known` sizes whose names the type has."""
    transformers = library("transformers")
    plain = transformers.AutoConfig.for_model(name)
    fitting = {key: value for key, value in known.items() if hasattr(plain, key)}
    return transformers.AutoConfig.for_model(name, **{**fitting, **sizes})


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
    check_shape(shape)
    prefix, separator, name = target.rpartition(":")
    if not separator and target.partition("/")[0] in LIBRARIES:
        prefix, separator, name = target.partition("/")
    if separator and prefix not in LIBRARIES:
        hint = f"{did_you_mean(prefix, LIBRARIES)}use one of {', '.join(LIBRARIES)}, or FILE.py:function"
        raise UsageError(f"unknown library {prefix!r} in {target!r}: {hint}")
    missing, known = list[str](), list[str]()
    for library_name in [prefix] if separator else LIBRARIES:
        try:
            found = library_names(library_name)
        except ImportError:
            missing.append(library_name)
            continue
        tagged = library_name == "timm" and name.partition(".")[0] in found
        if name in found or tagged or (library_name == "transformers" and "/" in name):
            return _BUILDERS[library_name](name, shape)
        known += found
    raise UsageError(_unknown(target, target.removesuffix(name), known, missing))


def _unknown(target: str, prefix: str, known: list[str], missing: list[str]) -> str:
    """What to say of a name that no library has."""
    own = "or give module.py:function that returns your own"
    if Path(target, "config.json").is_file():
        return f"unknown model {target!r}: write ./{target} for the folder"
    if not known:
        return f"{target!r} needs {' or '.join(missing)}: pip install {missing[0]}, {own}"
    hint = did_you_mean(target, [f"{prefix}{name}" for name in dict.fromkeys(known)])
    hint = f"{hint}Otherwise name" if hint else "name"
    absent = f"; not installed: {', '.join(missing)}" if missing else ""
    return (
        f"unknown model {target!r}: {hint} a model of torchvision, timm or transformers, {own}{absent}; models of the "
        "Hub are written owner/name, such as google-bert/bert-base-uncased"
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


def _transformers(name: str, shape: tuple[int, ...] | None) -> tuple[nn.Module, Any]:
    try:
        known = library("transformers").AutoConfig
        config = known.from_pretrained(name) if "/" in name else known.for_model(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"no configuration of {name!r} on this machine or on the Hub: {reason}") from error
    with torch.device("meta"):
        model, example = transformers_model(config, shape, usual=True)
    if sum(parameter.numel() for parameter in model.parameters()) <= MOST_PARAMS:
        return transformers_model(config, shape, usual=True)
    return model, {key: value.to("meta") for key, value in example.items()}


_BUILDERS: dict[str, Callable[[str, tuple[int, ...] | None], tuple[nn.Module, Any]]] = {
    "torchvision": torchvision_model,
    "timm": timm_model,
    "transformers": _transformers,
}
LIBRARIES = tuple(_BUILDERS)
"""In the order in which a name is searched."""


def transformers_model(
    config: Any, shape: tuple[int, ...] | None = None, *, usual: bool = False
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A transformers model in train mode, without a cache, and the inputs of a training step.

    Raises:
        UsageError: for a type without such a head, or a shape that does not fit it.
    """
    transformers, modeling_auto = library("transformers"), library("transformers.models.auto.modeling_auto")
    transformers.logging.set_verbosity_error()
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for head, mapping in _HEADS.items():
        if config.model_type in getattr(modeling_auto, mapping):
            kind = getattr(modeling_auto, mapping)[config.model_type]
            model: nn.Module = getattr(transformers, kind if isinstance(kind, str) else kind[-1])(config)
            return model.train(), _inputs(head, config, shape, usual)
    raise UsageError(f"transformers has no trainable head for {config.model_type!r}: use module.py:function instead")


def _inputs(head: str, config: Any, shape: tuple[int, ...] | None, usual: bool) -> dict[str, Tensor]:
    text = getattr(config, "text_config", None) or config
    vocabulary = min(int(getattr(text, "vocab_size", 100)), 1000)
    longest = int(getattr(text, "max_position_embeddings", None) or 128)
    length = min(128, longest if longest > 0 else 128) if usual else 12

    def tokens(rows_and_length: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(0)
        return torch.randint(3, vocabulary, rows_and_length, generator=generator, device="cpu")

    if head == "SpeechSeq2Seq":
        frames = 2 * int(getattr(config, "max_source_positions", 16))
        sound = noise(_shaped(shape, (2, int(config.num_mel_bins), frames), "frames of a spectrogram"))
        return {"input_features": sound, "decoder_input_ids": tokens((len(sound), 7))}
    if head == "CTC":
        return {"input_values": noise(_shaped(shape, (2, 16000 if usual else 800), "samples of sound"))}
    image = _image_shape(getattr(config, "vision_config", None) or config, 224 if usual else 64)
    if head in ("ImageClassification", "SemanticSegmentation"):
        return {"pixel_values": noise(_shaped(shape, image, "a batch of images"))}
    words = tokens(_shaped(shape, (2, length), "a batch of tokens"))
    if head == "ZeroShotImageClassification":
        return {"input_ids": words, "pixel_values": noise((len(words), *image[1:]))}
    if head == "Seq2SeqLM":
        return {"input_ids": words, "decoder_input_ids": words[:, : max(1, words.shape[1] * 7 // 12)]}
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def _shaped(shape: tuple[int, ...] | None, usual: tuple[int, ...], what: str) -> tuple[int, ...]:
    if shape is None:
        return usual
    if len(shape) != len(usual):
        said = ",".join(map(str, usual))
        raise UsageError(f"the model takes {what}, such as {said}, got {','.join(map(str, shape))}")
    return shape


def _image_shape(config: Any, otherwise: int) -> tuple[int, int, int, int]:
    size = getattr(config, "image_size", None) or otherwise
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return 2, int(getattr(config, "num_channels", 3)), int(height), int(width)
