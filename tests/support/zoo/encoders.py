"""Encoders of transformers with tiny configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 99
TOKENS = 12
IMAGE_SIZE = 32
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": 0}
IMAGE = {"image_size": IMAGE_SIZE, "patch_size": 8}

Inputs = Callable[[int], Mapping[str, Tensor]]


def _text(batch: int) -> Mapping[str, Tensor]:
    """Token ids and a mask in which the last request is shorter, both of shape (batch, TOKENS)."""
    mask = torch.ones(batch, TOKENS, dtype=torch.int64)
    mask[-1, TOKENS - 3 :] = 0
    ids = torch.randint(1, VOCABULARY, (batch, TOKENS)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def _image(batch: int) -> Mapping[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE)}


def _sound(batch: int) -> Mapping[str, Tensor]:
    return {"input_values": torch.randn(batch, 2000)}


def _builder(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a function that builds a class of transformers, for inference without a cache of the attention's keys."""

    def build() -> nn.Module:
        network: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return network

    return build


ENCODERS: Mapping[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "bert": (_builder("BertModel", "BertConfig", **SIZES, **TEXT), _text),
    "distilbert": (
        _builder("DistilBertModel", "DistilBertConfig", dim=32, n_layers=3, n_heads=4, hidden_dim=48, **TEXT),
        _text,
    ),
    "roberta": (_builder("RobertaModel", "RobertaConfig", **SIZES, **TEXT), _text),
    "albert": (_builder("AlbertModel", "AlbertConfig", embedding_size=16, **SIZES, **TEXT), _text),
    "electra": (_builder("ElectraModel", "ElectraConfig", embedding_size=16, **SIZES, **TEXT), _text),
    "t5": (
        _builder(
            "T5EncoderModel", "T5Config", d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=VOCABULARY
        ),
        _text,
    ),
    "clip-text": (_builder("CLIPTextModel", "CLIPTextConfig", **SIZES, **TEXT, eos_token_id=2, bos_token_id=1), _text),
    "vit": (_builder("ViTModel", "ViTConfig", **SIZES, **IMAGE), _image),
    "swin": (
        _builder(
            "SwinModel",
            "SwinConfig",
            image_size=IMAGE_SIZE,
            patch_size=2,
            embed_dim=16,
            depths=[1, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        _image,
    ),
    "wav2vec2": (
        _builder(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            **SIZES,
            vocab_size=VOCABULARY,
            conv_dim=(16, 16, 16),
            conv_stride=(5, 4, 2),
            conv_kernel=(10, 4, 3),
            num_feat_extract_layers=3,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        _sound,
    ),
}
