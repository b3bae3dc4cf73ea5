"""Small networks of torch, torchvision, timm and transformers, named in pipeline files as `module:factory`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

CLASSES = 5
TOKENS = 40


class Encoder(nn.Module):
    """Token ids int64 (B, T) and a mask bool (B, T) of those that are ignored: (B, CLASSES)."""

    example_inputs: ClassVar[dict[str, Tensor]] = {
        "tokens": torch.arange(6).view(1, 6),
        "ignored": torch.tensor([[False, False, False, False, True, True]]),
    }

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor, *, ignored: Tensor) -> Any:
        return self.out(self.encoder(self.embedding(tokens), src_key_padding_mask=ignored).mean(1))


class Bert(nn.Module):
    """Token ids int64 (B, T) and a mask int64 (B, T): (B, CLASSES)."""

    example_inputs: ClassVar[dict[str, Tensor]] = {
        "tokens": torch.arange(6).view(1, 6),
        "mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
    }

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        self.bert = BertModel(
            BertConfig(
                vocab_size=TOKENS,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=16,
            )
        )
        self.out = nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        return self.out(self.bert(input_ids=tokens, attention_mask=mask).pooler_output)


def _of_pictures(size: int) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def declare(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        factory.input_shape = (1, 3, size, size)  # type: ignore[attr-defined]
        return factory

    return declare


@_of_pictures(32)
def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model: nn.Module = VisionTransformer(32, 8, 3, 2, 16, 32, dropout=0.1, num_classes=CLASSES)
    return model


@_of_pictures(32)
def torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    model: nn.Module = SwinTransformer(
        [4, 4], 8, [2, 2], [2, 2], [2, 2], stochastic_depth_prob=0.3, num_classes=CLASSES
    )
    return model


@_of_pictures(32)
def timm_vit() -> nn.Module:
    import timm

    settings = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2, "drop_path_rate": 0.3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **settings)  # type: ignore[no-any-return]


@_of_pictures(64)
def timm_swin() -> nn.Module:
    import timm

    settings = {"img_size": 64, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **settings)  # type: ignore[no-any-return]


@_of_pictures(64)
def timm_mobilenet() -> nn.Module:
    import timm

    return timm.create_model(  # type: ignore[no-any-return]
        "mobilenetv3_small_050", num_classes=CLASSES, drop_rate=0.2, drop_path_rate=0.2
    )
