"""The networks of the zoo: classifiers of torchvision and timm, encoders of transformers, all with random weights.

`timm_architectures.txt` is made by

    python -m tests.support.zoo.networks

which takes the smallest architecture of each family of timm (a module of `timm.models`), then the second smallest of
each, and so on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn

from tests.support.training.networks import randomize_parameters
from tests.support.zoo.encoders import ENCODERS

TIMM_ARCHITECTURES = Path(__file__).with_name("timm_architectures.txt")
TIMM_COUNT = 300
TRAINED_TIMM_COUNT = 28
TRAINED_TORCHVISION = (
    *("alexnet", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mobilenet_v3_small"),
    *("regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "swin_t", "vgg11_bn", "vit_b_16"),
)
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True, slots=True)
class Network:
    """`make_inputs`: its argument is the batch size; returns one request by the names of the forward's arguments."""

    name: str
    build: Callable[[], nn.Module]
    make_inputs: Callable[[int], Mapping[str, Tensor]]


def networks() -> list[Network]:
    """Return all networks; their names begin with "torchvision:", "timm:" or "transformers:"."""
    return [
        *map(_torchvision_network, torchvision.models.list_models(module=torchvision.models)),
        *map(_timm_network, TIMM_ARCHITECTURES.read_text().split()),
        *(Network(f"transformers:{name}", build, inputs) for name, (build, inputs) in ENCODERS.items()),
    ]


def training_networks() -> list[Network]:
    """Return 50 small networks."""
    return [
        *map(_torchvision_network, TRAINED_TORCHVISION),
        *map(_timm_network, TIMM_ARCHITECTURES.read_text().split()[:TRAINED_TIMM_COUNT]),
        *(network for network in networks() if network.name.startswith("transformers:")),
    ]


def build(network: Network) -> nn.Module:
    """Build a network whose parameters and statistics are random, in evaluation mode."""
    torch.manual_seed(0)
    model = network.build()
    tables = [
        (buffer, buffer.clone()) for name, buffer in model.named_buffers() if not name.endswith(STATISTICS)
    ]  # masks, indices and position tables
    randomize_parameters(model)
    for buffer, values in tables:
        buffer.copy_(values)
    return model.eval()


def _torchvision_network(name: str) -> Network:
    size = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    options: dict[str, object] = {}
    if name.startswith("vit_"):
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # the initialisation takes a minute
    return Network(
        f"torchvision:{name}",
        lambda: torchvision.models.get_model(name, weights=None, **options),
        lambda batch: {"x": torch.randn(batch, 3, size, size)},
    )


def _timm_network(name: str) -> Network:
    size = timm.get_pretrained_cfg(name, allow_unregistered=True).input_size
    return Network(
        f"timm:{name}",
        lambda: timm.create_model(name, pretrained=False),
        lambda batch: {"x": torch.randn(batch, *size)},
    )


def _smallest_of_each_family(count: int) -> list[str]:
    families = defaultdict(list)
    for name in timm.list_models():
        with torch.device("meta"):
            try:
                model = timm.create_model(name, pretrained=False)
            except (RuntimeError, NotImplementedError):  # its constructor reads values
                with torch.device("cpu"):
                    model = timm.create_model(name, pretrained=False)
        size = sum(parameter.numel() for parameter in model.parameters())
        families[timm.models.model_entrypoint(name).__module__].append((size, name))
    ranks = zip_longest(*(sorted(family) for family in families.values()))
    return [entry[1] for rank in ranks for entry in rank if entry][:count]


if __name__ == "__main__":
    TIMM_ARCHITECTURES.write_text("\n".join(_smallest_of_each_family(TIMM_COUNT)) + "\n")
