"""Models of libraries that the benchmark trains or checks: names, sizes and configurations of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import UsageError
from setpoint.report.target import library, noise

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


def transformers_model(config: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A transformers model in train mode, without a cache, and the inputs of a training step: two short rows."""
    transformers, auto = library("transformers"), library("transformers.models.auto.modeling_auto")
    transformers.logging.set_verbosity_error()
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for head, mapping in _HEADS.items():
        if config.model_type in getattr(auto, mapping):
            kind = getattr(auto, mapping)[config.model_type]
            model: nn.Module = getattr(transformers, kind if isinstance(kind, str) else kind[-1])(config)
            return model.train(), _inputs(head, config)
    raise UsageError(f"transformers has no trainable head for {config.model_type!r}")


def _inputs(head: str, config: Any) -> dict[str, Tensor]:
    text = getattr(config, "text_config", None) or config
    vocabulary = min(int(getattr(text, "vocab_size", 100)), 1000)

    def tokens(rows: int, length: int) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(0)
        return torch.randint(3, vocabulary, (rows, length), generator=generator, device="cpu")

    if head == "SpeechSeq2Seq":
        frames = 2 * int(getattr(config, "max_source_positions", 16))
        return {"input_features": noise((2, int(config.num_mel_bins), frames)), "decoder_input_ids": tokens(2, 7)}
    if head == "CTC":
        return {"input_values": noise((2, 800))}
    images = getattr(config, "vision_config", None) or config
    size = getattr(images, "image_size", None) or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = noise((2, int(getattr(images, "num_channels", 3)), int(height), int(width)))
    if head in ("ImageClassification", "SemanticSegmentation"):
        return {"pixel_values": pixels}
    words = tokens(2, 12)
    if head == "ZeroShotImageClassification":
        return {"input_ids": words, "pixel_values": pixels}
    if head == "Seq2SeqLM":
        # Fewer tokens for the decoder: no dim of one can be mistaken for the other's.
        return {"input_ids": words, "decoder_input_ids": words[:, :7]}
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}
