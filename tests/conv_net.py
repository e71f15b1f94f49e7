"""A network that has every convolution."""

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Strided, grouped, dilated, depthwise, transposed, pointwise and one-dimensional convolutions, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.strided = nn.Conv2d(16, 32, (3, 5), stride=(2, 1), padding=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, padding="same", dilation=2, groups=2, padding_mode="reflect")
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.drop = nn.Dropout(0.5)
        self.up = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1, output_padding=(0, 1))
        self.point = nn.Conv2d(16, 24, 1)
        self.line = nn.Conv1d(24, 20, 5, stride=3)
        self.tokens = nn.Linear(20, 40)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.strided(self.stem(x)).relu()).relu()
        x = self.drop(self.depthwise(self.grouped(x)))
        x = self.line(self.point(self.up(x)).flatten(2))
        x = self.tokens(self.tokens(x.transpose(1, 2))[..., :20])  # linear layers over leading axes, called twice
        return self.head(x.relu()).mean(1)


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)
