"""The ImageNet ResNets of He et al. 2016 (arXiv 1512.03385, table 1): ResNet-18 and ResNet-50.

The stride of a bottleneck is on its 3x3 convolution. Module names match torchvision's (``layer1.0.downsample.0``), whose
pretrained weights therefore load unchanged.
"""

from torch import Tensor, nn
from torch.nn import functional as F


def _norm_conv(in_channels: int, channels: int, kernel: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    convolution = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(channels)


class _Block(nn.Module):
    """What both kinds of block share: the shortcut, projected by a 1x1 convolution where shapes differ (option B)."""

    expansion: int

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out = channels * self.expansion
        same = stride == 1 and in_channels == out
        self.downsample = None if same else nn.Sequential(*_norm_conv(in_channels, out, 1, stride))

    def residual(self, x: Tensor) -> Tensor:
        """What is added to the shortcut."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(_Block):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.conv1, self.bn1 = _norm_conv(in_channels, channels, 3, stride)
        self.conv2, self.bn2 = _norm_conv(channels, channels, 3)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Bottleneck(_Block):
    """1x1 down, 3x3, 1x1 up to four times the channels."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.conv1, self.bn1 = _norm_conv(in_channels, channels, 1)
        self.conv2, self.bn2 = _norm_conv(channels, channels, 3, stride)
        self.conv3, self.bn3 = _norm_conv(channels, channels * self.expansion, 1)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))


class ImageNetResNet(nn.Module):
    """Stem, four stages of 64, 128, 256 and 512 channels (times the block's expansion), head.

    Shapes: (batch, 3, h, w) -> (batch, classes).
    """

    def __init__(self, block: type[_Block], blocks: tuple[int, int, int, int], classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for i, count in enumerate(blocks):
            width = 64 * 2**i
            first = block(channels, width, 1 if i == 0 else 2)
            channels = width * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(first, *(block(channels, width, 1) for _ in range(count - 1))))
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(x.mean(dim=(2, 3)))


def resnet18(classes: int = 1000) -> ImageNetResNet:
    """ResNet-18: 11.7 million parameters, 1.8 GMACs at 224 x 224."""
    return ImageNetResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet50(classes: int = 1000) -> ImageNetResNet:
    """ResNet-50: 25.6 million parameters, 4.1 GMACs at 224 x 224."""
    return ImageNetResNet(Bottleneck, (3, 4, 6, 3), classes)
