"""The CIFAR ResNets of He et al. 2016 (arXiv 1512.03385, section 4.2): depth 6n + 2, widths 16, 32, 64.

Shortcuts are parameter-free (option A: subsample, pad the new channels with zeros). Module names match the widely used
CIFAR checkpoints (``conv1``, ``bn1``, ``layer1.0.conv1``, ..., ``linear``), which therefore load unchanged.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from rankprune.errors import RankPruneError

DEPTHS = (20, 32, 44, 56, 110)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and an option-A shortcut.

    Shapes: (batch, in_channels, h, w) -> (batch, channels, h / stride, w / stride).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.new_channels:
            half = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new_channels - half))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2, its stages width, 2 and 4 times width wide. Shapes: (batch, 3, h, w) -> (batch, classes)."""

    def __init__(self, depth: int, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise RankPruneError(f"a CIFAR ResNet has depth 6n + 2, got depth={depth}; use one of {DEPTHS}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, stride=1)
        self.layer2 = self._stage(width, 2 * width, blocks, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet(name: str, classes: int = 10) -> CifarResNet:
    """Build a network from its name, ``"resnet20"`` to ``"resnet110"``.

    Raises:
        RankPruneError: for a name that is not one of them.
    """
    names = {f"resnet{depth}": depth for depth in DEPTHS}
    if name not in names:
        raise RankPruneError(f"unknown model {name!r}; choose one of {', '.join(names)}")
    return CifarResNet(names[name], classes)


def resnet20() -> CifarResNet:
    """ResNet-20, as a builder for ``--model rankprune.recipes.resnet:resnet20``."""
    return resnet("resnet20")


def resnet32() -> CifarResNet:
    """ResNet-32, as a builder for ``--model``."""
    return resnet("resnet32")


def resnet44() -> CifarResNet:
    """ResNet-44, as a builder for ``--model``."""
    return resnet("resnet44")


def resnet56() -> CifarResNet:
    """ResNet-56, as a builder for ``--model``."""
    return resnet("resnet56")


def resnet110() -> CifarResNet:
    """ResNet-110, as a builder for ``--model``."""
    return resnet("resnet110")
