"""VGG-11, -13, -16 and -19 for pictures of 32x32: torchvision's feature layers with one linear layer as classifier.

Five poolings reduce 32x32 to 1x1x512, for which torchvision's classifier (three layers, 120 million parameters, made
for 7x7x512) is too large. Layers: K. Simonyan and A. Zisserman, "Very Deep Convolutional Networks" (2014), table 1.
"""

from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

INPUT_SIZE_PX = 32
DEFAULT_CLASS_COUNT = 10
FEATURE_CHANNELS = 512
# Of red, green and blue in 0..1: the normalised input is in -1..1.
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
CONFIG_KEYS = {"vgg11-small": "A", "vgg13-small": "B", "vgg16-small": "D", "vgg19-small": "E"}  # columns of table 1


class SmallVgg(nn.Module):
    """(B, 3, 32, 32) -> (B, num_classes). State names: `features.N.*` as in torchvision, and `classifier.*`."""

    def __init__(self, name: str, num_classes: int = DEFAULT_CLASS_COUNT) -> None:
        super().__init__()
        self.features = make_layers(cfgs[CONFIG_KEYS[name]])
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(FEATURE_CHANNELS, num_classes)
        for module in self.modules():  # initialised as torchvision.models.VGG
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            else:
                continue
            assert module.bias is not None
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(x)))  # type: ignore[no-any-return]
