"""Batches of images: shuffling, a batch's augmentation as one gather, normalisation, channels_last."""

import functools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rankprune.errors import RankPruneError
from rankprune.recipes.images import IMAGENET_MEAN, IMAGENET_STD, ImageSet


@dataclass(frozen=True)
class Normalize:
    """uint8 NHWC -> float32 NCHW in channels_last order: (x / 255 - mean) / std."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images (b, h, w, 3) uint8 -> (b, 3, h, w) float32."""
        shift, scale = _shift_and_scale(self.mean, self.std, images.device)
        return torch.addcmul(shift, images.float(), scale).permute(0, 3, 1, 2)


@functools.cache  # made for every batch, they would make the CPU wait for all that the GPU has to do
def _shift_and_scale(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    centre, deviation = torch.tensor(mean), torch.tensor(std)
    return (-(centre / deviation)).to(device), (1 / (255 * deviation)).to(device)


def sent(tensor: Tensor, device: str | torch.device) -> Tensor:
    """A tensor on another device, without the CPU waiting for what that computes."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Batches(ABC):
    """Shuffled, augmented batches to train on; the last, incomplete one is dropped.

    An epoch's order and augmentation depend on `seed` and the epoch's number alone, so a resumed run sees the same batches.

    Args:
        labels: of all images, (n,).
        batch: images per batch.
        part: of every batch, to yield; the whole batch is drawn all the same, so that parts of several processes add up to it.
    """

    def __init__(
        self,
        labels: Tensor,
        batch: int,
        *,
        seed: int = 0,
        normalize: Normalize | None = None,
        device: str | torch.device = "cpu",
        part: slice = slice(None),
    ) -> None:
        if batch < 1:
            raise RankPruneError(f"batch={batch}: give at least one image a batch")
        self.labels, self.device = labels.to(device), device
        self.batch, self.seed, self.part = batch, seed, part
        self.normalize = normalize or Normalize()

    def __len__(self) -> int:
        return len(self.labels) // self.batch

    @property
    def settings(self) -> dict[str, Any]:
        """What the batches depend on, as plain values; other images of the same number mostly have other labels."""
        digest = zlib.crc32(str(self.labels.tolist()).encode())
        return {"images": len(self.labels), "labels": digest, "batch": self.batch, "seed": self.seed}

    @abstractmethod
    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of epoch `number` from batch `start` on, or this part of them.

        Shapes: images (batch, 3, h, w) float32 and labels (batch,).
        """

    def _shuffled(self, number: int) -> tuple[Tensor, torch.Generator]:
        """Which images make the batches of an epoch, (batches, batch), and the generator to draw its augmentation from."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(len(self.labels), generator=generator)
        return order[: len(self) * self.batch].view(-1, self.batch), generator


class TrainBatches(Batches):
    """Batches of an ImageSet, randomly cropped and flipped.

    Args:
        data: the images; moved to `device` once, padded.
        pad: pixels of black border that crops may reach into; 0 for no crops.
        flip: whether to mirror half of the images.
        options: see Batches.
    """

    def __init__(self, data: ImageSet, batch: int, *, pad: int = 4, flip: bool = True, **options: Any) -> None:
        super().__init__(data.labels, batch, **options)
        self.pad, self.flip, self.digest = pad, flip, data.digest
        self.images = F.pad(data.images, (0, 0, pad, pad, pad, pad)).to(self.device)
        self.height, self.width = data.images.shape[1:3]

    @property
    def settings(self) -> dict[str, Any]:
        """What the batches depend on, as plain values."""
        return super().settings | {"pixels": self.digest, "pad": self.pad, "flip": self.flip}

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of epoch `number` from batch `start` on."""
        order, generator = self._shuffled(number)
        for i, index in enumerate(sent(order, self.device)):
            offsets = torch.randint(2 * self.pad + 1, (2, self.batch, 1), generator=generator)
            flips = torch.randint(2, (self.batch, 1), generator=generator).bool() & self.flip
            if i >= start:
                yield self.normalize(self._crop(index, offsets, flips)), self.labels[index[self.part]]

    def _crop(self, index: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        """Crops of this part of the images at `index` (b,), at `offsets` (2, b, 1), flipped where `flips` (b, 1) says so.

        Shape of the result: (b, height, width, 3) uint8.
        """
        rows = offsets[0] + torch.arange(self.height)  # (b, height)
        across = torch.arange(self.width)
        columns = offsets[1] + torch.where(flips, self.width - 1 - across, across)  # (b, width)
        index, rows, columns = (sent(each[self.part], self.images.device) for each in (index, rows, columns))
        return self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def eval_batches(
    data: ImageSet, batch: int = 500, normalize: Normalize | None = None, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order, unaugmented: images (<= batch, 3, h, w) float32 and labels."""
    normalize = normalize or Normalize()
    for images, labels in zip(data.images.split(batch), data.labels.split(batch), strict=True):
        yield normalize(sent(images, device)), sent(labels, device)
