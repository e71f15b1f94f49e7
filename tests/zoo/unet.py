"""A small U-Net, for none of the libraries has one: down by strides, up by transposed convolutions, joined at each level."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from zoo.architecture import Architecture, noise


class UNet(nn.Module):
    """Ronneberger et al. 2015 in small: (batch, 3, side, side) -> (batch, classes, side, side), side a multiple of 8."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128), classes: int = 4) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.stem = _twice(3, widths[0])
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), _twice(c, n)) for c, n in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(n, c, 2, stride=2) for c, n in reversed(pairs))
        self.join = nn.ModuleList(_twice(2 * c, c) for c, _ in reversed(pairs))
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.stem(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([levels.pop(), up(x)], 1))
        return self.head(x)


def _twice(c: int, n: int) -> nn.Sequential:
    convolutions = [(nn.Conv2d(a, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU()) for a in (c, n)]
    return nn.Sequential(*(layer for group in convolutions for layer in group))


def architectures() -> list[Architecture]:
    """The U-Net."""
    return [Architecture("unet", "torch", "segmentation", UNet, noise(2, 3, 32, 32), fast=True)]
