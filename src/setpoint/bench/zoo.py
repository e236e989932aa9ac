"""A zoo: models of torchvision, timm and transformers by name, with random weights and an example each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.bench.task import BenchError

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


def named_model(target: str, shape: tuple[int, ...] | None) -> tuple[nn.Module, Any]:
    """An untrained model of a library, and an example.

    Args:
        target: "torchvision:resnet50", "timm:vit_tiny_patch16_224", "transformers:gpt2" (a model type, or the name
            of a model on the Hub), or one of these names alone: then the libraries are asked in this order.
        shape: shape of an image batch, for torchvision and timm; None for the model's usual size.

    Raises:
        BenchError: for a name that no installed library knows.
    """
    library, colon, name = target.rpartition(":")
    if colon and library not in _LIBRARIES:
        raise BenchError(f"unknown library {library!r} in {target!r}: use one of {', '.join(_LIBRARIES)}")
    missing, close = [], []
    for each in [library] if colon else _LIBRARIES:
        try:
            names = _names(each)
        except ImportError:
            missing.append(each)
            continue
        if name in names or (each == "transformers" and "/" in name):
            return _LIBRARIES[each](name, shape)
        close += difflib.get_close_matches(name, names, 3)
    hint = f"; did you mean {', '.join(dict.fromkeys(close))}?" if close else ""
    absent = f" ({', '.join(missing)} not installed: pip install \"setpoint[suites]\")" if missing else ""
    raise BenchError(
        f"unknown model {target!r}{absent}{hint or ': name a model of torchvision, timm or transformers'}; "
        "or give module.py:function that returns your own"
    )


def noise(shape: tuple[int, ...]) -> Tensor:
    """An example input; zeros would leave BatchNorm nothing to normalise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _names(library: str) -> list[str]:
    if library == "torchvision":
        from torchvision import models

        return list(models.list_models())
    if library == "timm":
        import timm

        return list(timm.list_models())
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return list(CONFIG_MAPPING_NAMES)


def _torchvision(name: str, shape: tuple[int, ...] | None) -> tuple[nn.Module, Any]:
    from torchvision import models

    model: nn.Module = models.get_model(name, weights=None)
    return model, (noise(shape or (2, 3, 224, 224)),)


def _timm(name: str, shape: tuple[int, ...] | None) -> tuple[nn.Module, Any]:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model, (noise(shape or (2, *model.pretrained_cfg["input_size"])),)


def _transformers(name: str, shape: tuple[int, ...] | None) -> tuple[nn.Module, Any]:
    import transformers

    config: Any = (
        transformers.AutoConfig.from_pretrained(name) if "/" in name else transformers.AutoConfig.for_model(name)
    )
    return transformers_model(config)


_LIBRARIES = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}


def transformers_model(config: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A transformers model in train mode, without a cache, and the inputs of a training step.

    Args:
        config: its configuration; the model is built for the first task that its type can do.

    Raises:
        BenchError: for a type that can do none of the usual ones.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for head, mapping in _HEADS.items():
        if config.model_type in getattr(modeling_auto, mapping):
            kind = getattr(modeling_auto, mapping)[config.model_type]
            names = [kind] if isinstance(kind, str) else list(kind)
            model: nn.Module = getattr(transformers, names[-1])(config)
            return model.train(), _inputs(head, config)
    raise BenchError(f"transformers has no trainable head for {config.model_type!r}: use module.py:function instead")


def _inputs(head: str, config: Any) -> dict[str, Tensor]:
    text = getattr(config, "text_config", config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, min(int(getattr(text, "vocab_size", 100)), 1000), (2, 12), generator=generator)
    if head in ("MaskedLM", "CausalLM"):
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if head == "Seq2SeqLM":
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :7]}
    if head == "SpeechSeq2Seq":
        frames = 2 * int(getattr(config, "max_source_positions", 16))
        return {"input_features": noise((2, config.num_mel_bins, frames)), "decoder_input_ids": tokens[:, :7]}
    if head == "CTC":
        return {"input_values": noise((2, 800))}
    image = _image(getattr(config, "vision_config", config))
    return {"input_ids": tokens, "pixel_values": image} if head == "ZeroShotImageClassification" else {
        "pixel_values": image
    }


def _image(config: Any) -> Tensor:
    size = getattr(config, "image_size", None) or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return noise((2, int(getattr(config, "num_channels", 3)), int(height), int(width)))


def small_config(name: str, known: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
    """The configuration of a model type at small sizes.

    Args:
        name: the model type.
        known: sizes that are used where the type has an attribute of that name.
        sizes: sizes that are used whatever the type has.
    """
    import transformers

    plain = transformers.AutoConfig.for_model(name)
    fitting = {key: value for key, value in known.items() if hasattr(plain, key)}
    return transformers.AutoConfig.for_model(name, **{**fitting, **sizes})
